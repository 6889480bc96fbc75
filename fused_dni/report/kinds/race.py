"""What a race says: who has come how far, by when, and in what time of the first arm's."""

from __future__ import annotations

import functools
import itertools
import statistics
from typing import Any, NamedTuple

from fused_dni.report import plots, text
from fused_dni.report.blocks import Block, Figure, Table, Text
from fused_dni.report.schema import Result


def title(report: Result) -> str:
    """Name the arms and their time."""
    first, *others = report.settings["arms"]
    seconds = text.seconds(report.settings["seconds"])
    return f"A race: {seconds} for each of {first}, {', '.join(others)}"


def blocks(report: Result) -> list[Block]:
    """Say what :func:`fused_dni.measure.race.race` came to, finished or not."""
    seeds = len({run["seed"] for run in report["runs"]})
    said: list[Block] = [
        Text(
            "Arms are trained in turns, each on its own clock, which runs during steps alone. "
            f"Losses are on data held out. A range is over {text.count(seeds, 'seed')}."
        )
    ]
    if not report["runs"]:
        return [*said, Text("Unfinished: no seed was finished.")]
    said += [
        table(report),
        Figure(
            "loss-vs-time",
            functools.partial(draw, report),
            "Loss against an arm's own clock: mean over seeds, thin lines for single runs.",
            (7.2, 4.6),
        ),
    ]
    if not report["finished"]:
        said.append(Text(f"Unfinished: {seeds} of {len(report.settings['seeds'])} seeds."))
    return said


def runs_of(report: Result, name: str) -> list[dict[str, Any]]:
    """Return an arm's runs."""
    return [run for run in report["runs"] if run["name"] == name]


def reached(history: list[dict[str, float]], loss: float) -> float | None:
    """When a run came down to a loss, between two marks on the straight line; None if never."""
    if history[0]["loss"] <= loss:
        return 0.0
    for before, after in itertools.pairwise(history):
        if after["loss"] <= loss:
            share = (before["loss"] - loss) / (before["loss"] - after["loss"])
            share = share if share == share else 1.0  # from infinity
            return float(before["seconds"] + share * (after["seconds"] - before["seconds"]))
    return None


def shares(report: Result, name: str) -> list[float | None]:
    """By seed, the part of its time in which an arm came to what the first one ends with."""
    first = {run["seed"]: run["history"] for run in runs_of(report, report.settings["arms"][0])}
    found = []
    for run in runs_of(report, name):
        end = first[run["seed"]][-1]
        when = reached(run["history"], end["loss"])
        found.append(None if when is None else when / end["seconds"])
    return found


class Outcome(NamedTuple):
    """Which arms were sooner than the first at what it ends with: with every seed (``won``, with
    the parts of its time, best first), with none, with some."""

    won: list[tuple[str, list[float]]]
    lost: list[str]
    mixed: list[str]


def outcome(report: Result) -> Outcome:
    """Say what became of the other arms."""
    made = Outcome([], [], [])
    for name in report.settings["arms"][1:]:
        found = shares(report, name)
        times = [share for share in found if share is not None]
        if len(times) == len(found) and max(times) < 1.0:
            made.won.append((name, times))
        elif not times:
            made.lost.append(name)
        else:
            made.mixed.append(name)
    made.won.sort(key=lambda one: (statistics.median(one[1]), one[0]))
    return made


def sentence(report: Result) -> str:
    """Say what the race has shown."""
    if not report["runs"]:
        return ""
    first = report.settings["arms"][0]
    won, lost, mixed = outcome(report)
    said = []
    if won:
        best = "; ".join(f"{name} {text.parts(times)}" for name, times in won)
        said.append(f"With every seed sooner than {first} at what it ends with, in parts of its "
                    f"time: {best}.")  # fmt: skip
    if lost:
        said.append(f"Never there in that time: {', '.join(lost)}.")
    if mixed:
        said.append(f"With some seeds, and not with others: {', '.join(mixed)}.")
    return " ".join(said)


def table(report: Result) -> Table:
    """Show a row an arm."""
    first = report.settings["arms"][0]
    lines = []
    for name in report.settings["arms"]:
        runs = runs_of(report, name)
        ends = [run["history"][-1]["loss"] for run in runs]
        diverged = sum(run["diverged"] for run in runs)
        lines.append(
            [
                name,
                f"{statistics.median(run['history'][-1]['steps'] for run in runs):.0f}",
                f"{statistics.fmean(ends):.4g}" + f" ({diverged} diverged)" * bool(diverged),
                f"{min(ends):.4g} to {max(ends):.4g}",
                "1" if name == first else text.parts(shares(report, name)),
            ]
        )
    return Table(
        ["arm", "steps", "loss at the end", "range", f"time to {first}'s end"],
        lines,
        f"The last column is in parts of the time of {first}: the median over seeds, the range.",
    )


def draw(report: Result, canvas: Any) -> None:
    """Draw every arm's loss against its clock."""
    axes = canvas.add_subplot()
    for i, name in enumerate(report.settings["arms"]):
        histories = [run["history"] for run in runs_of(report, name)]
        found = [[(point["seconds"], point["loss"]) for point in h] for h in histories]
        plots.runs(axes, found, name, f"C{i % 10}")
    axes.set_xlim(left=0)
    plots.finish(axes, "seconds of training", "loss on data held out", log=True)
