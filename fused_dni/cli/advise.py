"""``advise``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from fused_dni.cli.arguments import (
    PROGRAM,
    UsageError,
    built,
    common,
    positive,
    rule,
    sample_shape,
    set_threads,
    whole,
)
from fused_dni.cli.output import OutFile, say

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fused_dni.measure.advise.blocks import Loss


def add_advise(commands: Any) -> None:
    """``fused-dni advise``."""
    command = commands.add_parser(
        "advise",
        help="where in a whole model interfaces pay: predicted, then converted and measured",
        description="Time every block of a model alone, predict from that where interfaces, which "
        "synthesizers and which k make a training step faster than backprop on the same kernels, "
        "convert the model accordingly, and print predicted time and memory beside measured ones.",
        epilog="examples:\n"
        f"  {PROGRAM} advise mymodels:mlp --sample 128x784\n"
        f"  {PROGRAM} advise mymodels:convnet --all --out advice.json\n\n"
        "The module is looked for in the folder that the command is run in, too.\n"
        "A factory is called without arguments and returns a module, (module, sample) or\n"
        "(module, sample, loss). The loss is called with the module's output, returns a scalar,\n"
        "and closes over its targets; without one a fixed gradient arrives at the output.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("what", metavar="FACTORY", help="package.module:factory")
    command.add_argument(
        "--sample", type=sample_shape, metavar="NxI", help="shape of a batch, if it brings none"
    )
    how = command.add_argument_group("method")
    how.add_argument(
        "--classes",
        type=whole(1, "classes"),
        help="condition synthesizers on labels of so many classes, drawn at random",
    )
    how.add_argument("--update", choices=("sgd", "adam", "adamw"), default="sgd")
    how.add_argument(
        "--all",
        action="store_true",
        help="propose an interface behind every block that can have one, whether or not they pay",
    )
    how.add_argument("--backend", help="force a backend of our kernels")
    how.add_argument("--seconds", type=positive("seconds"), default=20.0, help="(20)")
    out = command.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="print the advice as JSON on stdout")
    out.add_argument("--out", metavar="FILE", help="write the JSON into a file")
    out.add_argument("--quiet", action="store_true", help="no progress")
    common(command)
    command.set_defaults(run=_advise, check=_check)


def _check(args: argparse.Namespace) -> None:
    if ":" not in args.what:
        raise UsageError(f"advise takes package.module:factory, got {args.what!r}")


def _advise(args: argparse.Namespace, command: str) -> int:
    from fused_dni.measure.advise import advise
    from fused_dni.report.progress import Progress

    out = OutFile("--out", args.out)
    set_threads(args)
    module, sample, loss = _subject(args)
    progress = Progress(enabled=not args.quiet)
    with progress:
        found = advise(
            module,
            sample,
            loss,
            update=rule(args.update),
            classes=args.classes or 0,
            all_blocks=args.all,
            seconds=args.seconds,
            backend=args.backend,
            title=args.what,
            command=command,
            progress=progress.update,
        )
    out.write(found.to_json() + "\n")
    say(found.to_json() if args.json else found.table())
    out.finish()
    return 0


def _subject(args: argparse.Namespace) -> tuple[nn.Module, torch.Tensor, Loss | None]:
    """Module, sample and loss from the factory and the command line."""
    import torch

    made = built(args.what)
    parts = made if isinstance(made, tuple) else (made,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], torch.nn.Module):
        got = "(" + ", ".join(type(part).__name__ for part in parts) + ")"
        raise UsageError(
            f"{args.what} must return a module, (module, sample) or (module, sample, loss), got "
            f"{got if isinstance(made, tuple) else type(made).__name__}"
        )
    module, sample, loss = (*parts, None, None)[:3]
    if sample is None:
        if args.sample is None:
            raise UsageError(f"{args.what} brings no sample: give --sample, like 64x784")
        sample = torch.randn(args.sample, generator=torch.Generator().manual_seed(0))
    elif args.sample is not None:
        raise UsageError(f"{args.what} brings its own sample: leave --sample out")
    if not isinstance(sample, torch.Tensor):
        raise UsageError(f"the sample of {args.what} must be a tensor, got {type(sample).__name__}")
    if loss is not None and not callable(loss):
        raise UsageError(f"the loss of {args.what} must be callable, got {type(loss).__name__}")
    return module, sample, loss
