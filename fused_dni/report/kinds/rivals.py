"""What a report of rivals says: the table, error against wall-clock, rates, checks."""

from __future__ import annotations

import functools
import statistics
from typing import Any

from fused_dni.report import plots, text
from fused_dni.report.blocks import Block, Figure, Heading, Table, Text
from fused_dni.report.outcome import tuning
from fused_dni.report.schema import Result


def title(report: Result) -> str:
    """Name the data, the network and the time of a run."""
    s = report.settings
    return (
        f"Rivals of backprop on {report['dataset']}: {s['depth']} hidden layers of {s['hidden']}, "
        f"{text.seconds(s['seconds_per_run'])} a run"
    )


def blocks(report: Result) -> list[Block]:
    """Say what :func:`fused_dni.experiments.rivals.compare` came to, finished or not."""
    settings = report.settings
    rank = settings["rank"]
    said: list[Block] = [
        Text(
            f"Linear, BatchNorm, ReLU; batch {settings['batch_size']}, {settings['update']}, each "
            f"arm at its own rate with cosine to zero, synthesizers of "
            f"{f'rank {rank}' if rank else 'full rank'} with {text.percent(settings['warmup'])} of "
            f"the steps for warm-up{_recipe(settings)}. Every run has as many steps as fit into "
            "the same wall-clock at the time a step that was measured for all arms together; "
            "'took' is what they really took. Errors are on the test set at the end of a run."
        ),
        _table(report),
    ]
    if report["runs"]:
        said.append(
            Figure(
                "error-vs-wall-clock",
                functools.partial(_draw, report),
                "Error against wall-clock (steps times the measured time a step): mean over seeds, "
                "thin lines for single runs.",
                (7.2, 4.6),
            )
        )
    said += [Heading("The arms"), _arms(report)]
    if report["tuning"]:
        said += [Heading("Rates"), tuning(report["tuning"], _TRIED, " %")]
    worst = max(report["gate"].values())
    said.append(
        Text(
            "Before anything was timed, every arm's first steps were held against its formula in "
            f"float64: the largest deviation was {worst:.2g} of the tolerance. The memory of an "
            "arm with several kinds of steps is the largest."
        )
    )
    if not report["finished"]:
        wanted = len(report["arms"]) * len(settings["seeds"])
        said.append(Text(f"Unfinished: {len(report['runs'])} of {wanted} runs."))
    return said


def _recipe(settings: dict[str, Any]) -> str:
    """Say what files before these options do not name."""
    if "mix" not in settings:
        return ""
    lessons = text.count(settings["lessons"], "lesson")
    return f", mix {settings['mix']:g}, {lessons} a target at {settings['share']:.2g} of the rate"


def errors(report: Result, name: str) -> list[float]:
    """Final errors of an arm's finished runs."""
    return [run["history"][-1]["error"] for run in report["runs"] if run["name"] == name]


def _table(report: Result) -> Table:
    header = ["arm", "step", "vs fused", "vs backprop", "memory", "steps", "error", "range", "took"]
    lines = []
    for row in report["arms"]:
        found = errors(report, row["name"])
        took = [run["seconds"] for run in report["runs"] if run["name"] == row["name"]]
        diverged = sum(run["diverged"] for run in report["runs"] if run["name"] == row["name"])
        mean = text.percent(statistics.fmean(found) if found else None, ".2f")
        lines.append(
            [
                row["name"],
                text.seconds(row["time"].median),
                _cell(row, "fused"),
                _cell(row, "backprop"),
                text.size(row["memory"]),
                str(row["steps"]),
                f"{mean} ({diverged} diverged)" if diverged else mean,
                text.span([100 * e for e in found], to="-") if len(found) > 1 else "-",
                text.seconds(statistics.median(took)) if took else "-",
            ]
        )
    return Table(
        header,
        lines,
        "~: not distinguishable from 1 at 99 %. A step is the average over an arm's kinds of steps "
        "(warm-up, with and without targets; computed and repeated).",
    )


def _cell(row: dict[str, Any], base: str) -> str:
    """Return a ratio of times, marked if it could not be told from one."""
    if row["name"] == base:
        return "1"
    found = row["against"].get(base)
    if found is None:
        return "-"
    return text.ratio(found)


def sentence(report: Result) -> str:
    """Say which arms beat backprop on our kernels: in error, beyond the spread."""
    ours = errors(report, "fused")
    if not ours:
        return "Backprop on our kernels (fused) is the bar; it has no finished run."
    better, worse = [], []
    for row in report["arms"]:
        found = errors(report, row["name"])
        if row["name"] != "fused" and found:
            if max(found) < min(ours):
                better.append(row["name"])
            elif min(found) > max(ours):
                worse.append(row["name"])
    return (
        "At equal wall-clock, with every seed's error below (above) that of every seed of backprop "
        f"on our kernels: better {_listed(better)}; worse {_listed(worse)}; the ranges of all "
        f"others overlap with it. {text.count(len(ours), 'seed')}: a range is no interval."
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _arms(report: Result) -> Table:
    lines = [[f"{row['name']}: {row['what']}", f"{row['rate']:g}"] for row in report["arms"]]
    return Table(["what a step is", "rate"], lines)


#: Under the table of rates.
_TRIED = (
    "Error on the held-out part of the training set, one seed, half the wall-clock. The arms that "
    "compute backprop's step share the rate of the one that was tried."
)


def _draw(report: Result, canvas: Any) -> None:
    axes = canvas.add_subplot()
    methods = plots.Methods()
    for row in report["arms"]:
        runs = [run["history"] for run in report["runs"] if run["name"] == row["name"]]
        if not runs:
            continue
        step = row["time"].median
        points = [[(step * at["steps"], 100 * at["error"]) for at in history] for history in runs]
        colour, style = methods.style(row["name"])
        plots.runs(axes, points, row["name"], colour, style)
    axes.set_xlim(left=0)
    plots.finish(axes, "wall-clock, seconds", "error, % (log)", log=True, ncols=2)
    plots.plain_ticks(axes.yaxis)
