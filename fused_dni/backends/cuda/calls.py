"""How the CUDA backend calls its extension: which module serves, how tensors are described to it,
on which device and stream it launches."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fused_dni.backends.common.built import why_missing

# Codes of csrc/cuda/matrix.hpp.
TYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.int64: 4,
    torch.int32: 5,
    torch.bool: 6,
    torch.uint8: 7,
}
# Of a workspace, the first bytes: the grid's barrier, to be zero before its first use.
BARRIER_BYTES = 128


@functools.cache
def extension() -> Any:
    """The compiled module: ``fused_dni.backends._cuda``, or the host emulation that the
    environment variable FUSED_DNI_CUDA_EMULATION gives the path of.

    Raises:
        ImportError: it was not built.
    """
    path = os.environ.get("FUSED_DNI_CUDA_EMULATION")
    if not path:
        try:
            return importlib.import_module("fused_dni.backends._cuda")
        except ImportError as error:
            raise ImportError(f"fused_dni.backends._cuda {why_missing('_cuda', error)}") from error
    spec = importlib.util.spec_from_file_location("_cuda_emulated", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"FUSED_DNI_CUDA_EMULATION={path!r} is no Python extension")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def described(t: Tensor | None) -> tuple[int, ...] | None:
    """A tensor as the extension takes it: address, type, sizes, strides."""
    if t is None:
        return None
    return (t.data_ptr(), TYPES.get(t.dtype, -1), *t.shape, *t.stride())


def ieee() -> bool:
    """Whether float32 products are IEEE arithmetic, and not TF32."""
    return torch.get_float32_matmul_precision() == "highest"


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make the tensors' device the current one."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return nullcontext()


def stream(device: torch.device) -> int:
    """The address of its current stream, 0 in the emulation.

    The extension has a CUDA runtime of its own: it launches on this device from here on.
    """
    if device.type != "cuda":
        return 0
    extension().use_device(device.index)
    return torch.cuda.current_stream(device).cuda_stream


def unbuilt(capability: tuple[int, int]) -> str | None:
    """None if the extension has code for devices of this compute capability, or what it was built
    for. Code for 8.0 runs on 8.6 too, code for 9.0a on 9.0 alone."""
    major, minor = capability
    names = extension().architectures.split()
    for name in names:
        number = int(name.rstrip("af"))
        same = (number // 10, number % 10) == capability
        if same or (name.isdigit() and number // 10 == major and number % 10 <= minor):
            return None
    return ", ".join(names)


Op = Callable[[tuple[Any, ...], tuple[int, int] | None, int], int]


def workspace(op: Op, items: tuple[Any, ...], like: Tensor) -> Tensor:
    """Room for an op with these arguments, on that tensor's device, its barrier zeroed."""
    words = op(items, None, 0) // 4
    room: Tensor = like.new_empty(words, dtype=torch.float32)
    room[: BARRIER_BYTES // 4].zero_()
    return room


def launch(op: Op, items: tuple[Any, ...], room: Tensor) -> None:
    """Run an op on the room's device, in its current stream.

    Raises:
        CudaError: what CUDA reports of the launch.
    """
    device = room.device
    with on(device):
        op(items, (room.data_ptr(), 4 * room.numel()), stream(device))
