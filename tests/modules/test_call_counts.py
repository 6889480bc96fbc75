"""Python calls of a training step: what no clock blurs. Bounds are what 6f88877 made."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_dni as fd

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 4  # a whole cycle of targets on every fourth step


def _calls(synthesizer: bool, target_every: int | None) -> float:
    """Python calls a step of four Linear-BatchNorm-ReLU layers and an exact head, SGD rules."""
    options: dict[str, Any] = {"normalization": "batch", "activation": "relu"}
    options |= {"context_features": 10} if synthesizer else {"synthesizer": None}
    rule = fd.SGD(0.1)
    layers = [fd.FusedDNILinear(16, 16, update=rule, **options) for _ in range(4)]
    model = nn.Sequential(*layers, fd.FusedDNILinear(16, 10, synthesizer=None, update=rule))
    optimizer = fd.FusedOptimizer(model)
    schedule = fd.Schedule(model, target_every=target_every) if synthesizer else None
    x, y = torch.randn(8, 16), torch.randint(0, 10, (8,))

    def step() -> None:
        with fd.condition_on(y):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()

    for _ in range(6 * STEPS):  # the lowest layer learns from the fourth lesson on
        step()
    counted: Counter[str] = Counter()

    def count(frame: object, event: str, argument: object) -> None:
        counted[event] += 1

    sys.setprofile(count)
    try:
        for _ in range(STEPS):
            step()
    finally:
        sys.setprofile(None)
    return counted["call"] / STEPS


@pytest.mark.parametrize(
    ("synthesizer", "target_every", "most"),
    [
        pytest.param(False, 1, 805, id="own backprop"),
        pytest.param(True, 1, 746, id="k=1"),
        pytest.param(True, 4, 491, id="k=4"),
        pytest.param(True, None, 398, id="no targets"),
    ],
)
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="counts are Python 3.11's")
def test_a_step_makes_no_more_python_calls(
    synthesizer: bool, target_every: int | None, most: int
) -> None:
    assert 100 < _calls(synthesizer, target_every) <= most
