"""``Pace``: the k of ``Schedule(target_every="auto")``, from what steps with targets measured."""

from __future__ import annotations

import math
from statistics import median
from typing import Any, NamedTuple

FIRST = 4  # k before anything has been measured, within the bounds
SMOOTHED = 8  # targets: what is older weighs less than 1/e
PATIENCE = 4  # targets at a k before it may change; before it may grow, k if that is more
FACTOR = 2**0.5  # of the next k over this one, and back
MARGIN = 0.05  # by how much the best rate has to be better than that of this k
# Targets behind a return from a longer k before one is tried again; each return doubles it.
AGAIN, RAREST = 16, 1024
# A fall of r2 from one target to the next that is no noise: this part of it, and so many times its
# mean deviation. What an update by predictions has led to is then undone by true gradients.
FALL, DEVIATIONS = 0.05, 4.0
UNSEEN = 0.25  # that deviation before anything was seen: nothing is a fall for some time
RETREAT = 4  # by what k is divided then
LONGER = 4  # times as long it may not grow to what it was
FADES = 24  # targets in which r2 at shorter k, once better, comes near to what it is at this k
TIMED = 16  # cycles that the measured costs are medians of


class Seen(NamedTuple):
    """Sums over what one synthesizer was trained on in a step, in one unit: of products s*g, of
    squares g*g and (s-g)**2."""

    s_dot_g: float
    g_dot_g: float
    squared_error: float

    def told(self) -> bool:
        """Say whether there is a gradient in it, and nothing that is not finite."""
        return all(map(math.isfinite, self)) and self.g_dot_g > 0.0


class Pace:
    """Choose k by the gain per time, from step to step with targets.

    r2(k) is the part of the gradient g that the prediction s explains, 1 - |s - g|^2 / |g|^2, as
    measured on steps with targets: there the prediction is k steps old, the oldest of its cycle.
    Of that, a step by a prediction gains, when one by the true gradient gains 1::

        q(k) = r2(k) - (k - 1) / 3 (r2(1) - r2(k))
        rate(k) = (mix + (k - mix) q(k)) / (k + cost_ratio)

    The first term is what is left of the gain of a step, in the second order, where its length is
    the best for the true gradient. What no k explains differs from row to row, and that is all it
    takes. What r2 falls by with k is an error that the predicted steps of a cycle have in common:
    it adds up. In the cycle's oldest prediction it has that size and before, where it grows with
    age, less: of the k - 1 that it would count if it were always there, a quarter where its norm
    goes with the age and 4/9 where its square does; a third is taken. r2 elsewhere than at k is
    extrapolated as a * r**k, r being the least that this k and another say, and 1 where no other
    is known.

    A fall of r2 at one k, beyond its noise, says that predictions have led the layers to where they
    no longer hold: k retreats at once, and grows again below what it was.

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
        self._known: dict[int, float] = {}  # r2 at other k
        self._barred = 0  # targets for which k may not grow beyond the ceiling
        self._ceiling = bounds[1]
        self._again = AGAIN
        self._deviation = UNSEEN  # of r2 from what it was, in the mean
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
        if self._count:
            before = self.explained()
            now = min(1.0 - layer.squared_error / layer.g_dot_g for layer in seen)
            if before - now > FALL * max(before, 0.0) + DEVIATIONS * self._deviation:
                self._bar(max(round(self.k / FACTOR), self.bounds[0]), LONGER)
                self._move(max(self.k // RETREAT, self.bounds[0]), None)
                return
            self._deviation = keep * self._deviation + abs(now - before) / SMOOTHED
        for sums, layer in zip(self._sums, seen, strict=True):
            sums[0] = keep * sums[0] + layer.squared_error
            sums[1] = keep * sums[1] + layer.g_dot_g
        self._count += 1
        here = self.explained()
        self._barred = max(self._barred - 1, 0)
        if not self._barred:  # longer ones are to be tried
            self._known = {k: there for k, there in self._known.items() if k < self.k}
        if self._count < PATIENCE:
            return
        ratio = self.ratio()
        if ratio is not None:
            self._decide(ratio)
        elif self.k < self.bounds[1] and self.explained() > 0.0:
            self._move(self.k + 1, None)  # a step without a target is to be timed
        for k, there in self._known.items():
            if k < self.k and there > here:
                self._known[k] = there + (here - there) / FADES

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
        """Return the k of the best rate, that rate, and the rate at this k.

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
        gain = explained - (k - 1) / 3.0 * (fresh - explained)
        return (self.mix + (k - self.mix) * gain) / (k + ratio)

    def _decide(self, ratio: float) -> None:
        """Go a part of the way to the k whose rate is best, if it is better by the margin."""
        here = self.explained()
        wanted, best, now = self.best(here, self._falls(here), ratio)
        if best - now <= MARGIN * abs(now):
            return
        if wanted < self.k:
            shorter = max(min(round(self.k / FACTOR), self.k - 1), wanted)
            self._bar(shorter)
            self._move(shorter, here)
            return
        longer = min(max(round(self.k * FACTOR), self.k + 1), wanted)
        if self._barred:
            longer = min(longer, self._ceiling)
        if longer > self.k and self._count >= self.k:
            self._move(longer, here)

    def _bar(self, ceiling: int, longer: int = 1) -> None:
        """Let k stay at or below this for a while, for twice as long the next time."""
        self._ceiling = ceiling
        again = self._again
        if not self._barred:
            self._again = min(2 * again, RAREST)
        self._barred = max(self._barred, longer * again)

    def _falls(self, here: float) -> float:
        """Return the factor by which r2 falls with each step of k: the least that what is known of
        this k and another says."""
        factors = [
            (here / there) ** (1.0 / (self.k - k))
            for k, there in self._known.items()
            if k != self.k and there > 0.0 < here
        ]
        least: float = min([1.0, *factors])
        return least

    def _move(self, k: int, here: float | None) -> None:
        """Take another k. Of this one r2 is kept; nothing of any if it is None."""
        if here is None:
            self._known = {}
        if k != self.k:
            if here is not None:
                self._known[self.k] = here
            self.k = k
            self._sums, self._count = [], 0

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next k is made from; numbers, and lists of them."""
        return {
            "k": self.k,
            "sums": [list(sums) for sums in self._sums],
            "count": self._count,
            "known": [[k, there] for k, there in self._known.items()],
            "barred": self._barred,
            "ceiling": self._ceiling,
            "again": self._again,
            "deviation": self._deviation,
            "plain": list(self._plain),
            "targets": list(self._targets),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken; k is kept within the bounds."""
        least, most = self.bounds
        self.k = min(max(int(state["k"]), least), most)
        self._sums = [list(sums) for sums in state["sums"]]
        self._count = int(state["count"])
        self._barred, self._again = int(state["barred"]), int(state["again"])
        # States from before these were there have none.
        self._ceiling = int(state.get("ceiling", most))
        self._deviation = float(state.get("deviation", UNSEEN))
        self._known = {int(k): float(there) for k, there in state["known"]}
        self._plain, self._targets = list(state["plain"]), list(state["targets"])
