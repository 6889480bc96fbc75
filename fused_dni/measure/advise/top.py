"""Where a model has an expensive top: one that costs twice what learns below it, or more.

Two kinds are looked for: the part at the end in which nothing is trained (a frozen critic, a
simulator, the loss), and the last part that is (a large softmax), with all above it. In front of it
an interface lets the top be run on every k-th step alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fused_dni.measure import timing
from fused_dni.measure.advise.blocks import Block
from fused_dni.measure.advise.choose import LADDER
from fused_dni.measure.advise.predict import Blocks, Form
from fused_dni.measure.timing import Ratio, Timing

#: How many times as much as what is below it a top costs that is called expensive.
DEAR = 2.0


def expensive_top(measured: Blocks) -> dict[str, Any] | None:
    """Find the top whose interface would save most, from the blocks' stock times.

    Returns:
        ``blocks`` of the top, ``trained`` or not, its time ``over below``, and what part of its
        time a step would take by ``k`` and at ``most``, prediction and lesson not counted; None if
        there is none.
    """
    blocks = measured.blocks
    learning = [i for i, block in enumerate(blocks) if block.parameters]
    tops = [learning[-1] + 1, learning[-1]] if learning else []
    for first in tops:
        if not _cuts(blocks, first):
            continue
        below, above = _sum(measured, range(first)), _sum(measured, range(first, len(blocks)))
        whole = timing.combine("step", [(1.0, below), (1.0, above)])
        found = timing.ratio(above, below)
        if found.median < DEAR:
            continue
        return {
            "blocks": [block.name for block in blocks[first:]],
            "trained": first == learning[-1],
            "over below": found,
            "by k": {str(k): _factor(whole, below, above, 1.0 / k) for k in LADDER},
            "most": _factor(whole, below, above, 0.0),
        }
    return None


def _cuts(blocks: Sequence[Block], first: int) -> bool:
    """Say whether all from ``first`` on is known to read what the block before it returned, or each
    other, and something below learns."""
    if first >= len(blocks) or not any(block.parameters for block in blocks[:first]):
        return False
    read = [block.producer for block in blocks[first:]]
    return read[0] == first - 1 and all(i is not None and i >= first for i in read[1:])


def _sum(measured: Blocks, indices: range) -> Timing:
    parts = [(i, measured.blocks[i]) for i in indices]
    return timing.combine(
        "sum",
        [(float(b.calls), measured.time(i, Form(False, asks=b.asks))) for i, b in parts],
    )


def _factor(whole: Timing, below: Timing, above: Timing, share: float) -> Ratio:
    """Divide the time of a step that runs so much of the top by that of a whole one."""
    return timing.ratio(timing.combine("step", [(1.0, below), (share, above)]), whole)
