"""The report of a training run: what is written of an outcome."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

from fused_dni.measure.baseline import facts
from fused_dni.measure.verdict.result import Verdict
from fused_dni.report.folder import write_folder
from fused_dni.report.kinds.train import Outcome
from fused_dni.report.schema import Result


def result(
    outcome: Outcome,
    command: str | None = None,
    verdict: Verdict | None = None,
    race: Result | None = None,
) -> Result:
    """Gather the whole report, with the verdict for its layers and a race under an expensive top,
    if there are any."""
    body = {
        "dataset": outcome.dataset,
        "evaluated_on": "held-out part" if outcome.settings.held_out else "test set",
        "steps_per_epoch": outcome.steps_per_epoch,
        "summary": outcome.summary(),
        "runs": outcome.runs,
        "split": outcome.split,
    }
    if verdict is not None:
        body["verdict"] = verdict.report()
    if race is not None:
        body["race"] = race
    return Result(
        "train",
        facts=facts(command),
        settings=asdict(outcome.settings),
        notes=outcome.notes,
        body=body,
    )


def write(
    outcome: Outcome,
    folder: str | os.PathLike[str],
    *,
    command: str | None = None,
    verdict: Verdict | None = None,
) -> list[Path]:
    """Write ``report.json``, ``report.md`` and its plots into ``folder`` (made if needed).

    Raises:
        ReportError: the folder cannot be written.
    """
    return write_folder(result(outcome, command, verdict), folder)
