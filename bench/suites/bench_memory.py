"""Activation memory of a training step against depth: a curve, in ``extra_info`` and printed.

Time is measured too, since memory that is bought with time should show its price.
"""

from __future__ import annotations

import pytest

from fused_dni.measure import timing
from workloads import memory as w


@pytest.mark.parametrize("depth", w.DEPTHS)
@pytest.mark.parametrize("method", ["stock", "deferred", "immediate"])
def bench_memory(timed, benchmark, method, depth):
    step = w.step(method, depth)
    peak = timing.peak_memory(step)
    benchmark.extra_info["peak_bytes"] = peak
    print(f"{method:10} depth {depth:3}: {peak / 2**20:8.2f} MiB at the peak of a step")
    timed(f"What does less activation memory cost? depth {depth:02}", lambda: step)
