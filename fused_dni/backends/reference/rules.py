"""Update rules: the formulas of ``torch.optim``, and the one place that writes parameters.

Write p for a parameter, g for its gradient, t for the number of steps including this one.

SGD (``torch.optim.SGD``, dampening 0), momentum mu, L2 penalty w::

    g <- g + w p;    m <- mu m + g;    p <- p - lr m          (Nesterov: p <- p - lr (g + mu m))

Adam (Kingma & Ba 2014, arXiv 1412.6980; ``torch.optim.Adam``)::

    g <- g + w p;    m <- b1 m + (1 - b1) g;    v <- b2 v + (1 - b2) g^2
    p <- p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101; ``torch.optim.AdamW``): as Adam, but with
``p <- (1 - lr w) p`` first in place of the term in g.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_dni.backends.common.precision import LOW_PRECISION, require_masters
from fused_dni.ops.types import BETA1, BETA2, EPS, LR, SKIPPED, STEP, WEIGHT_DECAY, RuleTensors


class New(NamedTuple):
    """Values of a slot after a step, all of the parameter's shape."""

    parameter: Tensor
    first: Tensor | None = None
    second: Tensor | None = None


def sgd(
    p: Tensor,
    g: Tensor,
    m: Tensor | None,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> New:
    """Take a step of SGD on one slot; ``m`` is None for plain SGD. Nothing is mutated."""
    g = g + weight_decay * p if weight_decay else g
    if m is None:
        return New(p - lr * g)
    m = momentum * m + g
    return New(p - lr * (g + momentum * m if nesterov else m), m)


def adam(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    step: float,
) -> New:
    """Take a step of Adam (AdamW if ``decoupled``) on one slot. Nothing is mutated."""
    if weight_decay:
        if decoupled:
            p = p * (1 - lr * weight_decay)
        else:
            g = g + weight_decay * p
    m = m + (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * (g * g)
    denominator = v.sqrt() / math.sqrt(1 - beta2**step) + eps
    return New(p - (lr / (1 - beta1**step)) * (m / denominator), m, v)


def random_bits(count: int, step: int, slot: int, device: torch.device) -> Tensor:
    """Sixteen bits for each of ``count`` elements, int64: a hash of the element, the step and the
    slot (the finalizer of MurmurHash3, A. Appleby, public domain), alike on every device."""

    def mixed(h: Tensor) -> Tensor:
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            h = h ^ (h >> shift)
            h = (h * factor) & 0xFFFFFFFF
        return h ^ (h >> 16)

    element = torch.arange(count, device=device) & 0xFFFFFFFF
    return mixed(mixed(element) ^ ((0x9E3779B1 * (1024 * step + slot)) & 0xFFFFFFFF)) & 0xFFFF


def rounded_at_random(value: Tensor, step: int, slot: int) -> Tensor:
    """Round float32 to bfloat16, each to one of its two neighbours, right in the mean."""
    bits = value.contiguous().view(torch.int32).flatten()
    up = random_bits(value.numel(), step, slot, value.device).to(torch.int32)
    kept = (bits + up) & -0x10000
    return kept.view(torch.float32).view(value.shape).to(torch.bfloat16)


def finite(gradients: Sequence[Tensor | None], rule: RuleTensors) -> bool:
    """Say whether the gradients of all trainable slots are finite (synchronises with the
    device)."""
    return all(
        bool(torch.isfinite(g).all())
        for g, trainable in zip(gradients, rule.trainable, strict=True)
        if g is not None and trainable
    )


@torch.no_grad()
def skip_(rule: RuleTensors) -> None:
    """Count an update that was not made. Mutates ``rule.hyper[SKIPPED]``."""
    rule.hyper[SKIPPED] += 1


@torch.no_grad()
def apply_(
    parameters: Sequence[Tensor | None], gradients: Sequence[Tensor | None], rule: RuleTensors
) -> None:
    """Apply ``rule`` to every trainable slot.

    All new values are computed before the first is written. Mutates the trainable parameters,
    the rule's buffers and ``hyper[STEP]``; with a gradient that is not finite, ``hyper[SKIPPED]``
    alone. Every written tensor's version counter moves.

    Args:
        parameters: slots, None where the layer has none.
        gradients: slot by slot; None only where the slot is absent or frozen.
        rule: the rule's tensors over the same slots.

    Raises:
        TypeError: bfloat16 or float16 parameters (bfloat16: but for stochastic rounding).
        ValueError: unknown rule, or no gradient for a trainable slot.
    """
    require_masters(parameters, rule.stochastic)
    if not finite(gradients, rule):
        skip_(rule)
        return
    hyper = rule.hyper.tolist()
    step = hyper[STEP] + 1
    writes: list[tuple[Tensor, Tensor]] = []
    for i, p in enumerate(parameters):
        if p is None or not rule.trainable[i]:
            continue
        g, m, v = gradients[i], rule.first[i], rule.second[i]
        if g is None:
            raise ValueError(f"no gradient for the trainable slot {i}")
        low = p.dtype in LOW_PRECISION
        stored = p
        if low:
            p, g = p.float(), g.float()
        if rule.kind == "sgd":
            new = sgd(
                p,
                g,
                m,
                lr=hyper[LR],
                momentum=hyper[BETA1],
                weight_decay=hyper[WEIGHT_DECAY],
                nesterov=rule.nesterov,
            )
        elif rule.kind in ("adam", "adamw"):
            if m is None or v is None:
                raise ValueError(f"{rule.kind} has no moments for the trainable slot {i}")
            new = adam(
                p,
                g,
                m,
                v,
                lr=hyper[LR],
                beta1=hyper[BETA1],
                beta2=hyper[BETA2],
                eps=hyper[EPS],
                weight_decay=hyper[WEIGHT_DECAY],
                decoupled=rule.kind == "adamw",
                step=step,
            )
        else:
            raise ValueError(f"unknown update rule {rule.kind!r}")
        if low:
            new = new._replace(parameter=rounded_at_random(new.parameter, int(step), i))
        for old, value in zip((stored, m, v), new, strict=True):
            if old is not None and value is not None:
                writes.append((old, value))
    for old, value in writes:
        old.copy_(value)
    rule.hyper[STEP] = step
