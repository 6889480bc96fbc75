"""``tune``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fused_dni.cli.arguments import (
    ACTIVATIONS,
    DTYPES,
    PROGRAM,
    UsageError,
    common,
    device_name,
    device_named,
    positive,
    refuse,
    rule,
    whole,
)
from fused_dni.cli.output import say
from fused_dni.report import text

if TYPE_CHECKING:
    from fused_dni.ops.types import Backend


def add_tune(commands: Any) -> None:
    tune = commands.add_parser(
        "tune",
        help="measure tiles of the Triton kernels and the backends for a shape, keep the fastest",
        description="Time every op of a layer on scratch tensors with the tiles that come into "
        "question, on this GPU, then the CUDA and Triton backends on the layer's step or window, "
        "and keep the fastest for later processes: in $FUSED_DNI_CACHE, or fused_dni under the "
        "user's cache. Tiles of powers of two serve all shapes that round up to them, a backend's "
        "times those within a factor of four.",
        epilog=f"examples:\n  {PROGRAM} tune linear --batch 128 --in 1024 --out 1024\n"
        f"  {PROGRAM} tune lstm --batch 16 --in 256 --out 256 --window 32 --dtype float32",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tune.add_argument("what", choices=("linear", "lstm"), help="which layer")
    shape = tune.add_argument_group("shape")
    shape.add_argument("--batch", type=whole(2, "batch"), default=128, help="rows (128)")
    shape.add_argument("--in", dest="inputs", type=whole(1, "in"), default=1024, help="(1024)")
    shape.add_argument("--out", dest="outputs", type=whole(1, "out"), help="units (as --in)")
    shape.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of x (bfloat16)")
    shape.add_argument("--device", type=device_name, default="cuda", help="cuda[:N]")
    what = tune.add_argument_group("layer")
    what.add_argument("--update", choices=("sgd", "adam", "adamw"), default="sgd", help="(sgd)")
    what.add_argument("--normalization", choices=("none", "batch", "layer"), help="linear: (batch)")
    what.add_argument("--activation", choices=ACTIVATIONS, help="linear: (relu)")
    what.add_argument(
        "--rank", type=whole(0, "rank"), help="linear: of the synthesizer; 0: dense (16)"
    )
    what.add_argument(
        "--classes", type=whole(0, "classes"), help="linear: that it is conditioned on (10)"
    )
    what.add_argument("--window", type=whole(1, "window"), metavar="T", help="lstm: steps (32)")
    what.add_argument("--ops", nargs="+", metavar="OP", help="these alone, by their kernels' names")
    out = tune.add_argument_group("output")
    out.add_argument(
        "--seconds", type=positive("seconds"), default=1.0, help="of timing, for each op (1)"
    )
    out.add_argument("--json", action="store_true", help="as JSON on stdout")
    out.add_argument("--quiet", action="store_true", help="no progress")
    common(tune, threads=False)
    tune.set_defaults(run=_tune)


def _tune(args: argparse.Namespace, command: str) -> int:
    import torch

    from fused_dni.measure import tune
    from fused_dni.ops import registry
    from fused_dni.ops.types import LinearConfig
    from fused_dni.report.progress import Progress

    refuse(args, ("window",) if args.what == "linear" else ("normalization", "activation", "rank"))
    kind = tune.LSTMScratch if args.what == "lstm" else tune.LinearScratch
    known: Sequence[str] = kind.ops
    ops = args.ops or known
    for op in ops:
        if op not in known:
            raise UsageError(text.unknown("op", op, known))
    device = device_named(args.device)
    if args.device == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    dtype = getattr(torch, args.dtype)
    like = torch.empty(0, device=device)
    triton = registry.resolve("triton", like.to(dtype), like)
    update = type(rule(args.update))
    outputs = args.outputs or args.inputs

    def make(backend: Backend) -> tune.LinearScratch | tune.LSTMScratch:
        if args.what == "lstm":
            shape = (args.window or 32, args.batch, args.inputs, outputs)
            return tune.LSTMScratch(backend, shape, dtype, device, update)
        norm = args.normalization or "batch"
        config = LinearConfig(None if norm == "none" else norm, args.activation or "relu")
        rank = 16 if args.rank is None else args.rank
        classes = 10 if args.classes is None else args.classes
        sizes = (args.batch, args.inputs, outputs)
        return tune.LinearScratch(backend, sizes, dtype, device, config, update, rank, classes)

    progress = Progress(enabled=not args.quiet)
    limits: dict[str, Any] = {"seconds": args.seconds, "progress": progress.update}
    found: list[tune.Tuned] = []
    ranked: tune.Ranked | None = None
    with progress:
        for tuned in tune.tune(lambda: make(triton), ops, device, **limits):
            found.append(tuned)
            if not args.json:
                say(tuned.table(), end="\n\n")
        if set(kind.parts) <= set(ops):  # with their best tiles
            ranked = tune.rank(make, device, **limits)
            if not args.json:
                say(ranked.table(), end="\n\n")
    report = tune.report(found, ranked, device)
    say(json.dumps(report, indent=1) if args.json else report["kept in"])
    return 0
