"""Verdicts of tops with given times, and a clock that charges what was planted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fused_dni.measure import race as racing
from fused_dni.measure.timing import Timing
from fused_dni.measure.verdict import TopVariant, TopVerdict
from fused_dni.report.schema import Result

WOBBLE = [0.97, 1.0, 1.03] * 4


def planted(
    bottom: float,
    top: float,
    prediction: float = 0.1,
    lesson: float = 0.1,
    ks: tuple[int, ...] = (1, 2, 8),
    race: Result | None = None,
) -> TopVerdict:
    """A verdict whose parts take these times, in milliseconds, and whose cycles are their sums."""

    def timed(name: str, value: float, at: int = 0) -> Timing:
        rounds = tuple(value * 1e-3 * w for w in WOBBLE[at:] + WOBBLE[:at])
        return Timing.of(name, rounds, rounds, 1)

    cycles = {k: timed(f"k={k}", bottom + prediction + (top + lesson) / k, at=k % 3) for k in ks}
    without = timed("without", bottom + prediction)
    return TopVerdict(
        "a net",
        timed("backprop", bottom + top, at=1),
        timed("bottom", bottom),
        timed("top", top),
        [TopVariant("dense", without, timed("lesson", lesson), cycles, (2000, 1000))],
        2000,
        "bytes",
        {
            "threads": 2, "where": "cpu", "device": "a CPU", "gpu": None, "torch": "2",
            "date": "2026-01-01", "commit": None,
        },
        race=race,
    )  # fmt: skip


class Charged:
    """In the place of :class:`fused_dni.measure.waiting.Stopwatch`: a step takes one second, and so
    many more for each call of :meth:`above` in it that asks for gradients."""

    waited = 0.0

    def __init__(self, dear: float) -> None:
        self.dear, self.calls = dear, 0

    def __call__(self) -> Charged:
        return self

    def above(self) -> None:
        self.calls += 1

    def time(self, run: Callable[[], object]) -> float:
        before = self.calls
        run()
        return 1.0 + self.dear * (self.calls - before)

    def close(self) -> None:
        pass

    def install(self, monkeypatch: Any) -> None:
        """Let races go by this clock."""
        monkeypatch.setattr(racing, "Stopwatch", self)
