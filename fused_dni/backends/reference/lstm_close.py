"""The ends of an LSTM's window, around its backward.

A window of T steps ends in the state s_T = (h_T, c_T) and began at s_0. With the synthesizer M, the
target scale kappa and the factor a on synthetic gradients (Jaderberg et al. 2016, arXiv
1608.05343, section 2.1), its backward starts from::

    dL/ds_T + a M(s_T) / kappa            (M(s_T) counts as zero where the sequence ends)

and the gradient g_0 that it brings to the entrance is what M should have predicted there::

    minimise |M(s_0) - kappa g_0|^2,  and |M(s_T)|^2 where the sequence ends

over the rows together. A row with s_0 = 0 starts a sequence: nothing was predicted there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_dni.backends.common.synthesizer import synthesizer_predict
from fused_dni.backends.common.windows import clip_rows, inject, state_rows
from fused_dni.backends.reference.lstm import lstm_backward
from fused_dni.backends.reference.synthesizer import synthesizer_gradients
from fused_dni.ops.types import (
    LSTMBoundary,
    LSTMClosed,
    LSTMLayer,
    LSTMRegression,
    LSTMTrace,
)


@torch.no_grad()
def lstm_close(
    grad_output: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    x: Tensor,
    layers: tuple[LSTMLayer, ...],
    lengths: Tensor | None,
    dropout: tuple[Tensor, ...],
    trace: LSTMTrace,
    need_dx: bool,
    need_weights: bool,
    boundary: LSTMBoundary,
    statistics: Tensor | None,
) -> LSTMClosed:
    """See :meth:`fused_dni.ops.types.Backend.lstm_close`."""
    synthesizer, ended, kappa, strength, max_norm, max_target_norm, learns, entrance = boundary
    last = state_rows(trace.h, trace.c)
    if strength:
        scaled = synthesizer_predict(last, synthesizer, None).scaled
        if ended is not None:
            scaled = scaled.masked_fill(ended.unsqueeze(1), 0.0)
        grad_h, grad_c = inject(scaled, grad_h, grad_c, len(layers), kappa, max_norm, strength)
    made = lstm_backward(
        grad_output, grad_h, grad_c, x, layers, lengths, dropout, trace, need_dx, need_weights
    )
    parts: list[tuple[Tensor, Tensor]] = []
    if learns and entrance:
        assert trace.cells is not None
        first = state_rows(trace.hidden[:, 0], trace.cells[:, 0])
        continues = (first != 0.0).any(1)
        grad = state_rows(made.h, made.c)[continues]
        if max_target_norm:
            grad = clip_rows(grad, max_target_norm / kappa)
        parts.append((first[continues], grad))
    if learns and ended is not None:
        parts.append((last[ended], torch.zeros_like(last[ended])))
    rows, grad = (torch.cat(t) for t in zip(*parts, strict=True)) if parts else (last[:0],) * 2
    if not rows.shape[0]:
        return LSTMClosed(made)
    lesson = LSTMRegression(rows, grad, synthesizer_predict(rows, synthesizer, None))
    if statistics is None:
        return LSTMClosed(made, lesson)
    gradients = synthesizer_gradients(
        rows, lesson.prediction, grad, synthesizer, None, kappa, statistics
    )
    return LSTMClosed(made, None, gradients)
