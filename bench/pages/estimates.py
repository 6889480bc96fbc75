"""What the main kernels should take on an H200, by a formula, beside what they took."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from pages.cells import grid_of, table
from stored import named

#: Of the chip (its datasheet): bytes a second of its memory, FLOP a second of bf16 products,
#: processors, and bytes a second that one of them reads of the cache (64 a clock at 1.755 GHz).
MEMORY, TENSOR, PROCESSORS, CACHE = 4.8e12, 990e12, 132, 112e9
#: Of the kernels, in seconds: a launch in a graph, a barrier of the grid, a stage of a product (a
#: load from the cache through registers to shared memory, waited for, and multiplied), and what a
#: time step does between its product and its barrier.
LAUNCH, BARRIER, STAGE, GATES = 2.5e-6, 1.0e-6, 0.42e-6, 0.3e-6
#: Stages of a phase without a product over the whole depth.
SMALL_PHASE = 3
#: Share of the tensor cores' rate that torch.mm reaches, and the products inside a window's kernel.
TORCH, INSIDE = 0.6, 0.125
#: Rank of the synthesizer.
RANK = 16


class Estimate(NamedTuple):
    """A kernel at a shape.

    Attributes:
        found: where its measurement lies: part, group and row.
        steps: of the window; 0 for a layer.
    """

    name: str
    found: tuple[str, str, str]
    bytes: float
    flop: float
    launches: int
    barriers: int
    seconds: float
    steps: int = 0

    @property
    def bound(self) -> float:
        """Seconds that bytes and FLOP take by themselves."""
        return max(self.bytes / MEMORY, self.flop / TENSOR)


def bare(what: str, launches: int, barriers: int, seconds: float) -> Estimate:
    """Return a launch of nothing, or a barrier of all processors."""
    return Estimate(what, ("gpu-floors", "barrier", what), 0, 0, launches, barriers, seconds)


def layer_step(batch: int, hidden: int) -> Estimate:
    """Return the decoupled step in one launch: tiles of 128 x 16 of the product, in stages of 64
    depths; of 32 x 64 of the update, in stages of 32 rows; reduction and gradient between them."""
    product = math.ceil(hidden / 64) * math.ceil(math.ceil(hidden / 16) / PROCESSORS)
    tiles = math.ceil(hidden / 32) * math.ceil(hidden / 64)
    update = math.ceil(batch / 32) * math.ceil(tiles / PROCESSORS)
    return Estimate(
        f"decoupled step {batch}/{hidden}",
        ("gpu-layer", f"{batch}/{hidden} bf16 sgd", "DNI, CUDA"),
        8 * hidden * hidden + 2 * 2 * batch * hidden,
        4 * batch * hidden * hidden + 4 * batch * hidden * RANK,
        launches=1,
        barriers=3,
        seconds=LAUNCH + 3 * BARRIER + STAGE * (product + update + 2 * SMALL_PHASE),
    )


def synthesizer_update(batch: int, hidden: int) -> Estimate:
    """h U^T, the error, what it says of U, and of V and the context: four small phases."""
    return Estimate(
        f"synthesizer's update {batch}/{hidden}",
        ("gpu-layer", f"{batch}/{hidden} bf16 sgd", "synthesizer's update, CUDA"),
        3 * 2 * batch * hidden + 6 * 4 * 2 * RANK * hidden,
        8 * batch * hidden * RANK,
        launches=1,
        barriers=3,
        seconds=LAUNCH + 3 * BARRIER + STAGE * 4 * SMALL_PHASE,
    )


def of_steps(batch: int, depth: int, steps: int) -> float:
    """Return a window's chain: each step waits for a barrier, then for what it reads of the
    others'."""
    read = max(STAGE, batch * depth * 2 / CACHE)
    return steps * (BARRIER + read + GATES)


def window_forward(batch: int, hidden: int, steps: int) -> Estimate:
    """Return the input's products of all steps by torch.mm, then the steps in one launch."""
    product = 2 * batch * steps * 4 * hidden * hidden
    return Estimate(
        f"LSTM {batch}/{hidden}/{steps}, forward",
        ("gpu-lstm", f"{batch}/{hidden}/{steps} bf16", "ours, CUDA, forward"),
        4 * 8 * hidden * hidden + 2 * batch * steps * (2 * hidden + 2 * 4 * hidden),
        2 * product,
        launches=2,
        barriers=steps,
        seconds=2 * LAUNCH + product / (TORCH * TENSOR) + of_steps(batch, hidden, steps),
        steps=steps,
    )


def window(batch: int, hidden: int, steps: int) -> Estimate:
    """Forward, then backward in one launch: the steps, then the products of dx and the weights."""
    there = window_forward(batch, hidden, steps)
    product = 2 * batch * steps * 4 * hidden * hidden
    back = of_steps(batch, 4 * hidden, steps) + 3 * product / (INSIDE * TENSOR)
    return Estimate(
        f"LSTM {batch}/{hidden}/{steps}, forward and backward",
        (*there.found[:2], "ours, CUDA"),
        2 * there.bytes,
        there.flop + 4 * product,
        launches=3,
        barriers=2 * steps,
        seconds=there.seconds + LAUNCH + back,
        steps=steps,
    )


ESTIMATES = (
    bare("CUDA launch", 1, 0, LAUNCH),
    bare("CUDA barrier", 0, 1, BARRIER),
    layer_step(128, 1024),
    layer_step(64, 256),
    synthesizer_update(128, 1024),
    *(
        make(*shape)
        for shape in ((16, 768, 1024), (16, 256, 128), (64, 640, 128))
        for make in (window_forward, window)
    ),
)

TEXT = (
    "Estimates for an H200 (132 processors). Seconds = launches × 2.5 µs + barriers × 1 µs + "
    "stages × 0.42 µs, where a stage is a tile's load from the cache, through registers into "
    "shared memory, waited for and multiplied, as many as the longest chain of one processor "
    "has; a phase without a product over the whole depth counts as three. A time step of an "
    "LSTM: a barrier, a stage (or what it reads over 112 GB/s, a processor's share of the "
    "cache, if that is longer), 0.3 µs of sums and gates; its large products at 60 % of the "
    "tensor cores' rate by torch, at an eighth inside a kernel. Bound: the larger of bytes / "
    "4.8 TB/s and FLOP / 990 TFLOP/s. bf16; B/H, or B/H/T and in parentheses a time step. "
    "Measured by `bench/gpu.sh`."
)


def measured(results: dict[str, Any], estimate: Estimate) -> float | None:
    """Seconds that the kernel took there; None if it was not measured."""
    part, key, row = estimate.found
    group = results.get(part, {}).get(key, {})
    if part == "gpu-floors":
        return grid_of(results).get(row)
    found = group.get("rows", {}).get(row, {})
    return float(found["timing"].median) if "timing" in found else None


def render_estimates(found: list[dict[str, Any]]) -> str:
    """Render the kernels, what they move and wait for, the estimate, and a column a measured
    device."""
    rows = []
    for estimate in ESTIMATES:

        def cell(seconds: float | None, steps: int = estimate.steps) -> str:
            if seconds is None:
                return ""
            text = f"{seconds * 1e6:.3g}" if seconds < 1e-3 else f"{seconds * 1e6:.0f}"
            return f"{text} ({seconds / steps * 1e6:.3g})" if steps else text

        rows.append(
            [
                estimate.name,
                f"{estimate.bytes / 1e6:.3g}",
                f"{estimate.flop / 1e9:.3g}",
                str(estimate.launches),
                str(estimate.barriers),
                f"{estimate.bound * 1e6:.3g}",
                cell(estimate.seconds),
                *(cell(measured(results, estimate)) for results in found or [{"facts": {}}]),
            ]
        )
    header = ["kernel", "MB", "GFLOP", "launches", "barriers", "bound, µs", "estimate, µs"]
    devices = [f"{named(r['facts'])}, {r['facts'].get('commit')}" for r in found]
    header += [f"measured, µs, {device}" for device in devices] or ["measured, µs"]
    return "\n\n".join([TEXT, table(header, rows)])
