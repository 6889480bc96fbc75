"""The command line's top: which commands there are, and how errors come out.

Exit codes: 0; 1 something failed; 2 bad input; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from fused_dni.cli.advise import Advise
from fused_dni.cli.arguments import set_threads
from fused_dni.cli.command import PROGRAM, Command, Parser, UsageError, add, read
from fused_dni.cli.compare import Compare
from fused_dni.cli.map import Map
from fused_dni.cli.output import any_terminal, flush, say, warn
from fused_dni.cli.pipeline import TrainPipeline
from fused_dni.cli.profile import Profile
from fused_dni.cli.race import Race
from fused_dni.cli.report import Report
from fused_dni.cli.rivals import Delay, Interfaces, Literature, Recipes, RivalGrid, Rivals
from fused_dni.cli.simulate import Simulate
from fused_dni.cli.training import (
    Demo,
    Train,
    TrainCharacters,
    TrainCopy,
    TrainRepeatCopy,
    TrainRows,
)
from fused_dni.cli.tune import Tune
from fused_dni.cli.verdict import Verdict, VerdictLSTM
from fused_dni.cli.verdict_link import VerdictLink
from fused_dni.cli.verdict_top import VerdictTop
from fused_dni.measure.options import option
from fused_dni.report import text
from fused_dni.report.loaded import printable


@dataclass(kw_only=True)
class Env(Command):
    """Print what a bug report needs: versions, backends and for each why it can or cannot serve,
    thread pools, compilers, GPU."""

    name = "env"
    summary = "what a bug report needs: versions, backends, threads, compilers, GPU"

    json: bool = option(False, help="as JSON")
    left_out: bool = option(False, help="only what the installation left out, and how to get it")

    def run(self, command: str) -> int:
        from fused_dni.measure.environment import format_report, left_out, report

        if self.left_out:
            for line in left_out():
                say(line)
            return 0
        found = report()
        say(json.dumps(found, indent=1) if self.json else format_report(found))
        return 0


COMMANDS: tuple[type[Command], ...] = (
    *(Demo, Verdict, VerdictLSTM, VerdictTop, VerdictLink, Advise),
    *(Train, TrainCharacters, TrainCopy, TrainRepeatCopy, TrainRows, TrainPipeline),
    *(Tune, Map, Compare, Rivals, RivalGrid, Interfaces, Delay, Recipes, Literature),
    *(Race, Simulate, Profile, Report, Env),
)
#: Commands of two words.
TWO_WORDS = tuple(made.name for made in COMMANDS if " " in made.name)


def parser(*names: str) -> Parser:
    """Make argparse's parser of the command line; where commands are named, only they have their
    options, which takes a fifth of the time."""
    top = Parser(
        prog=PROGRAM,
        description="Decoupled neural interfaces: layers that learn from synthetic gradients, "
        "and what they cost beside backprop on this machine.",
        epilog="Errors are one line; set FUSED_DNI_DEBUG=1 (or --traceback) for where they arose.",
    )
    top.add_argument("--version", action="store_true", help="print the version and stop")
    top.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for made in COMMANDS:
        add(commands, made, not names or made.name in names)
    return top


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fused-dni")
    except PackageNotFoundError:
        return "unknown (not installed)"


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    words = list(argv)
    behind: list[str] = []  # what `profile` runs, and nothing of ours
    if "profile" in words[:2] and "--" in words:
        cut = words.index("--")
        words, behind = words[:cut], words[cut + 1 :]
    for i, (word, following) in enumerate(itertools.pairwise(words)):
        if f"{word} {following}" in TWO_WORDS:
            words[i : i + 2] = [f"{word} {following}"]
            break
    top = parser("", *words)
    args, extra = top.parse_known_args(words)
    if extra:
        known: Parser = top
        for action in top._actions:
            if isinstance(action, argparse._SubParsersAction) and args.command in action.choices:
                known = action.choices[args.command]
        what = "option" if extra[0].startswith("-") else "argument"
        allowed = known.options() if what == "option" else []
        given = extra[0].partition("=")[0]
        message = (
            text.unknown(what, given, allowed) if allowed else f"unexpected argument {given!r}"
        )
        raise UsageError(f"{message} (see {known.prog} --help)")
    return args, behind


#: Options whose value is a path of the reader's.
_PATHS = ("--data", "--checkpoint", "--out", "--plot", "--figures", "--check")


def _command(argv: Sequence[str]) -> str:
    """Write the command as it goes into a report: without the reader's folders."""
    words, hide = [], False
    for word in argv:
        words.append("DIR" if hide else printable(word))
        hide = word in _PATHS
        if word.startswith(tuple(f"{option}=" for option in _PATHS)):
            words[-1] = word.partition("=")[0] + "=DIR"
    return shlex.join([PROGRAM, *words])


#: What PyTorch says where a CPU has no memory left, an error of no class of its own.
_REFUSED = re.compile(r"DefaultCPUAllocator: .* tried to allocate (\d+) bytes")


@contextmanager
def _as_one_line(debug: bool, status: list[int]) -> Iterator[None]:
    """Turn exceptions into a line on stderr and an exit code."""

    def fail(message: object, code: int, *, internal: bool = False) -> None:
        status[0] = code
        lines = " ".join(str(message).split()) or type(message).__name__
        hint = " (FUSED_DNI_DEBUG=1 shows where)" if internal else ""
        warn(f"{PROGRAM}: error: {lines}{hint}")

    try:
        yield
    except KeyboardInterrupt:
        status[0] = 130
        warn(f"\n{PROGRAM}: stopped; nothing was kept")
    except BrokenPipeError:
        flush()  # of help, which argparse prints: whoever read it has seen enough (`| head`)
    except Exception as error:
        if type(error).__name__ == "Interrupted":
            status[0] = 130
            warn(f"\n{PROGRAM}: stopped; {error}")
            return
        if debug:
            raise
        if isinstance(error, ModuleNotFoundError):
            message = f"{error.name} is missing: pip install {error.name}"
            fail(message, 1)
        elif isinstance(error, MemoryError):
            fail("not enough memory", 1)
        elif found := _REFUSED.search(str(error)):
            wanted = text.size(int(found[1]))
            fail(f"not enough memory for a tensor of {wanted}: ask for smaller sizes", 1)
        else:
            bad_input = isinstance(error, (ValueError, IndexError))
            plain = bad_input or isinstance(error, (OSError, RuntimeError))
            named = error if plain else f"{type(error).__name__}: {error}"
            fail(named, 2 if bad_input else 1, internal=not plain)


def main(argv: Sequence[str] | None = None, *, load: Callable[[], None] | None = None) -> int:
    """Run the command line and return the exit code.

    Args:
        argv: the arguments; None for the process's.
        load: imports what is behind the command line; called when the arguments are known to be
            good, and not at all by what can do without.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    debug = bool(os.environ.get("FUSED_DNI_DEBUG")) or "--traceback" in given
    status = [0]
    with any_terminal(), _as_one_line(debug, status):
        try:
            args, behind = _parse(given)
        except SystemExit as stop:  # --help
            return int(stop.code or 0)
        except UsageError as error:
            warn(f"{PROGRAM}: error: {error}")
            return 2
        if args.version:
            say(f"{PROGRAM} {_version()}")
        elif args.command is None:
            parser().print_help()
        else:
            command = read(args, behind)
            command.check()
            if load is not None and command.needs_library:
                load()
            set_threads(getattr(command, "threads", None))
            status[0] = command.run(_command(given))
    return status[0]
