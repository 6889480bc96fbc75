"""What tables are made of: rows, cells, and the line that says what they hold for."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from fused_dni.report import text
from fused_dni.report.timings import Ratio, Timing
from stored import named


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table; every column after the first to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def threads_of(facts: Iterable[Mapping[str, Any]]) -> str:
    """Write how many threads there were: ``1 thread``, ``1 or 2 threads``."""
    found = sorted({of["threads"] for of in facts})
    return f"{' or '.join(map(str, found))} thread{'' if found == [1] else 's'}"


def where(facts: Mapping[str, Any], groups: Iterable[Mapping[str, Any]] = ()) -> str:
    """Say what figures hold for: machine, threads of a processor, versions, when and at which
    commits, of groups that keep theirs or of these facts."""
    of = list(groups) or [facts]
    threads = [] if facts.get("gpu") else [threads_of(of)]
    dates, commits = (sorted({str(found[name]) for found in of}) for name in ("date", "commit"))
    versions = [f"torch {facts['torch']}"]
    versions += [f"Triton {facts['triton']}"] if "triton" in facts else []
    span = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    return ", ".join([named(facts), *threads, *versions, span, f"commit {', '.join(commits)}"])


def time_of(row: Mapping[str, Any], scale: float = 1e6) -> str:
    """Write a row's median, in microseconds unless it says otherwise, or a dash."""
    return f"{row['timing'].median * scale:.3g}" if "timing" in row else "–"


def ratio_of(group: Mapping[str, Any], label: str) -> str:
    """Write a ratio of a group with its interval, or a dash."""
    ratio = group.get("ratios", {}).get(label)
    return "–" if ratio is None else interval(ratio)


def grid_of(results: Mapping[str, Any]) -> dict[str, float]:
    """Return what launches and barriers of a GPU take with a program a multiprocessor, seconds."""
    grids = results.get("gpu-floors", {}).get("barrier", {}).get("grids", {})
    found: dict[str, float] = grids.get(str(results.get("facts", {}).get("multiprocessors")), {})
    return found


def timed_rows(group: Mapping[str, Any]) -> list[list[str]]:
    """Return a group's candidates: name, microseconds, over the floor."""
    named_rows = ((name, group["rows"][name]) for name in group["order"])
    return [[name, time_of(row), over_floor(row)] for name, row in named_rows]


def without_figure(rows: Mapping[str, Any]) -> list[str]:
    """Return a paragraph that says which candidates failed, and why, if any did."""
    failed = [f"{name}: {row['failed']}" for name, row in rows.items() if "failed" in row]
    return [f"No figure: {'; '.join(failed)}."] if failed else []


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
