"""Writing files of text: UTF-8 wherever we are, whole or not at all, and tried beforehand."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from fused_dni.report.errors import WriteError


def as_json(report: Any) -> str:
    """Write a result as JSON, a line at its end; null for what JSON has no number for."""
    return json.dumps(finite(report), indent=1, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """Make plain data of results, timings and ratios, and null where JSON has no number: of
    infinity, and of what is no number."""
    if hasattr(value, "to_json"):
        return finite(value.to_json())
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def try_file(path: str | os.PathLike[str]) -> None:
    """See whether a file could be written, before there is anything to write into it.

    Its folder is made; the file itself is left as it was.

    Raises:
        WriteError: it could not.
    """
    target = Path(path)
    try:
        with suppress(FileExistsError):  # that the parent is a file shows below
            target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_file():  # to open a pipe is to wait for its reader
            if not os.access(target, os.W_OK):
                raise PermissionError(13, "Permission denied")
            return
        absent = not target.exists()
        with target.open("ab"):
            pass
        if absent:
            target.unlink()
    except OSError as error:
        raise unwritten(path, error) from error


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a file of text: whoever reads or interrupts sees the old file or the new one.

    What is no regular file (a device, a pipe) is written into, and never replaced.

    Raises:
        WriteError: it cannot be written.
    """
    target = Path(path)
    content = text.encode("utf-8", "backslashreplace")
    try:
        real = Path(os.path.realpath(target))
        if (real.exists() and not real.is_file()) or not os.access(real.parent, os.W_OK):
            with real.open("wb") as out:
                out.write(content)
        else:
            _replace(real, content)
    except OSError as error:
        raise unwritten(path, error) from error
    return target


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{os.getpid()}.part")
    try:
        partial.write_bytes(content)
        if path.exists():
            partial.chmod(path.stat().st_mode & 0o7777)
        os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink()


def unwritten(path: str | os.PathLike[str], error: OSError) -> WriteError:
    """Say what could not be written, and why."""
    return WriteError(f"cannot write {os.fspath(path)}: {error.strerror or error}")
