"""A training step of the whole network: four hidden layers, batch norm, ReLU, a linear head.

One group a batch size, width and rule; the time printed is that of a cycle of four steps, also for
the floor. The committed table of the same candidates is measured interleaved
(``bench/tables.py``). On our layers the head and its cross-entropy are part of the container's
call, by backprop as by DNI; the head alone is in ``bench_linear_cross_entropy.py``.
"""

from __future__ import annotations

import pytest

from fused_dni.measure import timing
from workloads import step as w


def group(case: w.Case, rule: str) -> str:
    return f"Is a network's step cheaper by DNI? {case} {rule}, {w.CYCLE} steps"


@pytest.mark.parametrize("rule", w.RULES)
@pytest.mark.parametrize("case", w.CASES, ids=str)
def bench_floor(timed, case, rule):
    floor = timing.gemm_floor([(case.batch, case.hidden, case.hidden)] * w.DEPTH * w.CYCLE)
    timed(group(case, rule), lambda: floor, steps=w.CYCLE)


@pytest.mark.parametrize("method", w.METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("rule", w.RULES)
@pytest.mark.parametrize("case", w.CASES, ids=str)
def bench_step(timed, case, rule, method):
    timed(
        group(case, rule),
        lambda: w.stepper(w.Training(case, rule, method, lr=w.LEARNING_RATES[rule] / 100)),
        lambda: w.check_step(case, rule, method),
        steps=w.CYCLE,
    )
