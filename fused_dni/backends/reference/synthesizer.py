"""The synthesizer M: prediction, regression and statistics.

Jaderberg et al. 2016 (arXiv 1608.05343), section 2; the linear form and what it assumes:
Czarnecki et al. 2017 (arXiv 1703.00522). With h [N, O], a context (class indices [N] or vectors
[N, K]) and the target scale kappa::

    dense      M(h) = h A^T + C[context] + c               A [O, O], C [O, K], c [O]
    low rank   M(h) = (h U^T) V^T + C[context] + c         U [R, O], V [O, R]
    diagonal   M(h) = a * h + C[context] + c               a [O]
    loss       L = 1/N * sum (M(h) - kappa g)^2            g = dL/dh as it arrived
    e          = dL/dM = 2/N (M(h) - kappa g)              [N, O]
    dA = e^T h,  dV = e^T (h U^T),  dU = (e V)^T h,  da = sum_N e * h,
    dC = e^T onehot (or e^T context),  dc = sum_N e

With the table W [K, O] of a softmax's head, a learned g [] and N* rows in the loss::

    M(h) = N / N* (.. - g W[label]) in those, 0 in the others
    e    = 2/N* (M(h) - kappa g)    in those, 0 in the others,   dg = -sum_NO e * W[label]

Of the form of a cross-entropy's gradient, with the probabilities or one-hot labels y [N, K]::

    M(h) = p V^T + c,  p = s - y,  s = softmax(h U^T + u)      U [K, O], u [K], V [O, K]
    dV = e^T p,  dc = sum_N e,  dU = d^T h,  du = sum_N d,     d = s * (q - sum_K s q),  q = e V
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_dni.backends.common.precision import accumulator, require_masters, sum_rows
from fused_dni.backends.common.synthesizer import check_context, gradients_of_error
from fused_dni.backends.reference.rules import apply_, finite, skip_
from fused_dni.ops.types import (
    G_DOT_G,
    ROWS,
    S_DOT_G,
    S_DOT_S,
    SQUARED_ERROR,
    Prediction,
    RuleTensors,
    SynthesizerTensors,
)


def _gradients(
    h: Tensor,
    prediction: Prediction,
    target: Tensor,
    synthesizer: SynthesizerTensors,
    context: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Apply the formulas of the module's head; ``target`` is ``kappa g`` [N, O]."""
    dtype = accumulator(synthesizer.weight)
    e = (2.0 / h.shape[0]) * (prediction.scaled.to(dtype) - target)  # [N, O]
    return gradients_of_error(e, h, prediction, synthesizer, context)


def _target(
    h: Tensor,
    prediction: Prediction,
    grad_h: Tensor,
    synthesizer: SynthesizerTensors,
    context: Tensor | None,
    target_scale: float,
) -> tuple[Tensor, Tensor]:
    """Return ``kappa g`` [N, O] in the accumulator's dtype, and what is to be added to the
    statistics."""
    check_context(synthesizer, context)
    target = target_scale * grad_h.to(accumulator(synthesizer.weight))
    s, g = prediction.scaled.double().reshape(-1, 1), target.double().reshape(-1, 1)  # [N * O, 1]
    sums = torch.zeros(5, dtype=torch.float64, device=h.device)
    sums[S_DOT_G] = sum_rows(s * g)[0]
    sums[S_DOT_S] = sum_rows(s * s)[0]
    sums[G_DOT_G] = sum_rows(g * g)[0]
    sums[SQUARED_ERROR] = sum_rows((s - g) ** 2)[0]
    sums[ROWS] = h.shape[0]
    return target, sums


@torch.no_grad()
def synthesizer_gradients(
    h: Tensor,
    prediction: Prediction,
    grad_h: Tensor,
    synthesizer: SynthesizerTensors,
    context: Tensor | None,
    target_scale: float,
    statistics: Tensor,
) -> tuple[Tensor | None, ...]:
    """Return gradients of ``sum((M(h) - kappa grad_h)^2) / N`` by slot, each of its parameter's
    dtype.

    Mutates ``statistics`` (adds to it), unless one of the sums is not finite.

    Raises:
        ValueError: unknown kind, or a context that does not go with the synthesizer.
        IndexError: a class index outside ``[0, K)``.
    """
    target, sums = _target(h, prediction, grad_h, synthesizer, context, target_scale)
    gradients = _gradients(h, prediction, target, synthesizer, context)
    if bool(torch.isfinite(sums).all()):
        statistics += sums
    return tuple(
        None if g is None or p is None else g.to(p.dtype)
        for g, p in zip(gradients, synthesizer.parameters(), strict=True)
    )


@torch.no_grad()
def synthesizer_update_(
    h: Tensor,
    prediction: Prediction,
    grad_h: Tensor,
    synthesizer: SynthesizerTensors,
    context: Tensor | None,
    target_scale: float,
    statistics: Tensor,
    rule: RuleTensors,
) -> None:
    """:func:`synthesizer_gradients`, applied by ``rule``.

    Mutates ``statistics``, the trainable parameters, the rule's buffers and counters; if the
    target, the prediction or a gradient is not finite, ``rule.hyper[SKIPPED]`` alone.

    Raises:
        TypeError: bfloat16 or float16 parameters.
        ValueError: unknown kind, or a context that does not go with the synthesizer.
        IndexError: a class index outside ``[0, K)``; raised before anything is changed.
    """
    require_masters(synthesizer.parameters(), rule.stochastic)
    target, sums = _target(h, prediction, grad_h, synthesizer, context, target_scale)
    gradients = _gradients(h, prediction, target, synthesizer, context)
    if not (bool(torch.isfinite(sums).all()) and finite(gradients, rule)):
        skip_(rule)
        return
    statistics += sums
    apply_(synthesizer.parameters(), gradients, rule)
