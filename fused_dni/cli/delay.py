"""``delay``: accuracy when the gradient is late."""

from __future__ import annotations

import argparse
from typing import Any

from fused_dni.cli.arguments import PROGRAM, common, positive, rate, set_threads, whole
from fused_dni.cli.output import OutFile, resumable, say_report, unfinished
from fused_dni.cli.rivals import add_output, given
from fused_dni.cli.training import add_data, dataset_named, load_dataset


def add_delay(commands: Any) -> None:
    """Add the command."""
    delay = commands.add_parser(
        "delay",
        help="accuracy of a pipeline whose gradients are late: synthetic gradients and rivals",
        description="Train a network that is split into stages, each gradient so many steps late "
        "over each cut, by label-conditioned DNI and by what else does not wait: stale gradients, "
        "with a look-ahead or with corrected updates, and local losses. In one process, which "
        "computes what a pipeline of processes computes at that delay. Nothing is timed.",
        epilog="examples:\n"
        f"  {PROGRAM} delay --quick\n"
        f"  {PROGRAM} delay --data DIR --lags 1 5 20 --stages 2 --seeds 1 2 3\n"
        f"  {PROGRAM} delay --data DIR --lags 20 --arms stale cdni-16 cdni-16-every-5\n\n"
        "Ctrl-C keeps the finished runs in --out; --resume goes on from there.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_data(delay)
    what = delay.add_argument_group("what is compared")
    what.add_argument(
        "--arms",
        nargs="+",
        metavar="ARM",
        help="of backprop, stale, stale-warm, nesterov, feedback, local, cdni-R, cdni-R-every-K, "
        "cdni-R-unconditioned (R: a rank, dense or mlp; default: backprop, stale, nesterov, "
        "feedback, local, cdni-16)",
    )
    what.add_argument("--lags", nargs="+", type=whole(0, "a lag"), metavar="STEPS", help="(1 5 20)")
    what.add_argument("--stages", type=whole(2, "stages"), help="(2)")
    what.add_argument(
        "--task",
        choices=("classification", "frozen-top", "reconstruction"),
        help="frozen-top: classification with a last stage that does not learn (classification)",
    )
    what.add_argument("--seeds", nargs="+", type=whole(0, "a seed"), metavar="SEED", help="(1 2 3)")
    what.add_argument("--hidden", type=whole(1, "hidden"), help="units of a hidden layer (256)")
    what.add_argument("--depth", type=whole(2, "depth"), help="hidden layers in all stages (4)")
    what.add_argument("--batch-size", type=whole(2, "batch size"), help="(mnist 256, digits 32)")
    what.add_argument("--epochs", type=whole(1, "epochs"), help="(mnist 6, digits 10)")
    what.add_argument(
        "--rates",
        nargs="+",
        type=positive("rates"),
        metavar="LR",
        help="at the start; of several the best on the held-out part of the training set, by arm "
        "and lag (0.001 0.003 0.01)",
    )
    what.add_argument(
        "--share", type=positive("share"), help="cdni: the synthesizers' part of the rate (0.5)"
    )
    what.add_argument("--warmup", type=rate, help="cdni: share of the steps that wait (0.167)")
    what.add_argument(
        "--max-norm", type=positive("max-norm"), help="cdni: bound of a synthetic gradient's norm"
    )
    what.add_argument("--quick", action="store_true", help="a look, in seconds")
    add_output(delay, "delay.json")
    delay.add_argument("--resume", action="store_true", help="go on with an unfinished --out")
    common(delay)
    delay.set_defaults(run=_delay)


def _delay(args: argparse.Namespace, command: str) -> int:
    from fused_dni.experiments import delay, delay_arms
    from fused_dni.report.files import as_json
    from fused_dni.report.progress import Progress

    settings = delay_arms.defaults(
        dataset_named(args), args.quick, **given(args, delay_arms.Settings)
    )
    out = OutFile("--out", args.out, needed=True)
    set_threads(args)
    progress = Progress(enabled=not args.quiet)
    previous = unfinished(args.out, "delay") if args.resume else None
    dataset = load_dataset(args, progress)
    with resumable(out):
        report = delay.compare(
            settings,
            dataset,
            previous=previous,
            keep=lambda report: out.write(as_json(report)),
            progress=Progress(enabled=not args.quiet),
            command=command,
        )
    say_report(report, args.json)
    out.finish()
    return 0
