"""``verdict link``: a user's split over a slow link."""

from __future__ import annotations

import argparse
import math
from typing import Any

from fused_dni.cli import units
from fused_dni.cli.arguments import (
    PROGRAM,
    UsageError,
    built,
    common,
    every,
    positive,
    set_threads,
    whole,
)
from fused_dni.cli.output import OutFile, say_report

EXAMPLE = """\
import torch
from torch import nn

def block(inputs): return nn.Sequential(nn.Linear(inputs, 512), nn.BatchNorm1d(512), nn.ReLU())

def factory():
    stages = [block(64), nn.Sequential(block(512), nn.Linear(512, 10))]
    def batch(): return torch.randn(256, 64), torch.randint(10, (256,))
    return stages, batch, nn.functional.cross_entropy
"""


def add_verdict_link(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "verdict link",
        help="what a slow link between stages leaves of each way to train them",
        description="Time each stage of a split and the bytes between them, say how many rows a "
        "second exact training, stale gradients, synthetic gradients, local losses, data parallel "
        "and DiLoCo carry over such a link, and which to take. The ways of fused_dni.distributed "
        "are run, too: processes over loopback that sleep for the stages' times, their links "
        "delayed.",
        epilog="A factory is called without arguments and returns (stages, batch, loss): a list "
        "of modules, a\nfunction that returns (x, target), and one of the last output and the "
        "target.\n\n"
        f"  {PROGRAM} verdict link mine:factory --latency 100ms --bandwidth 100Mbit/s\n\n"
        "with this in mine.py:\n\n"
        + "".join(f"    {line}\n" if line else "\n" for line in EXAMPLE.splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("what", metavar="FACTORY", help="package.module:factory")
    link = command.add_argument_group("link")
    link.add_argument("--latency", type=units.time("a latency"), required=True, metavar="TIME",
                      help="one way, like 100ms")  # fmt: skip
    link.add_argument("--latency-back", type=units.time("a latency"), metavar="TIME",
                      help="of the way back (as forward)")  # fmt: skip
    link.add_argument("--bandwidth", type=units.rate("bandwidth"), metavar="RATE",
                      help="like 100Mbit/s, or 100Mbit (no limit)")  # fmt: skip
    how = command.add_argument_group("ways")
    how.add_argument("--target-every", type=every, default=1, metavar="K",
                     help="batches for one target, of synthetic gradients (1)")  # fmt: skip
    how.add_argument("--microbatches", type=whole(1, "microbatches"), metavar="M",
                     help="batches of an update, of 1F1B and data parallel (four a "
                     "stage)")  # fmt: skip
    how.add_argument("--local-steps", type=whole(1, "steps"), default=100, metavar="H",
                     help="between two averages, of DiLoCo (100)")  # fmt: skip
    method = command.add_argument_group("method")
    method.add_argument("--seconds", type=positive("seconds"), default=2.0,
                        help="of measuring, for each stage (2)")  # fmt: skip
    method.add_argument("--run", type=positive("seconds"), default=2.0, metavar="SECONDS",
                        dest="paced", help="of running, for each way (2)")  # fmt: skip
    method.add_argument("--no-run", action="store_true", help="simulate alone")
    out = command.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="print the report as JSON on stdout")
    out.add_argument("--out", metavar="FILE", help="write the report as JSON")
    out.add_argument("--quiet", action="store_true", help="no progress")
    common(command)
    command.set_defaults(run=_verdict_link, check=_check)


def _check(args: argparse.Namespace) -> None:
    if ":" not in args.what:
        raise UsageError(f"verdict link takes package.module:factory, got {args.what!r}")
    if args.target_every == 0:
        raise UsageError("--target-every never is a local loss: synthesizers learn from targets")


def _verdict_link(args: argparse.Namespace, command: str) -> int:
    from fused_dni.measure.simulate import Link
    from fused_dni.measure.verdict.link import verdict_link
    from fused_dni.report.files import as_json
    from fused_dni.report.progress import Progress

    out = OutFile("--out", args.out)
    set_threads(args)
    progress = Progress(enabled=not args.quiet)
    wide = math.inf if args.bandwidth is None else args.bandwidth
    with progress:
        report = verdict_link(
            built(args.what),
            args.what,
            Link(args.latency, args.latency_back, wide),
            seconds=args.seconds,
            run=None if args.no_run else args.paced,
            options={
                "target_every": args.target_every,
                "microbatches": args.microbatches,
                "local_steps": args.local_steps,
            },
            progress=progress.update,
            command=command,
        )
    out.write(as_json(report))
    say_report(report, args.json)
    out.finish()
    return 0
