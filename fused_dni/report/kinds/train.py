"""The report of a training run: ``report.json``, and what it says as blocks."""

from __future__ import annotations

import functools
import json
import os
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fused_dni.experiments.train import Outcome, Settings
from fused_dni.measure.baseline import facts
from fused_dni.report import text
from fused_dni.report.blocks import Block, Figure, Heading, Table, Text, as_markdown
from fused_dni.report.kinds import ReportError, blocks_of

COLOURS = ("#1b6ca8", "#6fa8dc", "#2e9e5b", "#d1495b", "#edae49", "#8d6a9f", "#555555")


def as_json(outcome: Outcome, command: str | None = None) -> dict[str, Any]:
    """The whole report as plain data."""
    return {
        "kind": "train",
        "version": 1,
        "facts": facts(command),
        "settings": asdict(outcome.settings),
        "dataset": outcome.dataset,
        "evaluated_on": "held-out part" if outcome.settings.held_out else "test set",
        "steps_per_epoch": outcome.steps_per_epoch,
        "summary": outcome.summary(),
        "runs": outcome.runs,
        "split": outcome.split,
        "notes": outcome.notes,
    }


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
    settings: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in report["settings"].items()
    }
    s, where = Settings(**settings), report["facts"]
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
    return [*said, *map(Text, report["notes"])]


def write(
    outcome: Outcome,
    folder: str | os.PathLike[str],
    *,
    command: str | None = None,
    verdict: Any = None,
) -> list[Path]:
    """Write ``report.json``, ``report.md`` and its plots into ``folder`` (made if needed).

    Raises:
        ReportError: the folder cannot be written.
    """
    report = as_json(outcome, command)
    if verdict is not None:
        report["verdict"] = json.loads(verdict.to_json())
    return write_folder(report, blocks(report), folder)


def write_folder(
    report: dict[str, Any], said: list[Block], folder: str | os.PathLike[str]
) -> list[Path]:
    """A report's JSON, what it says as Markdown, and the plots in that.

    Raises:
        ReportError: the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / "report.json", folder / "report.md"]
        files[0].write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        files[1].write_text(as_markdown(said, folder, suffix=".png") + "\n")
    except OSError as error:
        raise ReportError(
            f"cannot write the report to {folder}: {error.strerror or error}"
        ) from error
    return [*files, *(folder / f"{b.name}.png" for b in said if isinstance(b, Figure))]
