"""What measurements are compared with and stated beside: stock optimizers, facts of the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

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
    processor = platform.processor() or platform.machine()
    try:
        for row in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if row.startswith("model name"):
                processor = row.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    commit = _git("rev-parse", "--short=12", "HEAD")
    # Results and pages are what a measurement writes, not what it measures.
    if commit and _git("status", "--porcelain", "-uno", "--", ".", ":!bench/results", ":!docs"):
        commit += "-dirty"
    commit = commit or os.environ.get("FUSED_DNI_COMMIT")  # of a copy of a checkout
    return {
        "device": processor,
        "where": torch.device(device).type,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "isa": _isa(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fused_dni": _version(),
        "commit": commit,
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
    }


def _isa() -> str | None:
    """Instruction set that our C++ kernels run on: one processor's name may stand for several."""
    try:
        import fused_dni.backends._cpu as cpu
    except ImportError:
        return None
    return cpu.isa()


def _git(*arguments: str) -> str | None:
    """Output of git in the checkout that this file belongs to; None if it belongs to none (an
    installed package may lie inside somebody else's repository)."""
    here = Path(__file__).resolve().parents[2]

    def run(*command: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *command],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=10,
            check=True,
        ).stdout.strip()

    try:
        if Path(run("rev-parse", "--show-toplevel")).resolve() != here:
            return None
        return run(*arguments) or None
    except (OSError, subprocess.SubprocessError):
        return None


def _version() -> str | None:
    try:
        return importlib.metadata.version("fused-dni")
    except importlib.metadata.PackageNotFoundError:
        return None
