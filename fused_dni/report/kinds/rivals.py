"""What a report of rivals says: the table, error against wall-clock, rates, checks."""

from __future__ import annotations

import functools
import statistics
from typing import Any

from fused_dni.report import text
from fused_dni.report.blocks import Block, Figure, Heading, Table, Text

#: Backprop in blues and greens, synthetic gradients in reds, the others between.
COLOURS = {
    "backprop": "#1b6ca8",
    "compiled": "#6fa8dc",
    "graph": "#12486f",
    "in-backward": "#88c9a1",
    "fused": "#2e9e5b",
    "stale": "#8d6a9f",
    "delayed": "#555555",
    "local": "#edae49",
    "feedback": "#b0763a",
    "cdni-z": "#f08a9b",
    "cdni": "#d1495b",
}
STYLES = ("-", "--", ":", "-.")


def blocks(report: dict[str, Any]) -> list[Block]:
    """The report of :func:`fused_dni.experiments.rivals.compare`, finished or not."""
    settings, where = report["settings"], report["facts"]
    device = where["gpu"] if settings["device"] != "cpu" else where["device"]
    rank = settings["rank"]
    said: list[Block] = [
        Heading(
            f"Rivals of backprop on {report['dataset']}: {settings['depth']} hidden layers of "
            f"{settings['hidden']}, {text.seconds(settings['seconds_per_run'])} a run",
            1,
        ),
        Text(
            f"{device}, threads {where['threads']}, torch {where['torch']}, commit "
            f"{where['commit'] or 'unknown'}."
        ),
        Text(
            f"Linear, BatchNorm, ReLU; batch {settings['batch_size']}, {settings['update']}, each "
            f"arm at its own rate with cosine to zero, synthesizers of "
            f"{f'rank {rank}' if rank else 'full rank'} with {100 * settings['warmup']:.0f} % of "
            "the steps for warm-up. Every run has as many steps as fit into the same wall-clock "
            "at the time a step that was measured for all arms together; 'took' is what they "
            "really took. Errors are on the test set at the end of a run."
        ),
        _table(report),
        Text(_winner(report), lead=True),
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
        said += [Heading("Rates"), _tuning(report["tuning"])]
    worst = max(report["gate"].values())
    said.append(
        Text(
            "Before anything was timed, every arm's first steps were held against its formula in "
            f"float64: the largest deviation was {worst:.2g} of the tolerance. Memory: "
            f"{report['memory_is']}; of an arm with several kinds of steps the largest."
        )
    )
    if not report["finished"]:
        wanted = len(report["arms"]) * len(settings["seeds"])
        said.append(Text(f"Unfinished: {len(report['runs'])} of {wanted} runs."))
    return said


def errors(report: dict[str, Any], name: str) -> list[float]:
    """Final errors of an arm's finished runs."""
    return [run["history"][-1]["error"] for run in report["runs"] if run["name"] == name]


def _table(report: dict[str, Any]) -> Table:
    header = ["arm", "step", "vs fused", "vs backprop", "memory", "steps", "error", "range", "took"]
    lines = []
    for row in report["arms"]:
        found = errors(report, row["name"])
        took = [run["seconds"] for run in report["runs"] if run["name"] == row["name"]]
        diverged = sum(run["diverged"] for run in report["runs"] if run["name"] == row["name"])
        mean = f"{100 * statistics.fmean(found):.2f} %" if found else "-"
        lines.append(
            [
                row["name"],
                text.seconds(row["time"]["median"]),
                _cell(row, "fused"),
                _cell(row, "backprop"),
                text.size(row["memory"]),
                str(row["steps"]),
                f"{mean} ({diverged} diverged)" if diverged else mean,
                f"{100 * min(found):.2f}-{100 * max(found):.2f}" if len(found) > 1 else "-",
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
    """A ratio of times, marked if it could not be told from one."""
    if row["name"] == base:
        return "1"
    found = row["against"].get(base)
    if found is None:
        return "-"
    return f"{'~' if found['verdict'] == 'inconclusive' else ''}{found['median']:.2f}"


def _winner(report: dict[str, Any]) -> str:
    """Which arms beat backprop on our kernels: in error at equal wall-clock, beyond the spread."""
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
    seeds = len(ours)
    return (
        "At equal wall-clock, with every seed's error below (above) that of every seed of backprop "
        f"on our kernels: better {_listed(better)}; worse {_listed(worse)}; the ranges of all "
        f"others overlap with it. {seeds} seed{'s' if seeds > 1 else ''}: a range is no interval."
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _arms(report: dict[str, Any]) -> Table:
    lines = [[f"{row['name']}: {row['what']}", f"{row['rate']:g}"] for row in report["arms"]]
    return Table(["what a step is", "rate"], lines)


def _tuning(tried: list[dict[str, Any]]) -> Table:
    rates = list(dict.fromkeys(row["rate"] for row in tried))
    lines = []
    for name in dict.fromkeys(row["name"] for row in tried):
        of = {row["rate"]: row for row in tried if row["name"] == name}
        cells = [
            "diverged" if of[rate]["diverged"] else f"{100 * of[rate]['error']:.2f} %"
            for rate in rates
        ]
        lines.append([name, *cells])
    return Table(
        ["arm", *(f"{rate:g}" for rate in rates)],
        lines,
        "Error on the held-out part of the training set, one seed, half the wall-clock. The arms "
        "that compute backprop's step share the rate of the one that was tried.",
    )


def _draw(report: dict[str, Any], canvas: Any) -> None:
    from matplotlib.ticker import FormatStrFormatter

    axes = canvas.add_subplot()
    drawn: dict[str, int] = {}
    for row in report["arms"]:
        runs = [run["history"] for run in report["runs"] if run["name"] == row["name"]]
        if not runs:
            continue
        kind = next(kind for kind in COLOURS if row["name"].startswith(kind))
        style = STYLES[drawn.get(kind, 0) % len(STYLES)]
        drawn[kind] = drawn.get(kind, 0) + 1
        times = [point["steps"] * row["time"]["median"] for point in runs[0]]
        curves = [[100 * point["error"] for point in history] for history in runs]
        for curve in curves if len(curves) > 1 else []:
            axes.plot(times, curve, color=COLOURS[kind], alpha=0.2, linewidth=0.7)
        mean = [statistics.fmean(points) for points in zip(*curves, strict=True)]
        axes.plot(times, mean, style, color=COLOURS[kind], linewidth=1.7, label=row["name"])
    axes.set_xlabel("wall-clock, seconds")
    axes.set_ylabel("error, % (log)")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(FormatStrFormatter("%g"))
    axes.set_xlim(left=0)
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(frameon=False, fontsize=8, ncols=2)
