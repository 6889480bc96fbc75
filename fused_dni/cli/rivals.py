"""``rivals`` and ``interfaces``: synthetic gradients beside their rivals, and by depth."""

from __future__ import annotations

import argparse
from typing import Any

from fused_dni.cli.arguments import (
    PROGRAM,
    common,
    device_name,
    device_named,
    positive,
    rate,
    set_threads,
    whole,
)
from fused_dni.cli.output import OutFile, resumable, say_report, unfinished
from fused_dni.cli.training import add_data, dataset_named, load_dataset


def add_rivals(commands: Any) -> None:
    rivals = commands.add_parser(
        "rivals",
        help="backprop, DNI and their rivals on one network: time, memory, error at equal "
        "wall-clock",
        description="Train one network by backprop in several ways (eager, compiled, with the "
        "optimizer in the backward, on our kernels), by label-conditioned DNI, and by its rivals: "
        "stale and delayed gradients, local losses, direct feedback alignment. Steps are timed "
        "together; then every run has as many steps as fit into the same wall-clock.",
        epilog="examples:\n"
        f"  {PROGRAM} rivals\n"
        f"  {PROGRAM} rivals --data DIR --seconds-per-run 8 --tune\n"
        f"  {PROGRAM} rivals --arms fused stale-2 cdni-4 --seeds 1 2 3 4 5\n\n"
        "Ctrl-C keeps the finished runs in --out; --resume goes on from there.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_data(rivals)
    what = rivals.add_argument_group("what is compared")
    what.add_argument(
        "--arms",
        nargs="+",
        metavar="ARM",
        help="of backprop, compiled, graph (cuda alone), in-backward, fused, stale-K, delayed, "
        "local, feedback, cdni-K, cdni-z-K (default: all, with K 4, and 1 and 4 for cdni)",
    )
    what.add_argument("--seeds", nargs="+", type=whole(0, "a seed"), metavar="SEED", help="(1 2 3)")
    what.add_argument("--hidden", type=whole(1, "hidden"), help="units of a hidden layer (256)")
    what.add_argument("--depth", type=whole(1, "depth"), help="hidden layers (3)")
    what.add_argument("--batch-size", type=whole(2, "batch size"), help="(mnist 256, digits 64)")
    what.add_argument("--update", choices=("sgd", "adam", "adamw"), help="update rule (adam)")
    what.add_argument("--lr", type=rate, help="one learning rate for all arms (each its own)")
    what.add_argument(
        "--warmup", type=rate, help="cdni: share of the steps on true gradients (0.1)"
    )
    what.add_argument("--rank", type=whole(0, "rank"), help="of the synthesizers; 0: dense (16)")
    what.add_argument("--backend", help="force a backend of our kernels")
    what.add_argument("--device", type=device_name, help="cpu or cuda (cpu)")
    budget = rivals.add_argument_group("budget")
    budget.add_argument(
        "--seconds-per-run",
        type=positive("seconds-per-run"),
        metavar="S",
        help="wall-clock of a run (mnist 5, digits 1.5)",
    )
    budget.add_argument(
        "--seconds", type=positive("seconds"), default=10.0, help="for timing the steps (10)"
    )
    budget.add_argument(
        "--tune",
        action="store_true",
        help="first choose each arm's rate on the held-out part of the training set",
    )
    add_output(rivals, "rivals.json")
    rivals.add_argument("--resume", action="store_true", help="go on with an unfinished --out")
    common(rivals)
    rivals.set_defaults(run=_rivals)


def add_interfaces(commands: Any) -> None:
    interfaces = commands.add_parser(
        "interfaces",
        help="how far synthetic gradients are from the true ones, by depth and layer",
        description="Train networks of several depths by label-conditioned DNI and hold each "
        "layer's synthetic gradient against the true gradient of the whole network; likewise with "
        "fewer interfaces in the deepest, and the errors beside those of backprop. About three "
        "minutes on 2 cores.",
    )
    add_data(interfaces)
    what = interfaces.add_argument_group("what is trained")
    what.add_argument(
        "--depths", nargs="+", type=whole(1, "a depth"), metavar="D", help="(1 2 4 8)"
    )
    what.add_argument(
        "--every",
        nargs="+",
        type=whole(1, "every"),
        metavar="N",
        help="in the deepest, an interface behind every N-th layer (1 2 4)",
    )
    what.add_argument("--seeds", nargs="+", type=whole(0, "a seed"), metavar="SEED", help="(1 2 3)")
    what.add_argument("--steps", type=whole(1, "steps"), help="(mnist 1000, digits 500)")
    what.add_argument(
        "--batches", type=whole(1, "batches"), help="to average the comparison over (10)"
    )
    what.add_argument("--hidden", type=whole(1, "hidden"), help="units of a hidden layer (256)")
    what.add_argument("--batch-size", type=whole(2, "batch size"), help="(mnist 256, digits 64)")
    what.add_argument("--lr", type=rate, help="Adam's rate at the start (0.003)")
    what.add_argument("--sg-lr", type=rate, help="the synthesizers' (0.0015)")
    what.add_argument("--warmup", type=rate, help="share of the steps on true gradients (0.1)")
    what.add_argument("--rank", type=whole(0, "rank"), help="of the synthesizers; 0: dense (16)")
    what.add_argument("--backend", help="force a backend of our kernels")
    add_output(interfaces, "interfaces.json")
    common(interfaces)
    interfaces.set_defaults(run=_interfaces)


def add_output(command: argparse.ArgumentParser, file: str) -> None:
    out = command.add_argument_group("output")
    out.add_argument("--out", metavar="FILE", default=file, help=f"the report, as JSON ({file})")
    out.add_argument("--json", action="store_true", help="print the report as JSON on stdout")
    out.add_argument("--quiet", action="store_true", help="no progress")


# ---------------------------------------------------------------------------------------- commands


def _rivals(args: argparse.Namespace, command: str) -> int:
    from fused_dni.experiments import rival_arms, rivals
    from fused_dni.report.files import as_json
    from fused_dni.report.progress import Progress

    settings = rival_arms.defaults(dataset_named(args), **given(args, rival_arms.Settings))
    device_named(settings.device)
    out = OutFile("--out", args.out, needed=True)
    set_threads(args)
    progress = Progress(enabled=not args.quiet)
    previous = unfinished(args.out, "rivals") if args.resume else None
    dataset = load_dataset(args, progress)
    with resumable(out):
        report = rivals.compare(
            settings,
            dataset,
            seconds=args.seconds,
            tuned=args.tune,
            previous=previous,
            keep=lambda report: out.write(as_json(report)),
            progress=Progress(enabled=not args.quiet),
            command=command,
        )
    say_report(report, args.json)
    out.finish()
    return 0


def _interfaces(args: argparse.Namespace, command: str) -> int:
    from fused_dni.experiments import interfaces
    from fused_dni.report.files import as_json
    from fused_dni.report.progress import Progress

    settings = interfaces.defaults(dataset_named(args), **given(args, interfaces.Settings))
    out = OutFile("--out", args.out)
    set_threads(args)
    dataset = load_dataset(args, Progress(enabled=not args.quiet))
    report = interfaces.measure(
        settings, dataset, progress=Progress(enabled=not args.quiet), command=command
    )
    out.write(as_json(report))
    say_report(report, args.json)
    out.finish()
    return 0


def given(args: argparse.Namespace, settings: Any) -> dict[str, Any]:
    """What the command line says about the fields of a dataclass; each value of a list once."""
    return {
        name: tuple(dict.fromkeys(value)) if isinstance(value, list) else value
        for name, value in vars(args).items()
        if name in settings.__dataclass_fields__ and name != "dataset"
    }
