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
# How long blocks wait for each other, in nanoseconds, until a launch is stopped.
SPIN_BOUND = "FUSED_DNI_SPIN_BOUND"
_SECOND = 1_000_000_000


@functools.cache
def extension() -> Any:
    """Return the compiled module: ``fused_dni.backends._cuda``, or the host emulation that the
    environment variable FUSED_DNI_CUDA_EMULATION gives the path of.

    Raises:
        ImportError: it was not built.
        ValueError: the environment variable FUSED_DNI_SPIN_BOUND is no number of nanoseconds.
    """
    module = _load()
    module.spin_bound(spin_bound())
    return module


def spin_bound() -> int:
    """Say how many nanoseconds a block waits for others at the most, 0 for ever.

    Raises:
        ValueError: the environment variable says something else.
    """
    text = os.environ.get(SPIN_BOUND, "").strip() or str(_SECOND)
    if not (text.isascii() and text.isdecimal() and int(text) < 2**63):
        raise ValueError(
            f"{SPIN_BOUND}: got {text!r}, takes nanoseconds from 0 (no bound) to 2**63 - 1"
        )
    return int(text)


def _load() -> Any:
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
    """Return a tensor as the extension takes it: address, type, sizes, strides."""
    if t is None:
        return None
    return (t.data_ptr(), TYPES.get(t.dtype, -1), *t.shape, *t.stride())


def ieee() -> bool:
    """Say whether float32 products are IEEE arithmetic, and not TF32."""
    return torch.get_float32_matmul_precision() == "highest"


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make the tensors' device the current one."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return nullcontext()


def current(device: torch.device) -> int:
    """Return the address of its current stream, 0 in the emulation."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def stream(device: torch.device) -> int:
    """Do as :func:`current`, to launch there, the device being the current one (see :func:`on`).

    The extension has a CUDA runtime of its own: it launches on this device from here on.
    """
    if device.type == "cuda":
        extension().use_device(device.index)
    return current(device)


def unbuilt(capability: tuple[int, int]) -> str | None:
    """Return None if the extension has code for devices of this compute capability, or what it was
    built for. Code for 8.0 runs on 8.6 too, code for 9.0a on 9.0 alone."""
    major, minor = capability
    names = extension().architectures.split()
    for name in names:
        number = int(name.rstrip("af"))
        same = (number // 10, number % 10) == capability
        if same or (name.isdigit() and number // 10 == major and number % 10 <= minor):
            return None
    return ", ".join(names)


# ---------------------------------------------------------------------------------------------
# Barrier words

_SPARE = 256  # words that a device has ready for captures


def capturing(device: torch.device) -> bool:
    """Say whether launches on its current stream go into a CUDA graph."""
    if device.type != "cuda":
        return False
    with on(device):
        return torch.cuda.is_current_stream_capturing()


class Words:
    """The words of one device at which the blocks of a launch meet, each 128 bytes from the next.

    A word is zero before its first use and in order behind every launch, so that launches that
    follow each other may share one: those of a stream do. A graph is replayed on any stream, beside
    anything: each launch that it captures has a word that no other launch ever has. Those are
    zeroed ahead, outside of captures; should there be none left, the graph zeroes its own with
    every replay.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.of_stream: dict[int, Tensor] = {}
        self.spare: list[Tensor] = []
        self.kept: list[Tensor] = []  # nobody knows how long a graph lives

    def word(self, stream: int) -> Tensor:
        """Return a word for the next launch on this stream, the device's current one."""
        if capturing(self.device):
            try:
                return self.spare.pop()
            except IndexError:
                return torch.zeros(1, dtype=torch.int32, device=self.device)
        self.prepare()
        word = self.of_stream.get(stream)
        if word is None:
            made = torch.zeros(1, 32, dtype=torch.int32, device=self.device)
            word = self.of_stream.setdefault(stream, made[0, :1])
        return word

    def prepare(self) -> None:
        """Have words ready for captures; does nothing during one."""
        if len(self.spare) >= _SPARE // 2 or capturing(self.device):
            return
        made = torch.zeros(_SPARE, 32, dtype=torch.int32, device=self.device)
        if self.device.type == "cuda":  # whatever stream comes to use them
            torch.cuda.current_stream(self.device).synchronize()
        self.kept.append(made)
        self.spare += [row[:1] for row in made]


@functools.cache
def words(device: torch.device) -> Words:
    """Return those of a device with an index, or of the CPU."""
    return Words(device)


# ---------------------------------------------------------------------------------------------
# Launches

Workspace = tuple[int, int, tuple[int, ...] | None]
Op = Callable[[tuple[Any, ...], Workspace | None, int], int]


def workspace(op: Op, items: tuple[Any, ...], like: Tensor) -> Tensor:
    """Make room for an op with these arguments, on that tensor's device, for its current stream."""
    return like.new_empty(op(items, None, 0) // 4, dtype=torch.float32)


def barrier(device: torch.device) -> tuple[tuple[int, ...] | None, int]:
    """Return the word at which the next launch's blocks meet, described, and the stream that it is
    on."""
    on_stream = stream(device)
    return described(words(device).word(on_stream)), on_stream


def launch(op: Op, items: tuple[Any, ...], room: Tensor) -> None:
    """Run an op on the room's device, in its current stream.

    Raises:
        CudaError: what CUDA reports of the launch.
    """
    device = room.device
    with on(device):
        word, on_stream = barrier(device)
        op(items, (room.data_ptr(), 4 * room.numel(), word), on_stream)
