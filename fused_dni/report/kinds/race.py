"""What a race says: who has come how far, by when, and in what time of the first arm's."""

from __future__ import annotations

import functools
import itertools
import statistics
from typing import Any, NamedTuple

from fused_dni.report import text
from fused_dni.report.blocks import Block, Figure, Heading, Table, Text


def blocks(report: dict[str, Any]) -> list[Block]:
    """The report of :func:`fused_dni.measure.race.race`, finished or not."""
    settings, where = report["settings"], report["facts"]
    device = where["gpu"] if settings["device"] != "cpu" else where["device"]
    first, *others = settings["arms"]
    seeds = len({run["seed"] for run in report["runs"]})
    said: list[Block] = [
        Heading(f"A race: {text.seconds(settings['seconds'])} for each of {first}, "
                f"{', '.join(others)}", 1),
        Text(
            f"{device}, threads {where['threads']}, torch {where['torch']}, commit "
            f"{where['commit'] or 'unknown'}."
        ),
        Text(
            "Arms are trained in turns, each on its own clock, which runs during steps alone. "
            f"Losses are on data held out. A range is over {seeds} seed{'s' * (seeds != 1)}."
        ),
    ]  # fmt: skip
    if not report["runs"]:
        return [*said, Text("Unfinished: no seed was finished.")]
    said += [
        table(report),
        Text(sentence(report), lead=True),
        Figure(
            "loss-vs-time",
            functools.partial(_draw, report),
            "Loss against an arm's own clock: mean over seeds, thin lines for single runs.",
            (7.2, 4.6),
        ),
    ]
    if not report["finished"]:
        said.append(Text(f"Unfinished: {seeds} of {len(settings['seeds'])} seeds."))
    return said


def runs_of(report: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """An arm's runs."""
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


def shares(report: dict[str, Any], name: str) -> list[float | None]:
    """By seed, the part of its time in which an arm came to what the first one ends with."""
    first = {run["seed"]: run["history"] for run in runs_of(report, report["settings"]["arms"][0])}
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


def outcome(report: dict[str, Any]) -> Outcome:
    """What became of the other arms."""
    made = Outcome([], [], [])
    for name in report["settings"]["arms"][1:]:
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


def sentence(report: dict[str, Any]) -> str:
    """What the race has shown."""
    first = report["settings"]["arms"][0]
    won, lost, mixed = outcome(report)
    said = []
    if won:
        best = "; ".join(
            f"{name} {statistics.median(times):.2f} ({_range(times)})" for name, times in won
        )
        said.append(f"With every seed sooner than {first} at what it ends with, in parts of its "
                    f"time: {best}.")  # fmt: skip
    if lost:
        said.append(f"Never there in that time: {', '.join(lost)}.")
    if mixed:
        said.append(f"With some seeds, and not with others: {', '.join(mixed)}.")
    return " ".join(said)


def _range(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def table(report: dict[str, Any]) -> Table:
    """A row an arm."""
    first = report["settings"]["arms"][0]
    lines = []
    for name in report["settings"]["arms"]:
        runs = runs_of(report, name)
        ends = [run["history"][-1]["loss"] for run in runs]
        diverged = sum(run["diverged"] for run in runs)
        times = [share for share in shares(report, name) if share is not None]
        share = f"{statistics.median(times):.2f} ({_range(times)})" if times else "never"
        if times and len(times) < len(runs):
            share += f", {len(times)} of {len(runs)} seeds"
        lines.append(
            [
                name,
                f"{statistics.median(run['history'][-1]['steps'] for run in runs):.0f}",
                f"{statistics.fmean(ends):.4g}" + f" ({diverged} diverged)" * bool(diverged),
                f"{min(ends):.4g} to {max(ends):.4g}",
                "1" if name == first else share,
            ]
        )
    return Table(
        ["arm", "steps", "loss at the end", "range", f"time to {first}'s end"],
        lines,
        f"The last column is in parts of the time of {first}: the median over seeds, the range.",
    )


def _draw(report: dict[str, Any], canvas: Any) -> None:
    axes = canvas.add_subplot()
    for i, name in enumerate(report["settings"]["arms"]):
        runs = [run["history"] for run in runs_of(report, name)]
        colour = f"C{i % 10}"
        for history in runs:
            times = [point["seconds"] for point in history]
            axes.plot(times, [point["loss"] for point in history], color=colour, alpha=0.25,
                      linewidth=0.7)  # fmt: skip
        whole = min(len(history) for history in runs)
        mean = [
            [statistics.fmean(history[j][what] for history in runs) for j in range(whole)]
            for what in ("seconds", "loss")
        ]
        axes.plot(*mean, color=colour, linewidth=1.7, label=name)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("loss on data held out")
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(frameon=False, fontsize=8)
