"""Names of rows and words of sentences, for verdicts and their reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol


class Ratio(Protocol):
    """A ratio of two times and how sure it is: :class:`fused_dni.measure.timing.Ratio`."""

    @property
    def median(self) -> float: ...

    def verdict(self) -> str: ...


def versus(found: Ratio) -> str:
    """What a ratio of times says, in the words of a sentence: ``1.20x faster than``."""
    word = found.verdict()
    if word != "inconclusive" and not 0.0 < found.median < math.inf:
        return f"{word} than"  # by no number: one time was shorter than the clock could tell
    if word == "faster":
        return f"{1 / found.median:.2f}x faster than"
    if word == "slower":
        return f"{found.median:.2f}x slower than"
    return "not measurably different from"


def cell(found: Ratio, *, marked: bool = True) -> str:
    """A ratio of times in a table; ``~`` marks one that could not be told from one."""
    mark = "~" if marked and found.verdict() == "inconclusive" else ""
    return f"{mark}{found.median:.2f}"


NAMES = {
    "backprop": "stock backprop",
    "compiled": "compiled backprop",
    "fused": "backprop on our kernels",
    "floor": "floor (products alone)",
}


def row(k: int | None) -> str:
    return f"dni k={k or 'never'}"


def often(k: int | None) -> str:
    if k is None:
        return "never trained"
    if k == 1:
        return "on every step"
    teens = k % 100 in (11, 12, 13)
    ending = "th" if teens else {1: "st", 2: "nd", 3: "rd"}.get(k % 10, "th")
    return f"on every {k}{ending} step"


def middle_k(ks: Sequence[int | None]) -> int | None:
    """The k that sentences are about: 4, or the first that is not never."""
    return 4 if 4 in ks else next((k for k in ks if k), None)
