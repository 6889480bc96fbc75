"""What the report of a training run says: accuracy and time by method, and where a step's goes."""

from __future__ import annotations

import functools
import itertools
import statistics
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from fused_dni.report import plots, text
from fused_dni.report.blocks import Block, Figure, Heading, Table, Text
from fused_dni.report.layout import blocks_of
from fused_dni.report.outcome import Outcome as AnyOutcome
from fused_dni.report.schema import Result, result_of

#: Accuracy whose wall-clock is reported.
THRESHOLD = {"mnist": 0.98, "digits": 0.96}


@dataclass
class Outcome(AnyOutcome):
    """What a finished run of the paper's network has to report.

    Rows of a run's ``history`` have epoch, steps, seconds since the start and error; ``compiled``
    has ``compile_seconds``, too. ``split`` is where a step's time goes, if that was measured.
    """

    steps_per_epoch: int = 0
    split: dict[str, Any] | None = None

    def summary(self, threshold: float | None = None) -> list[dict[str, Any]]:
        """Sum up every method in a row: errors, seconds per epoch, seconds to an accuracy.

        ``seconds_to_threshold`` is the median over seeds of the training time at the end of the
        first epoch whose accuracy is at least ``threshold``; None if a seed never got there.
        """
        threshold = THRESHOLD[self.settings.dataset] if threshold is None else threshold
        rows = []
        for name in self.names():
            runs = self.of(name)
            final = [run["history"][-1]["error"] for run in runs]
            epochs: list[float] = []
            reached: list[float | None] = []
            for run in runs:
                ends = [row["seconds"] for row in run["history"]]
                epochs += [b - a for a, b in zip([0.0, *ends], ends, strict=False)]
                reached.append(
                    next(
                        (
                            row["seconds"]
                            for row in run["history"]
                            if row["error"] <= 1 - threshold + 1e-12
                        ),
                        None,
                    )
                )
            known = [value for value in reached if value is not None]
            rows.append(
                {
                    "name": name,
                    "error_mean": statistics.fmean(final),
                    "error_min": min(final),
                    "error_max": max(final),
                    "errors": final,
                    "seconds_per_epoch": statistics.median(epochs),
                    "seconds_per_epoch_range": [min(epochs), max(epochs)],
                    "seconds_per_step": statistics.median(epochs) / self.steps_per_epoch,
                    "seconds_total": statistics.median(
                        [run["history"][-1]["seconds"] for run in runs]
                    ),
                    "threshold": threshold,
                    "seconds_to_threshold": (
                        statistics.median(known) if len(known) == len(reached) else None
                    ),
                    "seeds_that_reached_threshold": len(known),
                }
            )
        return rows


def summary(outcome: Outcome) -> Table:
    """Show a row a method."""
    rows = outcome.summary()
    base = next((row["seconds_per_epoch"] for row in rows if row["name"] == "backprop"), None)
    header = ["method", "error", "range", "epoch", "vs backprop", "total"]
    header.append(f"to {100 * rows[0]['threshold']:g} %")
    lines = []
    for row in rows:
        several = len(row["errors"]) > 1
        reached = row["seconds_to_threshold"]
        lines.append(
            [
                row["name"],
                text.percent(row["error_mean"], ".2f"),
                text.span([100 * e for e in row["errors"]], to="-") if several else "-",
                text.seconds(row["seconds_per_epoch"]),
                f"{row['seconds_per_epoch'] / base:.2f}x" if base else "-",
                text.seconds(row["seconds_total"]),
                text.seconds(reached) if reached is not None else "not reached",
            ]
        )
    return Table(header, lines)


def split(parts: dict[str, Any]) -> Table:
    """Show where a step's time goes, a row a method."""
    keys = ("forward", "sg", "update", "targets", "rest", "total")
    names = ("forward", "SG", "update", "targets", "rest", "total")
    lines = [
        [name, *("~0" if times[key] < 0.0 else text.seconds(times[key]) for key in keys)]
        for name, times in parts["pieces"].items()
    ]
    lost = any("~0" in line for line in lines)
    caption = "~0: a difference of steps that came out below zero: too little to be seen so."
    return Table(["step of", *names], lines, caption if lost else "")


def beside(outcome: Outcome) -> str:
    """Say in a sentence what a verdict, which is of time alone, leaves out: the errors."""
    ends = []
    for row in outcome.summary():
        ends.append(f"{row['name']} {text.percent(row['error_mean'], '.2f')}")
        if len(row["errors"]) > 1:
            ends[-1] += f" ({text.span(100 * error for error in row['errors'])})"
    epochs = text.count(outcome.settings.epochs, "epoch")
    return f"Errors here, after {epochs} each: {', '.join(ends)}."


def curves(outcome: Outcome) -> list[Figure]:
    """Draw the error against wall-clock and against steps."""
    settings = outcome.settings
    title = f"{outcome.data}, {settings.depth} x {settings.hidden}, batch {settings.batch_size}"
    several = " Bold: the median over seeds; thin: single runs." if len(settings.seeds) > 1 else ""
    return [
        Figure(
            f"accuracy-vs-{name}",
            functools.partial(_draw, outcome, key, label),
            f"Error against {label}: {title}.{several}",
            (6.4, 4.2),
        )
        for name, key, label in (
            ("wall-clock", "seconds", "training wall-clock, seconds"),
            ("steps", "steps", "training steps"),
        )
    ]


def _draw(outcome: Outcome, key: str, label: str, canvas: Any) -> None:
    axes = canvas.add_subplot()
    for method, colour in zip(outcome.names(), itertools.cycle(plots.CYCLE), strict=False):
        found = [[(r[key], 100 * r["error"]) for r in run["history"]] for run in outcome.of(method)]
        plots.runs(axes, found, method, colour, middle=statistics.median)
    axes.set_xlim(left=0)
    plots.finish(axes, label, "error, % (log)", log=True)
    plots.plain_ticks(axes.yaxis)


def outcome_of(report: Result) -> Outcome:
    """Make the outcome that a report was written from."""
    return Outcome(
        SimpleNamespace(**report.settings),
        report["dataset"],
        report["runs"],
        steps_per_epoch=report["steps_per_epoch"],
        split=report["split"],
    )


def title(report: Result) -> str:
    """Name the data and the network."""
    s = report.settings
    return f"{report['dataset']}: {text.count(s['depth'], 'hidden layer')} of {s['hidden']}"


def blocks(report: Result) -> list[Block]:
    """Show settings, accuracy and time, where a step's time goes, the verdict, the race."""
    outcome = outcome_of(report)
    s = outcome.settings
    # Absent from older files, in which they were these.
    mix, lessons = getattr(s, "mix", 0.0), getattr(s, "lessons", 1)
    form = f"of {f'rank {s.rank}' if s.rank else 'full rank'}"
    if getattr(s, "synthesizer", "linear") != "linear":
        form = f"of the {s.synthesizer} form"
    said: list[Block] = [
        Text(
            f"Batch {s.batch_size}, {s.epochs} epochs of {outcome.steps_per_epoch} "
            f"steps, {s.update} at {s.lr:g} (synthesizers {s.sg_lr:g}), "
            f"cosine to zero, {s.warmup_steps} warm-up steps on true gradients, "
            f"{f'steps with targets by {mix:g} of the true gradient, ' if mix else ''}"
            f"synthesizers {form} at the {s.interface}, "
            f"{f'{lessons} lessons a target, ' if lessons > 1 else ''}"
            f"{text.count(len(s.seeds), 'seed')}. Errors are of the last epoch on the "
            f"{report['evaluated_on']}. Times are of training steps alone; methods took turns "
            "epoch by epoch. Time to an accuracy counts whole epochs."
        ),
        Heading("Accuracy and time"),
        summary(outcome),
        *curves(outcome),
    ]
    if outcome.split is not None:
        said += [Heading("Where a step's time goes"), split(outcome.split)]
        said.append(Text(outcome.split["how"]))
    for name, heading in (
        ("verdict", "Verdict for these layers"),
        ("race", "Under an expensive top"),
    ):
        if name in report:
            inner = blocks_of(result_of(report[name]), origin=False)
            said += [Heading(heading), *(b for b in inner if not isinstance(b, Heading))]
            if name == "verdict":
                said.append(Text(beside(outcome)))
    return said
