"""What tables are made of: rows, cells, and the line that says what they hold for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from fused_dni.report import text
from fused_dni.report.timings import Ratio, Timing
from stored import named


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table; every column after the first to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def provenance(results: dict[str, Any], groups: dict[str, Any]) -> str:
    """One line: machine, threads, versions, when and at which commit."""
    facts = results["facts"]
    dates = sorted({group["date"] for group in groups.values()})
    commits = sorted({str(group["commit"]) for group in groups.values()})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    threads = sorted({group["threads"] for group in groups.values()})
    return (
        f"{named(facts)}, {' or '.join(map(str, threads))} threads, torch {facts['torch']}, "
        f"{span}, commit {', '.join(commits)}."
    )


def milliseconds(timed: Timing) -> str:
    """Write the median with its 95 % interval."""
    said = f"{timed.median * 1e3:.3g}"
    low, high = timed.interval
    return said if math.isinf(high) else f"{said} ({low * 1e3:.3g}–{high * 1e3:.3g})"


def interval(ratio: Ratio) -> str:
    """Write a ratio with its interval."""
    return text.ratio(ratio, marked=False, to="–")


def over_floor(row: Mapping[str, Any]) -> str:
    """Write a row's time over its floor, or a dash."""
    return f"{row['per_floor'].median:.2f}" if "per_floor" in row else "–"


def ordered(groups: dict[str, Any]) -> list[str]:
    """Group names by the numbers in them, then by the rest."""
    return sorted(groups, key=lambda key: ([int(n) for n in re.findall(r"\d+", key)], key))
