"""Shapes of an LSTM's window: states as rows, what is added at its end, which steps count."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_dni.backends.common.synthesizer import synthetic_gradient
from fused_dni.ops.types import Prediction


def state_rows(h: Tensor, c: Tensor) -> Tensor:
    """Return a state h, c [L, B, H] as rows [B, 2 L H]: h_0, c_0, h_1, c_1, ..."""
    if h.shape[0] == 1:
        return torch.cat((h[0], c[0]), 1)
    return torch.stack((h, c), 1).permute(2, 0, 1, 3).flatten(1)


def rows_state(rows: Tensor, layers: int) -> tuple[Tensor, Tensor]:
    """Undo :func:`state_rows`."""
    h, c = rows.unflatten(1, (layers, 2, -1)).permute(2, 1, 0, 3).unbind()  # [L, B, H] each
    return h, c


def inject(
    scaled: Tensor,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    layers: int,
    target_scale: float,
    max_norm: float,
    strength: float,
) -> tuple[Tensor, Tensor]:
    """Return the gradient at the final state [L, B, H], with the synthetic one from ``scaled`` =
    M(s_T) [B, 2 L H] added."""
    synthetic = synthetic_gradient(Prediction(scaled), target_scale, max_norm) * strength
    h, c = rows_state(synthetic, layers)
    return h if grad_h is None else grad_h + h, c if grad_c is None else grad_c + c


def clip_rows(grad: Tensor, limit: float) -> Tensor:
    """Return ``grad`` [N, F] with each row scaled down to a norm of ``limit`` where that is
    exceeded.

    Norms are summed in float64, so that finite elements have a finite norm."""
    norm = torch.linalg.vector_norm(grad, dim=1, keepdim=True, dtype=torch.float64)
    scale: Tensor = (limit / norm).clamp(max=1.0).to(grad.dtype)
    return grad * scale


def alive_steps(steps: int, lengths: Tensor | None, like: Tensor) -> Tensor:
    """Say whether a step is one of its row's own, [T, B, 1]."""
    if lengths is None:
        return torch.ones((steps, like.shape[1], 1), dtype=torch.bool, device=like.device)
    return (torch.arange(steps, device=like.device)[:, None] < lengths)[:, :, None]


def layer_input(
    index: int, x: Tensor, hidden: Tensor, dropout: tuple[Tensor, ...], alive: Tensor
) -> Tensor:
    """Return what layer ``index`` reads, [T, B, I or H]; zero where a row has ended."""
    if index == 0:
        below = x
    else:
        below = hidden[index - 1, 1:]
        if dropout:
            below = below * dropout[index - 1]
    return torch.where(alive, below, 0)
