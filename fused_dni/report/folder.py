"""A result in a folder of its own: its JSON, what it says as Markdown, and the plots in that."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fused_dni.report.blocks import Block, Figure, as_markdown
from fused_dni.report.errors import WriteError
from fused_dni.report.files import write_text
from fused_dni.report.layout import blocks_of
from fused_dni.report.schema import Result, save


def write_folder(
    result: Result, folder: str | os.PathLike[str], said: Sequence[Block] | None = None
) -> list[Path]:
    """Write ``report.json``, ``report.md`` and its plots into ``folder`` (made if needed).

    Args:
        result: what is written.
        folder: where.
        said: what the Markdown says instead of all that the result does.

    Returns:
        The files, the JSON first.

    Raises:
        WriteError: the folder cannot be written.
    """
    folder = Path(folder)
    said = blocks_of(result) if said is None else said
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / "report.json", folder / "report.md"]
        save(files[0], result)
        write_text(files[1], as_markdown(said, folder, suffix=".png") + "\n")
    except OSError as error:
        raise WriteError(
            f"cannot write the report to {folder}: {error.strerror or error}"
        ) from error
    return [*files, *(folder / f"{b.name}.png" for b in said if isinstance(b, Figure))]
