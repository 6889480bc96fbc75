"""A report in a folder of its own: its JSON, what it says as Markdown, and the plots in that."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fused_dni.report.blocks import Block, Figure, as_markdown
from fused_dni.report.errors import ReportError
from fused_dni.report.files import as_json, write_text
from fused_dni.report.kinds import blocks_of


def write_folder(report: dict[str, Any], folder: str | os.PathLike[str]) -> list[Path]:
    """Write ``report.json``, ``report.md`` and its plots into ``folder`` (made if needed).

    Returns:
        The files, the JSON first.

    Raises:
        ReportError: the folder cannot be written, or the report's kind is unknown.
    """
    return write_blocks(report, blocks_of(report), folder)


def write_blocks(
    report: dict[str, Any], said: Sequence[Block], folder: str | os.PathLike[str]
) -> list[Path]:
    """Write the same of a report that says ``said``."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / "report.json", folder / "report.md"]
        write_text(files[0], as_json(report))
        write_text(files[1], as_markdown(said, folder, suffix=".png") + "\n")
    except OSError as error:
        raise ReportError(
            f"cannot write the report to {folder}: {error.strerror or error}"
        ) from error
    return [*files, *(folder / f"{b.name}.png" for b in said if isinstance(b, Figure))]
