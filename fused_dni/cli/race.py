"""``race``: ways of training at equal wall-clock."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from fused_dni.cli.arguments import (
    PROGRAM,
    UsageError,
    built,
    common,
    device_name,
    device_named,
    positive,
    set_threads,
    whole,
)
from fused_dni.cli.output import OutFile, resumable, say_report, unfinished


def add_race(commands: Any) -> None:
    command = commands.add_parser(
        "race",
        help="your own ways of training, each on its own clock, at equal wall-clock",
        description="Train several ways for the same time, in turns, and say which came to what "
        "the first one ends with, and in what part of its time.",
        epilog="A factory is called without arguments and returns the arms by name, the one to "
        "beat first:\neach a function of a seed that returns an object with step(), which trains "
        "by one step,\nand loss(), on data held out.\n\n"
        f"  {PROGRAM} race package.module:factory --seconds 30 --seeds 1 2 3\n\n"
        "Ctrl-C keeps the finished seeds in --out; --resume goes on from there.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("what", metavar="FACTORY", help="package.module:factory")
    command.add_argument("--arms", nargs="+", metavar="NAME", help="of these (all)")
    command.add_argument(
        "--seconds", type=positive("seconds"), default=20.0, help="of each arm and seed (20)"
    )
    command.add_argument(
        "--seeds", nargs="+", type=whole(0, "a seed"), default=[1, 2, 3], metavar="SEED",
        help="(1 2 3)",
    )  # fmt: skip
    command.add_argument(
        "--marks", type=whole(1, "marks"), default=20, help="looks at the loss (20)"
    )
    command.add_argument("--device", type=device_name, default="cpu", help="cpu or cuda (cpu)")
    out = command.add_argument_group("output")
    out.add_argument("--out", metavar="FILE", default="race.json", help="(race.json)")
    out.add_argument("--json", action="store_true", help="print the report as JSON on stdout")
    out.add_argument("--quiet", action="store_true", help="no progress")
    out.add_argument("--resume", action="store_true", help="go on with an unfinished --out")
    common(command)
    command.set_defaults(run=_race, check=_check)


def _check(args: argparse.Namespace) -> None:
    if ":" not in args.what:
        raise UsageError(f"race takes package.module:factory, got {args.what!r}")


def _race(args: argparse.Namespace, command: str) -> int:
    from fused_dni.measure.race import race
    from fused_dni.report.files import as_json
    from fused_dni.report.progress import Progress

    device_named(args.device)
    out = OutFile("--out", args.out, needed=True)
    set_threads(args)
    previous = unfinished(args.out, "race") if args.resume else None
    arms = built(args.what)
    if not isinstance(arms, Mapping) or not all(callable(make) for make in arms.values()):
        raise UsageError(
            f"{args.what} must return a dictionary of functions of a seed, got "
            f"{type(arms).__name__}"
        )
    if args.arms is not None:
        if unknown := [name for name in args.arms if name not in arms]:
            raise UsageError(f"--arms: {args.what} has {', '.join(arms)}; not {unknown[0]!r}")
        arms = {name: arms[name] for name in dict.fromkeys(args.arms)}
    with resumable(out):
        report = race(
            arms,
            seconds=args.seconds,
            seeds=args.seeds,
            marks=args.marks,
            device=args.device,
            previous=previous,
            keep=lambda report: out.write(as_json(report)),
            progress=Progress(enabled=not args.quiet),
            command=command,
        )
    say_report(report, args.json)
    out.finish()
    return 0
