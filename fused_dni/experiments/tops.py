"""What arms of a race under an expensive top have in common: full steps, and what is between."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from fused_dni.modules.decoupled import Decoupled
from fused_dni.modules.local import backward_local
from fused_dni.schedule import Schedule

WARMUP = 50
#: Of steps that are not full:
#: prediction   the bottom learns from the synthetic gradient
#: dropped      the same is computed, and nothing is updated: what full steps come to by themselves,
#:              as many of them in the same time
#: held         the bottom's optimizers step by the gradient of their parameters in the last full
#:              step; nothing is run and no batch is drawn. (A gradient at h that is held would
#:              belong to another batch.)
#: surrogate    the bottom learns from a cheap loss
Between = Literal["prediction", "dropped", "held", "surrogate"]
Every = int | Literal["auto"] | None


class Racer:
    """A network in training of which every k-th step is full: runs what is above the interface.

    Subclasses say what a batch is, how h is made from it and what it costs.

    Args:
        inner: what is below the interface.
        synthesizer: of the gradient at its output; None where ``between`` needs none.
        every: after the warm-up the first and every so-manieth step is full; "auto" by what they
            cost on the clock; None for backprop.
        between: what the others are.

    Attributes:
        bottom: ``inner``, decoupled if there is a synthesizer.
        schedule: its phases.
        lower: optimizers of what is below, the synthesizer too; upper: of what is above.
    """

    def __init__(
        self,
        inner: nn.Module,
        synthesizer: nn.Module | None = None,
        every: Every = None,
        between: Between = "prediction",
    ) -> None:
        predicts = every is not None and between in ("prediction", "dropped")
        if (synthesizer is not None) != predicts or (every == "auto" and not predicts):
            raise ValueError(f"every={every}, between={between!r}, synthesizer={synthesizer!r}")
        self.inner = self.bottom = inner
        self.every, self.between, self.steps = every, between, 0
        self.lower: list[torch.optim.Optimizer] = []
        self.upper: list[torch.optim.Optimizer] = []
        self.schedule: Schedule | None = None
        if synthesizer is not None:
            self.bottom = Decoupled(inner, synthesizer)
            # A full step has paid for the true gradient: it is used.
            self.schedule = Schedule(self.bottom, warmup_steps=WARMUP, target_every=every, mix=1.0)

    def batch(self) -> Any:
        """Draw the next."""
        raise NotImplementedError

    def below(self, batch: Any) -> Tensor:
        """Run the bottom: h."""
        raise NotImplementedError

    def above(self, h: Tensor, batch: Any) -> Tensor:
        """Run what is expensive: the loss."""
        raise NotImplementedError

    def surrogate(self, h: Tensor, batch: Any) -> Tensor:
        """Compute the loss that stands for it between full steps."""
        raise NotImplementedError

    def meanwhile(self, h: Tensor, batch: Any) -> None:
        """Train what is above between full steps, from h without its graph."""

    def loss(self) -> float:
        """See :class:`fused_dni.measure.race.Racer`."""
        raise NotImplementedError

    @property
    def full(self) -> bool:
        """Whether the coming step is."""
        if self.schedule is not None:
            return self.schedule.target
        if self.every is None:
            return True
        past = self.steps - WARMUP
        return past < 0 or past % int(self.every) == 0

    def step(self) -> None:
        """Train by one step."""
        full = self.full
        if full or self.between != "held":
            batch = self.batch()
            for optimizer in (*self.lower, *self.upper):
                optimizer.zero_grad()
            h = self.below(batch)
            if full:
                self.above(h, batch).backward()
            elif self.between == "surrogate":
                self.surrogate(h, batch).backward()
            else:
                backward_local(h)
                self.meanwhile(h.detach(), batch)
        if full or self.between != "dropped":
            for optimizer in self.lower:
                optimizer.step()
        if full:
            for optimizer in self.upper:
                optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        self.steps += 1


def squared_error(h: Tensor, t: Tensor | None) -> Tensor:
    """Compute the squared distance of h from what it should be: [N]."""
    assert t is not None
    return (h - t).square().sum(1)
