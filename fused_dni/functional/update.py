"""An update rule on parameters of any module, by PyTorch's fused optimizer kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fused_dni.backends.reference import rules
from fused_dni.ops.types import BETA1, BETA2, EPS, LR, STEP, WEIGHT_DECAY, RuleTensors


@torch.no_grad()
def apply_(
    parameters: Sequence[Tensor | None], gradients: Sequence[Tensor | None], rule: RuleTensors
) -> None:
    """Do as :func:`fused_dni.backends.reference.rules.apply_`, in one pass over memory.

    The kernels are those behind ``torch.optim``'s ``fused=True``. What they do not take (bfloat16
    rounded at random, parameters of several dtypes or devices, or that are not contiguous) the
    reference does.
    """
    slots = [
        (p, g.contiguous(), m, v)
        for p, g, m, v, trainable in zip(
            parameters, gradients, rule.first, rule.second, rule.trainable, strict=True
        )
        if p is not None and g is not None and trainable
    ]
    if not slots or len(slots) != sum(rule.trainable) or not _fusable(rule.kind, slots):
        rules.apply_(parameters, gradients, rule)
        return
    ps, gs, ms, vs = (list(column) for column in zip(*slots, strict=True))
    # A sum of norms is finite only if all elements are, and takes one pass; squares may overflow,
    # though.
    total = torch.stack(torch._foreach_norm(gs, 2)).sum()
    if not math.isfinite(total.item()) and not rules.finite(gradients, rule):
        rules.skip_(rule)
        return
    hyper = rule.hyper.tolist()
    step = hyper[STEP] + 1
    if rule.kind == "sgd":
        torch._fused_sgd_(
            ps,
            gs,
            [] if ms[0] is None else ms,
            weight_decay=hyper[WEIGHT_DECAY],
            momentum=0.0 if ms[0] is None else hyper[BETA1],
            lr=hyper[LR],
            dampening=0.0,
            nesterov=rule.nesterov,
            maximize=False,
            is_first_step=False,
        )
    else:
        kernel = torch._fused_adam_ if rule.kind == "adam" else torch._fused_adamw_
        kernel(
            ps,
            gs,
            ms,
            vs,
            [],
            [torch.tensor(step, dtype=torch.float32, device=ps[0].device)] * len(ps),
            lr=hyper[LR],
            beta1=hyper[BETA1],
            beta2=hyper[BETA2],
            weight_decay=hyper[WEIGHT_DECAY],
            eps=hyper[EPS],
            amsgrad=False,
            maximize=False,
        )
    # The kernels do not say that they wrote.
    torch.autograd.graph.increment_version([t for t in (*ps, *ms, *vs) if t is not None])
    rule.hyper[STEP] = step


def _fusable(kind: str, slots: Sequence[tuple[Tensor | None, ...]]) -> bool:
    if kind not in ("sgd", "adam", "adamw"):
        return False
    first = slots[0][0]
    assert first is not None
    dtype, device = first.dtype, first.device
    if dtype not in (torch.float32, torch.float64):
        return False
    for slot in slots:
        for t in slot:
            if t is None:
                if kind != "sgd":
                    return False
            elif (
                t.dtype != dtype
                or t.device != device
                or not t.is_contiguous()
                or type(t) not in (Tensor, torch.nn.Parameter)
            ):
                return False
    return True
