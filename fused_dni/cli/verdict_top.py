"""``verdict top``."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any

from fused_dni.cli.arguments import (
    PROGRAM,
    UsageError,
    built,
    common,
    positive,
    rate,
    refuse_format,
    rule,
    set_threads,
    whole,
)
from fused_dni.cli.output import OutFile, say_verdict

if TYPE_CHECKING:
    from fused_dni.measure.race import Arms
    from fused_dni.measure.verdict import TopVerdict

EXAMPLE = """\
import torch
from torch import nn

def factory():
    critic = nn.Sequential(nn.Linear(64, 2048), nn.ReLU(), nn.Linear(2048, 64))
    critic.requires_grad_(False)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64))
    def top(h, x): return (critic(h) - critic(x)).square().sum(1).mean()
    def batch(number):
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(number))
        return x, x
    return net, top, batch
"""


def add_verdict_top(commands: Any) -> None:
    command = commands.add_parser(
        "verdict top",
        help="what is gained by running an expensive top on every k-th step alone",
        description="Time what learns, what is above it, prediction and lesson, and whole cycles "
        "of k steps with the top run in one of them; say from which k it pays and what the most "
        "is that can be gained. With --race, train both ways for the same time, too.",
        epilog="A factory is called without arguments and returns (bottom, top, batch), or\n"
        "(bottom, top, batch, synthesizer). bottom learns: h = bottom(x). top is everything\n"
        "above, loss = top(h, *rest): a module, or a function that trains nothing.\n"
        "(x, *rest) = batch(number), the same for the same number: from 0 on for training, below\n"
        "0 for looking at the loss (held-out data, where there are such). The first tensor of\n"
        "the rest is the synthesizer's context. For a race the factory is called anew for each\n"
        "arm and seed, behind torch.manual_seed(seed).\n\n"
        f"  {PROGRAM} verdict top mine:factory --race 20     # with this in mine.py:\n\n"
        + "".join(f"    {line}\n" if line else "\n" for line in EXAMPLE.splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("what", metavar="FACTORY", help="package.module:factory")
    how = command.add_argument_group("method")
    how.add_argument(
        "--target-every",
        nargs="+",
        type=whole(1, "k"),
        metavar="K",
        help="(1 2 4 8 16; of a race 4 8)",
    )
    how.add_argument(
        "--synthesizers",
        nargs="+",
        metavar="NAME",
        help="auto, softmax, difference, rank16 or another rank, dense, diagonal, conv (auto: the "
        "first that fits), where the factory brings none",
    )
    how.add_argument("--update", choices=("sgd", "adam", "adamw"), default="adam", help="(adam)")
    how.add_argument("--lr", type=rate, default=1e-3, help="learning rate in a race (0.001)")
    how.add_argument("--seconds", type=positive("seconds"), default=5.0, help="of timing (5)")
    race = command.add_argument_group("race")
    race.add_argument(
        "--race", type=positive("seconds"), metavar="SECONDS", help="of each arm and seed"
    )
    race.add_argument(
        "--seeds", nargs="+", type=whole(0, "a seed"), default=[1, 2, 3], metavar="SEED",
        help="(1 2 3)",
    )  # fmt: skip
    race.add_argument(
        "--warmup-steps", type=whole(0, "warmup-steps"), metavar="N",
        help="of plain backprop, before the top is left out (50)",
    )  # fmt: skip
    out = command.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="print the verdict as JSON on stdout")
    out.add_argument("--out", metavar="FILE", help="write the JSON there")
    out.add_argument("--plot", metavar="PATH", help="draw it into an image file")
    out.add_argument("--quiet", action="store_true", help="no progress")
    common(command)
    command.set_defaults(run=_verdict_top, check=_check)


def _check(args: argparse.Namespace) -> None:
    if ":" not in args.what:
        raise UsageError(f"verdict top takes package.module:factory, got {args.what!r}")


def _verdict_top(args: argparse.Namespace, command: str) -> int:
    from fused_dni.measure.verdict.candidates import at_rate
    from fused_dni.measure.verdict.top import KS, verdict_top
    from fused_dni.measure.verdict.top_race import RACE_KS, WARMUP, top_arms
    from fused_dni.measure.verdict.top_steps import drawn, given
    from fused_dni.report.kinds import verdict_top as reports
    from fused_dni.report.progress import Progress

    out, plot = OutFile("--out", args.out), OutFile("--plot", args.plot)
    refuse_format(plot.path)
    set_threads(args)
    made = given(built(args.what), args.what)
    if made.synthesizer is not None and args.synthesizers is not None:
        raise UsageError(f"{args.what} brings its own synthesizer: leave --synthesizers out")
    names = args.synthesizers or ["auto"]
    update = at_rate(rule(args.update), args.lr)
    if args.race is not None:
        drawn(made.batch, -1)  # what fails is said before anything is measured
    progress = Progress(enabled=not args.quiet)
    with progress:
        found = verdict_top(
            made.bottom,
            made.top,
            drawn(made.batch, 0),
            synthesizer=made.synthesizer or names,
            target_every=args.target_every or KS,
            update=update,
            seconds=args.seconds,
            title=args.what,
            progress=progress.update,
        )
    found.facts["command"] = command
    if args.race is not None:
        out.write(found.to_json() + "\n")
        arms = top_arms(
            partial(built, args.what),
            synthesizer=names,
            target_every=args.target_every or RACE_KS,
            update=update,
            warmup=WARMUP if args.warmup_steps is None else args.warmup_steps,
        )
        _race(args, found, arms, out, command)
    say_verdict(found, args.json, out, plot, reports.figure(found.report()))
    return 0


def _race(
    args: argparse.Namespace, found: TopVerdict, arms: Arms, out: OutFile, command: str
) -> None:
    """Add a race; Ctrl-C keeps the seeds that were finished in the file."""
    from fused_dni.measure.errors import Interrupted
    from fused_dni.measure.race import race
    from fused_dni.report.progress import Progress

    def keep(report: dict[str, Any]) -> None:
        found.race = report
        out.write(found.to_json() + "\n")

    try:
        race(
            arms,
            seconds=args.race,
            seeds=args.seeds,
            device=found.facts["where"],
            keep=keep,
            progress=Progress(enabled=not args.quiet),
            command=command,
        )
    except Interrupted as stopped:
        kept = "" if out.written is None else f"; that and the times of steps are in {out.path}"
        raise Interrupted(f"{stopped}{kept}") from None
