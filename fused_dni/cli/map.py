"""``map``: the break-even map."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fused_dni.cli.arguments import (
    DTYPES,
    PROGRAM,
    UsageError,
    common,
    device_name,
    device_named,
    every,
    positive,
    refuse_unwritable,
    rule,
    set_threads,
    whole,
)
from fused_dni.cli.output import OutFile, say, warn

if TYPE_CHECKING:
    from fused_dni.report import Result


def add_map(commands: Any) -> None:
    made = commands.add_parser(
        "map",
        help="the break-even map: batch x width x k x synthesizer",
        description="Measure one layer (Linear, BatchNorm, ReLU) inside a network by backprop and "
        "by DNI over a grid of batches, widths and synthesizers, and keep the map in a file. The "
        "same command goes on where it was stopped; points of other machines, versions or "
        "settings in the file are kept apart.",
        epilog="examples:\n"
        f"  {PROGRAM} map\n"
        f"  {PROGRAM} map --batches 32 128 --widths 256 512 --synthesizers rank4 --out small.json\n"
        f"  {PROGRAM} map --merge here.json there.json --out both.json\n"
        f"  {PROGRAM} report map.json -o map.html",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = made.add_argument_group("grid")
    what.add_argument(
        "--batches",
        nargs="+",
        type=whole(2, "a batch"),
        default=[16, 64, 256],
        metavar="ROWS",
        help="(16 64 256)",
    )
    what.add_argument(
        "--widths",
        nargs="+",
        type=whole(1, "a width"),
        default=[64, 128, 256, 512, 1024],
        metavar="FEATURES",
        help="(64 128 256 512 1024)",
    )
    what.add_argument(
        "--synthesizers",
        nargs="+",
        default=["dense", "rank16", "diagonal"],
        metavar="KIND",
        help="dense, rankR or diagonal (dense rank16 diagonal)",
    )
    what.add_argument(
        "--interfaces",
        nargs="+",
        default=["output"],
        metavar="WHERE",
        help="output or preactivation (output)",
    )
    how = made.add_argument_group("method")
    how.add_argument(
        "--target-every",
        nargs="+",
        type=every,
        metavar="K",
        default=[1, 2, 4, 8, 16, 0],
        help="(1 2 4 8 16 never)",
    )
    how.add_argument("--update", choices=("sgd", "adam", "adamw"), default="sgd", help="(sgd)")
    how.add_argument("--dtype", choices=DTYPES, default="float32")
    how.add_argument("--device", type=device_name, default="cpu", help="cpu or cuda")
    how.add_argument("--backend", help="force a backend of our kernels")
    how.add_argument(
        "--seconds", type=positive("seconds"), default=2.5, help="of timing, for each point (2.5)"
    )
    out = made.add_argument_group("output")
    out.add_argument("--out", metavar="FILE", default="map.json", help="the map (map.json)")
    out.add_argument(
        "--merge", nargs="+", metavar="FILE", help="measure nothing: join these maps into --out"
    )
    out.add_argument("--figures", metavar="DIR", help="write the heat maps into DIR, as SVG")
    out.add_argument("--json", action="store_true", help="print the map as JSON on stdout")
    out.add_argument("--quiet", action="store_true", help="no progress")
    common(made)
    made.set_defaults(run=_map)


def _map(args: argparse.Namespace, command: str) -> int:
    from fused_dni.measure.map import merge
    from fused_dni.report import as_text, blocks_of, load
    from fused_dni.report.files import as_json

    out = OutFile("--out", args.out, needed=True)
    if args.figures is not None:
        refuse_unwritable(args.figures)
    if args.merge is not None:
        found = merge([load(name, "map") for name in args.merge])
        out.write(as_json(found))
    else:
        found = _measured(args, out, command)
    say(as_json(found).rstrip() if args.json else as_text(blocks_of(found)))
    out.finish()
    if args.figures is not None:
        _draw(found, Path(args.figures))
    return 0


def _measured(args: argparse.Namespace, out: OutFile, command: str) -> Result:
    import torch

    from fused_dni.measure.map import Settings, make_grid
    from fused_dni.measure.map.sweep import sweep
    from fused_dni.ops import registry
    from fused_dni.report.files import as_json
    from fused_dni.report.progress import Progress

    set_threads(args)
    try:
        points = make_grid(args.batches, args.widths, args.synthesizers, args.interfaces)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if args.backend is not None:
        registry.get(args.backend)
    settings = Settings(
        device=device_named(args.device),
        dtype=getattr(torch, args.dtype),
        update=rule(args.update),
        ks=tuple(dict.fromkeys(k or None for k in args.target_every)),
        backend=args.backend,
        seconds=args.seconds,
    )
    progress = Progress(enabled=not args.quiet)
    with progress:
        return sweep(
            points,
            settings,
            Path(args.out),
            progress=progress.update,
            command=command,
            keep=lambda found: out.write(as_json(found)),
        )


def _draw(report: Result, folder: Path) -> None:
    """Write the figures; without matplotlib, say what to install and leave it at that."""
    from fused_dni.report import Figure, blocks_of

    try:
        for block in blocks_of(report):
            if isinstance(block, Figure):
                block.save(folder / f"{block.name}.svg")
    except ModuleNotFoundError as error:
        warn(f"{PROGRAM}: no figures: pip install {error.name}")
