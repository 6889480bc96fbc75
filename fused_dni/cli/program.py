"""The command line's top: which commands there are, and how errors come out.

Exit codes: 0; 1 something failed; 2 bad input; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from fused_dni.cli import (
    advise,
    compare,
    delay,
    pipeline,
    profile,
    race,
    report,
    rivals,
    simulate,
    training,
    tune,
    verdict,
    verdict_link,
    verdict_top,
)
from fused_dni.cli import map as map_command
from fused_dni.cli.arguments import PROGRAM, Parser, UsageError, common
from fused_dni.cli.output import any_terminal, flush, say, warn
from fused_dni.report import text
from fused_dni.report.loaded import printable


def parser() -> Parser:
    """The command line."""
    top = Parser(
        prog=PROGRAM,
        description="Decoupled neural interfaces: layers that learn from synthetic gradients, "
        "and what they cost beside backprop on this machine.",
        epilog="Errors are one line; set FUSED_DNI_DEBUG=1 (or --traceback) for where they arose.",
    )
    top.add_argument("--version", action="store_true", help="print the version and stop")
    top.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    training.add_demo(commands)
    verdict.add_verdict(commands)
    verdict.add_verdict_lstm(commands)
    verdict_top.add_verdict_top(commands)
    verdict_link.add_verdict_link(commands)
    advise.add_advise(commands)
    training.add_train(commands)
    for task in training.RECURRENT:
        training.add_recurrent(commands, task)
    pipeline.add_pipeline(commands)
    tune.add_tune(commands)
    map_command.add_map(commands)
    compare.add_compare(commands)
    rivals.add_rivals(commands)
    rivals.add_interfaces(commands)
    delay.add_delay(commands)
    race.add_race(commands)
    simulate.add_simulate(commands)
    profile.add_profile(commands)
    report.add_report(commands)
    env = commands.add_parser(
        "env",
        help="what a bug report needs: versions, backends, threads, compilers, GPU",
        description="Print what a bug report needs: versions, backends and for each why it can or "
        "cannot serve, thread pools, compilers, GPU.",
    )
    env.add_argument("--json", action="store_true", help="as JSON")
    env.add_argument(
        "--left-out",
        action="store_true",
        help="only what the installation left out, and how to get it",
    )
    common(env, threads=False)
    env.set_defaults(run=_env)
    # What a command refuses before anything is imported, and whether it needs PyTorch to run.
    for command in {id(made): made for made in commands.choices.values()}.values():
        command.set_defaults(
            check=command.get_default("check"),
            needs_library=command.get_default("needs_library") is not False,
        )
    return top


def _env(args: argparse.Namespace, command: str) -> int:
    from fused_dni.measure.environment import format_report, left_out, report

    if args.left_out:
        for line in left_out():
            say(line)
        return 0
    found = report()
    say(json.dumps(found, indent=1) if args.json else format_report(found))
    return 0


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fused-dni")
    except PackageNotFoundError:
        return "unknown (not installed)"


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    top = parser()
    words = list(argv)
    behind: list[str] = []  # what `profile` runs, and nothing of ours
    if "profile" in words[:2] and "--" in words:
        cut = words.index("--")
        words, behind = words[:cut], words[cut + 1 :]
    for i, (word, following) in enumerate(itertools.pairwise(words)):
        if (word == "train" and following in (*training.RECURRENT, "pipeline")) or (
            word == "verdict" and following in ("lstm", "top", "link")
        ):
            words[i : i + 2] = [f"{word} {following}"]
            break
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
    args.behind = behind
    return args


#: Options whose value is a path of the reader's.
_PATHS = ("--data", "--checkpoint", "--out", "--plot", "--figures", "--check")


def _command(argv: Sequence[str]) -> str:
    """The command as it goes into a report: without the reader's folders."""
    words, hide = [], False
    for word in argv:
        words.append("DIR" if hide else printable(word))
        hide = word in _PATHS
        if word.startswith(tuple(f"{option}=" for option in _PATHS)):
            words[-1] = word.partition("=")[0] + "=DIR"
    return shlex.join([PROGRAM, *words])


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
            args = _parse(given)
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
            if args.check is not None:
                args.check(args)
            if load is not None and args.needs_library:
                load()
            status[0] = args.run(args, _command(given))
    return status[0]
