"""What one file of benchmarks says: by ``pytest bench --benchmark-json``, or by bench/tables.py."""

from __future__ import annotations

import math
from typing import Any

from fused_dni.report import plots, text
from fused_dni.report.blocks import Block, Figure, Heading, Table, Text
from fused_dni.report.schema import Result
from fused_dni.report.times import Row, results_of

#: Groups that are drawn; a page of many more is read by its tables.
DRAWN = 24


def title(report: Result) -> str:
    """Name what they are."""
    return "Benchmarks"


def sentence(report: Result) -> str:
    """Count the times and their groups."""
    groups = _groups(report)
    times = sum(map(len, groups.values()))
    return f"{text.count(times, 'time')} in {text.count(len(groups), 'group')}."


def _groups(report: Result) -> dict[str, dict[str, Row]]:
    groups: dict[str, dict[str, Row]] = {}
    for name, row in results_of(report).rows.items():
        groups.setdefault(row.group, {})[name] = row
    return groups


def blocks(report: Result) -> list[Block]:
    """Show a table and a figure a group, fastest first."""
    made: list[Block] = [
        Text(
            "Medians with their 99 % intervals. What stands in one group was measured in one run; "
            "how two files differ, `fused-dni compare` tells."
        ),
    ]
    for at, (group, rows) in enumerate(_groups(report).items()):
        rows = dict(sorted(rows.items(), key=lambda item: item[1].median))
        named = {_short(name): row for name, row in rows.items()}
        rows = named if len(named) == len(rows) else rows
        fastest = min(row.median for row in rows.values())
        made.append(Heading(group.removesuffix("/rows") or "no group"))
        made.append(
            Table(
                ["benchmark", "median", "interval", "over the fastest"],
                [
                    [name, text.seconds(row.median), _interval(row), _over(row.median, fastest)]
                    for name, row in rows.items()
                ],
            )
        )
        if at < DRAWN and len(rows) > 1:
            made.append(_figure(f"group-{at + 1}", rows))
    return [*made, *_trained(report.get("stragglers", []))]


def _trained(rows: list[dict[str, Any]]) -> list[Block]:
    """Show what bench/stragglers.py trained."""
    if not rows:
        return []
    cells = []
    for row in rows:
        speed = f"{row['steps_per_second']:.1f}"
        error = text.percent(row["error"], ".2f")
        cells.append([row["name"], f"{row['factor']:g}", str(row["seed"]), speed, error])
    header = ["way", "slower by", "seed", "steps a second", "error"]
    return [Table(header, cells, "A stage is slowed for a part of the time.")]


def _short(name: str) -> str:
    """Without the file of a test and the group of a row."""
    return name.rpartition("::")[2] if "::" in name else name.rpartition("/rows/")[2]


def _over(median: float, fastest: float) -> str:
    return f"{median / fastest:.2f}" if fastest else "-"  # shorter than the clock could tell


def _interval(row: Row) -> str:
    if not math.isfinite(row.high):
        return "too few rounds"
    return f"{text.seconds(row.low)} to {text.seconds(row.high)}"


def _figure(name: str, rows: dict[str, Row]) -> Figure:
    def draw(canvas: Any) -> None:
        axes = canvas.add_subplot()
        axes.barh(range(len(rows)), [1e6 * row.median for row in rows.values()], color=plots.BLUE)
        for at, row in enumerate(rows.values()):
            if math.isfinite(row.high):
                axes.plot([1e6 * row.low, 1e6 * row.high], [at, at], color="black", linewidth=1.2)
        axes.set_yticks(range(len(rows)), list(rows), fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel("microseconds; lines: 99 % interval of the median")

    return Figure(name, draw, "Shorter is faster.", (8.0, 1.0 + 0.26 * len(rows)))
