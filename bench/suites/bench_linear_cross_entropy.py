"""A classifier's head with its loss: forward, backward and update, and the gradient below.

Against ``F.cross_entropy`` of ``nn.Linear`` with PyTorch's fused optimizer, eager and compiled, and
``F.linear_cross_entropy`` where this PyTorch has it.
"""

from __future__ import annotations

import pytest

from fused_dni.measure import timing
from workloads import linear_cross_entropy as w


def group(case: w.Case) -> str:
    return f"What does a head cost with its loss? {case}"


@pytest.mark.parametrize("case", w.CASES, ids=str)
def bench_floor(timed, case):
    floor = timing.gemm_floor([(case.batch, case.features, case.classes)] * 3)
    timed(group(case), lambda: floor)


@pytest.mark.parametrize("name", w.CANDIDATES)
@pytest.mark.parametrize("case", w.CASES, ids=str)
def bench_head(timed, case, name):
    timed(group(case), lambda: w.stepper(case, name), lambda: w.check(case, name))
