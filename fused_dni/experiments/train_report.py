"""The report of a training run: what is written of an outcome."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fused_dni.measure.baseline import facts
from fused_dni.report.folder import write_folder
from fused_dni.report.kinds.train import Outcome


def as_json(
    outcome: Outcome,
    command: str | None = None,
    verdict: Any = None,
    race: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Gather the whole report as plain data, with the verdict for its layers and a race under an
    expensive top, if there are any."""
    report: dict[str, Any] = {
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
    if verdict is not None:
        report["verdict"] = verdict.report()
    if race is not None:
        report["race"] = race
    return report


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
    return write_folder(as_json(outcome, command, verdict), folder)
