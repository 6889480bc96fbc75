"""What commands make of their options, and refuse before work begins."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fused_dni.cli.command import UsageError as UsageError
from fused_dni.report import text

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fused_dni.rules import Rule

#: What `verdict` knows by name.
SEGMENTS = ("linear", "mlp", "block", "conv", "transformer", "lstm", "top")


def rule(name: str) -> Rule:
    """Make the update rule of that name, with its own rate."""
    from fused_dni.rules import SGD, Adam, AdamW

    rules: dict[str, type[Rule]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW}
    return rules[name]()


def refuse(what: str, given: Mapping[str, Any]) -> None:
    """Refuse options, by their flags, that do not go with ``what``, if they were given."""
    for flag, value in given.items():
        if value is not None:
            raise UsageError(f"--{flag} does not go with {what}")


def refuse_number(out: str | None) -> None:
    """Refuse a number as --out: of output features."""
    if out is not None and out.isdigit():
        raise UsageError(
            f"--out is the file that the JSON goes to, got {out!r}; for output features there "
            "is --outputs"
        )


def no_factory(spec: str) -> UsageError:
    """Say what is wrong with a word that names neither a segment nor a factory."""
    return UsageError(f"{text.unknown('module', spec, SEGMENTS)}, or package.module:factory")


def built(spec: str) -> Any:
    """Call the factory ``package.module:name`` without arguments and return what it makes."""
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
        outside = error.__traceback__ is not None and error.__traceback__.tb_next is None
        if isinstance(error, TypeError) and outside:  # the call itself
            raise UsageError(f"{spec} must be callable without arguments: {error}") from error
        raise UsageError(f"{spec} failed: {text.raised(error)}") from error


def factory(
    spec: str, shape: tuple[int, ...] | None, *more: str
) -> tuple[nn.Module, torch.Tensor, list[Any]]:
    """Get module and sample of a factory that returns a module or (module, sample), and what
    ``more`` names, as far as it returns that; ``shape`` is of a sample where it brings none."""
    import torch

    made = built(spec)
    parts = list(made) if isinstance(made, tuple) else [made]
    if not 1 <= len(parts) <= 2 + len(more) or not isinstance(parts[0], torch.nn.Module):
        forms = [f"({', '.join(('module', 'sample', *more[:i]))})" for i in range(len(more) + 1)]
        allowed = ", ".join(["a module", *forms[:-1]])
        got = f"({', '.join(type(part).__name__ for part in parts)})"
        raise UsageError(
            f"{spec} must return {allowed} or {forms[-1]}, got "
            f"{got if isinstance(made, tuple) else type(made).__name__}"
        )
    module, sample, *rest = [*parts, None][: max(2, len(parts))]
    if sample is None:
        if shape is None:
            raise UsageError(f"{spec} brings no sample: give --sample, like 64x784")
        sample = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    elif shape is not None:
        raise UsageError(f"{spec} brings its own sample: leave --sample out")
    if not isinstance(sample, torch.Tensor):
        raise UsageError(f"the sample of {spec} must be a tensor, got {type(sample).__name__}")
    return module, sample, rest


def set_threads(threads: int | None) -> None:
    """Let torch use so many, if a number was given."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def device_named(name: str) -> torch.device:
    """Make a device, after a look for CUDA."""
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
