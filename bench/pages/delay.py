"""Late gradients: one table of all runs of ``fused-dni delay``."""

from __future__ import annotations

import statistics
from typing import Any

from fused_dni.report.kinds import delay
from pages.cells import table
from stored import named

#: Reports whose columns are apart, in this order.
TASKS = ("classification", "reconstruction")


def render_delay(results: list[dict[str, Any]]) -> str:
    """A row an arm, a column a task, number of stages and lag."""
    if not results:
        return "Not measured yet."
    columns = _columns(results)
    arms = list(dict.fromkeys(name for report in results for name in report["arms"]))
    families = list(delay.COLOURS)
    arms.sort(key=lambda name: families.index(name.partition("-")[0]))
    rows = [
        [name, *(_cell(parts, name, key[2]) for key, parts in columns.items())] for name in arms
    ]
    header = [f"{_short(task)}{stages} stages, lag {lag}" for task, stages, lag in columns]
    lines = [table(["arm", *header], rows), ""]
    for report in results:
        facts, s = report["facts"], report["settings"]
        lines.append(
            f"- {_short(s['task'])}{s['stages']} stages: {named(facts)}, threads "
            f"{facts['threads']}, torch {facts['torch']}, {facts['date']}, commit "
            f"{facts['commit']}: "
            f"`{facts['command']}`."
        )
    return "\n".join(lines)


def _short(task: str) -> str:
    return "" if task == "classification" else f"{task}, "


Columns = dict[tuple[str, int, int], list[dict[str, Any]]]


def _columns(results: list[dict[str, Any]]) -> Columns:
    """The reports by task, stages and lag."""
    found: Columns = {}
    for report in results:
        settings = report["settings"]
        for lag in settings["lags"]:
            found.setdefault((settings["task"], settings["stages"], lag), []).append(report)
    return dict(sorted(found.items(), key=lambda item: (TASKS.index(item[0][0]), *item[0][1:])))


def _cell(parts: list[dict[str, Any]], name: str, lag: int) -> str:
    errors = [error for report in parts for error in delay.errors(report, name, lag)]
    if not errors:
        return ""
    return f"{statistics.fmean(errors):.2f} ({min(errors):.2f}–{max(errors):.2f})"
