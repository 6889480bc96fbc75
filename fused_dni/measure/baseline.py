"""What measurements are compared with and stated beside: stock optimizers, facts of the machine."""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fused_dni.measure import environment
from fused_dni.rules import Rule


def stock_optimizer(
    model: nn.Module, rule: Rule, *, captured: bool = False
) -> torch.optim.Optimizer:
    """``torch.optim`` with ``fused=True``, by the same formulas as ``rule``.

    Args:
        model: whose parameters.
        rule: gives kind and constants.
        captured: the steps are to be captured in a CUDA graph: the rate is a tensor on the
            parameters' device, which a replay reads.
    """
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "sgd": torch.optim.SGD,
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
    }
    parameters = list(model.parameters())
    options = rule.defaults()
    if captured:
        options["lr"] = torch.tensor(options["lr"], device=parameters[0].device)
        if rule.kind != "sgd":  # SGD has no state that a capture would freeze, and no such option
            options["capturable"] = True
    return kinds[rule.kind](parameters, fused=True, **options)


def facts(command: str | None = None, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Gather what a reader needs to place the numbers: device, versions, commit, command, time.

    Args:
        command: what was asked for.
        device: where it was measured; ``where`` among the facts.
    """
    return {
        "device": environment.processor(),
        "where": torch.device(device).type,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "isa": _isa(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fused_dni": environment.version("fused-dni"),
        "commit": _commit() or os.environ.get("FUSED_DNI_COMMIT"),  # of a copy of a checkout
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
    }


def name_commit(found: dict[str, Any], commit: str | None) -> None:
    """Name a commit among the facts of a report, beside those that earlier runs are of."""
    known = found.get("commit")
    if commit and commit not in str(known).split(", "):
        found["commit"] = f"{known}, {commit}" if known else commit


def _isa() -> str | None:
    """Instruction set that our C++ kernels run on: one processor's name may stand for several."""
    try:
        import fused_dni.backends._cpu as cpu
    except ImportError:
        return None
    return cpu.isa()


@functools.cache
def _commit() -> str | None:
    """Name the commit of the code that runs: asked once, as it is imported once."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    # Results and pages are what a measurement writes, not what it measures.
    if commit and _git("status", "--porcelain", "-uno", "--", ".", ":!bench/results", ":!docs"):
        commit += "-dirty"
    return commit


def _git(*arguments: str) -> str | None:
    """Output of git in the checkout that this file belongs to; None if it belongs to none (an
    installed package may lie inside somebody else's repository)."""
    here = Path(__file__).resolve().parents[2]
    git = ("git", "-C", str(here))
    top = environment.output_of(*git, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != here:
        return None
    return environment.output_of(*git, *arguments) or None
