"""``fused-dni``, before PyTorch is imported: a module of its own, as to import anything of the
package is to import PyTorch, and neither a version, a typo, a file that is no report nor a Ctrl-C
waits for that."""

from __future__ import annotations

import os
import signal
import sys
from importlib.util import find_spec, module_from_spec
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
    # The command line, which needs no PyTorch, is imported below a package whose own contents are
    # left for later: until there is something to run.
    spec = find_spec("fused_dni")
    assert spec is not None and spec.loader is not None
    package, loader = module_from_spec(spec), spec.loader
    sys.modules["fused_dni"] = package

    def load() -> None:
        loader.exec_module(package)
        signal.signal(signal.SIGINT, before)

    from fused_dni.cli import main as command

    return command(load=load)
