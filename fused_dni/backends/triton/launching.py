"""How the Triton backend's launches run: on which device, with which precision, and where the
programs of cooperative launches meet.

Launches of one stream come one after another and share the words that their programs meet at.
Those of another stream have words of their own, and so has each launch that a CUDA graph captures,
for replays run beside whatever they like. All words were zeroed outside of any capture.

Programs that wait in vain leave a record where the host can read it. It is looked at in front of
every launch from Python, which costs no synchronisation: the next call that reaches the backend on
that device raises. Replays of a graph call no Python.
"""

from __future__ import annotations

import ctypes
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from fused_dni.kernels import barrier, linear, lstm, synthesizer
from fused_dni.kernels.barrier import GridBarrier
from fused_dni.kernels.launch import Launch

_KERNELS = {
    barrier.LINEAR.value: linear.KERNEL,
    barrier.SYNTHESIZER.value: synthesizer.KERNEL,
    barrier.LSTM_FORWARD.value: lstm.FORWARD_KERNEL,
    barrier.LSTM_BACKWARD.value: lstm.BACKWARD_KERNEL,
}
# Words are handed out by sectors of the cache, eight at a time, from blocks of this many; eager
# calls see to it that half a block is there for captures to come.
_BLOCK = 2**16
_SECTOR = 8


def architecture(device: torch.device) -> int:
    """90 for compute capability 9.0 and so on; 0 for the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def resident(device: torch.device) -> int:
    """Return how many programs a cooperative launch may have: one a multiprocessor; in the
    interpreter, where programs run one after another, one."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def run(launches: list[Launch], device: torch.device) -> None:
    """Run on the tensors' device, whichever is the current one.

    Raises:
        RuntimeError: programs of an earlier launch on this device waited in vain for each other.
    """
    shared = _shared.get(device)
    if shared is not None and shared.waited.value:
        shared.fail()
    on: AbstractContextManager[Any] = nullcontext()
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        on = torch.cuda.device(device)
    with on:
        for launch in launches:
            launch.run()


def precision() -> str:
    """Say how float32 products are made."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


# ---------------------------------------------------------------------------------------------
# Where programs meet


def stream(device: torch.device) -> int | None:
    """Return the device's current stream; None while it is captured in a CUDA graph."""
    if device.type != "cuda":
        return 0
    if torch.cuda.is_current_stream_capturing():
        return None
    current: int = driver.active.get_current_stream(device.index)
    return current


def barrier_on(device: torch.device, current: int | None, groups: int = 1) -> GridBarrier:
    """Say where the programs of a launch meet, in so many groups; ``current`` is :func:`stream`'s.

    Raises:
        RuntimeError: in a capture, and there are no words that were zeroed before.
        ValueError: FUSED_DNI_SPIN_BOUND is no bound.
    """
    return shared_by(device, current).barrier(current, groups)


def shared_by(device: torch.device, current: int | None) -> _Shared:
    """Return what launches on a device share, made when it is first asked for; ``current`` is
    :func:`stream`'s.

    Raises:
        RuntimeError: it would have to be made in a capture.
        ValueError: FUSED_DNI_SPIN_BOUND is no bound.
    """
    shared = _shared.get(device)
    if shared is None:
        if current is None:
            raise RuntimeError(_refusal("nothing of backend 'triton' has run on this device yet"))
        shared = _shared.setdefault(device, _Shared(device))
    return shared


def _refusal(why: str) -> str:
    return (
        "a CUDA graph is being captured, in which the memory that programs of a launch meet at "
        f"cannot be zeroed, and {why}: run a step outside of the capture first"
    )


class _Shared:
    """What launches on a device share: words to meet at, and a record of who waited in vain."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bound = barrier.spin_bound()
        self.record = torch.zeros(
            barrier.RECORD, dtype=torch.int32, pin_memory=device.type == "cuda"
        )
        self.waited = ctypes.c_int32.from_address(self.record.data_ptr())
        self.streams: dict[int, GridBarrier] = {}
        self.lock = threading.Lock()
        self.blocks: list[Tensor] = []  # for ever: who knows when a graph is gone
        self.words = self._zeroed(_BLOCK)

    def barrier(self, current: int | None, groups: int) -> GridBarrier:
        """Words that are this stream's alone, or this launch's where it is captured (None).

        Raises:
            RuntimeError: too many launches were captured since the last eager one.
        """
        if current is None:
            if len(self.words) < groups:
                raise RuntimeError(_refusal("what was zeroed before is used up"))
            return self._take(groups)
        found = self.streams.get(current)
        if found is None or len(found.words) < groups:
            found = self.streams[current] = self._take(groups)
        if len(self.words) < _BLOCK // 2:
            with self.lock:
                self.words = self._zeroed(_BLOCK)
        return found

    def _take(self, groups: int) -> GridBarrier:
        size = -(-groups // _SECTOR) * _SECTOR
        with self.lock:
            words = self.words[:size] if size <= len(self.words) else self._zeroed(size)
            self.words = self.words[size:]
        return GridBarrier(words, self.record, self.bound)

    def _zeroed(self, size: int) -> Tensor:
        words = torch.zeros(size, dtype=torch.int32, device=self.device)
        if self.device.type == "cuda":  # graphs may be replayed on any stream
            torch.cuda.current_stream(self.device).synchronize()
        self.blocks.append(words)
        return words

    def fail(self) -> None:
        """Say what is recorded. Eager launches get new words, for the old ones stay given up;
        graphs that were captured keep theirs.

        Raises:
            RuntimeError: always.
        """
        if stream(self.device) is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the record is whole, and nobody adds to it
        said = barrier.describe(self.record.tolist(), _KERNELS, self.bound)
        self.streams.clear()
        self.record.zero_()
        raise RuntimeError(f"backend 'triton' on {self.device}: {said}")


_shared: dict[torch.device, _Shared] = {}
