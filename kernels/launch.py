"""A kernel launch as data: made by the launchers, run by the backend, compiled by the tests."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import triton.language as tl

Options = TypeVar("Options", bound=NamedTuple)


class Launch(NamedTuple):
    """One launch of a jitted kernel.

    What a launcher plans can be looked at before it is run: tests compile it ahead of time for
    architectures that are not there, the tuner compares its variants.
    """

    kernel: Any  # of triton.jit
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by name; tensors, numbers, compile-time constants, named tuples
    options: dict[str, Any]  # num_warps, num_stages, launch_cooperative_grid

    def run(self) -> None:
        """Launch on the current device's current stream."""
        self.kernel[self.grid](**self.arguments, **self.options)


def constants(options: Options) -> Options:
    """Make strings of what a kernel is compiled for compile-time constants: Triton 3.6 does so
    with numbers and types by itself, when a device function hands them on, but not with strings."""
    fields = options._asdict().items()
    strings = {name: tl.constexpr(value) for name, value in fields if isinstance(value, str)}
    made: Options = options._replace(**strings)
    return made


class Specimen(NamedTuple):
    """A launch that is compiled ahead of time, and what its machine code has to keep to."""

    name: str
    launch: Launch
    spills: int = 0  # bytes of a thread's registers that may go through memory
    tensor_cores: bool = True  # has mma or wgmma instructions
    wide_loads: bool = True  # has 128-bit loads from global memory
    in_flight: int = 0  # loads that are not waited for before a grid barrier
