"""Names of rows and words of sentences that results of several kinds share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fused_dni.report import text
from fused_dni.report.timings import Ratio


def device(facts: Mapping[str, Any]) -> str:
    """Name what was measured on."""
    return str(facts["gpu"] if facts.get("where") == "cuda" else facts["device"])


def machine(facts: Mapping[str, Any]) -> str:
    """Name it in a sentence: a GPU, or a number of threads."""
    on_gpu = facts["where"] == "cuda"
    return device(facts) if on_gpu else text.count(facts["threads"], "CPU thread")


def provenance(facts: Mapping[str, Any]) -> str:
    """Say in a line where figures are from; "" if the facts do not tell."""
    if not {"torch", "threads", "date"} <= facts.keys():
        return ""
    return (
        f"{device(facts)}, {text.count(facts['threads'], 'thread')}, torch {facts['torch']}, "
        f"{facts['date']}, commit {facts['commit'] or 'unknown'}."
    )


def versus(found: Ratio) -> str:
    """Say what a ratio of times says, in the words of a sentence: ``1.20x faster than``."""
    word = found.verdict()
    if word != "inconclusive" and not 0.0 < found.median < math.inf:
        return f"{word} than"  # by no number: one time was shorter than the clock could tell
    if word == "inconclusive":
        return "not measurably different from"
    times = 1 / found.median if word == "faster" else found.median
    return f"{text.significant(times)}x {word} than"


NAMES = {
    "backprop": "stock backprop",
    "compiled": "compiled backprop",
    "fused": "backprop on our kernels",
    "floor": "floor (products alone)",
}


def row(k: int | None) -> str:
    """Name the row of DNI with targets on every k-th step; None is never."""
    return f"dni k={k or 'never'}"


def often(k: int | None) -> str:
    """Say how often: ``on every 4th step``, ``on every step``, ``never trained``."""
    if k is None:
        return "never trained"
    return "on every step" if k == 1 else f"on every {ordinal(k)} step"


def ordinal(k: int) -> str:
    """Write ``2nd``, ``11th``, ``23rd``."""
    teens = k % 100 in (11, 12, 13)
    return f"{k}{'th' if teens else {1: 'st', 2: 'nd', 3: 'rd'}.get(k % 10, 'th')}"


def middle_k(ks: Sequence[int | None]) -> int | None:
    """Choose the k that sentences are about: 4, or the first that is not never."""
    return 4 if 4 in ks else next((k for k in ks if k), None)


#: What stands under a table of medians with ratios beside them.
PAIRED = (
    "A ratio is the median of those within rounds, each of which timed both: the medians beside it "
    "divide to about that, not exactly."
)
#: What stands under a table whose ratios are marked.
DOUBT = "A ~ marks a ratio whose interval reaches one: no difference could be shown."
