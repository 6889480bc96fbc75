"""The report folder of a training run: ``report.json``, ``report.md`` and two plots."""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fused_dni import text
from fused_dni.baseline import facts
from fused_dni.experiments.train import Outcome

PLOTS = ("accuracy-vs-wall-clock.png", "accuracy-vs-steps.png")
#: Drawn best: the eye should find the methods in both plots by the same colour.
COLOURS = ("#1b6ca8", "#6fa8dc", "#2e9e5b", "#d1495b", "#edae49", "#8d6a9f", "#555555")


class ReportError(ValueError):
    """The report cannot be written; the message says why."""


def as_json(outcome: Outcome, command: str | None = None) -> dict[str, Any]:
    """The whole report as plain data."""
    return {
        "kind": "train",
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


def summary_table(outcome: Outcome, *, markdown: bool = False) -> str:
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
    return text.table(header, lines, markdown=markdown)


def split_table(split: dict[str, Any], *, markdown: bool = False) -> str:
    """Where a step's time goes, a row a method."""
    keys = ("forward", "sg", "update", "targets", "rest", "total")
    names = ("forward", "SG", "update", "targets", "rest", "total")
    lines = [
        [name, *(text.seconds(parts[key]) for key in keys)]
        for name, parts in split["pieces"].items()
    ]
    return text.table(["step of", *names], lines, markdown=markdown)


def write(
    outcome: Outcome,
    folder: str | os.PathLike[str],
    *,
    command: str | None = None,
    verdict: Any = None,
) -> list[Path]:
    """Write the report into ``folder`` (made if needed) and return its files.

    Raises:
        ReportError: the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        report = as_json(outcome, command)
        if verdict is not None:
            report["verdict"] = json.loads(verdict.to_json())
        files = [folder / "report.json", folder / "report.md"]
        files[0].write_text(json.dumps(report, indent=1) + "\n")
        plots = _plots(outcome, folder)
        drawn = None
        if verdict is not None:
            drawn = verdict.plot(folder / "verdict.png")
        files[1].write_text(_markdown(outcome, report, plots, verdict, drawn))
        return [*files, *plots, *([drawn] if drawn is not None else [])]
    except OSError as error:
        raise ReportError(
            f"cannot write the report to {folder}: {error.strerror or error}"
        ) from error


def _markdown(
    outcome: Outcome, report: dict[str, Any], plots: list[Path], verdict: Any, drawn: Path | None
) -> str:
    settings, where = outcome.settings, report["facts"]
    seeds = len(settings.seeds)
    parts = [
        f"# {outcome.dataset}: {settings.depth} hidden layers of {settings.hidden}\n",
        (
            f"{where['device']}, {where['threads']} threads, torch {where['torch']}, "
            f"commit {where['commit'] or 'unknown'}."
        ),
        (
            f"Batch {settings.batch_size}, {settings.epochs} epochs of {outcome.steps_per_epoch} "
            f"steps, {settings.update} at {settings.lr:g} (synthesizers {settings.sg_lr:g}), "
            f"cosine to zero, {settings.warmup_steps} warm-up steps on true gradients, "
            f"synthesizers of {f'rank {settings.rank}' if settings.rank else 'full rank'}, {seeds} "
            f"seed{'s' if seeds > 1 else ''}. Errors are of the last epoch on the "
            f"{report['evaluated_on']}. Times are of training steps alone; methods took turns "
            "epoch by epoch. Time to an accuracy counts whole epochs.\n"
        ),
        "## Accuracy and time\n",
        summary_table(outcome, markdown=True) + "\n",
        *(f"![{path.stem.replace('-', ' ')}]({path.name})\n" for path in plots),
    ]
    if outcome.split is not None:
        parts += ["## Where a step's time goes\n", split_table(outcome.split, markdown=True) + "\n"]
        parts.append(outcome.split["how"] + "\n")
    if verdict is not None:
        parts += ["## Verdict for these layers\n", verdict.sentence() + "\n"]
        parts.append(verdict.table(markdown=True) + "\n")
        if drawn is not None:
            parts.append(f"![verdict]({drawn.name})\n")
    parts += [f"- {note}" for note in outcome.notes]
    return "\n".join(parts)


def _plots(outcome: Outcome, folder: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made = []
    for name, key, label in (
        (PLOTS[0], "seconds", "training wall-clock, seconds"),
        (PLOTS[1], "steps", "training steps"),
    ):
        figure, axes = plt.subplots(figsize=(6.4, 4.2), dpi=120)
        lowest = 1.0
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
            lowest = min(lowest, *(error for _, error in middle))
        axes.set_xlabel(label)
        axes.set_ylabel("error, % (log)")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axes.set_xlim(left=0)
        axes.grid(True, which="both", alpha=0.2)
        axes.set_title(
            f"{outcome.dataset}, {outcome.settings.depth} x {outcome.settings.hidden}, "
            f"batch {outcome.settings.batch_size}"
        )
        axes.legend(frameon=False)
        figure.tight_layout()
        path = folder / name
        figure.savefig(path)
        plt.close(figure)
        made.append(path)
    return made
