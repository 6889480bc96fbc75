"""How the Triton backend's launches run: on which device, with which precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from fused_dni.kernels.launch import Launch


def architecture(device: torch.device) -> int:
    """90 for compute capability 9.0 and so on; 0 for the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def resident(device: torch.device) -> int:
    """Programs that a cooperative launch may have: one a multiprocessor; in the interpreter, where
    programs run one after another, one."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def run(launches: list[Launch], device: torch.device) -> None:
    """Run on the tensors' device, whichever is the current one."""
    on: AbstractContextManager[Any] = nullcontext()
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        on = torch.cuda.device(device)
    with on:
        for launch in launches:
            launch.run()


def precision() -> str:
    """How float32 products are made."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
