"""``Twin``: the stages of a pipeline in one process, each gradient so many steps late."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fused_dni.distributed.pipeline import StepOutput
from fused_dni.distributed.stage import Arrived, Loss, Stage, Worker, why_not


class Twin:
    """What a :class:`Pipeline` with this ``lag`` computes, to the bit, without its processes.

    For accuracy, which depends on how late gradients are and not on what makes them late: runs are
    repeatable, and a delay costs no waiting. Over each cut a gradient is used ``lag`` steps after
    the step it belongs to::

        twin = Twin(stages, loss=F.cross_entropy, lag=20)
        for x, y in batches:
            out = twin.step(x, y)
            optimizer.step()  # of all stages' parameters
            optimizer.zero_grad()

    Args:
        stages: all of them, in order; as :class:`Pipeline` takes them one by one.
        loss, mode: as in :class:`Pipeline`.
        targets: as in :class:`Pipeline`.
        lag: steps, 0 or more; or by stage, where what passes several cuts is later.

    Raises:
        TypeError, ValueError: as :class:`Pipeline`.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        loss: Loss,
        mode: str = "decoupled",
        lag: int | Sequence[int] = 0,
        targets: str = "bootstrapped",
    ) -> None:
        lags = list(lag) if isinstance(lag, Sequence) else [lag] * len(stages)
        if len(lags) != len(stages) or any(type(late) is not int or late < 0 for late in lags):
            raise ValueError(
                f"lag must be an integer of at least 0, or {len(stages)} of them, one a stage, got "
                f"{lag!r}"
            )
        for i, stage in enumerate(stages):
            why = why_not(stage, i, len(stages), mode, loss, targets)
            if why:
                raise ValueError(f"stage {i}: {why}")
        self.workers = [
            Worker(stage, loss, mode, late, late, targets)
            for stage, late in zip(stages, lags, strict=True)
        ]
        self.steps = 0

    def step(self, x: Tensor, target: Tensor, context: Tensor | None = None) -> StepOutput:
        """Train one step of every stage; what :meth:`Pipeline.step` returns on the last.

        Args:
            x, target, context: as in :meth:`Pipeline.run`.
        """
        step, workers = self.steps, self.workers
        given = Arrived(x, target, target if context is None else context, False)
        for below, worker in zip([None, *workers[:-1]], workers, strict=True):
            begun = worker.begin(step, given)
            if given.wanted and begun.dx is not None:
                assert below is not None
                below.arrive(step, begun.dx)
            given = given._replace(x=begun.h, wanted=begun.asks)
        for i in reversed(range(len(workers))):
            assert not workers[i].missing(step)
            for of, dx in workers[i].settle(step):
                workers[i - 1].arrive(of, dx)
        self.steps = step + 1
        return StepOutput(step, begun.loss, begun.h)
