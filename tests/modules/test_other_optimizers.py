"""Optimizers of ``torch.optim`` that were given parameters of layers under a rule."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

import fused_dni as fd

pytestmark = pytest.mark.usefixtures("one_thread")


def network() -> nn.Sequential:
    return nn.Sequential(fd.FusedDNILinear(4, 5, update=fd.SGD(0.1)), nn.Linear(5, 3))


def looking() -> int:
    return len(torch_optimizer._global_optimizer_pre_hooks)


def train(model: nn.Module, *steps: object) -> None:
    model(torch.randn(8, 4)).square().mean().backward()
    for each in steps:
        each.step()  # type: ignore[attr-defined]


@pytest.mark.parametrize("order", ["other, schedule", "other, fused", "fused, other"])
def test_it_is_said_once(order: str) -> None:
    model = network()
    owner = fd.Schedule(model) if "schedule" in order else fd.FusedOptimizer(model)
    other = torch.optim.Adam(model.parameters(), lr=0.01)
    steps = (other, owner) if order.startswith("other") else (owner, other)

    def steps_of_training() -> None:
        for _ in range(3):
            train(model, *steps)

    with pytest.warns(UserWarning, match=r"Adam was given 5 parameters \(of 7\) .* as '0'") as said:
        steps_of_training()
    assert len(said) == 1 and said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = fd.Schedule(model)  # one that was warned of is known
        train(model, other)
        again.step()


def test_nothing_is_said_of_what_is_right():
    model = network()
    ordinary = torch.optim.SGD(fd.ordinary_parameters(model), lr=0.01)
    elsewhere = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.01)
    fused, schedule = fd.FusedOptimizer(model), fd.Schedule(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            train(model, ordinary, elsewhere, fused, schedule)
    plain = nn.Sequential(fd.FusedDNILinear(4, 5), nn.Linear(5, 3))  # without a rule
    fd.Schedule(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(plain, torch.optim.SGD(plain.parameters(), lr=0.01))


def test_nothing_looks_on_behind_the_first_step():
    before = looking()
    model = network()
    schedule, fused = fd.Schedule(model), fd.FusedOptimizer(model)
    assert looking() == before + 2
    train(model, fused, schedule)
    train(model, fused, schedule)
    assert looking() == before
    dropped = fd.Schedule(model)
    assert looking() == before + 1
    del dropped
    gc.collect()
    assert looking() == before


def test_copies_look_at_nothing():
    before = looking()
    model = network()
    owners = model, fd.FusedOptimizer(model), fd.Schedule(model)
    copied = copy.deepcopy(owners)
    loaded = pickle.loads(pickle.dumps(owners))
    assert looking() == before + 2
    for net, optimizer, schedule in (copied, loaded):
        for _ in range(2):
            train(net, optimizer, schedule)
    assert looking() == before + 2
    for _ in range(2):
        train(*owners)
    assert looking() == before
