"""Late gradients: one table of all runs of ``fused-dni delay``."""

from __future__ import annotations

import statistics
from typing import Any

from fused_dni.experiments.delay_settings import TASKS, Settings, arm
from fused_dni.report.kinds import delay
from pages.cells import table, where

#: Of :data:`fused_dni.experiments.delay_arms.TASKS`.
TITLES = {
    "classification": "Classification",
    "frozen-top": "Classification behind a last stage that stays as it was drawn",
    "reconstruction": "Reconstruction",
}


def render_delay(results: list[dict[str, Any]]) -> str:
    """Render a table for each task and depth: a row an arm, a column a number of stages and a
    lag."""
    if not results:
        return "Not measured yet."
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for report in results:
        s = report["settings"]
        groups.setdefault((TASKS.index(s["task"]), s["depth"], s["epochs"]), []).append(report)
    return "\n\n".join(_group(found) for _, found in sorted(groups.items(), key=lambda i: i[0]))


def _group(results: list[dict[str, Any]]) -> str:
    columns = sorted({column for r in results for column in _columns(r["settings"])})
    cells: dict[str, dict[tuple[Any, ...], list[float]]] = {}
    for report in results:
        s = report["settings"]
        for name in report["arms"]:
            row = cells.setdefault(_label(name, s), {})
            for column in _columns(s):
                row.setdefault(column, []).extend(delay.errors(report, name, column[1]))
    for label, row in cells.items():  # what passes one cut alone is as late either way
        for n, lag, each in columns:
            if each and not arm(label.partition(",")[0]).relayed and (n, lag, False) in row:
                row.setdefault((n, lag, True), row[n, lag, False])
    families = ("backprop", "stale", "nesterov", "feedback", "local", "cdni")
    labels = sorted(cells, key=lambda name: families.index(name.partition("-")[0]))
    s = results[0]["settings"]
    rows = [
        [name, *(_cell(cells[name].get(column, []), len(s["seeds"])) for column in columns)]
        for name in labels
    ]
    head = (
        f"{TITLES[s['task']]}, {s['depth']} hidden layers of {s['hidden']}, batch "
        f"{s['batch_size']}, {s['epochs']} epochs"
    )
    header = ["arm"]
    header += [f"{n} stages, lag {lag}{' a cut' * each}" for n, lag, each in columns]
    facts = sorted({where(report["facts"]) for report in results})
    commands = [f"`{report['facts']['command']}`" for report in results]
    return f"{head}. {'; '.join(facts)}.\n\n{table(header, rows)}\n\nBy {', '.join(commands)}."


def _columns(settings: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Stages, lag, and whether what passes several cuts is as many times as late; of older reports
    it was not."""
    return [(settings["stages"], lag, settings.get("each_cut", False)) for lag in settings["lags"]]


def _label(name: str, settings: dict[str, Any]) -> str:
    """Return an arm, with what its call changed."""
    usual = Settings()
    if not name.startswith("cdni"):
        return name
    changed = [
        f"{what} {settings[what]:g}"
        for what in ("share", "warmup", "max_norm")
        if settings[what] != getattr(usual, what)
    ]
    return f"{name}, {', '.join(changed)}" if changed else name


def _cell(errors: list[float], seeds: int) -> str:
    if not errors:
        return ""
    if len(errors) == 1:
        return f"{errors[0]:.2f}, 1 seed"
    found = f"{statistics.fmean(errors):.2f} ({min(errors):.2f}–{max(errors):.2f})"
    return found if len(errors) == seeds else f"{found}, {len(errors)} seeds"
