"""The report of a recurrent run: what is written of an outcome."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fused_dni.measure import timing
from fused_dni.measure.baseline import facts
from fused_dni.report.files import finite
from fused_dni.report.folder import write_folder
from fused_dni.report.kinds.recurrent import Outcome, sentence


def as_json(outcome: Outcome, command: str | None = None) -> dict[str, Any]:
    """Gather the whole report as plain data."""
    report = {
        "kind": f"train {outcome.settings.task}",
        "version": 1,
        "facts": facts(command),
        "settings": asdict(outcome.settings),
        "data": outcome.data,
        "memory_method": timing.PEAK_MEMORY_CPU,
        "summary": outcome.summary(),
        "sentence": sentence(outcome),
        "costs": outcome.costs,
        "runs": outcome.runs,
        "memory_curve": outcome.memory_curve,
        "notes": outcome.notes,
    }
    made: dict[str, Any] = finite(report)
    return made


def write(
    outcome: Outcome, folder: str | os.PathLike[str], *, command: str | None = None
) -> list[Path]:
    """Write ``report.json``, ``report.md`` and its plots into ``folder`` (made if needed).

    Raises:
        ReportError: the folder cannot be written.
    """
    return write_folder(as_json(outcome, command), folder)
