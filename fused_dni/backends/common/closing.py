"""What backends whose synthetic gradient is made inside of the backward share of its two ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fused_dni.backends.common.synthesizer import gradients_of_error, synthesizer_predict
from fused_dni.backends.common.windows import clip_rows, inject, state_rows
from fused_dni.ops.types import (
    G_DOT_G,
    ROWS,
    S_DOT_G,
    S_DOT_S,
    SQUARED_ERROR,
    Layers,
    LSTMBoundary,
    LSTMClosed,
    LSTMGradients,
    LSTMRegression,
    LSTMTrace,
    SynthesizerTensors,
)


class Window(NamedTuple):
    """What the backward of a window is given; the boundary if its synthetic gradient is to be
    added."""

    arriving: tuple[Tensor | None, Tensor | None, Tensor | None]  # at output, h and c
    x: Tensor
    layers: Layers
    lengths: Tensor | None
    dropout: tuple[Tensor, ...]
    trace: LSTMTrace
    need_dx: bool
    need_weights: bool
    boundary: LSTMBoundary | None = None


def close_window(
    backward: Callable[[Window], LSTMGradients],
    window: Window,
    boundary: LSTMBoundary,
    statistics: Tensor | None,
) -> LSTMClosed:
    """See :meth:`fused_dni.ops.types.Backend.lstm_close`.

    With a bound on the synthetic gradient's norm, which is known only when all of it is, it is made
    beforehand.

    Without statistics the host waits for the number of rows. With them nothing is waited for: the
    gradients are zero where there is no row to learn from.
    """
    synthesizer, ended, kappa, strength, max_norm, max_target_norm, learns, entrance = boundary
    (grad_output, grad_h, grad_c), trace = window.arriving, window.trace
    last = state_rows(trace.h, trace.c)  # [B, 2 L H]
    started: LSTMBoundary | None = boundary if strength else None
    if strength and max_norm > 0.0:
        scaled = synthesizer_predict(last, synthesizer, None).scaled
        if ended is not None:
            scaled = scaled.masked_fill(ended.unsqueeze(1), 0.0)
        layers = trace.h.shape[0]
        grad_h, grad_c = inject(scaled, grad_h, grad_c, layers, kappa, max_norm, strength)
        started = None
    made = backward(window._replace(arriving=(grad_output, grad_h, grad_c), boundary=started))
    parts: list[tuple[Tensor, Tensor, Tensor]] = []  # rows, their gradients, which count
    if learns and entrance:
        assert trace.cells is not None
        first = state_rows(trace.hidden[:, 0], trace.cells[:, 0])
        grad = state_rows(made.h, made.c)
        if max_target_norm:
            grad = clip_rows(grad, max_target_norm / kappa)
        parts.append((first, grad, (first != 0.0).any(1)))
    if learns and ended is not None:
        parts.append((last, torch.zeros_like(last), ended))
    if not parts:
        return LSTMClosed(made)
    rows, grad, counted = (torch.cat(t) for t in zip(*parts, strict=True))
    if statistics is not None:
        learned = learn(rows, grad, counted, synthesizer, kappa, statistics)
        return LSTMClosed(made, None, learned)
    rows, grad = rows[counted], grad[counted]
    if not rows.shape[0]:
        return LSTMClosed(made)
    prediction = synthesizer_predict(rows, synthesizer, None)
    return LSTMClosed(made, LSTMRegression(rows, grad, prediction))


def learn(
    rows: Tensor,
    grad: Tensor,
    counted: Tensor,
    synthesizer: SynthesizerTensors,
    target_scale: float,
    statistics: Tensor,
) -> tuple[Tensor | None, ...]:
    """:meth:`fused_dni.ops.types.Backend.synthesizer_gradients` on the rows [N, F] that are
    ``counted`` [N], whose number only the device knows; the others count as zeros."""
    keep = counted.unsqueeze(1)  # [N, 1]
    rows = torch.where(keep, rows, 0.0)
    prediction = synthesizer_predict(rows, synthesizer, None)
    s = torch.where(keep, prediction.scaled, 0.0)
    g = torch.where(keep, target_scale * grad.to(s.dtype), 0.0)
    count = counted.sum()
    wide_s, wide_g = s.double(), g.double()
    sums = torch.empty_like(statistics)
    sums[S_DOT_G] = (wide_s * wide_g).sum()
    sums[S_DOT_S] = (wide_s * wide_s).sum()
    sums[G_DOT_G] = (wide_g * wide_g).sum()
    sums[SQUARED_ERROR] = ((wide_s - wide_g) ** 2).sum()
    sums[ROWS] = count
    statistics += torch.where(torch.isfinite(sums).all(), sums, 0.0)
    e = (s - g) * (2.0 / count.clamp(min=1))
    made = gradients_of_error(e, rows, prediction, synthesizer, None)
    return tuple(
        None if d is None or p is None else d.to(p.dtype)
        for d, p in zip(made, synthesizer.parameters(), strict=True)
    )
