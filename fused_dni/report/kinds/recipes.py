"""What a report of recipes says: error by recipe and k, and which ranges are apart."""

from __future__ import annotations

import functools
import statistics
from typing import Any

from fused_dni.report import plots, text
from fused_dni.report.blocks import Block, Figure, Heading, Table, Text
from fused_dni.report.outcome import unfinished
from fused_dni.report.schema import Result


def title(report: Result) -> str:
    """Name the data and the network."""
    s = report.settings
    return (
        f"Recipes on {report['dataset']}: {text.count(s['depth'], 'hidden layer')} of {s['hidden']}"
    )


def blocks(report: Result) -> list[Block]:
    """Say what :func:`fused_dni.experiments.recipes.compare` came to, finished or not."""
    rows = report["rows"]
    said: list[Block] = [Text(protocol(report)), table(report)]
    if report["runs"]:
        said.append(
            Figure(
                "error-by-k",
                functools.partial(_draw, report),
                "Error by the steps from one target to the next: mean over seeds, and their range.",
            )
        )
    said += [
        Heading("Share of exact steps"),
        shares(report),
        Heading("The rows"),
        Table(["row", "what it is"], [[name, rows[name]] for name in rows]),
    ]
    return said + unfinished(report)


def protocol(report: Result) -> str:
    """Say how the runs were made, in a paragraph."""
    s = report.settings
    return (
        f"Linear, BatchNorm, ReLU; batch {s['batch_size']}, {s['epochs']} epochs, "
        f"{s.get('update', 'adam')} at {s['lr']:g} (synthesizers: adam at {s['sg_lr']:g}), cosine "
        f"to zero; {s['warmup']:g} epochs of warm-up on true gradients, which held gradients do "
        "without. Every row starts from the same weights and sees the same batches; "
        f"{text.count(len(s['seeds']), 'seed')}. Errors are of the last epoch on the "
        f"{report['evaluated_on']}."
    )


def runs_of(report: Result, name: str, k: int) -> list[dict[str, Any]]:
    """List a row's finished runs at a k."""
    return [run for run in report["runs"] if run["name"] == name and run["k"] in (k, None)]


def errors(report: Result, name: str, k: int) -> list[float]:
    """List their errors, in percent."""
    return [100 * run["error"] for run in runs_of(report, name, k)]


def diverged(report: Result, name: str, k: int) -> int:
    """Count those that diverged: none in older files, where a run that did was none."""
    return sum(run.get("diverged", False) for run in runs_of(report, name, k))


def against(report: Result, name: str, base: str, k: int) -> str:
    """Say how a row's range at a k lies to another's: "below", "above" or empty where they
    overlap, or one of them has no two runs."""
    mine, theirs = errors(report, name, k), errors(report, base, k)
    if min(len(mine), len(theirs)) < 2 or name == base:
        return ""
    return "below" if max(mine) < min(theirs) else "above" if min(mine) > max(theirs) else ""


def cell(report: Result, name: str, k: int) -> str:
    """Write mean and range, marked where the range is apart from the held gradient's."""
    mark = {"below": " *", "above": " !"}.get(against(report, name, "stale", k), "")
    gone = diverged(report, name, k)
    said = text.mean(errors(report, name, k)) + f", {gone} diverged" * bool(gone)
    return f"{said}{mark}"


def table(report: Result) -> Table:
    """Error by row and k: mean (range)."""
    ks = sorted(report.settings["target_every"])
    lines = [[name, *(cell(report, name, k) for k in ks)] for name in report["rows"]]
    caption = (
        f"Error on the {report['evaluated_on']}, %: mean (range) over seeds. * the range lies "
        "below that of a held gradient (stale) at the same k, ! above it. backprop does not depend "
        "on k."
    )
    return Table(["row", *(f"k={k}" for k in ks)], lines, caption)


def shares(report: Result) -> Table:
    """Mean share of the steps that made true gradients, warm-up included, by row and k."""
    ks = sorted(report.settings["target_every"])
    lines = []
    for name in report["rows"]:
        found = [[run["exact"] for run in runs_of(report, name, k)] for k in ks]
        means = [text.percent(statistics.fmean(of), ".1f") if of else "-" for of in found]
        lines.append([name, *means])
    return Table(["row", *(f"k={k}" for k in ks)], lines)


def sentence(report: Result) -> str:
    """Say which recipe has the least error at the largest k, of those of which no run diverged
    if there are such, and which ranges are apart."""
    k = max(report.settings["target_every"])
    means = {
        name: statistics.fmean(found)
        for name in report["rows"]
        if name not in ("backprop", "stale") and (found := errors(report, name, k))
    }
    if not means:
        return "No recipe was trained."
    gone = {name: diverged(report, name, k) for name in report["rows"]}
    best = min(means, key=lambda name: (gone[name] > 0, means[name]))

    def mean(name: str, of: float) -> str:
        return f"{of:.2f} %" + f" ({gone[name]} diverged)" * bool(gone[name])

    said = f"At k={k} the row of least error is {best}, {mean(best, means[best])}"
    for base in ("stale", "backprop"):
        found = errors(report, base, k)
        if found:
            said += f"; {base} {mean(base, statistics.fmean(found))}"
            if len(found) > 1:
                apart = against(report, best, base, k)
                said += ", ranges apart" if apart else ", ranges overlap"
    return f"{said}."


def _draw(report: Result, canvas: Any) -> None:
    axes = canvas.add_subplot()
    ks = sorted(report.settings["target_every"])
    plots.arms(axes, report["rows"], ks, functools.partial(errors, report))
    plots.finish(axes, "k, steps from one target to the next", "error, %", log=True)
