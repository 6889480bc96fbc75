"""Replicas of the whole model: data parallel, and DiLoCo with many steps between two exchanges.

Every replica works on its own until all exchange parameters' worth of bytes in a ring: 2 (N - 1)
phases, in each of which everyone sends one part in N to the next and waits for the one before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fused_dni.measure.simulate import draws
from fused_dni.measure.simulate_settings import Settings


@dataclass(frozen=True)
class Rounds:
    """What became of the replicas.

    Attributes:
        seconds: of one round, work and exchange, on the average.
        busy: share of it at work, by replica.
    """

    seconds: float
    busy: list[float]


def run(settings: Settings, replicas: int, work: float, tensor_bytes: float, rounds: int) -> Rounds:
    """Simulate rounds of work and exchange.

    Args:
        settings: link and stragglers; the ring runs in the forward direction.
        replicas: N; one exchanges nothing.
        work: seconds of a round's work of one replica.
        tensor_bytes: what is averaged over the replicas.
        rounds: how many.
    """
    link = settings.link
    index = np.arange(replicas)
    slow = _Spells(settings, index)
    key = draws.keys(settings.seed, draws.FORWARD, index)
    transfer = tensor_bytes / replicas / link.bandwidth
    mean = link.jitter_of(link.latency)
    clock, busy, sent = np.zeros(replicas), np.zeros(replicas), 0
    for _ in range(rounds):
        takes = slow.work(clock, work)
        busy += takes
        clock = clock + takes
        for _ in range(2 * (replicas - 1)):
            sent += 1
            arrives = clock + transfer + link.latency
            if mean > 0.0:
                number = np.full(replicas, sent)
                arrives += mean * draws.delay(link.shape, key, number)
            clock = np.maximum(clock + transfer, np.roll(arrives, 1))
    end = float(clock.max())
    return Rounds(end / rounds, [float(share) for share in busy / end])


class _Spells:
    """Slow spells of replicas, as the stages of a chain have them."""

    def __init__(self, settings: Settings, index: np.ndarray) -> None:
        self.given = given = settings.stragglers
        one = given.stage is None or index == given.stage
        self.struck = np.broadcast_to(one, index.shape) & (given.factor > 1.0) & (given.share > 0.0)
        self.gap = given.spell * (1.0 - given.share) / max(given.share, 1e-12)
        self.keys = [draws.keys(settings.seed, p, index) for p in (draws.GAP, draws.SPELL)]
        self.count = np.zeros(len(index), np.int64)
        # A replica's work lasts for long: it goes through fast and slow times.
        self.slow = np.zeros(len(index), bool)
        self.until = np.zeros(len(index))
        self._next(np.flatnonzero(self.struck))

    def _next(self, s: np.ndarray) -> None:
        """Draw the next gap or spell."""
        mean = np.where(self.slow[s], self.given.spell, self.gap)
        which = np.where(self.slow[s], 1, 0)
        drawn = np.where(
            which == 1,
            draws.exponential(self.keys[1][s], self.count[s]),
            draws.exponential(self.keys[0][s], self.count[s]),
        )
        self.until[s] += mean * drawn
        self.count[s] += which

    def work(self, start: np.ndarray, amount: float) -> np.ndarray:
        """Seconds that ``amount`` of work takes each replica from its ``start``."""
        now, left = start.copy(), np.full(len(start), amount)
        still = self.struck.copy()
        while still.any():
            s = np.flatnonzero(still)
            factor = np.where(self.slow[s], self.given.factor, 1.0)
            room = np.maximum(self.until[s] - now[s], 0.0)
            done = np.minimum(left[s], room / factor)
            now[s] += done * factor
            left[s] -= done
            over = s[left[s] > 0.0]
            self.slow[over] = ~self.slow[over]
            self._next(over)
            still[s] = left[s] > 0.0
        return np.asarray(now + left - start)
