"""What a report of delays says: error by arm and lag, the rates, cosines at the cuts."""

from __future__ import annotations

import functools
import statistics
from typing import Any

from fused_dni.report import plots, text
from fused_dni.report.blocks import Block, Figure, Heading, Table, Text
from fused_dni.report.outcome import tuning, unfinished
from fused_dni.report.schema import Result


def title(report: Result) -> str:
    """Name the data, the task and the split."""
    s = report.settings
    return (
        f"Late gradients on {report['dataset']}, {s['task']}: {text.count(s['stages'], 'stage')}, "
        f"{text.count(s['depth'], 'hidden layer')} of {s['hidden']}"
    )


def blocks(report: Result) -> list[Block]:
    """Say what :func:`fused_dni.experiments.delay.compare` came to, finished or not."""
    said: list[Block] = [Text(protocol(report)), table(report)]
    if report["runs"]:
        said.append(
            Figure(
                "error-by-lag",
                functools.partial(_draw, report),
                "Error by the steps that a gradient is late over each cut: mean over seeds, and "
                "their range.",
            )
        )
    arms = report["arms"]
    said += [Heading("The arms"), Table(["arm", "what it is"], [[n, arms[n]] for n in arms])]
    if report["tuning"]:
        caption = "Error on the held-out part, %, one seed."
        said += [Heading("Rates"), tuning(report["tuning"], caption, lags=True)]
    if any(run["cosines"] for run in report["runs"]):
        said += [Heading("Cosine of predictions with what came for them, by cut"), _cosines(report)]
    return said + unfinished(report)


def protocol(report: Result) -> str:
    """Say how the runs were made, in a paragraph."""
    s = report.settings
    tuned = len(s["rates"]) > 1
    rates = ", ".join(f"{rate:g}" for rate in s["rates"])
    chosen = (
        f"of {rates} the one that was best on the held-out sixth of the training set in a shorter "
        "run of the first seed, by arm and lag (one choice for all cDNI arms)"
        if tuned
        else rates
    )
    clip = "" if s["max_norm"] is None else f", max_norm {s['max_norm']:g}"
    cuts = "; what passes several cuts is as many times as late" * s.get("each_cut", False)
    through = {
        "reconstruction": f" through {s['code']} units",
        "frozen-top": "; the last stage stays as it was drawn",
    }.get(s["task"], "")
    return (
        f"Linear, BatchNorm, ReLU{through}; batch {s['batch_size']}, {s['epochs']} epochs, "
        f"{text.count(len(s['seeds']), 'seed')}{cuts}; rate at the start {chosen}, cosine "
        f"to zero. cDNI: synthesizers at {s['share']:g} of the rate, in the first "
        f"{text.percent(s['warmup'], 'g')} of the steps stages wait for their gradient{clip}."
    )


def errors(report: Result, name: str, lag: int | None) -> list[float]:
    """Errors of an arm's finished runs at a lag, in percent."""
    return [
        100 * run["error"]
        for run in report["runs"]
        if run["name"] == name and run["lag"] in (lag, None)
    ]


def _cell(report: Result, name: str, lag: int) -> str:
    diverged = sum(
        run["diverged"]
        for run in report["runs"]
        if run["name"] == name and run["lag"] in (lag, None)
    )
    return text.mean(errors(report, name, lag)) + f", {diverged} diverged" * bool(diverged)


def table(report: Result) -> Table:
    """Error by arm and lag: mean (range)."""
    lags = sorted(report.settings["lags"])
    lines = [[name, *(_cell(report, name, lag) for lag in lags)] for name in report["arms"]]
    what = {
        "classification": "Error on the test set, %",
        "frozen-top": "Error on the test set, %, behind a last stage that does not learn",
        "reconstruction": "Variance of the test images that is not reconstructed, %",
    }[report.settings["task"]]
    caption = f"{what}: mean (range) over seeds. backprop and local do not depend on the lag."
    return Table(["arm", *(f"lag {lag}" for lag in lags)], lines, caption)


def sentence(report: Result) -> str:
    """Whom the first cDNI arm beats at the largest lag, every seed below every seed."""
    lag = max(report.settings["lags"])
    ours = next((name for name in report["arms"] if name.startswith("cdni")), None)
    mine = errors(report, ours, lag) if ours else []
    if not ours or not mine:
        return "No synthetic gradient was trained."
    found: dict[str, list[str]] = {"better than": [], "worse than": [], "overlapping": []}
    for name in report["arms"]:
        theirs = errors(report, name, lag)
        if name != ours and theirs:
            apart = "better than" if max(mine) < min(theirs) else "overlapping"
            apart = "worse than" if min(mine) > max(theirs) else apart
            found[apart].append(name)
    said = "; ".join(f"{how} {', '.join(names)}" for how, names in found.items() if names)
    return (
        f"At a lag of {lag}, {ours} by the ranges of {text.count(len(mine), 'seed')}: "
        f"{said or 'alone'}."
    )


def _cosines(report: Result) -> Table:
    cuts = report.settings["stages"] - 1
    lines = []
    for name in report["arms"]:
        for lag in sorted(report.settings["lags"]):
            runs = [
                run["cosines"]
                for run in report["runs"]
                if run["name"] == name and run["lag"] == lag and run["cosines"]
            ]
            if runs:
                known = [[c for c in cut if c is not None] for cut in zip(*runs, strict=True)]
                means = [f"{statistics.fmean(cut):.2f}" if cut else "-" for cut in known]
                lines.append([name, str(lag), *means])
    return Table(["arm", "lag", *(f"cut {i + 1}" for i in range(cuts))], lines, "Mean over seeds.")


def _draw(report: Result, canvas: Any) -> None:
    axes = canvas.add_subplot()
    lags = sorted(report.settings["lags"])
    plots.arms(axes, report["arms"], lags, functools.partial(errors, report))
    plots.finish(axes, "lag, steps", "error, %", log=True)
