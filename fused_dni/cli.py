"""``fused-dni``: the command line.

argparse, because it is in the standard library and does what is needed; a nicer parser would be a
dependency of a package whose users mostly want layers. What a command alone needs (scikit-learn,
matplotlib, rich) is imported when it runs.

Exit codes: 0; 1 something failed; 2 bad input; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fused_dni import text

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fused_dni.backends.base import Backend
    from fused_dni.experiments.characters import Text
    from fused_dni.experiments.train import Outcome
    from fused_dni.rules import Rule
    from fused_dni.verdict import Verdict

PROGRAM = "fused-dni"
ACTIVATIONS = (
    "identity",
    "relu",
    "gelu",
    "gelu_tanh",
    "silu",
    "tanh",
    "sigmoid",
    "softplus",
    "mish",
)
DTYPES = ("float32", "float64", "bfloat16", "float16")
#: Commands of two words: ``train copy``.
RECURRENT = ("charlm", "copy", "repeat-copy")


class UsageError(ValueError):
    """Bad input on the command line."""


class Parser(argparse.ArgumentParser):
    """One line for an error, with a suggestion for a typo."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            what = "command" if isinstance(action, argparse._SubParsersAction) else "value"
            names = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(
                None if what == "command" else action, text.unknown(what, str(value), names)
            )

    def options(self) -> list[str]:
        """All options that it knows."""
        return [option for action in self._actions for option in action.option_strings]


# ------------------------------------------------------------------------------- types of arguments


def _whole(low: int, what: str) -> Callable[[str], int]:
    def parse(given: str) -> int:
        try:
            value = int(given)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(
                f"{what} must be a whole number from {low} on, got {given!r}"
            )
        return value

    return parse


def _positive(what: str) -> Callable[[str], float]:
    def parse(given: str) -> float:
        try:
            value = float(given)
        except ValueError:
            value = -1.0
        if not 0.0 < value < float("inf"):
            raise argparse.ArgumentTypeError(
                f"{what} must be a positive, finite number, got {given!r}"
            )
        return value

    return parse


def _rate(given: str) -> float:
    try:
        value = float(given)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"a rate must be a finite number from 0 on, got {given!r}")
    return value


def _every(given: str) -> int:
    """k, with 0 for never."""
    if given == "never":
        return 0
    try:
        value = int(given)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(
            f"k must be a whole number from 1 on, or 'never', got {given!r}"
        )
    return value


def _shape(given: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in given.lower().split("x"))
    except ValueError:
        shape = ()
    if len(shape) < 2 or min(shape) < 1:
        raise argparse.ArgumentTypeError(
            f"a sample's shape looks like 64x784, batch first, got {given!r}"
        )
    return shape


# ------------------------------------------------------------------------------------------ parser


def parser() -> Parser:
    """The command line."""
    top = Parser(
        prog=PROGRAM,
        description="Decoupled neural interfaces: layers that learn from synthetic gradients, "
        "and what they cost beside backprop on this machine.",
        epilog="Errors are one line; set FUSED_DNI_DEBUG=1 (or --traceback) for where they arose.",
    )
    top.add_argument("--version", action="store_true", help="print the version and stop")
    top.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    _add_demo(commands)
    _add_verdict(commands)
    _add_verdict_lstm(commands)
    _add_train(commands)
    for task in RECURRENT:
        _add_recurrent(commands, task)
    _add_tune(commands)
    env = commands.add_parser(
        "env",
        help="what a bug report needs: versions, backends, threads, compilers, GPU",
        description="Print what a bug report needs: versions, backends and for each why it can or "
        "cannot serve, thread pools, compilers, GPU.",
    )
    env.add_argument("--json", action="store_true", help="as JSON")
    _common(env, threads=False)
    return top


def _common(command: argparse.ArgumentParser, *, threads: bool = True) -> None:
    if threads:
        command.add_argument(
            "--threads", type=_whole(1, "threads"), help="CPU threads (torch's default otherwise)"
        )
    # Also behind the command; SUPPRESS keeps what was given in front of it.
    command.add_argument(
        "--traceback", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )


def _add_training(command: argparse.ArgumentParser) -> None:
    """Options that train and demo share. No defaults here: they are the dataset's."""
    where = command.add_argument_group("data")
    where.add_argument(
        "--dataset",
        choices=("digits", "mnist"),
        help="digits: embedded; mnist: fetched once and checked (default: digits, or mnist with "
        "--data)",
    )
    where.add_argument("--data", metavar="DIR", help="folder of the four MNIST files (IDX, .gz)")
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
        type=_every,
        metavar="K",
        help="train synthesizers on every K-th step; several are run side by side (default: 1 4)",
    )
    what.add_argument("--hidden", type=_whole(1, "hidden"), help="units of a hidden layer (256)")
    what.add_argument("--depth", type=_whole(1, "depth"), help="hidden layers (3)")
    what.add_argument("--epochs", type=_whole(1, "epochs"), help="(mnist 8, digits 25)")
    what.add_argument("--batch-size", type=_whole(2, "batch size"), help="(mnist 256, digits 64)")
    what.add_argument("--update", choices=("sgd", "adam", "adamw"), help="update rule (adam)")
    what.add_argument("--lr", type=_rate, help="learning rate at the start, cosine to zero")
    what.add_argument("--sg-lr", type=_rate, help="the synthesizers' rate, likewise")
    what.add_argument("--weight-decay", type=_rate, help="(0)")
    what.add_argument(
        "--warmup-steps",
        type=_whole(0, "warm-up steps"),
        help="steps on true gradients while synthesizers learn (one epoch)",
    )
    what.add_argument("--rank", type=_whole(0, "rank"), help="of the synthesizers; 0: dense (16)")
    what.add_argument("--seeds", nargs="+", type=_whole(0, "a seed"), metavar="SEED")
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
        type=_whole(1, "checkpoint-every"),
        metavar="STEPS",
        help="(default: every 15 seconds and at the end of an epoch)",
    )


def _add_train(commands: Any) -> None:
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
    train.add_argument("--out", metavar="DIR", help="report folder (default: runs/DATASET)")
    train.add_argument(
        "--split-seconds",
        type=_positive("split-seconds"),
        default=4.0,
        help="time for measuring the parts of a step (4)",
    )
    train.add_argument("--no-split", action="store_true", help="do not measure them")
    _common(train)
    train.set_defaults(run=_train)


def _add_recurrent(commands: Any, task: str) -> None:
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
            "--validation", type=_positive("validation"), help="share kept at the end (0.05)"
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
        type=_whole(1, "a window"),
        metavar="T",
        help=f"windows of all methods ({8 if characters else 4})",
    )
    what.add_argument(
        "--long",
        nargs="*",
        type=_whole(1, "a window"),
        metavar="T",
        help=f"windows of truncated backprop alone ({40 if characters else 'none'})",
    )
    what.add_argument("--seeds", nargs="+", type=_whole(0, "a seed"), metavar="SEED")
    how = train.add_argument_group("training")
    how.add_argument("--hidden", type=_whole(1, "hidden"), help="units of the LSTM")
    how.add_argument("--layers", type=_whole(1, "layers"), help="of the LSTM (1)")
    how.add_argument("--batch-size", type=_whole(1, "batch size"), help="streams or episodes")
    if characters:
        how.add_argument(
            "--characters", dest="amount", type=_whole(1, "characters"), help="seen by every arm"
        )
        how.add_argument(
            "--update-every",
            type=_whole(0, "update-every"),
            metavar="STEPS",
            help="sum gradients over so many steps of a stream; 0: an update every window",
        )
        how.add_argument(
            "--warmup", type=_rate, help="share of the run in which synthesizers only learn"
        )
        how.add_argument("--embedding", type=_whole(0, "embedding"), help="its size; 0: one-hot")
    else:
        how.add_argument(
            "--steps", dest="amount", type=_whole(1, "steps"), help="batches of every arm"
        )
        how.add_argument("--width", type=_whole(1, "width"), help="bits of a symbol")
        how.add_argument(
            "--threshold",
            type=_positive("threshold"),
            help="bits of error below which a length is solved (0.15)",
        )
    how.add_argument("--lr", type=_rate, help="learning rate")
    how.add_argument(
        "--exact-lr", type=_rate, help="that of truncated backprop, if another; 0: the same"
    )
    how.add_argument("--sg-lr", type=_rate, help="that of synthesizer and auxiliary head")
    how.add_argument("--clip", type=_rate, help="bound of the gradient's norm; 0: none")
    how.add_argument("--sg-scale", type=_rate, help="factor on the synthetic gradient")
    how.add_argument(
        "--target-clip", type=_rate, help="bound of the synthesizer's target by row; 0: none"
    )
    how.add_argument(
        "--target-scale", type=_positive("target-scale"), help="factor on the synthesizer's target"
    )
    how.add_argument("--synthesizer", choices=("default", "linear", "mlp"))
    how.add_argument("--sg-hidden", type=_whole(1, "sg-hidden"), help="hidden units of mlp")
    how.add_argument("--backend", help="force a backend of our kernels")
    out = train.add_argument_group("output")
    out.add_argument("--out", metavar="DIR", default=f"runs/{task}", help=f"(runs/{task})")
    out.add_argument("--evaluations", type=_whole(1, "evaluations"), help="points of the curves")
    out.add_argument(
        "--seconds", type=_positive("seconds"), default=4.0, help="time for timing the arms (4)"
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
    _common(train)
    train.set_defaults(run=_train_recurrent, task=task)


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="train on real digits, then the verdict for these layers on this machine",
        description="Train the paper's network on the embedded digits (or MNIST), then measure "
        "what its layers cost by backprop and by DNI on this machine. Under two minutes on 2 "
        "cores with the digits.",
    )
    _add_training(demo)
    demo.add_argument("--out", metavar="DIR", default="runs/demo", help="(runs/demo)")
    demo.add_argument(
        "--seconds", type=_positive("seconds"), default=6.0, help="time for the verdict (6)"
    )
    demo.add_argument("--no-compile", action="store_true", help="leave compiled backprop out")
    _common(demo)
    demo.set_defaults(run=_demo)


def _add_tune(commands: Any) -> None:
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
    shape.add_argument("--batch", type=_whole(2, "batch"), default=128, help="rows (128)")
    shape.add_argument("--in", dest="inputs", type=_whole(1, "in"), default=1024, help="(1024)")
    shape.add_argument("--out", dest="outputs", type=_whole(1, "out"), help="units (as --in)")
    shape.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of x (bfloat16)")
    shape.add_argument("--device", default="cuda", help="cuda[:N]")
    what = tune.add_argument_group("layer")
    what.add_argument("--update", choices=("sgd", "adam", "adamw"), default="sgd", help="(sgd)")
    what.add_argument("--normalization", choices=("none", "batch", "layer"), help="linear: (batch)")
    what.add_argument("--activation", choices=ACTIVATIONS, help="linear: (relu)")
    what.add_argument(
        "--rank", type=_whole(0, "rank"), help="linear: of the synthesizer; 0: dense (16)"
    )
    what.add_argument(
        "--classes", type=_whole(0, "classes"), help="linear: that it is conditioned on (10)"
    )
    what.add_argument("--window", type=_whole(1, "window"), metavar="T", help="lstm: steps (32)")
    what.add_argument("--ops", nargs="+", metavar="OP", help="these alone, by their kernels' names")
    out = tune.add_argument_group("output")
    out.add_argument(
        "--seconds", type=_positive("seconds"), default=1.0, help="of timing, for each op (1)"
    )
    out.add_argument("--json", action="store_true", help="as JSON on stdout")
    out.add_argument("--quiet", action="store_true", help="no progress")
    _common(tune, threads=False)
    tune.set_defaults(run=_tune)


def _add_verdict(commands: Any) -> None:
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
    shape.add_argument("--in", dest="inputs", type=_whole(1, "in"), help="input features")
    shape.add_argument("--out", dest="outputs", type=_whole(1, "out"), help="output features")
    shape.add_argument("--width", type=_whole(1, "width"), help="mlp: units of a hidden layer")
    shape.add_argument("--depth", type=_whole(1, "depth"), help="mlp: hidden layers")
    shape.add_argument("--batch", type=_whole(1, "batch"), help="rows of a batch")
    shape.add_argument(
        "--classes",
        type=_whole(1, "classes"),
        help="mlp: outputs; both: classes that synthesizers are conditioned on (10)",
    )
    shape.add_argument("--unconditional", action="store_true", help="no conditioning on classes")
    shape.add_argument("--normalization", choices=("none", "batch", "layer"), help="(batch)")
    shape.add_argument("--activation", choices=ACTIVATIONS, help="(relu)")
    shape.add_argument("--sample", type=_shape, metavar="NxI", help="factory: shape of a batch")
    shape.add_argument("--dtype", choices=DTYPES, default="float32")
    shape.add_argument("--device", default="cpu", help="cpu or cuda")
    how = verdict.add_argument_group("method")
    how.add_argument("--update", choices=("sgd", "adam", "adamw"), default="sgd")
    how.add_argument("--rank", type=_whole(0, "rank"), help="of the synthesizers; 0: dense (16)")
    how.add_argument(
        "--target-every",
        nargs="+",
        type=_every,
        metavar="K",
        default=[1, 2, 4, 8, 16, 0],
        help="(1 2 4 8 16 never)",
    )
    how.add_argument("--backend", help="force a backend of our kernels")
    how.add_argument("--no-compile", action="store_true", help="leave compiled backprop out")
    how.add_argument("--seconds", type=_positive("seconds"), default=5.0, help="(5)")
    out = verdict.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="print the verdict as JSON on stdout")
    out.add_argument("--plot", metavar="PATH", help="draw it into an image file")
    out.add_argument("--quiet", action="store_true", help="no progress")
    _common(verdict)
    verdict.set_defaults(run=_verdict)


def _add_verdict_lstm(commands: Any) -> None:
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
    shape.add_argument("--input", type=_whole(1, "input"), help="input features (as --hidden)")
    shape.add_argument("--hidden", type=_whole(1, "hidden"), default=256, help="units (256)")
    shape.add_argument("--layers", type=_whole(1, "layers"), default=1, help="(1)")
    shape.add_argument("--batch", type=_whole(1, "batch"), default=32, help="rows (32)")
    shape.add_argument("--window", type=_whole(1, "window"), default=8, metavar="T", help="(8)")
    shape.add_argument(
        "--long", type=_whole(2, "long"), metavar="T2", help="longer window (5 times T)"
    )
    shape.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    shape.add_argument("--device", default="cpu", help="cpu or cuda")
    how = verdict.add_argument_group("method")
    how.add_argument("--update", choices=("sgd", "adam", "adamw"), default="adam", help="(adam)")
    how.add_argument("--rank", type=_whole(0, "rank"), help="of the synthesizer; 0: dense (16)")
    how.add_argument("--auxiliary", action="store_true", help="DNI with the auxiliary head")
    how.add_argument("--backend", help="force a backend of our kernels")
    how.add_argument("--seconds", type=_positive("seconds"), default=5.0, help="(5)")
    out = verdict.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="print the verdict as JSON on stdout")
    out.add_argument("--quiet", action="store_true", help="no progress")
    _common(verdict)
    verdict.set_defaults(run=_verdict_lstm)


# ---------------------------------------------------------------------------------------- commands


def _env(args: argparse.Namespace, command: str) -> int:
    from fused_dni.environment import format_report, report

    found = report()
    if args.json:
        import json

        print(json.dumps(found, indent=1))
    else:
        print(format_report(found))
    return 0


def _prepare(args: argparse.Namespace, command: str, compile: bool = False) -> Any:
    """Data, settings and progress of a training command; what is wrong shows before anything
    runs."""
    from fused_dni.experiments import data
    from fused_dni.experiments.train import defaults
    from fused_dni.progress import Progress

    if args.data is not None and args.dataset == "digits":
        raise UsageError("--data is for the MNIST files; leave --dataset digits out")
    name = "mnist" if args.data is not None else args.dataset or "digits"
    settings = defaults(
        name,
        methods=tuple(args.methods) if args.methods else None,
        target_every=tuple(args.target_every) if args.target_every else None,
        seeds=tuple(dict.fromkeys(args.seeds)) if args.seeds else None,
        held_out=args.held_out or None,
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
    if args.resume and args.checkpoint is None:
        raise UsageError("--resume needs --checkpoint DIR")
    _writable(args.out)
    _threads(args)
    progress = Progress(enabled=not args.quiet)

    def fetching(file: str, done: int, total: int) -> None:
        progress.update(f"fetching {file}", done / total if total > 0 else 0.0)

    with progress:
        dataset = data.load(name, folder=args.data, held_out=settings.held_out, progress=fetching)
    progress.line(
        f"{dataset.name}: {len(dataset.train.labels)} images to train on, "
        f"{len(dataset.test.labels)} to test on; {', '.join(settings.runs())}"
    )
    return settings, dataset


def _run_training(args: argparse.Namespace, command: str, split_seconds: float | None) -> Any:
    from fused_dni.experiments import train
    from fused_dni.progress import Progress

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
    from fused_dni.experiments import report

    outcome, _, _ = _run_training(args, command, None if args.no_split else args.split_seconds)
    files = report.write(outcome, args.out, command=command)
    _print_training(args, outcome, files, None)
    return 0


def _train_recurrent(args: argparse.Namespace, command: str) -> int:
    from fused_dni.experiments import memory, recurrent, recurrent_report
    from fused_dni.progress import Progress

    given = {
        name: tuple(dict.fromkeys(value)) if isinstance(value, list) else value
        for name, value in vars(args).items()
        if name in recurrent.Settings.__dataclass_fields__ and name != "task"
    }
    settings = recurrent.defaults(args.task, **given)
    if args.resume and args.checkpoint is None:
        raise UsageError("--resume needs --checkpoint DIR")
    source = _text(args.data, settings.validation) if args.task == "charlm" else None
    for arm in settings.arms():  # what does not fit shows before anything runs
        recurrent.build(arm, settings.seeds[0], settings, source)
    _writable(args.out)
    _threads(args)
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
    files = recurrent_report.write(outcome, args.out, command=command)
    if args.json:
        print(files[0].read_text(), end="")
        return 0
    print()
    print(recurrent_report.summary_table(outcome))
    if settings.probe:
        print()
        print(recurrent_report.future_table(outcome))
    if outcome.memory_curve:
        print()
        print(recurrent_report.memory_table(outcome.memory_curve))
    print()
    print(recurrent_report.sentence(outcome))
    print()
    for path in files:
        print(path)
    return 0


def _text(path: str | None, validation: float) -> Text:
    from fused_dni.experiments import characters

    if path is None:
        raise UsageError(f"charlm needs a text, --data PATH: {characters.HOW_TO_GET}")
    return characters.load(path, validation)


def _demo(args: argparse.Namespace, command: str) -> int:
    from fused_dni.experiments import data, nets, report
    from fused_dni.progress import Progress
    from fused_dni.verdict import verdict

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
            compile=not args.no_compile,
            compile_limit=45.0,
            backend=settings.backend,
            title=f"{settings.depth} hidden layers of {settings.hidden} (Linear, BatchNorm, ReLU) "
            f"at batch {settings.batch_size} with {settings.update.capitalize()}",
            progress=progress.update,
        )
    files = report.write(outcome, args.out, command=command, verdict=found)
    _print_training(args, outcome, files, found)
    return 0


def _print_training(
    args: argparse.Namespace, outcome: Outcome, files: Sequence[Path], verdict: Verdict | None
) -> None:
    from fused_dni.experiments import report

    if args.json:
        print(files[0].read_text(), end="")
        return
    print()
    print(report.summary_table(outcome))
    if outcome.split is not None:
        print()
        print(report.split_table(outcome.split))
    if verdict is not None:
        print()
        print(verdict.table())
        print()
        print(verdict.sentence())
    print()
    for path in files:
        print(path)


def _verdict(args: argparse.Namespace, command: str) -> int:
    import torch

    from fused_dni.progress import Progress
    from fused_dni.verdict import verdict

    if args.plot is not None:
        _writable(str(Path(args.plot).parent))
    _threads(args)
    dtype = getattr(torch, args.dtype)
    device = _device(args.device)
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
            update=_rule(args.update),
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

    _threads(args)
    device = _device(args.device)
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
            update=_rule(args.update),
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


def _tune(args: argparse.Namespace, command: str) -> int:
    import torch

    from fused_dni import tune
    from fused_dni.backends import registry
    from fused_dni.backends.base import LinearConfig
    from fused_dni.progress import Progress

    _refuse(args, ("window",) if args.what == "linear" else ("normalization", "activation", "rank"))
    kind = tune.LSTMScratch if args.what == "lstm" else tune.LinearScratch
    known: Sequence[str] = kind.ops
    ops = args.ops or known
    for op in ops:
        if op not in known:
            raise UsageError(text.unknown("op", op, known))
    device = _device(args.device)
    if args.device == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    dtype = getattr(torch, args.dtype)
    like = torch.empty(0, device=device)
    triton = registry.resolve("triton", like.to(dtype), like)
    update = type(_rule(args.update))
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
                print(tuned.table(), end="\n\n", flush=True)
        if set(kind.parts) <= set(ops):  # with their best tiles
            ranked = tune.rank(make, device, **limits)
            if not args.json:
                print(ranked.table(), end="\n\n", flush=True)
    report = tune.report(found, ranked, device)
    if args.json:
        import json

        print(json.dumps(report, indent=1))
    else:
        print(report["kept in"])
    return 0


def _rule(name: str) -> Rule:
    from fused_dni.rules import SGD, Adam, AdamW

    rules: dict[str, type[Rule]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW}
    return rules[name]()


def _subject(
    args: argparse.Namespace,
) -> tuple[nn.Module, torch.Tensor, torch.Tensor | None, str | None]:
    """Module, sample, labels and title from the command line."""
    import torch

    module: nn.Module
    generator = torch.Generator().manual_seed(0)
    if args.what in ("linear", "mlp"):
        foreign = {"linear": ("width", "depth", "sample"), "mlp": ("outputs", "sample")}[args.what]
        _refuse(args, foreign)
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
    _refuse(args, ("inputs", "outputs", "width", "depth", "batch", "normalization", "activation"))
    module, sample = _factory(args.what)
    if sample is None:
        if args.sample is None:
            raise UsageError(f"{args.what} returns a module alone: give --sample, like 64x784")
        sample = torch.randn(args.sample, generator=generator)
    elif args.sample is not None:
        raise UsageError(f"{args.what} brings its own sample: leave --sample out")
    return module, sample, None, None


def _refuse(args: argparse.Namespace, names: Sequence[str]) -> None:
    spelled = {"inputs": "in", "outputs": "out"}
    for name in names:
        if getattr(args, name) is not None:
            raise UsageError(f"--{spelled.get(name, name)} does not go with {args.what}")


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


def _factory(spec: str) -> tuple[nn.Module, torch.Tensor | None]:
    import torch

    place, colon, name = spec.partition(":")
    if not colon or not place or not name:
        kinds = text.unknown("module", spec, ("linear", "mlp", "lstm"))
        raise UsageError(f"{kinds}, or package.module:factory")
    sys.path.insert(0, os.getcwd())  # as `python -m` would
    try:
        module = importlib.import_module(place)
    except ImportError as error:
        raise UsageError(f"cannot import {place!r}: {error}") from error
    finally:
        sys.path.pop(0)
    try:
        factory = getattr(module, name)
    except AttributeError:
        public = [n for n in vars(module) if not n.startswith("_") and callable(vars(module)[n])]
        raise UsageError(text.unknown(f"factory in {place}", name, public)) from None
    if not callable(factory):
        raise UsageError(f"{spec} is not callable, but {type(factory).__name__}")
    try:
        made = factory()
    except TypeError as error:
        raise UsageError(f"{spec} must be callable without arguments: {error}") from error
    sample = None
    if isinstance(made, tuple) and len(made) == 2:
        made, sample = made
    if not isinstance(made, torch.nn.Module):
        raise UsageError(
            f"{spec} must return a module or (module, sample), got {type(made).__name__}"
        )
    if sample is not None and not isinstance(sample, torch.Tensor):
        raise UsageError(f"the sample of {spec} must be a tensor, got {type(sample).__name__}")
    return made, sample


def _threads(args: argparse.Namespace) -> None:
    if args.threads is not None:
        import torch

        torch.set_num_threads(args.threads)


def _device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device {name!r}: allowed are cpu and cuda[:N]") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("device cuda was asked for, but torch finds no CUDA device here")
    return device


def _writable(folder: str) -> None:
    """Refuse an unwritable folder before minutes of work, not after."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror or error}") from error
    if not os.access(path, os.W_OK):
        raise UsageError(f"cannot write to {folder}: permission denied")


# -------------------------------------------------------------------------------------------- main


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fused-dni")
    except PackageNotFoundError:
        return "unknown (not installed)"


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    top = parser()
    words = list(argv)
    for i, (word, following) in enumerate(itertools.pairwise(words)):
        if (word == "train" and following in RECURRENT) or (word, following) == ("verdict", "lstm"):
            words[i : i + 2] = [f"{word} {following}"]
            break
    args, extra = top.parse_known_args(words)
    if extra:
        known: Parser = top
        for action in top._actions:
            if isinstance(action, argparse._SubParsersAction) and args.command in action.choices:
                known = action.choices[args.command]
        what = "option" if extra[0].startswith("-") else "argument"
        allowed = known.options() if what == "option" else []
        given = extra[0].partition("=")[0]
        message = (
            text.unknown(what, given, allowed) if allowed else f"unexpected argument {given!r}"
        )
        raise UsageError(f"{message} (see {known.prog} --help)")
    return args


def _command(argv: Sequence[str]) -> str:
    """The command as it goes into a report: without the reader's folders."""
    words, hide = [], False
    for word in argv:
        words.append("DIR" if hide else word)
        hide = word in ("--data", "--checkpoint", "--out", "--plot")
        if word.startswith(("--data=", "--checkpoint=", "--out=", "--plot=")):
            words[-1] = word.partition("=")[0] + "=DIR"
    return shlex.join([PROGRAM, *words])


@contextmanager
def _as_one_line(debug: bool, status: list[int]) -> Iterator[None]:
    """Turn exceptions into a line on stderr and an exit code."""

    def say(message: object, code: int, *, internal: bool = False) -> None:
        status[0] = code
        lines = " ".join(str(message).split()) or type(message).__name__
        hint = " (FUSED_DNI_DEBUG=1 shows where)" if internal else ""
        print(f"{PROGRAM}: error: {lines}{hint}", file=sys.stderr)

    try:
        yield
    except KeyboardInterrupt:
        status[0] = 130
        print(f"\n{PROGRAM}: stopped; nothing was kept", file=sys.stderr)
    except BrokenPipeError:
        # Whoever read our output has seen enough (`| head`).
        status[0] = 0
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if type(error).__name__ == "Interrupted":
            status[0] = 130
            print(f"\n{PROGRAM}: stopped; {error}", file=sys.stderr)
            return
        if debug:
            raise
        if isinstance(error, ModuleNotFoundError):
            message = f"{error.name} is missing: pip install {error.name}"
            say(message, 1)
        elif isinstance(error, MemoryError):
            say("not enough memory", 1)
        else:
            bad_input = isinstance(error, (ValueError, IndexError))
            plain = bad_input or isinstance(error, (OSError, RuntimeError))
            named = error if plain else f"{type(error).__name__}: {error}"
            say(named, 2 if bad_input else 1, internal=not plain)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    given = sys.argv[1:] if argv is None else list(argv)
    debug = bool(os.environ.get("FUSED_DNI_DEBUG")) or "--traceback" in given
    status = [0]
    with _as_one_line(debug, status):
        try:
            args = _parse(given)
        except SystemExit as stop:  # --help
            return int(stop.code or 0)
        except UsageError as error:
            print(f"{PROGRAM}: error: {error}", file=sys.stderr)
            return 2
        if args.version:
            print(f"{PROGRAM} {_version()}")
        elif args.command is None:
            parser().print_help()
        elif args.command == "env":
            status[0] = _env(args, _command(given))
        else:
            status[0] = args.run(args, _command(given))
        sys.stdout.flush()
    return status[0]


if __name__ == "__main__":
    sys.exit(main())
