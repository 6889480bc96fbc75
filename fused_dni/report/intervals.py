"""Intervals of a median, from the values alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import lru_cache


@lru_cache(maxsize=1024)
def _rank(n: int, confidence: float) -> int | None:
    """Largest rank r (from 0) with P(x_(r) <= median <= x_(n-1-r)) >= confidence, None if none."""
    allowed = (1.0 - confidence) / 2.0
    if n > 1000:  # the normal approximation is exact to a rank there
        z = statistics.NormalDist().inv_cdf(1.0 - allowed)
        return max(0, math.floor((n - z * math.sqrt(n)) / 2.0) - 1)
    below, rank = 0, None
    for r in range(n // 2):
        below += math.comb(n, r)
        if below / 2**n > allowed:
            break
        rank = r
    return rank


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Bound the median by order statistics, without an assumption on the distribution.

    Args:
        values: the sample.
        confidence: that the median lies within the bounds.

    Returns:
        The lower and the upper bound; ``(-inf, inf)`` if there are too few values for this
        confidence (below six for 95 %).
    """
    rank = _rank(len(values), confidence)
    if rank is None:
        return (-math.inf, math.inf)
    ordered = sorted(values)
    return (ordered[rank], ordered[len(ordered) - 1 - rank])
