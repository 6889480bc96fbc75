"""What a comparison says: a sentence, the changes first, and how far two runs can be trusted."""

from __future__ import annotations

import math
from typing import Any

from fused_dni.report import plots, text
from fused_dni.report.blocks import Block, Figure, Table, Text
from fused_dni.report.schema import Result

ORDER = ("slower", "faster", "inconclusive")
COLOURS = {"slower": plots.RED, "faster": plots.BLUE, "inconclusive": "gray"}
#: More rows than this make no readable figure; the changes are drawn alone then.
DRAWN = 60


def title(report: Result) -> str:
    """Name what it is."""
    return "Two runs compared"


def blocks(report: Result) -> list[Block]:
    """Show the changes first, and how far two runs can be trusted."""
    rows = sorted(report["rows"], key=lambda row: (ORDER.index(row["verdict"]), -_size(row)))
    made: list[Block] = [Text(_trust(report))]
    if report["differences"]:
        named = "; ".join(f"{d['what']}: {d['old']} to {d['new']}" for d in report["differences"])
        made.append(Text(f"What was measured differs, and was compared by force. {named}."))
    table = [
        [
            row["name"],
            text.seconds(row["old"]),
            text.seconds(row["new"]),
            _ratio(row),
            row["verdict"],
        ]
        for row in rows
    ]
    made.append(Table(["benchmark", "old", "new", "new / old", "verdict"], table))
    drawn = [row for row in rows if row["ratio"].bounds is not None]
    if len(drawn) > DRAWN:
        drawn = [row for row in drawn if row["verdict"] != "inconclusive"][:DRAWN]
    if drawn:
        made.append(
            Figure(
                "comparison",
                lambda canvas: _draw(drawn, canvas),
                "New over old with intervals; right of 1 is slower.",
                (8.0, 1.0 + 0.22 * len(drawn)),
            )
        )
    for which, names in (("first", report["only_old"]), ("second", report["only_new"])):
        if names:
            made.append(Text(f"Only in the {which} file: {', '.join(names)}."))
    return made


def sentence(report: Result) -> str:
    """Say how many are faster, slower and undecided."""
    words = [row["verdict"] for row in report["rows"]]
    counts = ", ".join(f"{words.count(word)} {word}" for word in ORDER)
    return f"Of {len(words)} benchmarks in both files, the second against the first: {counts}."


def _trust(report: Result) -> str:
    noise = report["noise"]
    floors = len(noise["floors"])
    came = {
        "given": "as given on the command line",
        "floors": f"the most that one of {floors} floors may have changed by, which are the same "
        "code in both runs",
        "assumed": f"assumed, since only {floors} floors stand in both files",
    }[noise["source"]]
    return (
        f"Two runs are not interleaved: each interval (99 % of both medians) is widened by "
        f"{text.percent(noise['fraction'], '.1f')}, {came}; a change counts if it goes "
        f"{text.percent(report['margin'])} beyond."
    )


def _size(row: dict[str, Any]) -> float:
    ratio: float = row["ratio"].median
    return max(ratio, 1.0 / ratio) if ratio > 0.0 else 0.0


def _ratio(row: dict[str, Any]) -> str:
    found = row["ratio"]
    if math.isnan(found.median):
        return "too short to be timed"
    few = " (too few rounds)" if found.bounds is None else ""
    return text.ratio(found, marked=False, to="–") + few


def _draw(rows: list[dict[str, Any]], canvas: Any) -> None:
    axes = canvas.subplots()
    for at, row in enumerate(rows):
        low, high = row["ratio"].bounds
        colour = COLOURS[row["verdict"]]
        axes.plot([low, high], [at, at], color=colour, linewidth=1.5)
        axes.plot([row["ratio"].median], [at], "o", color=colour, markersize=4)
    axes.axvline(1.0, color="gray", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row["name"].rpartition("::")[2] for row in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    plots.finish(axes, "new / old", "")
