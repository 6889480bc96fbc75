"""What a grid of rivals says: who is ahead after as many batches, and who in as much time."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fused_dni.report import text
from fused_dni.report.blocks import Block, Heading, Table, Text
from fused_dni.report.outcome import tuning, unfinished
from fused_dni.report.schema import Result
from fused_dni.report.timings import Timing, ratio

#: Student's t, two-sided at 95 %, by degrees of freedom from 1 on; beyond them the last.
T95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
Points = list[tuple[float, float]]


class Cell(NamedTuple):
    """A network and a budget."""

    width: int
    depth: int
    budget: int

    def __str__(self) -> str:
        return f"{self.width} x {self.depth}, {self.budget}x"


def title(report: Result) -> str:
    """Name the data and the extent."""
    s = report.settings
    widths, depths = (", ".join(map(str, s[name])) for name in ("widths", "depths"))
    return f"Rivals of backprop on {report['dataset']}: widths {widths}, depths {depths}"


def cells(report: Result) -> list[Cell]:
    """List networks and budgets, in the order of tables."""
    s = report.settings
    return [
        Cell(*place) for place in itertools.product(s["widths"], s["depths"], sorted(s["budgets"]))
    ]


def others(report: Result) -> list[str]:
    """List the arms that do not compute backprop's step."""
    return [name for name in report.settings["arms"] if name not in report["exact"]]


def points(report: Result, cell: Cell, name: str, seed: int) -> Points:
    """Return steps and error of an arm's runs in a network, a run a budget."""
    return sorted(
        (float(run["steps"]), float(run["history"][-1]["error"]))
        for run in report["runs"]
        if (run["width"], run["depth"], run["name"], run["seed"]) == (*cell[:2], name, seed)
    )


def at(curve: Points, steps: float) -> float | None:
    """Read an error between two runs, straight in the logarithm of the steps; None outside."""
    for (n, low), (m, high) in itertools.pairwise(curve):
        if n <= steps <= m:
            return low + (high - low) * math.log(steps / n) / math.log(m / n)
    return None


def when(curve: Points, error: float) -> float | None:
    """Read from how many steps on an error is reached: likewise; None if it is not. The steps of
    the shortest run where that is there already."""
    if curve and curve[0][1] <= error:
        return float(curve[0][0])
    for (n, before), (m, after) in itertools.pairwise(curve):
        if after <= error:
            share = (before - error) / (before - after)
            return math.exp(math.log(n) + share * math.log(m / n))
    return None


def times(report: Result, cell: Cell) -> dict[str, Timing]:
    """Return the arms' times a step in a network; empty where they were not measured."""
    return {
        row["name"]: row["time"]
        for network in report["networks"]
        if (network["width"], network["depth"]) == cell[:2]
        for row in network["arms"]
    }


def fastest(report: Result, cell: Cell) -> str | None:
    """Return which of the arms by backprop has the shortest step."""
    found = {n: t.median for n, t in times(report, cell).items() if n in report["exact"]}
    return min(found, key=lambda name: found[name], default=None)


def by_batches(report: Result, cell: Cell, name: str) -> list[float]:
    """Return, by seed, an arm's error less backprop's after as many batches."""
    ends: dict[int, dict[str, float]] = {}
    for run in report["runs"]:
        if (run["width"], run["depth"], run["budget"]) == tuple(cell):
            ends.setdefault(run["seed"], {})[run["name"]] = run["history"][-1]["error"]
    base = report["trained"]
    return [end[name] - end[base] for end in ends.values() if name in end and base in end]


def by_time(report: Result, cell: Cell, name: str) -> list[float]:
    """Return, by seed, an arm's error at a budget less that of the fastest backprop in as much
    time, between two of its runs; empty where none is as long, or as short."""
    best, took = fastest(report, cell), times(report, cell)
    if best is None or name not in took:
        return []
    found = []
    for run in report["runs"]:
        if (run["width"], run["depth"], run["budget"], run["name"]) == (*cell, name):
            theirs = points(report, cell, report["trained"], run["seed"])
            spent = run["steps"] * took[name].median / took[best].median
            there = at(theirs, spent)
            if there is not None:
                found.append(run["history"][-1]["error"] - there)
    return found


def parts(report: Result, cell: Cell, name: str) -> list[float | None]:
    """Return, by seed, in what part of its time an arm is at what the fastest backprop ends the
    budget with; None where it is not, in any of its runs."""
    best, took = fastest(report, cell), times(report, cell)
    if best is None or name not in took:
        return []
    found: list[float | None] = []
    for run in report["runs"]:
        if (run["width"], run["depth"], run["budget"], run["name"]) == (*cell, report["trained"]):
            curve = points(report, cell, name, run["seed"])
            steps = when(curve, run["history"][-1]["error"])
            share = took[name].median / took[best].median
            if curve:
                found.append(None if steps is None else steps / run["steps"] * share)
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return a 95 % interval of the mean, by Student's t; all numbers for fewer than two."""
    n = len(values)
    if n < 2:
        return -math.inf, math.inf
    half = T95[min(n - 2, len(T95) - 1)] * statistics.stdev(values) / math.sqrt(n)
    mean = statistics.fmean(values)
    return mean - half, mean + half


def _apart(values: Sequence[float]) -> int:
    """Return -1 (less) or 1 (more) where the interval leaves zero out, else 0."""
    low, high = interval(values)
    return (low > 0.0) - (high < 0.0)


def ahead(
    report: Result, name: str, found: Callable[[Result, Cell, str], list[float]]
) -> tuple[int, int, int]:
    """Count where an arm has less error than backprop, where more, and of how many."""
    places = [_apart(values) for cell in cells(report) if (values := found(report, cell, name))]
    return places.count(-1), places.count(1), len(places)


def sooner(report: Result, name: str) -> list[float]:
    """List the parts of backprop's time (the longest of all seeds) of networks and budgets in which
    an arm is there sooner with every seed."""
    return [part for cell in cells(report) if (part := _won(parts(report, cell, name)))]


def sentence(report: Result) -> str:
    """Count, by arm, where it is ahead of backprop."""
    said = []
    for name in others(report):
        less, more, of = ahead(report, name, by_batches)
        line = f"{name} {less}/{more} of {of} after as many batches"
        if report["networks"]:
            less, more, of = ahead(report, name, by_time)
            line += f", {less}/{more} of {of} in as much time"
            line += f", sooner in {len(sooner(report, name))}"
        said.append(line)
    return (
        "Networks and budgets with less/more error than backprop, beyond the 95 % interval of "
        "paired seeds, and where every seed is sooner at what backprop ends with: "
        f"{'; '.join(said)}."
    )


def _won(found: Sequence[float | None]) -> float | None:
    """Return the largest part of backprop's time, if all seeds were sooner."""
    known = [part for part in found if part is not None]
    return max(known) if known and len(known) == len(found) and max(known) < 1.0 else None


def blocks(report: Result) -> list[Block]:
    """Say what :func:`fused_dni.experiments.rival_grid.compare` came to, finished or not."""
    s = report.settings
    said: list[Block] = [
        Text(
            f"Linear, BatchNorm, ReLU; batch {s['batch_size']}, {s['update']}, the rate with "
            f"cosine to zero over each run; budget 1x: {s['steps']} steps, an arm that repeats a "
            "gradient so many batches. Of the arms by backprop one is trained "
            f"({report['trained']}), and its errors count at the time of the fastest. cDNI: mix "
            f"{s['mix']:g}, synthesizers at {s['share']:.2g} of the rate, linear ones of rank "
            f"{s['rank']}, {text.count(s['lessons'], 'lesson')} a target, "
            f"{text.percent(s['warmup'])} of the steps for warm-up. "
            f"{text.count(len(s['seeds']), 'seed')}, paired: the same weights and batches."
        ),
        Heading("After as many batches"),
        _differences(report, by_batches, "Errors on the test set, in points against backprop's."),
    ]
    if report["networks"]:
        said += [
            Heading("In as much time"),
            _differences(
                report,
                by_time,
                "In points against what the fastest backprop has in the arm's time: between two "
                "of its runs, straight in the logarithm of the steps. -: it has none so short, or "
                "so long.",
            ),
            Heading("Time to backprop's error"),
            _parts(report),
            Heading("A step"),
            _steps(report),
        ]
    if report["tuning"]:
        said += [Heading("Rates"), tuning(report["tuning"], _TRIED, " %")]
    return said + unfinished(report)


def _differences(
    report: Result, found: Callable[[Result, Cell, str], list[float]], caption: str
) -> Table:
    lines = []
    for cell in cells(report):
        ends = [
            run["history"][-1]["error"]
            for run in report["runs"]
            if (run["width"], run["depth"], run["budget"], run["name"])
            == (*cell, report["trained"])
        ]
        line = [str(cell), text.percent(statistics.fmean(ends) if ends else None, ".2f")]
        for name in others(report):
            values = found(report, cell, name)
            mark = "" if _apart(values) else "~"
            line.append(f"{mark}{100 * statistics.fmean(values):+.2f}" if values else "-")
        lines.append(line)
    return Table(
        ["network, budget", "backprop", *others(report)],
        lines,
        f"{caption} ~: the 95 % interval over seeds does not leave zero out.",
    )


def _parts(report: Result) -> Table:
    lines = []
    for cell in cells(report):
        line = [str(cell), fastest(report, cell) or "-"]
        for name in others(report):
            found = parts(report, cell, name)
            line.append(text.parts(found) if found else "-")
        lines.append(line)
    return Table(
        ["network, budget", "fastest backprop", *others(report)],
        lines,
        "Until an arm has the error that backprop ends the budget with, in parts of the time of "
        "the fastest backprop: median over seeds, range.",
    )


def _steps(report: Result) -> Table:
    lines = []
    for network in report["networks"]:
        cell = Cell(network["width"], network["depth"], 1)
        best = fastest(report, cell)
        base = times(report, cell)[best] if best else None
        for row in network["arms"]:
            over = "1" if base is None else text.ratio(ratio(row["time"], base))
            lines.append(
                [
                    f"{cell.width} x {cell.depth}",
                    row["name"],
                    text.seconds(row["time"].median),
                    "1" if row["name"] == best else over,
                    text.size(row["memory"]),
                ]
            )
    return Table(["network", "arm", "step", "vs fastest backprop", "memory"], lines)


#: Under the table of rates.
_TRIED = (
    "Error on the held-out part, with the smallest network and budget; the least is taken in all."
)
