"""The report of a recurrent run: what is written of an outcome."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

from fused_dni.measure import timing
from fused_dni.measure.baseline import facts
from fused_dni.report.folder import write_folder
from fused_dni.report.kinds.recurrent import Outcome
from fused_dni.report.schema import Result


def result(outcome: Outcome, command: str | None = None) -> Result:
    """Gather the whole report."""
    return Result(
        f"train {outcome.settings.task}",
        facts=facts(command),
        settings=asdict(outcome.settings),
        memory_is=timing.PEAK_MEMORY_CPU,
        notes=outcome.notes,
        body={
            "data": outcome.data,
            "summary": outcome.summary(),
            "costs": outcome.costs,
            "runs": outcome.runs,
            "memory_curve": outcome.memory_curve,
        },
    )


def write(
    outcome: Outcome, folder: str | os.PathLike[str], *, command: str | None = None
) -> list[Path]:
    """Write ``report.json``, ``report.md`` and its plots into ``folder`` (made if needed).

    Raises:
        ReportError: the folder cannot be written.
    """
    return write_folder(result(outcome, command), folder)
