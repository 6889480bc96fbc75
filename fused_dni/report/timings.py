"""Times, ratios of times and break-evens: what measurements hold, in memory and in files alike."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fused_dni.report.intervals import median_interval

#: Differences below one per cent are reported as none: code placement alone makes them.
MARGIN = 0.01


def _quantile(ordered: Sequence[float], q: float) -> float:
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _bounds(low: float, high: float) -> list[float] | None:
    return [low, high] if math.isfinite(high) else None


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one candidate; made by ``of``, or of a file's numbers.

    Attributes:
        name: the candidate's name in ``compare``; not written to files, whose keys say it.
        median: of the rounds.
        p10, p90: percentiles of the samples.
        iqr: distance between the quartiles of the samples.
        interval: 95 % confidence interval of the median (order statistics over the rounds);
            infinite where there were too few rounds.
        n: number of samples.
        rounds: the median sample of each round; what comparisons pair. Empty in files from
            before they were kept.
        repeats: calls in one sample.
        waited: share of the time on the clock in which no core was free, not counted in the
            samples (``fused_dni.measure.waiting``): how busy the machine was.
    """

    name: str = field(compare=False)
    median: float
    p10: float
    p90: float
    iqr: float
    interval: tuple[float, float]
    n: int
    rounds: tuple[float, ...]
    repeats: int
    waited: float

    @classmethod
    def of(
        cls,
        name: str,
        samples: Sequence[float],
        rounds: Sequence[float],
        repeats: int,
        waited: float = 0.0,
    ) -> Timing:
        """Sum up samples, seconds per call, and the medians of their rounds."""
        ordered = sorted(samples)
        p10, p25, p75, p90 = (_quantile(ordered, q) for q in (0.10, 0.25, 0.75, 0.90))
        middle, bounds = statistics.median(rounds), median_interval(rounds)
        iqr, n = p75 - p25, len(samples)
        return cls(name, middle, p10, p90, iqr, bounds, n, tuple(rounds), repeats, waited)

    def scaled(self, factor: float) -> Timing:
        """Return the same of a part of the call, or of several calls."""
        return replace(
            self,
            median=factor * self.median,
            p10=factor * self.p10,
            p90=factor * self.p90,
            iqr=factor * self.iqr,
            interval=(factor * self.interval[0], factor * self.interval[1]),
            rounds=tuple(factor * value for value in self.rounds),
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers, seconds."""
        kept = {key: value for key, value in vars(self).items() if key != "name"}
        return {**kept, "interval": _bounds(*self.interval), "rounds": list(self.rounds)}

    @classmethod
    def from_json(cls, name: str, found: Mapping[str, Any]) -> Timing:
        """Read what :meth:`to_json` wrote; null is no number.

        Raises:
            ValueError: something is no number, or negative.
        """
        median, p10, p90, iqr = (_number(found[key]) for key in ("median", "p10", "p90", "iqr"))
        rounds = tuple(_number(value) for value in found["rounds"])
        interval = _pair(found["interval"], -math.inf)
        counts = [int(_number(found[key])) for key in ("n", "repeats")]
        waited = _number(found["waited"])
        return cls(name, median, p10, p90, iqr, interval, counts[0], rounds, counts[1], waited)


@dataclass(frozen=True)
class Ratio:
    """Time of ``a`` over time of ``b``: the median of the rounds' ratios and its interval."""

    median: float
    low: float
    high: float

    def verdict(self, margin: float = MARGIN) -> str:
        """Return ``faster``, ``slower`` (``a`` against ``b``), or ``inconclusive``: the interval
        reaches within ``margin`` of one, or there were too few rounds for an interval."""
        if self.high < 1.0 - margin:
            return "faster"
        if self.low > 1.0 + margin:
            return "slower"
        return "inconclusive"

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The interval; None if it is not known."""
        return (self.low, self.high) if math.isfinite(self.high) else None

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers, and the verdict."""
        interval = _bounds(self.low, self.high)
        return {"median": self.median, "interval": interval, "verdict": self.verdict()}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Ratio:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: something is no number, or negative.
        """
        return cls(_number(found["median"]), *_pair(found["interval"], 0.0))


@dataclass(frozen=True)
class BreakEven:
    """From which k on DNI is faster than a baseline.

    Attributes:
        kind: ``from`` (faster for every k from ``k`` on), ``never`` (even without any targets it is
            not faster), or ``inconclusive`` (the intervals overlap).
        k: the smallest such k, for ``from``.
        slower_to: the largest k at which it was measurably slower, 0 if none.
    """

    kind: str
    k: int | None = None
    slower_to: int = 0

    def __str__(self) -> str:
        """Say it in words: ``k = 3 (in doubt from 2)``, ``never``, ``inconclusive``."""
        if self.k is None:
            return self.kind
        doubt = self.slower_to + 1
        return f"k = {self.k}" if doubt >= self.k else f"k = {self.k} (in doubt from {doubt})"

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> BreakEven:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: another kind, or no whole numbers.
        """
        kind, k, slower_to = (found[key] for key in ("kind", "k", "slower_to"))
        if kind not in ("from", "never", "inconclusive") or (kind == "from") != isinstance(k, int):
            raise ValueError(f"no break-even: {kind!r}, k {k!r}")
        return cls(kind, k, int(_number(slower_to)))


def _number(value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e99:
        raise ValueError(f"no number that a time or ratio can have: {str(value)[:100]!r}")
    return value


def _pair(found: Any, least: float) -> tuple[float, float]:
    if found is None:
        return least, math.inf
    low, high = map(_number, found)
    return low, high


_TIMING = {"median", "p10", "p90", "iqr", "interval", "n", "rounds", "repeats", "waited"}
_RATIO = {"median", "interval", "verdict"}
_BREAK_EVEN = {"kind", "k", "slower_to"}


def typed(name: str, found: Mapping[str, Any]) -> Any:
    """Read a timing, a ratio or a break-even by the keys that it has; anything else as it is.

    Raises:
        ValueError: it has the keys of one and not the values.
    """
    keys = found.keys()
    if keys == _TIMING:
        return Timing.from_json(name, found)
    if keys == _RATIO:
        return Ratio.from_json(found)
    return BreakEven.from_json(found) if keys == _BREAK_EVEN else found


def ratio(a: Timing, b: Timing, confidence: float = 0.99) -> Ratio:
    """Divide ``a`` by ``b``, paired round by round; both from the same ``compare``.

    Raises:
        ValueError: the two have different numbers of rounds, so they were not measured together.
    """
    if len(a.rounds) != len(b.rounds):
        raise ValueError(
            f"{a.name!r} has {len(a.rounds)} rounds and {b.name!r} has {len(b.rounds)}: "
            "only timings from one compare() can be paired"
        )
    ratios = [_quotient(x, y) for x, y in zip(a.rounds, b.rounds, strict=True)]
    low, high = median_interval(ratios, confidence)
    return Ratio(statistics.median(ratios), max(low, 0.0), high)


def _quotient(x: float, y: float) -> float:
    """Divide times, of which one may be shorter than the clock can tell: none of none is one."""
    if y:
        return x / y
    return math.inf if x else 1.0


def differs(a: Timing, b: Timing, *, confidence: float = 0.99, margin: float = MARGIN) -> str:
    """Say whether ``a`` is ``"faster"`` or ``"slower"`` than ``b``, or ``"inconclusive"``.

    The verdict is that of the confidence interval of the median of paired ratios, and asks for a
    difference of at least ``margin``. The interval is at 99 %, not 95: a table makes many
    comparisons.
    """
    return ratio(a, b, confidence).verdict(margin)


def combine(name: str, parts: Sequence[tuple[float, Timing]]) -> Timing:
    """Sum candidates of one ``compare`` by weight, round by round: ``sum(w * t)``.

    For the average of a cycle whose steps were timed apart. Spread and pairing stay those of the
    rounds; the samples are the rounds, since single samples of two candidates do not belong
    together.
    """
    rounds = [
        sum(w * v for (w, _), v in zip(parts, values, strict=True))
        for values in zip(*(t.rounds for _, t in parts), strict=True)
    ]
    repeats = max(t.repeats for _, t in parts)
    return Timing.of(name, rounds, rounds, repeats, max(t.waited for _, t in parts))
