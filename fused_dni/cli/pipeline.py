"""``train pipeline``: a network over several processes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fused_dni.cli.arguments import PROGRAM, UsageError, common, rate, refuse_unwritable, whole
from fused_dni.cli.output import OutFile, say_report
from fused_dni.cli.training import add_data, dataset_named

#: What a data set wants different from the digits.
_PRESETS: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 25},
    "mnist": {"batch_size": 256, "warmup_steps": 234},
}
_SETTINGS = (
    "stages", "hidden", "depth", "epochs", "batch_size", "lr", "rank", "target_every",
    "warmup_steps", "window", "lag", "checkpoint_every", "seed",
)  # fmt: skip


def add_pipeline(commands: Any) -> None:
    command = commands.add_parser(
        "train pipeline",
        help="train over several processes in which no stage waits for a backward",
        description="Train the network of Jaderberg et al. 2016 with its layers shared out over "
        "processes, by each way of getting a gradient to a stage: waiting for it, using it when "
        "it comes, local losses, predicting it; and write a report: steps a second, error, age of "
        "gradients, what each stage waits for.",
        epilog="To measure what a delay between the stages does to the number of steps: "
        f"{PROGRAM} simulate; to the error: {PROGRAM} delay. Your own model, and several hosts: "
        "fused_dni.distributed (docs/distributed.md).",
    )
    add_data(command)
    what = command.add_argument_group("training (defaults are the dataset's)")
    what.add_argument("--stages", type=whole(1, "stages"), help="processes (2)")
    what.add_argument("--modes", nargs="+", metavar="MODE", help="of exact, stale, local, "
                      "decoupled (all)")  # fmt: skip
    what.add_argument("--hidden", type=whole(1, "hidden"), help="units of a hidden layer (256)")
    what.add_argument("--depth", type=whole(1, "depth"), help="hidden layers in all (4)")
    what.add_argument("--epochs", type=whole(1, "epochs"), help="(mnist 8, digits 25)")
    what.add_argument("--batch-size", type=whole(2, "batch size"), help="(mnist 256, digits 64)")
    what.add_argument("--lr", type=rate, help="learning rate at the start, cosine to zero (3e-3)")
    what.add_argument("--rank", type=whole(1, "rank"), help="of the synthesizers (16)")
    what.add_argument(
        "--target-every", type=whole(1, "target-every"), metavar="K",
        help="a gradient comes back on every K-th step of the decoupled run (1)",
    )  # fmt: skip
    what.add_argument(
        "--warmup-steps", type=whole(0, "warm-up steps"),
        help="on which its stages wait for the true gradient (mnist 234, digits 44)",
    )  # fmt: skip
    what.add_argument("--window", type=whole(1, "window"), help="messages on their way (4)")
    what.add_argument(
        "--lag", type=whole(0, "lag"), help="use gradients exactly so many steps late"
    )
    what.add_argument("--seed", type=whole(0, "a seed"))
    out = command.add_argument_group("output")
    out.add_argument(
        "--out", metavar="FILE", default="pipeline.json", help="the report (pipeline.json)"
    )
    out.add_argument("--json", action="store_true", help="print the report as JSON on stdout")
    out.add_argument("--quiet", action="store_true", help="no progress")
    keep = command.add_argument_group("checkpoints")
    keep.add_argument(
        "--checkpoint", metavar="DIR",
        help="keep the state of the run in DIR, and go on from what is there",
    )  # fmt: skip
    keep.add_argument(
        "--checkpoint-every", type=whole(1, "checkpoint-every"), metavar="STEPS", help="(100)"
    )
    keep.add_argument(
        "--restarts", type=whole(0, "restarts"), default=0,
        help="how often all processes are started anew when one dies (0)",
    )  # fmt: skip
    common(command, threads=False)
    command.set_defaults(run=_pipeline)


def _pipeline(args: argparse.Namespace, command: str) -> int:
    import tempfile

    from fused_dni.experiments.staged import Settings, train
    from fused_dni.report.files import as_json
    from fused_dni.report.progress import Progress

    out = OutFile("--out", args.out, needed=True)
    name = dataset_named(args)
    given = {key: getattr(args, key) for key in _SETTINGS}
    given = {key: value for key, value in given.items() if value is not None}
    if args.modes:
        given["modes"] = tuple(dict.fromkeys(args.modes))
    settings = Settings(dataset=name, folder=args.data, **{**_PRESETS[name], **given})
    if args.checkpoint is not None:
        refuse_unwritable(args.checkpoint)
    elif args.restarts:
        raise UsageError("--restarts needs --checkpoint DIR, to go on from")
    with tempfile.TemporaryDirectory() as temporary:
        report = train(
            settings,
            str(Path(args.checkpoint or temporary).absolute()),
            restarts=args.restarts,
            progress=Progress(enabled=not args.quiet),
            command=command,
        )
    out.write(as_json(report))
    say_report(report, args.json)
    out.finish()
    return 0
