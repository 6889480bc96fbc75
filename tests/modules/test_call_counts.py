"""Python's and C's calls of a training step: what no clock blurs. (6f88877 made 805, 746, 491 and
398 of Python's where no container is named.)"""

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


def _calls(
    synthesizer: bool, target_every: int | None, container: bool, loss: bool
) -> tuple[float, float]:
    """Calls a step of four Linear-BatchNorm-ReLU layers and an exact head, SGD rules; with the
    cross-entropy in the head or outside."""
    options: dict[str, Any] = {"normalization": "batch", "activation": "relu"}
    options |= {"context_features": 10} if synthesizer else {"synthesizer": None}
    rule = fd.SGD(0.1)
    layers: list[nn.Module] = [fd.FusedDNILinear(16, 16, update=rule, **options) for _ in range(4)]
    head: nn.Module = fd.FusedDNILinear(16, 10, synthesizer=None, update=rule)
    if loss:
        head = fd.FusedDNILinearCrossEntropyLoss(16, 10, update=rule)
    if not container:
        model: nn.Module = nn.Sequential(*layers, head)
    elif synthesizer and not loss:
        model = nn.Sequential(fd.DecoupledSequential(*layers), head)
    else:
        model = fd.DecoupledSequential(*layers, head)
    optimizer = fd.FusedOptimizer(model)
    schedule = fd.Schedule(model, target_every=target_every) if synthesizer else None
    x, y = torch.randn(8, 16), torch.randint(0, 10, (8,))

    def step() -> None:
        with fd.condition_on(y):
            made = model(x, target=y) if loss else F.cross_entropy(model(x), y)
        made.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()

    # The lowest layer learns from the fourth lesson on, and no unit is looked at in the seventh,
    # nor, where every step has a target, in the 25th to 28th.
    for _ in range(6 * STEPS):
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
    return counted["call"] / STEPS, counted["c_call"] / STEPS


@pytest.mark.parametrize(
    ("synthesizer", "target_every", "container", "loss", "most", "most_of_c"),
    [
        pytest.param(False, 1, False, False, 206, 175, id="own backprop"),
        pytest.param(True, 1, False, False, 240, 190, id="k=1"),
        pytest.param(True, 4, False, False, 140, 118, id="k=4"),
        pytest.param(True, None, False, False, 104, 92, id="no targets"),
        pytest.param(False, 1, True, False, 90, 120, id="own backprop, stack"),
        pytest.param(True, 1, True, False, 120, 120, id="k=1, stack"),
        pytest.param(True, 4, True, False, 90, 120, id="k=4, stack"),
        pytest.param(True, None, True, False, 84, 90, id="no targets, stack"),
        pytest.param(False, 1, True, True, 71, 85, id="own backprop, head in it"),
        pytest.param(True, 1, True, True, 78, 89, id="k=1, head in it"),
        pytest.param(True, 4, True, True, 71, 80, id="k=4, head in it"),
        pytest.param(True, None, True, True, 69, 77, id="no targets, head in it"),
    ],
)
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="counts are Python 3.11's")
def test_a_step_makes_no_more_calls(
    synthesizer: bool,
    target_every: int | None,
    container: bool,
    loss: bool,
    most: float,
    most_of_c: float,
) -> None:
    calls, of_c = _calls(synthesizer, target_every, container, loss)
    assert 50 < calls <= most, calls
    assert of_c <= most_of_c, of_c
