"""What the installation left out, and why: ``build.json``, which setup.py writes."""

from __future__ import annotations

import json
from pathlib import Path


def why_left_out(extension: str) -> str:
    """Say why an extension is not there, in a line that begins behind its name.

    Args:
        extension: ``_cpu`` or ``_cuda``.
    """
    try:
        said = json.loads((Path(__file__).parents[1] / "build.json").read_text())["left out"]
        return f"was not built: {said[extension]}"
    except (OSError, ValueError, KeyError, TypeError):
        return "was not built, or not for this Python: install fused_dni again"
