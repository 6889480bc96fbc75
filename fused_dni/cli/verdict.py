"""``verdict`` and ``verdict lstm``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fused_dni.cli.arguments import (
    ACTIVATIONS,
    DTYPES,
    PROGRAM,
    UsageError,
    common,
    device_named,
    every,
    factory,
    positive,
    refuse,
    refuse_unwritable,
    rule,
    sample_shape,
    set_threads,
    whole,
)

if TYPE_CHECKING:
    import torch
    from torch import nn


def add_verdict(commands: Any) -> None:
    verdict = commands.add_parser(
        "verdict",
        help="what backprop and DNI cost for a layer or network, and where the break-even is",
        description="Time a training step by stock backprop, compiled backprop, backprop on our "
        "kernels and DNI (targets on every k-th step), interleaved, with the floor beside them.",
        epilog="examples:\n"
        f"  {PROGRAM} verdict linear --in 1024 --out 1024 --batch 128 --normalization batch "
        "--activation relu\n"
        f"  {PROGRAM} verdict mlp --width 256 --depth 4 --batch 64 --classes 10\n"
        f"  {PROGRAM} verdict package.module:factory --sample 64x784\n"
        f"  {PROGRAM} verdict lstm --hidden 256 --batch 32 --window 8 --long 40\n\n"
        "A factory is called without arguments and returns a module, or (module, sample).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verdict.add_argument("what", metavar="WHAT", help="linear, mlp, lstm or package.module:factory")
    shape = verdict.add_argument_group("shape")
    shape.add_argument("--in", dest="inputs", type=whole(1, "in"), help="input features")
    shape.add_argument("--out", dest="outputs", type=whole(1, "out"), help="output features")
    shape.add_argument("--width", type=whole(1, "width"), help="mlp: units of a hidden layer")
    shape.add_argument("--depth", type=whole(1, "depth"), help="mlp: hidden layers")
    shape.add_argument("--batch", type=whole(1, "batch"), help="rows of a batch")
    shape.add_argument(
        "--classes",
        type=whole(1, "classes"),
        help="mlp: outputs; both: classes that synthesizers are conditioned on (10)",
    )
    shape.add_argument("--unconditional", action="store_true", help="no conditioning on classes")
    shape.add_argument("--normalization", choices=("none", "batch", "layer"), help="(batch)")
    shape.add_argument("--activation", choices=ACTIVATIONS, help="(relu)")
    shape.add_argument(
        "--sample", type=sample_shape, metavar="NxI", help="factory: shape of a batch"
    )
    shape.add_argument("--dtype", choices=DTYPES, default="float32")
    shape.add_argument("--device", default="cpu", help="cpu or cuda")
    how = verdict.add_argument_group("method")
    how.add_argument("--update", choices=("sgd", "adam", "adamw"), default="sgd")
    how.add_argument("--rank", type=whole(0, "rank"), help="of the synthesizers; 0: dense (16)")
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
    how.add_argument("--seconds", type=positive("seconds"), default=5.0, help="(5)")
    out = verdict.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="print the verdict as JSON on stdout")
    out.add_argument("--plot", metavar="PATH", help="draw it into an image file")
    out.add_argument("--quiet", action="store_true", help="no progress")
    common(verdict)
    verdict.set_defaults(run=_verdict)


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
    shape.add_argument("--device", default="cpu", help="cpu or cuda")
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


def _verdict(args: argparse.Namespace, command: str) -> int:
    import torch

    from fused_dni.progress import Progress
    from fused_dni.verdict import verdict

    if args.plot is not None:
        refuse_unwritable(str(Path(args.plot).parent))
    set_threads(args)
    dtype = getattr(torch, args.dtype)
    device = device_named(args.device)
    module, sample, target, title = _subject(args)
    try:
        module = module.to(device=device, dtype=dtype)
    except (RuntimeError, TypeError) as error:
        raise UsageError(
            f"cannot take the module to {args.device}, {args.dtype}: {error}"
        ) from None
    sample = sample.to(device=device, dtype=dtype)
    if target is not None:
        target = target.to(device)
    progress = Progress(enabled=not args.quiet)
    classes = args.classes or (10 if args.what in ("linear", "mlp") else 0)
    with progress:
        found = verdict(
            module,
            sample,
            target=target,
            update=rule(args.update),
            target_every=[k or None for k in args.target_every],
            context_features=0 if args.unconditional else classes,
            rank=args.rank,
            seconds=args.seconds,
            compile=not args.no_compile,
            backend=args.backend,
            title=title,
            progress=progress.update,
        )
    plotted = found.plot(args.plot) if args.plot is not None else None
    if args.json:
        print(found.to_json())
    else:
        print(found.table())
        print()
        print(found.sentence())
        if plotted is not None:
            print()
            print(plotted)
    return 0


def _verdict_lstm(args: argparse.Namespace, command: str) -> int:
    import torch

    import fused_dni as fd
    from fused_dni.progress import Progress

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
    if args.json:
        print(found.to_json())
    else:
        print(found.table())
        print()
        print(found.sentence())
    return 0


def _subject(
    args: argparse.Namespace,
) -> tuple[nn.Module, torch.Tensor, torch.Tensor | None, str | None]:
    """Module, sample, labels and title from the command line."""
    import torch

    module: nn.Module
    generator = torch.Generator().manual_seed(0)
    if args.what in ("linear", "mlp"):
        foreign = {"linear": ("width", "depth", "sample"), "mlp": ("outputs", "sample")}[args.what]
        refuse(args, foreign)
        norm = args.normalization or "batch"
        act = args.activation or "relu"
        if args.what == "linear":
            inputs, outputs = args.inputs or 1024, args.outputs or args.inputs or 1024
            batch = args.batch or 128
            module = torch.nn.Sequential(*_layer(inputs, outputs, norm, act))
            title = f"one layer {inputs} to {outputs} ({_named(norm, act)}) at batch {batch}"
            return module, torch.randn(batch, inputs, generator=generator), None, title
        width, depth = args.width or 256, args.depth or 4
        inputs, batch, classes = args.inputs or width, args.batch or 64, args.classes or 10
        layers = [
            part for i in range(depth) for part in _layer(width if i else inputs, width, norm, act)
        ]
        module = torch.nn.Sequential(*layers, torch.nn.Linear(width, classes))
        labels = torch.randint(classes, (batch,), generator=generator)
        title = f"{depth} hidden layers of {width} ({_named(norm, act)}) at batch {batch}"
        return module, torch.randn(batch, inputs, generator=generator), labels, title
    refuse(args, ("inputs", "outputs", "width", "depth", "batch", "normalization", "activation"))
    module, sample = factory(args.what)
    if sample is None:
        if args.sample is None:
            raise UsageError(f"{args.what} returns a module alone: give --sample, like 64x784")
        sample = torch.randn(args.sample, generator=generator)
    elif args.sample is not None:
        raise UsageError(f"{args.what} brings its own sample: leave --sample out")
    return module, sample, None, None


def _named(norm: str, act: str) -> str:
    names = {"batch": ["BatchNorm"], "layer": ["LayerNorm"], "none": []}[norm]
    return ", ".join(["Linear", *names, *([act] if act != "identity" else [])])


def _layer(inputs: int, outputs: int, norm: str, act: str) -> Iterator[nn.Module]:
    from torch import nn

    yield nn.Linear(inputs, outputs, bias=norm != "batch")
    if norm != "none":
        yield (nn.BatchNorm1d if norm == "batch" else nn.LayerNorm)(outputs)
    made: dict[str, Callable[[], nn.Module]] = {
        "relu": nn.ReLU,
        "gelu": nn.GELU,
        "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
        "silu": nn.SiLU,
        "tanh": nn.Tanh,
        "sigmoid": nn.Sigmoid,
        "softplus": nn.Softplus,
        "mish": nn.Mish,
    }
    if act != "identity":
        yield made[act]()
