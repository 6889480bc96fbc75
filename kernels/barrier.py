"""Where the programs of a cooperative launch meet, and what becomes of those that wait in vain.

The barrier itself is :func:`fused_dni.kernels.common.grid_barrier`. Here: what a launch is handed
for it, the record that programs leave when they give up, and what that record says.

A program that did not pass a barrier writes nothing any more but that record, and meets no other:
so parameters, which the last phases write, are as they were. Which words a launch may have, and who
reads the record, is the caller's affair.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from fused_dni.kernels.common import grid_barrier

# Kernels whose programs meet, as a record names them.
LINEAR: tl.constexpr = tl.constexpr(1)
SYNTHESIZER: tl.constexpr = tl.constexpr(2)
LSTM_FORWARD: tl.constexpr = tl.constexpr(3)
LSTM_BACKWARD: tl.constexpr = tl.constexpr(4)

RECORD = 5  # int32 of a record: kernel (0: nothing happened), phase, and three sizes

_BOUND = "FUSED_DNI_SPIN_BOUND"
# A look is a trip to the second-level cache and two barriers of a block, half a microsecond or so.
_USUAL_BOUND = 2**21


class GridBarrier(NamedTuple):
    """What a launch needs so that its programs can meet."""

    words: Any  # int32: one for each group of programs that meet, see grid_barrier
    record: Any  # int32 [RECORD], in memory that the host can read
    bound: Any  # how often a program looks before it gives up; 0: for ever


class Kernel(NamedTuple):
    """What a record says of a kernel."""

    name: str
    phases: Sequence[str] | None  # by number; None: a phase is a step of a window
    sizes: tuple[str, str, str]


@triton.jit
def wait_for_all(barrier, group, programs, phase, size0, size1, size2, KERNEL: tl.constexpr):
    """Wait for all ``programs`` of a group; returns whether they came. Otherwise records which
    kernel waited in front of which phase, unless something is recorded already."""
    passed = grid_barrier(barrier.words + group, programs, barrier.bound)
    if passed == 0:
        record = barrier.record
        if tl.load(record) == 0:
            tl.store(record + 1, phase)
            tl.store(record + 2, size0)
            tl.store(record + 3, size1)
            tl.store(record + 4, size2)
            tl.store(record, KERNEL)
    return passed


def spin_bound() -> int:
    """Return how often a program looks at a barrier's word before it gives up: what
    FUSED_DNI_SPIN_BOUND says, or about a second's worth.

    Raises:
        ValueError: it says something else than an integer from 0 (for ever) to 2^31 - 1.
    """
    said = os.environ.get(_BOUND)
    if said is None:
        return _USUAL_BOUND
    if not (said.isascii() and said.isdigit() and int(said) < 2**31):
        raise ValueError(
            f"{_BOUND} is how often a program looks before it gives up waiting for the others, an "
            f"integer from 0 (it waits for ever) to {2**31 - 1}; got {said!r}"
        )
    return int(said)


def describe(record: Sequence[int], kernels: dict[int, Kernel], bound: int) -> str:
    """Say what a record of one of these kernels says."""
    number, phase, *sizes = record
    kernel = kernels[number]
    where = f"behind step {phase}"
    if kernel.phases is not None:
        where = f"in front of phase {kernel.phases[phase]!r}"
    shape = ", ".join(f"{n} = {size}" for n, size in zip(kernel.sizes, sizes, strict=True))
    return (
        f"{kernel.name}, {where}, for {shape}: not all programs of the launch came to "
        f"meet the others, who gave up after {bound} looks ({_BOUND}; 0: for ever). From there on "
        "that launch wrote nothing, nor did later ones of its stream whose programs meet; what was "
        "computed behind it is void"
    )
