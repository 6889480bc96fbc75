"""A report in a folder of its own: its JSON, what it says as Markdown, and the plots in that."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fused_dni.report.blocks import Figure, as_markdown
from fused_dni.report.kinds import ReportError, blocks_of


def write_folder(report: dict[str, Any], folder: str | os.PathLike[str]) -> list[Path]:
    """Write ``report.json``, ``report.md`` and its plots into ``folder`` (made if needed).

    Returns:
        The files, the JSON first.

    Raises:
        ReportError: the folder cannot be written, or the report's kind is unknown.
    """
    said = blocks_of(report)
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
