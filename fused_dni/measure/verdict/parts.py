"""What the parts of a training step cost, each timed alone.

Of stock backprop: forward, backward (also for the parameters and for the input alone), optimizer.
Of a decoupled model: the phases that each decoupled module goes through, by the same methods that
its step is made of, summed over the modules, and what lies between the modules.

A part (:mod:`fused_dni.measure.verdict.phases` lists them) is timed in the state in which its
predecessor leaves the caches (:class:`fused_dni.measure.timing.Staged`), all in one
:func:`fused_dni.measure.timing.compare`, together with the whole steps: so the sum of the parts can
be held against the step that they make (:class:`Sum`). What the sum of the phases lacks are the
nodes of autograd and Python between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from fused_dni.measure import timing
from fused_dni.measure.timing import Ratio, Timing
from fused_dni.measure.verdict.candidates import Problem
from fused_dni.measure.verdict.phases import (
    CALLS,
    CALLS_DX,
    PHASES,
    PHASES_DX,
    STOCK,
    count_work,
    fuses,
    part_candidates,
)
from fused_dni.measure.verdict.work import Work

#: A step made of parts run one after the other is to be their sum within this share.
AGREEMENT = 0.15


class Sum(NamedTuple):
    """Parts that make a step, and how their sum agrees with it.

    Attributes:
        step: the whole step's name.
        parts: the parts' names.
        ratio: of the sum to the step.
        composed: the step runs its parts one after the other; if not, kernels fuse several, and
            the ratio says what that saves.
    """

    step: str
    parts: tuple[str, ...]
    ratio: Ratio
    composed: bool

    @property
    def agrees(self) -> bool:
        """Whether the sum is within 15 % of the step."""
        return abs(self.ratio.median - 1.0) <= AGREEMENT

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "step": self.step,
            "parts": list(self.parts),
            "sum over step": self.ratio,
            "composed": self.composed,
            "agrees": self.agrees,
        }


@dataclass(frozen=True)
class Parts:
    """Result of ``measure_parts``.

    Attributes:
        timings: seconds by part, and of the whole steps.
        work: floating-point operations and bytes by part, where they can be counted.
        sums: parts against wholes.
    """

    timings: dict[str, Timing]
    work: dict[str, Work]
    sums: tuple[Sum, ...]

    def seconds(self, name: str) -> float:
        """Median of a part; 0 for one that the step does not have."""
        return self.timings[name].median if name in self.timings else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "timings": self.timings,
            "work": {name: value._asdict() for name, value in self.work.items()},
            "sums": [value.to_json() for value in self.sums],
        }


def measure_parts(
    plain: nn.Module,
    decoupled: nn.Module,
    problem: Problem,
    *,
    seconds: float = 2.0,
    progress: Callable[[float], None] | None = None,
) -> Parts:
    """Time the parts of a step by stock backprop and of a decoupled step.

    Args:
        plain: the module by PyTorch alone.
        decoupled: the same on our layers, with synthesizers and rules
            (:func:`fused_dni.measure.verdict.candidates.decouple`).
        problem: what both are given (:func:`fused_dni.measure.verdict.candidates.make_problem`).
        seconds: budget of all parts together.
        progress: called with the fraction done.

    Both are trained meanwhile, at the rate of ``problem.rule``.
    """
    candidates = part_candidates(plain, decoupled, problem)
    timings = timing.compare(
        candidates, seconds=seconds, block=1, device=problem.sample.device, progress=progress
    )
    return Parts(timings, count_work(plain, decoupled, problem), sums(timings, decoupled))


def sums(timings: Mapping[str, Timing], decoupled: nn.Module) -> tuple[Sum, ...]:
    """Parts against the steps that they make; ``timings`` of one :func:`timing.compare`."""
    fused = fuses(decoupled)
    made: list[tuple[str, tuple[str, ...], bool]] = [("stock step", STOCK, True)]
    for step, phases, calls in (
        ("step with targets", PHASES_DX, CALLS_DX),
        ("step without targets", PHASES, CALLS),
    ):
        there = tuple(name for name in phases if name in timings)
        made += [(step, there, not fused), (step, calls, True)]
    found = []
    for step, parts, composed in made:
        total = timing.combine("sum", [(1.0, timings[part]) for part in parts])
        found.append(Sum(step, parts, timing.ratio(total, timings[step]), composed))
    return tuple(found)
