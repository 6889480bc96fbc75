"""What this device can do at most, measured: products and copies; and so the floor of a part.

A ceiling is a rate that was reached here, at a large size and at the segment's own: on a CPU what
fits into a cache is copied faster than any large array, and a small product reaches no large one's
rate. The floor of a part takes the best rates seen, so nothing on this device can be below it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fused_dni.measure import timing
from fused_dni.measure.verdict.work import Work

#: Side of the square product, and bytes of the copied array, that count as large.
LARGE_PRODUCT = {"cpu": 768, "cuda": 8192}
LARGE_COPY = {"cpu": 1 << 26, "cuda": 1 << 30}
#: Own sizes that are copied, at least and at most.
OWN_COPY = (1 << 14, 1 << 26)
ROUNDS = 8


@dataclass(frozen=True)
class Ceilings:
    """Rates reached on this device.

    Attributes:
        flops: floating-point operations per second, by what was multiplied.
        bytes: bytes read and written per second, by what was copied.
    """

    flops: dict[str, float]
    bytes: dict[str, float]

    def floor(self, work: Work) -> float:
        """Seconds that this work takes at least: by arithmetic or by traffic, the larger."""
        arithmetic = work.flops / max(self.flops.values())
        traffic = work.bytes / max(self.bytes.values())
        return max(arithmetic, traffic)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"flops per second": self.flops, "bytes per second": self.bytes}


def measure_ceilings(
    dtype: torch.dtype,
    device: torch.device,
    shapes: Sequence[tuple[int, int, int]] = (),
    traffic: int = 0,
    *,
    progress: Callable[[float], None] | None = None,
) -> Ceilings:
    """Measure what products and copies reach.

    Args:
        dtype: of the products.
        device: where.
        shapes: (rows, in, out) of the segment's linear layers.
        traffic: bytes that a part of the segment moves.
        progress: called with the fraction done.
    """
    side = LARGE_PRODUCT[device.type]
    products = {f"{side} x {side} x {side}": [(side, side, side)]}
    if shapes:
        products["the segment's own"] = list(shapes)
    copies = {"large": LARGE_COPY[device.type]}
    if traffic:
        copies["the segment's own"] = min(max(traffic, OWN_COPY[0]), OWN_COPY[1])
    calls: dict[str, timing.Candidate] = {}
    for name, sizes in products.items():
        calls[f"product {name}"] = timing.gemm_floor(sizes, dtype, device)
    for name, size in copies.items():
        calls[f"copy {name}"] = _copy(size, device)
    found = timing.compare(calls, rounds=ROUNDS, block=1, device=device, progress=progress)
    # gemm_floor makes two products of a shape; a copy reads and writes half of its bytes each.
    flops = {
        name: sum(4 * n * i * o for n, i, o in sizes) / found[f"product {name}"].p10
        for name, sizes in products.items()
    }
    bytes_ = {name: size / found[f"copy {name}"].p10 for name, size in copies.items()}
    return Ceilings(flops, bytes_)


def _copy(size: int, device: torch.device) -> timing.Candidate:
    source = torch.zeros(size // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
