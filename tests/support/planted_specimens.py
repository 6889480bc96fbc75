"""Kernels that keep to their bounds and kernels that do not, for test_triton_compiled.py.

Compiled in processes of their own, where Triton's interpreter is off. Run as a script, this prints
what a kernel is specialised on for a table of arguments.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fused_dni.kernels.aot import compile_launch
from fused_dni.kernels.common import dot, grid_barrier
from fused_dni.kernels.launch import Launch, Specimen
from triton.tools.tensor_descriptor import TensorDescriptor


class Pair(NamedTuple):
    """Two things to add, one of which may be missing."""

    first: Any
    second: Any = None


@triton.jit
def product_kernel(a, b, c, size, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """``c = a @ b`` of [BLOCK, size] and [size, BLOCK], one program."""
    i, k = tl.arange(0, BLOCK), tl.arange(0, 64)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for first in range(0, size, 64):
        left = tl.load(a + i[:, None] * size + (first + k)[None, :])
        right = tl.load(b + (first + k)[:, None] * BLOCK + i[None, :])
        total = dot(left, right, total, PRECISION)
    tl.store(c + i[:, None] * BLOCK + i[None, :], total)


@triton.jit
def described_kernel(a, b, c, size, BLOCK: tl.constexpr):
    """The same by tensor descriptors."""
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for first in range(0, size, 64):
        total = dot(a.load([0, first]), b.load([first, 0]), total, "ieee")
    tl.store(c + i[:, None] * BLOCK + i[None, :], total)


@triton.jit
def meeting_kernel(pair, result, state, size, programs, BLOCK: tl.constexpr):
    """Two rounds of the grid barrier, and what they are for."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for _ in range(2):
        total = tl.load(pair.first + i, mask=i < size)
        if pair.second is not None:
            total += tl.load(pair.second + i, mask=i < size)
        tl.store(result + i, total, mask=i < size)
        grid_barrier(state, programs)
        tl.store(pair.first + i, tl.load(result + size - 1 - i, mask=i < size), mask=i < size)
        grid_barrier(state, programs)


@triton.jit
def ahead_kernel(data, result, state, programs, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """Asks for something in front of a grid barrier, to be used behind it or (EARLY) at once."""
    at = tl.arange(0, BLOCK)
    own = tl.program_id(0) * BLOCK + at
    ahead = tl.load(data + own)
    if EARLY:
        tl.store(result + own, ahead.to(tl.float32))
    grid_barrier(state, programs)
    total = tl.load(result + (programs - 1 - tl.program_id(0)) * BLOCK + at)
    tl.store(data + own, (ahead.to(tl.float32) + total).to(tl.bfloat16))


@triton.jit
def wrong_kernel(a):
    """Does not compile."""
    tl.static_assert(False, "planted")
    tl.store(a, 0.0)


class Crash:
    """In place of a kernel whose compiler does not come back."""

    __name__ = "crash_kernel"

    def warmup(self, **arguments: Any) -> None:
        os._exit(134)


def _operands(block: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return empty(block, size), empty(size, block), empty(block, block, dtype=torch.float32)


def _product(block: int, dtype: torch.dtype, precision: str = "ieee", **options: int) -> Launch:
    a, b, c = _operands(block, 256, dtype)
    arguments = {"a": a, "b": b, "c": c, "size": 256, "BLOCK": block, "PRECISION": precision}
    return Launch(product_kernel, (1,), arguments, options)


def _described(block: int) -> Launch:
    a, b, c = _operands(block, 256, torch.bfloat16)
    described = {
        "a": TensorDescriptor.from_tensor(a, [block, 64]),
        "b": TensorDescriptor.from_tensor(b, [64, block]),
    }
    return Launch(described_kernel, (1,), described | {"c": c, "size": 256, "BLOCK": block}, {})


def meeting(second: bool, device: str = "meta", **options: bool) -> Launch:
    """Four programs."""
    data = torch.zeros(3, 4096, device=device)
    arguments = {
        "pair": Pair(data[0], data[1] if second else None),
        "result": data[2],
        "state": torch.zeros(1, dtype=torch.int32, device=device),
        "size": 4096,
        "programs": 4,
        "BLOCK": 1024,
    }
    return Launch(meeting_kernel, (4,), arguments, dict(options))


def _ahead(early: bool) -> Launch:
    data = torch.zeros(4096, device="meta")
    arguments = {"data": data.bfloat16(), "result": data, "state": data.int(), "programs": 4}
    constants = {"BLOCK": 1024, "EARLY": early}
    options = {"launch_cooperative_grid": True}
    return Launch(ahead_kernel, (4,), arguments | constants, options)


def specimens(architecture: int) -> Iterator[Specimen]:
    """Those named "good" break no bound; the others break the one that they are named after."""
    yield Specimen("good product", _product(128, torch.bfloat16))
    yield Specimen("good descriptors", _described(128))
    for second in (True, False):
        launch = meeting(second, launch_cooperative_grid=True)
        yield Specimen(f"good meeting {second}", launch, tensor_cores=False)
    yield Specimen("good look ahead", _ahead(False), tensor_cores=False, in_flight=1)
    yield Specimen("in flight", _ahead(True), tensor_cores=False, in_flight=1)
    yield Specimen("spills", _product(128, torch.bfloat16, num_warps=2))
    yield Specimen("shared memory", _product(128, torch.bfloat16, num_stages=9))
    yield Specimen("tensor-core", _product(32, torch.float32))
    a, b, c = _operands(64, 256, torch.bfloat16)
    misaligned = {"a": a.flatten()[1:], "b": b.flatten()[1:], "c": c, "size": 256}
    constants = {"BLOCK": 64, "PRECISION": "ieee"}
    yield Specimen("128-bit", Launch(product_kernel, (1,), misaligned | constants, {}))
    yield Specimen("not cooperative", meeting(True), tensor_cores=False)
    yield Specimen("not compiled", Launch(wrong_kernel, (1,), {"a": a}, {}))
    yield Specimen("the compiler crashed", Launch(Crash(), (1,), {}, {}))


@triton.jit
def taking_kernel(a):
    """Takes anything."""


@triton.jit
def constant_kernel(a: tl.constexpr):
    """Takes what the compiler has to know."""


def specialisations() -> dict[str, list[Any]]:
    """What Triton makes of arguments: their types, the constants among them, and those that are
    known to be divisible by 16; members of tuples by their paths."""
    data = torch.empty(64, 64, device="meta")
    table = {
        "pointer": data,
        "pointer off by an element": data.flatten()[1:],
        "pointer off by 16 bytes": data.flatten()[4:],
        "bfloat16": data.bfloat16(),
        "int64": data.long(),
        "1": 1,
        "0": 0,
        "16": 16,
        "17": 17,
        "2**31": 2**31,
        "2**31 - 1": 2**31 - 1,
        "float": 1.0,
        "bool": True,
        "None": None,
        "tuple": Pair(Pair(data, None), Pair(32, 1)),
        "descriptor": TensorDescriptor.from_tensor(data, [16, 32]),
    }
    launches = {name: Launch(taking_kernel, (1,), {"a": a}, {}) for name, a in table.items()}
    launches["constant"] = Launch(constant_kernel, (1,), {"a": "name"}, {})
    made = {}
    for name, launch in launches.items():
        source = compile_launch(launch, 90).src
        constants = {str(path): str(value) for path, value in source.constants.items()}
        divisible = [str(path) for path, attributes in source.attrs.items() if attributes]
        made[name] = [source.signature["a"], constants, divisible]
    return made


if __name__ == "__main__":
    print(json.dumps(specialisations()))
