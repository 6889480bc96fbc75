"""What the report of a training run says: accuracy and time by method, and where a step's goes."""

from __future__ import annotations

import functools
import statistics
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from fused_dni.report import text
from fused_dni.report.blocks import Block, Figure, Heading, Table, Text
from fused_dni.report.kinds import blocks_of

#: Accuracy whose wall-clock is reported.
THRESHOLD = {"mnist": 0.98, "digits": 0.96}
#: What reports from before there was such a setting were measured with.
ADDED = {"interface": "output"}
COLOURS = ("#1b6ca8", "#6fa8dc", "#2e9e5b", "#d1495b", "#edae49", "#8d6a9f", "#555555")


@dataclass
class Outcome:
    """What a finished run has to report.

    ``settings`` are those of the experiment, or what a report keeps of them, by the same names.
    ``runs`` holds, for each method and seed, ``name``, ``seed``, ``history`` (a row an epoch:
    epoch, steps, seconds since the start, error), ``fingerprint`` of the final parameters and, for
    ``compiled``, ``compile_seconds``.
    """

    settings: Any
    dataset: str
    runs: list[dict[str, Any]]
    steps_per_epoch: int
    split: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    def names(self) -> list[str]:
        """List the methods in order."""
        return list(dict.fromkeys(run["name"] for run in self.runs))

    def of(self, name: str) -> list[dict[str, Any]]:
        """Select the runs of a method, one a seed."""
        return [run for run in self.runs if run["name"] == name]

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
    """A row a method."""
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
                f"{100 * row['error_mean']:.2f} %",
                f"{100 * row['error_min']:.2f}-{100 * row['error_max']:.2f}" if several else "-",
                text.seconds(row["seconds_per_epoch"]),
                f"{row['seconds_per_epoch'] / base:.2f}x" if base else "-",
                text.seconds(row["seconds_total"]),
                text.seconds(reached) if reached is not None else "not reached",
            ]
        )
    return Table(header, lines)


def split(parts: dict[str, Any]) -> Table:
    """Where a step's time goes, a row a method."""
    keys = ("forward", "sg", "update", "targets", "rest", "total")
    names = ("forward", "SG", "update", "targets", "rest", "total")
    lines = [
        [name, *(text.seconds(times[key]) for key in keys)]
        for name, times in parts["pieces"].items()
    ]
    return Table(["step of", *names], lines)


def curves(outcome: Outcome) -> list[Figure]:
    """Error against wall-clock and against steps."""
    settings = outcome.settings
    title = f"{outcome.dataset}, {settings.depth} x {settings.hidden}, batch {settings.batch_size}"
    return [
        Figure(
            f"accuracy-vs-{name}",
            functools.partial(_draw, outcome, key, label),
            f"Error against {label}: {title}.",
            (6.4, 4.2),
        )
        for name, key, label in (
            ("wall-clock", "seconds", "training wall-clock, seconds"),
            ("steps", "steps", "training steps"),
        )
    ]


def _draw(outcome: Outcome, key: str, label: str, canvas: Any) -> None:
    from matplotlib.ticker import FormatStrFormatter

    axes = canvas.add_subplot()
    for i, method in enumerate(outcome.names()):
        colour = COLOURS[i % len(COLOURS)]
        runs = [run["history"] for run in outcome.of(method)]
        for rows in runs if len(runs) > 1 else []:
            axes.plot(
                [row[key] for row in rows],
                [100 * row["error"] for row in rows],
                color=colour,
                alpha=0.25,
                linewidth=0.8,
            )
        middle = [
            (
                statistics.median([rows[e][key] for rows in runs]),
                100 * statistics.median([rows[e]["error"] for rows in runs]),
            )
            for e in range(len(runs[0]))
        ]
        axes.plot(*zip(*middle, strict=True), color=colour, linewidth=1.8, label=method)
    axes.set_xlabel(label)
    axes.set_ylabel("error, % (log)")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(FormatStrFormatter("%g"))
    axes.set_xlim(left=0)
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(frameon=False)


def blocks(report: dict[str, Any]) -> list[Block]:
    """What a report says: settings, accuracy and time, where a step's time goes, the verdict."""
    s, where = SimpleNamespace(**{**ADDED, **report["settings"]}), report["facts"]
    outcome = Outcome(
        s, report["dataset"], report["runs"], report["steps_per_epoch"], report["split"]
    )
    seeds = len(s.seeds)
    said: list[Block] = [
        Heading(f"{outcome.dataset}: {s.depth} hidden layers of {s.hidden}", 1),
        Text(
            f"{where['device']}, {where['threads']} threads, torch {where['torch']}, "
            f"commit {where['commit'] or 'unknown'}."
        ),
        Text(
            f"Batch {s.batch_size}, {s.epochs} epochs of {outcome.steps_per_epoch} "
            f"steps, {s.update} at {s.lr:g} (synthesizers {s.sg_lr:g}), "
            f"cosine to zero, {s.warmup_steps} warm-up steps on true gradients, "
            f"synthesizers of {f'rank {s.rank}' if s.rank else 'full rank'} at the {s.interface}, "
            f"{seeds} "
            f"seed{'s' if seeds > 1 else ''}. Errors are of the last epoch on the "
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
    if "verdict" in report:
        said.append(Heading("Verdict for these layers"))
        said += [b for b in blocks_of(report["verdict"]) if not isinstance(b, Heading)]
    if "race" in report:
        said.append(Heading("Under an expensive top"))
        said += [b for b in blocks_of(report["race"]) if not isinstance(b, Heading)]
    return [*said, *map(Text, report["notes"])]
