"""``fused-dni``: the command line; a dataclass for each command, on :mod:`fused_dni.cli.command`.

What a command alone needs (scikit-learn, matplotlib, rich) is imported when it runs.
"""

from fused_dni.cli.program import main, parser

__all__ = ["main", "parser"]
