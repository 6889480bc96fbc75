"""``fused-dni``: the command line; a file for each group of commands.

argparse, because it is in the standard library and does what is needed; a nicer parser would be a
dependency of a package whose users mostly want layers. What a command alone needs (scikit-learn,
matplotlib, rich) is imported when it runs.
"""

from fused_dni.cli.program import main, parser

__all__ = ["main", "parser"]
