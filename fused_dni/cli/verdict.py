"""``verdict`` and ``verdict lstm``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from fused_dni.cli.arguments import (
    ACTIVATIONS,
    DTYPES,
    PROGRAM,
    SEGMENTS,
    UsageError,
    common,
    device_name,
    device_named,
    every,
    factory,
    no_factory,
    positive,
    refuse,
    refuse_format,
    rule,
    sample_shape,
    set_threads,
    whole,
)
from fused_dni.cli.output import OutFile, say, say_verdict

if TYPE_CHECKING:
    from torch import nn

    from fused_dni.measure.verdict.segments import Segment


def add_verdict(commands: Any) -> None:
    verdict = commands.add_parser(
        "verdict",
        help="what backprop and DNI cost for a layer or network, and where the break-even is",
        description="Time a training step by stock backprop, compiled backprop, backprop on our "
        "kernels and DNI (targets on every k-th step, by interface and synthesizer), interleaved, "
        "with the floor beside them; then the parts of a step.",
        epilog="examples:\n"
        f"  {PROGRAM} verdict linear --in 1024 --batch 128 --normalization batch "
        "--activation relu\n"
        f"  {PROGRAM} verdict mlp --width 256 --depth 4 --batch 64 --classes 10\n"
        f"  {PROGRAM} verdict block --depth 8 --synthesizers dense rank16\n"
        f"  {PROGRAM} verdict transformer --width 256 --tokens 128 --batch 4\n"
        f"  {PROGRAM} verdict package.module:factory --sample 64x784\n"
        f"  {PROGRAM} verdict lstm --hidden 256 --batch 32 --window 8 --long 40\n"
        f"  {PROGRAM} verdict top package.module:factory --race 20\n\n"
        "A factory is called without arguments and returns a module, or (module, sample).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verdict.add_argument(
        "what",
        metavar="SEGMENT",
        help="linear, mlp, block, conv, transformer, lstm, top or package.module:factory",
    )
    shape = verdict.add_argument_group("segment")
    shape.add_argument("--in", dest="inputs", type=whole(1, "in"), help="input features")
    shape.add_argument("--outputs", type=whole(1, "outputs"), help="linear: output features")
    shape.add_argument("--width", type=whole(1, "width"), help="units, or channels, of a layer")
    shape.add_argument("--depth", type=whole(1, "depth"), help="mlp, block, conv: layers")
    shape.add_argument("--size", type=whole(1, "size"), help="conv: side of the maps")
    shape.add_argument("--tokens", type=whole(1, "tokens"), help="transformer: of a sequence")
    shape.add_argument("--heads", type=whole(1, "heads"), help="transformer: of the attention")
    shape.add_argument("--batch", type=whole(1, "batch"), help="rows of a batch")
    shape.add_argument(
        "--classes",
        type=whole(1, "classes"),
        help="that synthesizers are conditioned on (10; for a factory none); mlp: outputs too",
    )
    shape.add_argument("--unconditional", action="store_true", help="no conditioning on classes")
    shape.add_argument("--normalization", choices=("none", "batch", "layer"), help="(batch)")
    shape.add_argument("--activation", choices=ACTIVATIONS, help="(relu)")
    shape.add_argument(
        "--sample", type=sample_shape, metavar="NxI", help="factory: shape of a batch"
    )
    shape.add_argument("--dtype", choices=DTYPES, default="float32")
    shape.add_argument("--device", type=device_name, default="cpu", help="cpu or cuda")
    how = verdict.add_argument_group("method")
    how.add_argument("--update", choices=("sgd", "adam", "adamw"), default="sgd")
    how.add_argument(
        "--interface",
        nargs="+",
        choices=("output", "preactivation"),
        help="where the gradient is predicted (all that differ)",
    )
    how.add_argument(
        "--synthesizers",
        nargs="+",
        metavar="NAME",
        help="dense, rank16 or another rank, diagonal, conv (all that fit)",
    )
    how.add_argument(
        "--rank", type=whole(0, "rank"), help="one synthesizer alone, of this rank; 0: dense"
    )
    how.add_argument(
        "--target-every",
        nargs="+",
        type=every,
        metavar="K",
        default=[1, 2, 4, 8, 16, 0],
        help="(1 2 4 8 16 never)",
    )
    how.add_argument("--backend", help="force a backend of our kernels")
    how.add_argument("--no-compile", action="store_true", help="leave compiled backprop out")
    how.add_argument("--no-parts", action="store_true", help="whole steps alone, not their parts")
    how.add_argument("--seconds", type=positive("seconds"), default=5.0, help="(5)")
    out = verdict.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="print the verdict as JSON on stdout")
    out.add_argument("--out", metavar="FILE", help="write the JSON there")
    out.add_argument("--plot", metavar="PATH", help="draw it into an image file")
    out.add_argument("--quiet", action="store_true", help="no progress")
    common(verdict)
    verdict.set_defaults(run=_verdict, check=_check)


def add_verdict_lstm(commands: Any) -> None:
    verdict = commands.add_parser(
        "verdict lstm",
        help="what an LSTM costs by DNI at a window and by backprop at a longer one",
        description="Time and peak memory of an LSTM by DNI at window T, by truncated backprop at "
        "T, and by backprop at the longer window T2 that reaches the same quality: per time step "
        "of the sequence, interleaved, with the floor beside them. Which T2 that is, "
        f"`{PROGRAM} train charlm` measures.",
        epilog=f"example: {PROGRAM} verdict lstm --hidden 256 --batch 32 --window 8 --long 40",
    )
    shape = verdict.add_argument_group("shape")
    shape.add_argument("--input", type=whole(1, "input"), help="input features (as --hidden)")
    shape.add_argument("--hidden", type=whole(1, "hidden"), default=256, help="units (256)")
    shape.add_argument("--layers", type=whole(1, "layers"), default=1, help="(1)")
    shape.add_argument("--batch", type=whole(1, "batch"), default=32, help="rows (32)")
    shape.add_argument("--window", type=whole(1, "window"), default=8, metavar="T", help="(8)")
    shape.add_argument(
        "--long", type=whole(2, "long"), metavar="T2", help="longer window (5 times T)"
    )
    shape.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    shape.add_argument("--device", type=device_name, default="cpu", help="cpu or cuda")
    how = verdict.add_argument_group("method")
    how.add_argument("--update", choices=("sgd", "adam", "adamw"), default="adam", help="(adam)")
    how.add_argument("--rank", type=whole(0, "rank"), help="of the synthesizer; 0: dense (16)")
    how.add_argument("--auxiliary", action="store_true", help="DNI with the auxiliary head")
    how.add_argument("--backend", help="force a backend of our kernels")
    how.add_argument("--seconds", type=positive("seconds"), default=5.0, help="(5)")
    out = verdict.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="print the verdict as JSON on stdout")
    out.add_argument("--quiet", action="store_true", help="no progress")
    common(verdict)
    verdict.set_defaults(run=_verdict_lstm)


# ---------------------------------------------------------------------------------------- commands


def _check(args: argparse.Namespace) -> None:
    """Refuse what needs no module to be seen wrong."""
    if args.what not in SEGMENTS and ":" not in args.what:
        raise no_factory(args.what)
    if args.out is not None and args.out.isdigit():
        raise UsageError(
            f"--out is the file that the JSON goes to, got {args.out!r}; for output features there "
            "is --outputs"
        )
    if args.rank is not None and args.synthesizers is not None:
        raise UsageError("give --rank or --synthesizers, not both")


def _verdict(args: argparse.Namespace, command: str) -> int:
    import torch

    from fused_dni.measure.verdict import verdict
    from fused_dni.report.kinds import verdict as reports
    from fused_dni.report.progress import Progress

    out, plot = OutFile("--out", args.out), OutFile("--plot", args.plot)
    refuse_format(plot.path)
    set_threads(args)
    dtype = getattr(torch, args.dtype)
    device = device_named(args.device)
    segment = _segment(args)
    try:
        module = segment.module.to(device=device, dtype=dtype)
    except (RuntimeError, TypeError) as error:
        raise UsageError(
            f"cannot take the module to {args.device}, {args.dtype}: {error}"
        ) from None
    target = None if segment.target is None else segment.target.to(device)
    synthesizers = "default" if args.rank is not None else args.synthesizers or "all"
    progress = Progress(enabled=not args.quiet)
    with progress:
        found = verdict(
            module,
            segment.sample.to(device=device, dtype=dtype),
            target=target,
            update=rule(args.update),
            target_every=[k or None for k in args.target_every],
            interface=args.interface or "all",
            synthesizer=synthesizers,
            context_features=0 if args.unconditional else segment.classes,
            rank=args.rank,
            seconds=args.seconds,
            parts=not args.no_parts,
            compile=not args.no_compile,
            backend=args.backend,
            title=segment.title or None,
            progress=progress.update,
        )
    found.facts["command"] = command
    say_verdict(found, args.json, out, plot, reports.over_k(found.report()))
    return 0


def _verdict_lstm(args: argparse.Namespace, command: str) -> int:
    import torch

    import fused_dni as fd
    from fused_dni.report.progress import Progress

    set_threads(args)
    device = device_named(args.device)
    factory = {"device": device, "dtype": getattr(torch, args.dtype)}
    inputs = args.input or args.hidden
    features = 2 * args.layers * args.hidden
    synthesizer: nn.Module | str = "default"
    if args.rank is not None:
        low = min(args.rank, features) or None
        synthesizer = fd.LinearSynthesizer(features, low, **factory)
    lstm = fd.FusedDNILSTM(
        inputs,
        args.hidden,
        args.layers,
        synthesizer=synthesizer,
        auxiliary=args.auxiliary,
        backend=args.backend,
        **factory,
    )
    sample = torch.randn(
        args.window, args.batch, inputs, generator=torch.Generator().manual_seed(0)
    ).to(**factory)
    progress = Progress(enabled=not args.quiet)
    with progress:
        found = fd.verdict_lstm(
            lstm,
            sample,
            long=args.long,
            update=rule(args.update),
            seconds=args.seconds,
            progress=progress.update,
        )
    say(found.to_json() if args.json else f"{found.table()}\n\n{found.sentence()}")
    return 0


def _segment(args: argparse.Namespace) -> Segment:
    """What is measured, from the command line."""
    import torch

    from fused_dni.measure.verdict import segments

    given = {name: getattr(args, name) for name in segments.options()}
    if args.what in segments.SEGMENTS:
        refuse(args, ("sample",))
        try:
            return segments.make(args.what, given)
        except ValueError as error:
            raise UsageError(str(error)) from None
    refuse(args, [name for name in given if name != "classes"])
    module, sample = factory(args.what)
    if sample is None:
        if args.sample is None:
            raise UsageError(f"{args.what} returns a module alone: give --sample, like 64x784")
        sample = torch.randn(args.sample, generator=torch.Generator().manual_seed(0))
    elif args.sample is not None:
        raise UsageError(f"{args.what} brings its own sample: leave --sample out")
    return segments.Segment(module, sample, None, "", args.classes or 0)
