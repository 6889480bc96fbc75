"""What the commands share: parser, types of arguments, what is refused before work begins."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fused_dni.report import text

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fused_dni.rules import Rule

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
#: What `verdict` knows by name.
SEGMENTS = ("linear", "mlp", "block", "conv", "transformer", "lstm", "top")


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


def whole(low: int, what: str) -> Callable[[str], int]:
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


def positive(what: str) -> Callable[[str], float]:
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


def rate(given: str) -> float:
    try:
        value = float(given)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"a rate must be a finite number from 0 on, got {given!r}")
    return value


def every(given: str) -> int:
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


def sample_shape(given: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in given.lower().split("x"))
    except ValueError:
        shape = ()
    if len(shape) < 2 or min(shape) < 1:
        raise argparse.ArgumentTypeError(
            f"a sample's shape looks like 64x784, batch first, got {given!r}"
        )
    return shape


def device_name(given: str) -> str:
    if re.fullmatch(r"cpu|cuda(:\d+)?", given) is None:
        raise argparse.ArgumentTypeError(f"unknown device {given!r}: allowed are cpu and cuda[:N]")
    return given


def common(command: argparse.ArgumentParser, *, threads: bool = True) -> None:
    if threads:
        command.add_argument(
            "--threads", type=whole(1, "threads"), help="CPU threads (torch's default otherwise)"
        )
    # Also behind the command; SUPPRESS keeps what was given in front of it.
    command.add_argument(
        "--traceback", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )


# ------------------------------------------------------------------------------ what is asked for


def rule(name: str) -> Rule:
    from fused_dni.rules import SGD, Adam, AdamW

    rules: dict[str, type[Rule]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW}
    return rules[name]()


def refuse(args: argparse.Namespace, names: Sequence[str]) -> None:
    spelled = {"inputs": "in"}
    for name in names:
        if getattr(args, name) is not None:
            raise UsageError(f"--{spelled.get(name, name)} does not go with {args.what}")


def no_factory(spec: str) -> UsageError:
    """What is wrong with a word that names neither a segment nor a factory."""
    return UsageError(f"{text.unknown('module', spec, SEGMENTS)}, or package.module:factory")


def built(spec: str) -> Any:
    """What the factory ``package.module:name`` returns, called without arguments."""
    place, colon, name = spec.partition(":")
    if not colon or not place or not name:
        raise no_factory(spec)
    sys.path.insert(0, os.getcwd())  # as `python -m` would
    try:
        module = importlib.import_module(place)
    except ImportError as error:
        raise UsageError(
            f"cannot import {place!r}: {error}; modules are looked for in {os.getcwd()}, too"
        ) from error
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
        return factory()
    except Exception as error:  # whatever a user's code may raise
        message = str(error) or type(error).__name__
        outside = error.__traceback__ is not None and error.__traceback__.tb_next is None
        if isinstance(error, TypeError) and outside:  # the call itself
            raise UsageError(f"{spec} must be callable without arguments: {message}") from error
        raise UsageError(f"{spec} failed: {message}") from error


def factory(spec: str) -> tuple[nn.Module, torch.Tensor | None]:
    """Module and sample of a factory that returns a module or (module, sample)."""
    import torch

    made = built(spec)
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


def set_threads(args: argparse.Namespace) -> None:
    if args.threads is not None:
        import torch

        torch.set_num_threads(args.threads)


def device_named(name: str) -> torch.device:
    import torch

    found = torch.device(name)
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("device cuda was asked for, but torch finds no CUDA device here")
    return found


def refuse_format(plot: Path | None) -> None:
    """Refuse a plot in a format that is not known, before anything is measured."""
    if plot is None:
        return
    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if plot.suffix.lower().removeprefix(".") not in known:
        raise UsageError(f"--plot must end in one of .{', .'.join(known)}, got {str(plot)!r}")


def refuse_unwritable(folder: str) -> None:
    """Refuse an unwritable folder before minutes of work, not after."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror or error}") from error
