"""A network trained over several processes: what each way of getting a gradient came to."""

from __future__ import annotations

import functools
from typing import Any

from fused_dni.report import plots, text
from fused_dni.report.blocks import Block, Figure, Table, Text
from fused_dni.report.schema import Result

#: What the modes are called.
NAMES = {
    "exact": "exact: each stage waits",
    "stale": "stale gradient",
    "local": "local losses",
    "decoupled": "synthetic gradient",
}


def title(report: Result) -> str:
    """Name the network, its split and the data."""
    s = report.settings
    return f"{s['depth']} hidden layers of {s['hidden']} on {s['stages']} processes, {s['dataset']}"


def blocks(report: Result) -> list[Block]:
    """Say what :func:`fused_dni.experiments.staged.train` came to."""
    settings = report.settings
    return [
        Text(
            f"One thread a process. {report['steps']} steps of {settings['batch_size']} rows; "
            f"gradients come back on every {_nth(settings['target_every'])} step of the decoupled "
            f"run, whose first {settings['warmup_steps']} wait for them. All processes are on this "
            "machine: its links have no delay to speak of."
        ),
        _table(report),
        _stages(report),
        Figure(
            "loss-vs-time",
            functools.partial(_draw, report),
            "Training loss at the last stage against wall-clock, means over as many steps.",
            (7.2, 4.4),
        ),
    ]


def _nth(k: int) -> str:
    return {1: "single", 2: "second", 3: "third"}.get(k, f"{k}th")


def _rate(run: dict[str, Any]) -> float:
    last = run["stages"][-1]
    return float(last["steps"] - run["resumed_at"]) / float(last["seconds"])


def _table(report: Result) -> Table:
    rows = []
    for run in report["runs"]:
        ages = [s["age"]["mean"] for s in run["stages"] if s["age"]["mean"] is not None]
        sent = sum(sum(s["bytes"].values()) for s in run["stages"])
        rows.append([
            NAMES[run["mode"]],
            f"{_rate(run):.0f}",
            text.percent(run["error"], ".2f"),
            f"{max(ages):.1f}" if ages else "–",
            text.size(sent / max(1, run["stages"][-1]["steps"])),
        ])  # fmt: skip
    header = ["gradient", "steps a second", "error, test set", "its age, steps", "sent a step"]
    return Table(header, rows, "Age: the mean of the stage with the oldest gradients.")


def _stages(report: Result) -> Table:
    rows = []
    for run in report["runs"]:
        for stage in run["stages"]:
            seconds, waited = stage["seconds"], stage["waited"]
            shares = [stage["busy"], waited["input"], waited["gradients"], waited["room"]]
            dropped = sum(stage["dropped"].values()) + stage["expired"]
            rows.append([
                f"{NAMES[run['mode']]}, stage {stage['stage']}",
                *(text.percent(share / seconds) for share in shares),
                *(text.size(sent / max(1, stage["steps"])) for sent in stage["bytes"].values()),
                str(stage["learned"]),
                str(dropped),
            ])  # fmt: skip
    header = ["stage", "at work", "waits for input", "for gradients", "for room"]
    return Table([*header, "up a step", "down", "gradients used", "dropped"], rows)


def sentence(report: Result) -> str:
    """Say which run was soonest and which best."""
    runs = report["runs"]
    soonest, best = max(runs, key=_rate), min(runs, key=lambda run: float(run["error"]))
    said = (
        f"Most steps a second: {NAMES[soonest['mode']]} ({_rate(soonest):.0f}); least error: "
        f"{NAMES[best['mode']]} ({text.percent(best['error'], '.2f')})"
    )
    return f"{said}. One seed: differences of a few tenths of a per cent mean nothing."


def _draw(report: Result, figure: Any) -> None:
    axes = figure.subplots()
    for run in report["runs"]:
        seconds, losses = zip(*run["curve"], strict=True)
        axes.plot(seconds, losses, label=NAMES[run["mode"]])
    plots.finish(axes, "seconds", "training loss", log=True)
