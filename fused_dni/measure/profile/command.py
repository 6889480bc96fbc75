"""The command that is profiled: run as a process of its own, or in this one."""

from __future__ import annotations

import re
import runpy
import shutil
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

#: Our own program, and the package that ``python -m`` runs it from.
PROGRAM, PACKAGE = "fused-dni", "fused_dni"
_PYTHON = re.compile(r"python(\d+(\.\d+)*)?(\.exe)?")


def as_process(words: Sequence[str]) -> list[str]:
    """Return the command for a process of its own: a script or our program by this Python.

    Raises:
        ValueError: there is no such program or script.
    """
    first = words[0]
    if first.endswith(".py"):
        _refuse_missing(first)
        return [sys.executable, *words]
    if first == PROGRAM:
        return [sys.executable, "-m", PACKAGE, *words[1:]]
    if shutil.which(first) is None:
        raise ValueError(f"there is no program {first!r} to profile")
    return list(words)


class InProcess:
    """The command as this process can run it: a script, ``-m module``, or our own program.

    Args:
        words: with or without ``python`` in front, which is always this Python.

    Raises:
        ValueError: anything else, or a script that is not there.
    """

    def __init__(self, words: Sequence[str]) -> None:
        named = bool(_PYTHON.fullmatch(Path(words[0]).name))
        rest = list(words[1:]) if named else list(words)
        if rest[:1] == [PROGRAM] and not named:
            self.kind, self.target, self.arguments = "module", PACKAGE, rest[1:]
        elif rest[:1] == ["-m"] and len(rest) > 1:
            self.kind, self.target, self.arguments = "module", rest[1], rest[2:]
        elif rest and rest[0].endswith(".py"):
            _refuse_missing(rest[0])
            self.kind, self.target, self.arguments = "script", rest[0], rest[1:]
        else:
            raise ValueError(
                f"profile torch runs a script.py, -m MODULE or {PROGRAM} ... in this process, got "
                f"{' '.join(words)!r} (nsys and ncu take any command)"
            )

    def run(self) -> int:
        """Run it to its end and return its exit status; an error of its own is printed."""
        argv, path = sys.argv, list(sys.path)
        sys.argv = [self.target, *self.arguments]
        try:
            if self.kind == "module":
                sys.path.insert(0, "")  # the folder it is run in, as `python -m`
                runpy.run_module(self.target, run_name="__main__", alter_sys=True)
            else:
                sys.path.insert(0, str(Path(self.target).resolve().parent))
                runpy.run_path(self.target, run_name="__main__")
        except SystemExit as stop:
            return _status(stop.code)
        except Exception:
            traceback.print_exc()
            return 1
        finally:
            sys.argv, sys.path[:] = argv, path
        return 0


def _refuse_missing(script: str) -> None:
    if not Path(script).is_file():
        raise ValueError(f"there is no script {script!r} to profile")


def _status(code: object) -> int:
    """Return the exit status that Python makes of ``SystemExit(code)``."""
    if code is None or isinstance(code, int):
        return code or 0
    print(code, file=sys.stderr)
    return 1
