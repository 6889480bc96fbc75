"""How two files differ, with what two runs differ by anyway taken off.

Candidates of one run are compared within rounds (:mod:`fused_dni.measure.timing`); two runs have no
rounds in common. Between them a machine may have grown warmer, slower or busier. So the interval of
a ratio is that of two independent medians, widened on both sides by the *noise* between the runs:
the most by which any of the benchmarks' own floors may have changed, by its interval. Floors are
torch's products alone, the same code in both runs.
"""

from __future__ import annotations

import math
from typing import Any

from fused_dni.measure.baseline import facts
from fused_dni.measure.timing import MARGIN, Ratio
from fused_dni.report.schema import Result
from fused_dni.report.times import ComparisonError, Results, Row

#: Benchmarks whose name has this are floors.
FLOOR = "floor"
#: With fewer floors than this in both files their largest change says little.
ENOUGH = 3
#: Then two runs are taken to differ by at least this: what shared machines often do.
UNKNOWN = 0.10
#: Facts that may differ between two files: what one compares, and when it was measured.
FREE = ("fused_dni", "commit", "command", "date")


def compare(
    old: Results,
    new: Results,
    *,
    noise: float | None = None,
    force: bool = False,
    command: str | None = None,
) -> Result:
    """Compare the benchmarks that stand in both, as a report of kind ``comparison``.

    Args:
        old, new: what is compared; ratios are new over old.
        noise: what the same code may change by from one run to the other, as a fraction; None to
            take it from the floors.
        force: compare even what was measured on different machines, or with other settings.
        command: kept among the facts.

    Raises:
        ComparisonError: the files are of different kinds, have no benchmark in common, or differ
            in machine, versions or settings without ``force``.
    """
    if old.kind != new.kind:
        raise ComparisonError(f"the first file is of kind {old.kind}, the second of {new.kind}")
    common = [name for name in old.rows if name in new.rows]
    if not common:
        raise ComparisonError(
            f"no benchmark stands in both: the first file has {_some(old)}, the second {_some(new)}"
        )
    differences = _differences(old.facts, new.facts)
    if differences and not force:
        named = "; ".join(f"{d['what']}: {d['old']} against {d['new']}" for d in differences)
        raise ComparisonError(f"what was measured differs ({named}): --force compares all the same")
    between = _noise(old, new, common, noise)
    body = {
        "compared": old.kind,
        "old": old.facts,
        "new": new.facts,
        "differences": differences,
        "noise": between,
        "margin": MARGIN,
        "rows": [_row(name, old, new, between["fraction"]) for name in common],
        "only_old": [name for name in old.rows if name not in new.rows],
        "only_new": [name for name in new.rows if name not in old.rows],
    }
    return Result("comparison", facts=facts(command), body=body)


def _some(results: Results) -> str:
    first = next(iter(results.rows))
    return f"{first!r} and {len(results.rows) - 1} more"


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"what": name, "old": old.get(name), "new": new.get(name)}
        for name in dict.fromkeys([*old, *new])
        if name not in FREE and old.get(name) != new.get(name)
    ]


def _noise(old: Results, new: Results, common: list[str], given: float | None) -> dict[str, Any]:
    floors = {
        name: ratio
        for name in common
        if FLOOR in name.lower()
        and math.isfinite((ratio := _ratio(old.rows[name], new.rows[name])).high)
        and ratio.low > 0.0
    }
    worst = max((max(r.high, 1.0 / r.low) - 1.0 for r in floors.values()), default=0.0)
    if given is not None:
        fraction, source = given, "given"
    elif len(floors) < ENOUGH:
        fraction, source = max(worst, UNKNOWN), "assumed"
    else:
        fraction, source = worst, "floors"
    return {"fraction": fraction, "source": source, "floors": floors}


def _ratio(old: Row, new: Row, noise: float = 0.0) -> Ratio:
    """Return of two independent medians: at worst one is at its interval's end and the other at
    its.

    Of a time of zero, shorter than the clock could tell, there is none: NaN, between 0 and
    infinity.
    """
    if not old.median or not new.median:
        return Ratio(math.nan, 0.0, math.inf)
    low = new.low / old.high / (1.0 + noise)
    high = new.high / old.low * (1.0 + noise) if old.low else math.inf
    return Ratio(new.median / old.median, low, high)


def _row(name: str, old: Results, new: Results, noise: float) -> dict[str, Any]:
    before, after = old.rows[name], new.rows[name]
    ratio = _ratio(before, after, noise)
    return {
        "name": name,
        "group": after.group,
        "old": before.median,
        "new": after.median,
        "ratio": ratio,
        "verdict": ratio.verdict(),
    }
