"""What the installation left out, and why: ``build.json``, which setup.py writes."""

from __future__ import annotations

import json
from pathlib import Path

EXTENSIONS = ("_cpu", "_cuda")


def left_out() -> dict[str, str]:
    """Read which extensions the installation left out, and why; empty if it does not tell."""
    try:
        said = json.loads((Path(__file__).parents[1] / "build.json").read_text())["left out"]
        return {name: str(said[name]) for name in EXTENSIONS if name in said}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def why_missing(extension: str, error: ImportError) -> str:
    """Say why an extension cannot be imported, in a line that begins behind its name.

    Args:
        extension: ``_cpu`` or ``_cuda``.
        error: what its import raised.
    """
    if not isinstance(error, ModuleNotFoundError):
        return f"was built, but cannot be loaded: {error}"
    reason = left_out().get(extension)
    if reason is None:
        return "was not built, or not for this Python: install fused_dni again"
    return f"was not built: {reason}"
