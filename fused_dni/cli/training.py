"""``train``, ``train charlm``, ``train copy``, ``train repeat-copy`` and ``demo``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fused_dni.cli.arguments import (
    PROGRAM,
    UsageError,
    common,
    every,
    positive,
    rate,
    refuse_unwritable,
    set_threads,
    whole,
)
from fused_dni.cli.output import say

if TYPE_CHECKING:
    from fused_dni.experiments.characters import Text as Characters
    from fused_dni.experiments.data import Dataset
    from fused_dni.measure.verdict import Verdict
    from fused_dni.report.blocks import Block
    from fused_dni.report.kinds.train import Outcome
    from fused_dni.report.progress import Progress
    from fused_dni.report.schema import Result

#: Commands of two words: ``train copy``.
RECURRENT = ("charlm", "copy", "repeat-copy")


def add_data(command: argparse.ArgumentParser) -> None:
    """Options that say on what images to train."""
    where = command.add_argument_group("data")
    where.add_argument(
        "--dataset",
        choices=("digits", "mnist"),
        help="digits: embedded; mnist: fetched once and checked (default: digits, or mnist with "
        "--data)",
    )
    where.add_argument("--data", metavar="DIR", help="folder of the four MNIST files (IDX, .gz)")


def _add_training(command: argparse.ArgumentParser) -> None:
    """Options that train and demo share. No defaults here: they are the dataset's."""
    add_data(command)
    what = command.add_argument_group("training (defaults are the dataset's)")
    what.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="of backprop, compiled, fused, cdni, dni (default: backprop fused cdni)",
    )
    what.add_argument(
        "--target-every",
        nargs="+",
        type=every,
        metavar="K",
        help="train synthesizers on every K-th step; several are run side by side (default: 1 4)",
    )
    what.add_argument("--hidden", type=whole(1, "hidden"), help="units of a hidden layer (256)")
    what.add_argument("--depth", type=whole(1, "depth"), help="hidden layers (3)")
    what.add_argument("--epochs", type=whole(1, "epochs"), help="(mnist 8, digits 25)")
    what.add_argument("--batch-size", type=whole(2, "batch size"), help="(mnist 256, digits 64)")
    what.add_argument("--update", choices=("sgd", "adam", "adamw"), help="update rule (adam)")
    what.add_argument("--lr", type=rate, help="learning rate at the start, cosine to zero")
    what.add_argument("--sg-lr", type=rate, help="the synthesizers' rate, likewise")
    what.add_argument("--weight-decay", type=rate, help="(0)")
    what.add_argument(
        "--warmup-steps",
        type=whole(0, "warm-up steps"),
        help="steps on true gradients while synthesizers learn (mnist 234, an epoch; digits 44, "
        "two epochs)",
    )
    what.add_argument("--rank", type=whole(0, "rank"), help="of the synthesizers; 0: dense (16)")
    what.add_argument("--seeds", nargs="+", type=whole(0, "a seed"), metavar="SEED")
    what.add_argument(
        "--held-out",
        action="store_true",
        help="evaluate on the last sixth of the training set, kept out of training",
    )
    what.add_argument("--backend", help="force a backend of our kernels")
    out = command.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="print the report as JSON on stdout")
    out.add_argument("--quiet", action="store_true", help="no progress")
    keep = command.add_argument_group("checkpoints")
    keep.add_argument("--checkpoint", metavar="DIR", help="keep the state of the run in DIR")
    keep.add_argument("--resume", action="store_true", help="continue from --checkpoint DIR")
    keep.add_argument(
        "--checkpoint-every",
        type=whole(1, "checkpoint-every"),
        metavar="STEPS",
        help="(default: every 15 seconds and at the end of an epoch)",
    )


def add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train the paper's network by backprop and by DNI, side by side",
        description="Train the network of Jaderberg et al. 2016 (hidden layers of Linear, "
        "BatchNorm, ReLU) by stock backprop, by backprop on our kernels and by cDNI, epoch by "
        "epoch in turn, and write a report: error and wall-clock of each, where a step's time "
        "goes, two plots.",
        epilog=f"recurrent networks: {', '.join(f'{PROGRAM} train {task}' for task in RECURRENT)}",
    )
    _add_training(train)
    train.add_argument(
        "--interface",
        choices=("output", "preactivation"),
        help="where synthesizers predict the gradient: at a layer's output, or before its "
        "normalisation and activation (output)",
    )
    train.add_argument("--out", metavar="DIR", help="report folder (default: runs/DATASET)")
    train.add_argument(
        "--split-seconds",
        type=positive("split-seconds"),
        default=4.0,
        help="time for measuring the parts of a step (4)",
    )
    train.add_argument("--no-split", action="store_true", help="do not measure them")
    common(train)
    train.set_defaults(run=_train, check=_check)


def add_recurrent(commands: Any, task: str) -> None:
    characters = task == "charlm"
    train = commands.add_parser(
        f"train {task}",
        help={
            "charlm": "an LSTM on the characters of a text: truncated backprop and DNI",
            "copy": "an LSTM on the copy task: truncated backprop and DNI",
            "repeat-copy": "likewise, on repeat-copy",
        }[task],
        description="Train an LSTM in windows of T steps by truncated backprop and by DNI, with "
        "and without the auxiliary head, in turn and on the same data, and write a report: "
        + (
            "validation bits per character against characters seen and against wall-clock, and "
            "how much of the gap to a longer window DNI closes at what memory."
            if characters
            else "the longest length solved against training steps, under a curriculum."
        ),
    )
    if characters:
        where = train.add_argument_group("data")
        where.add_argument(
            "--data",
            metavar="PATH",
            help="a UTF-8 text (.gz too), or a folder of .txt and .txt.gz files",
        )
        where.add_argument(
            "--validation", type=positive("validation"), help="share kept at the end (0.05)"
        )
    what = train.add_argument_group("arms")
    what.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="of backprop (nn.LSTM), fused (truncated backprop on our kernels), dni, dni+aux "
        "(default: fused dni dni+aux)",
    )
    what.add_argument(
        "--windows",
        nargs="+",
        type=whole(1, "a window"),
        metavar="T",
        help=f"windows of all methods ({8 if characters else 4})",
    )
    what.add_argument(
        "--long",
        nargs="*",
        type=whole(1, "a window"),
        metavar="T",
        help=f"windows of truncated backprop alone ({40 if characters else 'none'})",
    )
    what.add_argument("--seeds", nargs="+", type=whole(0, "a seed"), metavar="SEED")
    how = train.add_argument_group("training")
    how.add_argument("--hidden", type=whole(1, "hidden"), help="units of the LSTM")
    how.add_argument("--layers", type=whole(1, "layers"), help="of the LSTM (1)")
    how.add_argument("--batch-size", type=whole(1, "batch size"), help="streams or episodes")
    if characters:
        how.add_argument(
            "--characters", dest="amount", type=whole(1, "characters"), help="seen by every arm"
        )
        how.add_argument(
            "--update-every",
            type=whole(0, "update-every"),
            metavar="STEPS",
            help="sum gradients over so many steps of a stream; 0: an update every window",
        )
        how.add_argument(
            "--warmup", type=rate, help="share of the run in which synthesizers only learn"
        )
        how.add_argument("--embedding", type=whole(0, "embedding"), help="its size; 0: one-hot")
    else:
        how.add_argument(
            "--steps", dest="amount", type=whole(1, "steps"), help="batches of every arm"
        )
        how.add_argument("--width", type=whole(1, "width"), help="bits of a symbol")
        how.add_argument(
            "--threshold",
            type=positive("threshold"),
            help="bits of error below which a length is solved (0.15)",
        )
    how.add_argument("--lr", type=rate, help="learning rate")
    how.add_argument(
        "--exact-lr", type=rate, help="that of truncated backprop, if another; 0: the same"
    )
    how.add_argument("--sg-lr", type=rate, help="that of synthesizer and auxiliary head")
    how.add_argument("--clip", type=rate, help="bound of the gradient's norm; 0: none")
    how.add_argument("--sg-scale", type=rate, help="factor on the synthetic gradient")
    how.add_argument(
        "--target-clip", type=rate, help="bound of the synthesizer's target by row; 0: none"
    )
    how.add_argument(
        "--target-scale", type=positive("target-scale"), help="factor on the synthesizer's target"
    )
    how.add_argument("--synthesizer", choices=("default", "linear", "mlp"))
    how.add_argument("--sg-hidden", type=whole(1, "sg-hidden"), help="hidden units of mlp")
    how.add_argument("--backend", help="force a backend of our kernels")
    out = train.add_argument_group("output")
    out.add_argument("--out", metavar="DIR", default=f"runs/{task}", help=f"(runs/{task})")
    out.add_argument("--evaluations", type=whole(1, "evaluations"), help="points of the curves")
    out.add_argument(
        "--seconds", type=positive("seconds"), default=4.0, help="time for timing the arms (4)"
    )
    out.add_argument(
        "--probe",
        action="store_true",
        help="measure the true gradient of the future at boundaries, beside the window's own and "
        "beside what the synthesizer predicts",
    )
    out.add_argument(
        "--memory",
        action="store_true",
        help="measure peak memory against window and length of the sequence",
    )
    out.add_argument("--json", action="store_true", help="print the report as JSON on stdout")
    out.add_argument("--quiet", action="store_true", help="no progress")
    keep = train.add_argument_group("checkpoints")
    keep.add_argument("--checkpoint", metavar="DIR", help="keep the state of the run in DIR")
    keep.add_argument("--resume", action="store_true", help="continue from --checkpoint DIR")
    common(train)
    train.set_defaults(run=_train_recurrent, task=task, check=_check)


def add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="train on real digits: inside a network, with the verdict for its layers on this "
        "machine, and under an expensive top",
        description="Train the paper's network on the embedded digits (or MNIST), measure what its "
        "layers cost by backprop and by DNI on this machine; then race an autoencoder under a "
        "loss of frozen convolutional features. About two minutes on 2 cores with the digits.",
    )
    _add_training(demo)
    demo.add_argument("--out", metavar="DIR", default="runs/demo", help="(runs/demo)")
    demo.add_argument(
        "--seconds", type=positive("seconds"), default=6.0, help="time for the verdict (6)"
    )
    demo.add_argument("--no-compile", action="store_true", help="leave compiled backprop out")
    demo.add_argument(
        "--race", type=positive("race"), default=8.0, metavar="SECONDS",
        help="of each arm and seed under the expensive top (8)",
    )  # fmt: skip
    common(demo)
    demo.set_defaults(run=_demo, check=_check)


# ---------------------------------------------------------------------------------------- commands


def _check(args: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    if args.resume and args.checkpoint is None:
        raise UsageError("--resume needs --checkpoint DIR")
    if hasattr(args, "dataset"):
        dataset_named(args)


def dataset_named(args: argparse.Namespace) -> str:
    """What ``--dataset`` and ``--data`` ask for."""
    if args.data is not None and args.dataset == "digits":
        raise UsageError("--data is for the MNIST files; leave --dataset digits out")
    return "mnist" if args.data is not None else args.dataset or "digits"


def load_dataset(
    args: argparse.Namespace, progress: Progress, *, held_out: bool = False
) -> Dataset:
    """Load it, with a bar for what is fetched."""
    from fused_dni.experiments import data

    def fetching(file: str, done: int, total: int) -> None:
        progress.update(f"fetching {file}", done / total if total > 0 else 0.0)

    with progress:
        return data.load(
            dataset_named(args), folder=args.data, held_out=held_out, progress=fetching
        )


def _refuse_unwritable(args: argparse.Namespace) -> None:
    """Refuse, before anything runs, folders that the run could not write to."""
    refuse_unwritable(args.out)
    if args.checkpoint is not None:
        refuse_unwritable(args.checkpoint)


def _prepare(args: argparse.Namespace, command: str, compile: bool = False) -> Any:
    """Data, settings and progress of a training command; what is wrong shows before anything
    runs."""
    from fused_dni.experiments.train import defaults
    from fused_dni.report.progress import Progress

    name = dataset_named(args)
    settings = defaults(
        name,
        methods=tuple(args.methods) if args.methods else None,
        target_every=tuple(args.target_every) if args.target_every else None,
        seeds=tuple(dict.fromkeys(args.seeds)) if args.seeds else None,
        held_out=args.held_out or None,
        interface=getattr(args, "interface", None),
        **{
            key: getattr(args, key)
            for key in (
                "hidden",
                "depth",
                "epochs",
                "batch_size",
                "update",
                "lr",
                "sg_lr",
                "weight_decay",
                "warmup_steps",
                "rank",
                "backend",
            )
        },
    )
    _refuse_unwritable(args)
    set_threads(args)
    progress = Progress(enabled=not args.quiet)
    dataset = load_dataset(args, progress, held_out=settings.held_out)
    progress.line(
        f"{dataset.name}: {len(dataset.train.labels)} images to train on, "
        f"{len(dataset.test.labels)} to test on; {', '.join(settings.runs())}"
    )
    return settings, dataset


def _run_training(args: argparse.Namespace, command: str, split_seconds: float | None) -> Any:
    from fused_dni.experiments import train
    from fused_dni.report.progress import Progress

    if args.out is None:
        args.out = f"runs/{'mnist' if args.data else args.dataset or 'digits'}"
    settings, dataset = _prepare(args, command)
    outcome = train.train(
        settings,
        dataset,
        checkpoint=args.checkpoint,
        resume=args.resume,
        checkpoint_every=args.checkpoint_every,
        progress=Progress(enabled=not args.quiet),
    )
    if split_seconds is not None:
        progress = Progress(enabled=not args.quiet)
        with progress:
            outcome.split = train.split_time(
                settings,
                dataset,
                seconds=split_seconds,
                progress=lambda fraction: progress.update("parts of a step", fraction),
            )
    return outcome, settings, dataset


def _train(args: argparse.Namespace, command: str) -> int:
    outcome, _, _ = _run_training(args, command, None if args.no_split else args.split_seconds)
    _finish_training(args, outcome, command)
    return 0


def _train_recurrent(args: argparse.Namespace, command: str) -> int:
    from fused_dni.experiments import recurrent
    from fused_dni.experiments.recurrent_report import result
    from fused_dni.measure import memory
    from fused_dni.report.blocks import Text
    from fused_dni.report.kinds import recurrent as kind
    from fused_dni.report.progress import Progress

    given = {
        name: tuple(dict.fromkeys(value)) if isinstance(value, list) else value
        for name, value in vars(args).items()
        if name in recurrent.Settings.__dataclass_fields__ and name != "task"
    }
    settings = recurrent.defaults(args.task, **given)
    source = _text(args.data, settings.validation) if args.task == "charlm" else None
    for arm in settings.arms():  # what does not fit shows before anything runs
        recurrent.build(arm, settings.seeds[0], settings, source)
    _refuse_unwritable(args)
    set_threads(args)
    progress = Progress(enabled=not args.quiet)
    if source is not None:
        progress.line(
            f"{source.name}: {len(source.train)} characters to train on, "
            f"{len(source.validation)} to validate on, {len(source.symbols)} symbols"
        )
    outcome = recurrent.train(
        settings, source, checkpoint=args.checkpoint, resume=args.resume, progress=progress
    )
    progress = Progress(enabled=not args.quiet)
    with progress:
        outcome.costs = recurrent.costs(
            settings,
            source,
            seconds=args.seconds,
            progress=lambda fraction: progress.update("costs", fraction),
        )
        if args.memory:
            outcome.memory_curve = memory.memory_curve(
                batch=settings.batch_size,
                inputs=settings.hidden,
                hidden=settings.hidden,
                layers=settings.layers,
                backend=settings.backend,
                progress=lambda fraction: progress.update("memory curve", fraction),
            )
    said: list[Block] = [kind.summary(outcome)]
    if settings.probe:
        said.append(kind.future_table(outcome))
    if outcome.memory_curve:
        said.append(kind.memory_table(outcome.memory_curve))
    made = result(outcome, command).described()
    said += [Text(made.sentence), *map(Text, outcome.notes)]
    _finish(args, made, said)
    return 0


def _text(path: str | None, validation: float) -> Characters:
    from fused_dni.experiments import characters

    if path is None:
        raise UsageError(f"charlm needs a text, --data PATH: {characters.HOW_TO_GET}")
    return characters.load(path, validation)


def _demo(args: argparse.Namespace, command: str) -> int:
    from fused_dni.experiments import data, nets, perceptual
    from fused_dni.measure.race import race
    from fused_dni.measure.verdict import verdict
    from fused_dni.report.progress import Progress

    outcome, settings, dataset = _run_training(args, command, 3.0)
    rows = data.permutation(len(dataset.train.labels), 0, 0)[: settings.batch_size]
    images, labels = data.pick(dataset.train, rows)
    network = nets.plain(dataset.features, settings.hidden, settings.depth, dataset.classes)
    progress = Progress(enabled=not args.quiet)
    with progress:
        found = verdict(
            network,
            images,
            target=labels,
            update=settings.rule(settings.lr, settings.weight_decay),
            context_features=dataset.classes,
            rank=settings.rank,
            seconds=args.seconds,
            parts=False,
            compile=not args.no_compile,
            compile_limit=45.0,
            backend=settings.backend,
            title=f"{settings.depth} hidden layers of {settings.hidden} (Linear, BatchNorm, ReLU) "
            f"at batch {settings.batch_size} with {settings.update.capitalize()}",
            progress=progress.update,
        )
    raced = race(
        perceptual.arms(perceptual.Images(dataset)),
        seconds=args.race,
        seeds=settings.seeds[:2],
        progress=Progress(enabled=not args.quiet),
        command=command,
    )
    _finish_training(args, outcome, command, found, raced)
    return 0


def _finish_training(
    args: argparse.Namespace,
    outcome: Outcome,
    command: str,
    verdict: Verdict | None = None,
    race: Result | None = None,
) -> None:
    from fused_dni.experiments.train_report import result
    from fused_dni.report.blocks import Heading, Text
    from fused_dni.report.kinds import race as races
    from fused_dni.report.kinds import train as kind

    report = result(outcome, command, verdict, race)
    said: list[Block] = [kind.summary(outcome)]
    if outcome.split is not None:
        said.append(kind.split(outcome.split))
    said += map(Text, outcome.notes)
    if verdict is not None:
        said += [Text(verdict.table()), Text(verdict.sentence())]
    if race is not None:
        said += [Heading("Under an expensive top"), races.table(race), Text(races.sentence(race))]
    _finish(args, report, said)


def _finish(args: argparse.Namespace, report: Result, said: list[Block]) -> None:
    """Write the folder and print what was measured: that, too, where it cannot be written."""
    from fused_dni.report.blocks import as_text
    from fused_dni.report.errors import ReportError
    from fused_dni.report.files import as_json
    from fused_dni.report.folder import write_folder

    files: list[Path] = []
    failed: ReportError | None = None
    try:
        files = write_folder(report, args.out)
    except ReportError as error:
        failed = error
    if args.json:
        say(as_json(report), end="")
    else:
        say("\n" + "\n\n".join([as_text(said), *["\n".join(map(str, files))] * bool(files)]))
    if failed is not None:
        raise failed
