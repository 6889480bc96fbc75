"""What of a weak prediction helps: the LSTM hears something else than what was predicted.

For ``train copy --ablate``. Held against full backprop a prediction's direction is next to random,
row by row, and yet it lengthens what is copied. So what is injected is changed, and what is left of
the gain says where it came from. The synthesizer is taught as ever, by the gradient that comes to
the next window's start: but that one is made of what was injected at this window's end, so it is
another target too. In place of the prediction M(s) at a window's end

``zero``
    nothing: all else that the arm does stays, updates of windows without a loss included;
``negated``
    -M(s);
``shuffled``
    the prediction for another row of the batch, drawn anew each time;
``mean``
    the mean of M(s) over the batch;
``noise``
    a random direction, drawn anew each time, with the norm of M(s), row by row;
``true``
    the direction of the true gradient of the future with the norm of M(s), row by row.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Altered(nn.Module):
    """A synthesizer whose ``inner`` learns, and that predicts something made of what it says.

    A lesson asks with gradients, a window's end without; in ``eval()`` it predicts as ``inner``.

    Args:
        inner: called with rows [B, F].
        change: of those above.
        seed: of what is random.

    Attributes:
        truth: for ``true``, the true gradient [B, F] at the next end, in any unit; None at that of
            a sequence, where nothing is injected whatever is predicted.
    """

    calls: Tensor

    def __init__(self, inner: nn.Module, change: str, seed: int) -> None:
        super().__init__()
        self.inner, self.change, self.seed = inner, change, seed
        #: So that a run that is resumed draws on.
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.truth: Tensor | None = None

    def forward(self, rows: Tensor, context: Tensor | None = None) -> Tensor:
        """Predict for rows [B, F]."""
        made: Tensor = self.inner(rows, context)
        return made if torch.is_grad_enabled() or not self.training else self.altered(made)

    def altered(self, made: Tensor) -> Tensor:
        """Make what is injected of the prediction."""
        if self.change == "zero":
            return torch.zeros_like(made)
        if self.change == "negated":
            return -made
        if self.change == "mean":
            return made.mean(0, keepdim=True).expand_as(made).contiguous()
        if self.change == "true":
            return made if self.truth is None else _sized(self.truth, made)
        self.calls += 1
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(self.calls))
        if self.change == "shuffled":
            return made[torch.randperm(len(made), generator=generator)]
        return _sized(torch.randn(made.shape, generator=generator).to(made), made)


def _sized(direction: Tensor, like: Tensor) -> Tensor:
    """Give each row of ``direction`` the norm of that of ``like``; rows of zeros stay."""
    size: Tensor = direction.norm(dim=1, keepdim=True)
    wanted: Tensor = like.norm(dim=1, keepdim=True)
    return direction * (wanted / size.masked_fill(size == 0, 1.0))
