"""``fused-dni``, before PyTorch is imported: a module of its own, as to import anything of the
package is to import PyTorch, and a version or a Ctrl-C does not wait for that."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any


def _stop(*_: Any) -> None:
    # An exception would come up somewhere inside of an import, which may turn it into another one.
    os.write(2, b"\nfused-dni: stopped; nothing was kept\n")
    os._exit(130)


def main() -> int:
    """Run the command line and return the exit code."""
    before = signal.signal(signal.SIGINT, _stop)
    if sys.argv[1:] == ["--version"]:
        from importlib.metadata import version

        print(f"fused-dni {version('fused-dni')}")
        return 0
    from fused_dni.cli import main as command

    signal.signal(signal.SIGINT, before)
    return command()
