"""``Pace``: the k of ``Schedule(target_every="auto")``, from what steps with targets measured."""

from __future__ import annotations

import math
from statistics import median
from typing import Any, NamedTuple

FIRST = 4  # k before anything has been measured, within the bounds
SMOOTHED = 8  # targets: what is older weighs less than 1/e
PATIENCE = 4  # targets at a k before it may change
FACTOR = 2**0.5  # of the next k over this one, and back
MARGIN = 0.05  # by how much the best rate has to be better than that of this k
# Targets at a k after which nothing is held to be known of others; each return to a shorter one
# doubles it.
AGAIN, RAREST = 16, 1024
TIMED = 16  # cycles that the measured costs are medians of


class Seen(NamedTuple):
    """Sums over what one synthesizer was trained on in a step, in one unit: of products s*g, of
    squares g*g and (s-g)**2."""

    s_dot_g: float
    g_dot_g: float
    squared_error: float

    def told(self) -> bool:
        """Whether there is a gradient in it, and nothing that is not finite."""
        return all(map(math.isfinite, self)) and self.g_dot_g > 0.0


class Pace:
    """Choose k by the gain per second, from step to step with targets.

    A step by the true gradient gains 1 and one by a prediction q(k); a cycle of k steps takes the
    time of k + ``cost_ratio`` steps without a target. Its gain per time is::

        rate(k) = (mix + (1 - mix) q(k) + (k - 1) q(k)) / (k + cost_ratio)

    Args:
        bounds: the least and the largest k.
        cost_ratio: what a target adds to a step, over what a step without one costs; None to take
            it from :meth:`time`.
        mix: share of the true gradient in a step with a target.

    Attributes:
        k: steps from the last target to the next but the first, which comes right after warm-up.
    """

    def __init__(self, bounds: tuple[int, int], cost_ratio: float | None, mix: float) -> None:
        self.bounds, self.cost_ratio, self.mix = bounds, cost_ratio, mix
        self.k = min(max(FIRST, bounds[0]), bounds[1])
        self._sums: list[list[float]] = []  # by layer (s-g)**2 and g*g at this k
        self._count = 0  # targets at this k
        self._other: tuple[int, float] | None = None  # the k before this one, and its r2
        self._again = AGAIN
        self._plain: list[float] = []  # seconds of a step without a target, by cycle
        self._targets: list[float] = []  # seconds of a step with one

    def time(self, plain: float | None, target: float | None) -> None:
        """Note the seconds of a step without a target and of one with; None for not known."""
        for kept, seconds in ((self._plain, plain), (self._targets, target)):
            if seconds is not None:
                kept.append(seconds)
                del kept[:-TIMED]

    def observe(self, seen: list[Seen], distance: int) -> None:
        """Take in a step with a target, ``distance`` steps after the one before; k is that from
        here on."""
        seen = [layer for layer in seen if layer.told()]
        if not seen:
            return
        if any(layer.s_dot_g <= 0.0 for layer in seen):
            self._move(self.bounds[0], None)
            return
        if distance != self.k:
            return
        if len(self._sums) != len(seen):
            self._sums, self._count = [[0.0, 0.0] for _ in seen], 0
        keep = 1.0 - 1.0 / SMOOTHED
        for sums, layer in zip(self._sums, seen, strict=True):
            sums[0] = keep * sums[0] + layer.squared_error
            sums[1] = keep * sums[1] + layer.g_dot_g
        self._count += 1
        if self._count < PATIENCE:
            return
        ratio = self.ratio()
        if ratio is not None:
            self._decide(ratio)
        elif self.k < self.bounds[1] and self.explained() > 0.0:
            self._move(self.k + 1, None)  # a step without a target is to be timed

    def explained(self) -> float:
        """r2 at this k: the part of the gradient that is predicted, 1 - |s - g|^2 / |g|^2, of the
        layer that is predicted worst."""
        return min(1.0 - error / size for error, size in self._sums)

    def ratio(self) -> float | None:
        """``cost_ratio``, given or measured; None where neither is there yet."""
        if self.cost_ratio is not None:
            return self.cost_ratio
        if not self._plain or not self._targets:
            return None
        plain = median(self._plain)
        return max(median(self._targets) - plain, 0.0) / plain

    def best(self, here: float, falls: float, ratio: float) -> tuple[int, float, float]:
        """The k of the best rate, that rate, and the rate at this k.

        Args:
            here: r2 at this k.
            falls: the factor by which r2 falls with each step that k is longer.
            ratio: what a target adds, in steps without one.
        """
        least, most = self.bounds
        explained = {k: min(here * falls ** (k - self.k), 1.0) for k in range(1, most + 1)}
        rates = {
            k: self._rate(k, explained[k], explained[1], ratio) for k in range(least, most + 1)
        }
        k = max(rates, key=lambda k: (rates[k], -k))
        return k, rates[k], rates[self.k]

    def _rate(self, k: int, explained: float, fresh: float, ratio: float) -> float:
        gain = explained - (k - 1) * (fresh - explained)
        return (self.mix + (k - self.mix) * gain) / (k + ratio)

    def _decide(self, ratio: float) -> None:
        """Go a part of the way to the k whose rate is best, if it is better by the margin."""
        if self._count >= self._again:
            self._other = None
        here = self.explained()
        wanted, best, now = self.best(here, self._falls(here), ratio)
        if best - now <= MARGIN * abs(now):
            return
        if wanted > self.k:
            k = min(max(round(self.k * FACTOR), self.k + 1), wanted)
        else:
            k = max(min(round(self.k / FACTOR), self.k - 1), wanted)
            self._again = min(2 * self._again, RAREST)
        self._move(k, here)

    def _falls(self, here: float) -> float:
        """The factor by which r2 falls with each step of k, from this k and the one before."""
        if self._other is None or here <= 0.0 or self._other[1] <= 0.0:
            return 1.0
        k, there = self._other
        factor: float = (here / there) ** (1.0 / (self.k - k))
        return min(factor, 1.0)

    def _move(self, k: int, here: float | None) -> None:
        """Take another k; of this one its r2 is kept, if it is given."""
        if k != self.k:
            self._other = None if here is None else (self.k, here)
            self.k = k
            self._sums, self._count = [], 0

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next k is made from; numbers, and lists of them."""
        return {
            "k": self.k,
            "sums": [list(sums) for sums in self._sums],
            "count": self._count,
            "other": self._other,
            "again": self._again,
            "plain": list(self._plain),
            "targets": list(self._targets),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken; k is kept within the bounds."""
        least, most = self.bounds
        self.k = min(max(int(state["k"]), least), most)
        self._sums = [list(sums) for sums in state["sums"]]
        self._count, self._again = int(state["count"]), int(state["again"])
        other = state["other"]
        self._other = None if other is None else (int(other[0]), float(other[1]))
        self._plain, self._targets = list(state["plain"]), list(state["targets"])
