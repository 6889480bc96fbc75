"""What the parts of a step say about steps that were not measured: pure functions of their times.

*Amdahl*: how much of a step synthetic gradients can take away at all, on one device.
*Critical path*: what they unlock when every segment of a chain has a device of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: Lengths of the chain that the critical path is shown for.
CHAIN = (1, 2, 4, 8, 16)

AMDAHL = (
    "What synthetic gradients can take off a step of backprop on the same kernels, on one device: "
    "all that a step without targets leaves out, if the prediction itself cost nothing and the "
    "synthesizer were never trained. At this interface no synthesizer and no k can gain more."
)
CRITICAL_PATH = (
    "A chain of n equal segments, each on a device of its own. Under backprop the update of the "
    "lowest waits for all forwards and all backwards; under DNI for its own forward, prediction, "
    "local backward and update. Assumed: no time for communication or for the loss, "
    "no contention, targets trained beside the critical path; one batch at a time, so no pipeline "
    "of micro-batches, which would shorten backprop too."
)


def amdahl(fused: float, without: float, predict: float) -> dict[str, Any]:
    """Share of a step that synthetic gradients can remove.

    Args:
        fused: seconds of a step of backprop on the same kernels.
        without: of a decoupled step without targets.
        predict: of the predictions in it.

    Returns:
        ``share`` of ``fused`` that goes at most (0 if none), and the ``speedup`` at most; None
        where the predictions, which are timed alone, take as long as the whole step.
    """
    left = without - predict
    if left <= 0.0:
        return {"share": None, "speedup": None, "means": AMDAHL}
    share = max(0.0, 1.0 - left / fused)
    return {"share": share, "speedup": fused / left if share else 1.0, "means": AMDAHL}


def critical_path(seconds: Mapping[str, float], chain: Sequence[int] = CHAIN) -> dict[str, Any]:
    """Return the update lock of the lowest segment of a chain, by its length.

    Args:
        seconds: of ``forward``, ``predict``, ``local backward``, ``local backward, dx`` and
            ``update``; backward for the input too under backprop.
        chain: numbers of segments.

    Returns:
        Seconds by n under ``backprop`` and under ``dni`` (from the start of the lowest segment's
        forward to the end of its update), and their ratio, ``unlocked``.
    """
    forward, backward = seconds["forward"], seconds["local backward, dx"]
    update = seconds["update"]
    own = forward + seconds["predict"] + seconds["local backward"] + update
    backprop = [n * (forward + backward) + update for n in chain]
    return {
        "n": list(chain),
        "backprop": backprop,
        "dni": [own for _ in chain],
        "unlocked": [lock / own for lock in backprop],
        "means": CRITICAL_PATH,
    }
