"""``FusedOptimizer``: the fused rules where PyTorch looks for hyper-parameters and state."""

from __future__ import annotations

import copy
import inspect
import io

import pytest
import torch
import torch.nn.functional as F
import twins
from torch import nn
from torch.optim import lr_scheduler
from twins import BACKENDS, Plain, close, double, kept, linear, present

import fused_dni as fd

pytestmark = pytest.mark.usefixtures("one_thread")
RULES = {
    "sgd": fd.SGD(lr=0.1),
    "momentum": fd.SGD(lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": fd.Adam(lr=0.01),
    "adamw": fd.AdamW(lr=0.01),
}


def network(rule, width=6):
    return nn.Sequential(
        linear(4, width, normalization="batch", activation="relu", update=rule),
        linear(width, 5, activation="tanh", update=rule, synthesizer_update=fd.SGD(0.05)),
        linear(5, 3, synthesizer=None, update=rule),
    )


def train(model, steps, optimizer=None, scheduler=None, seed=0):
    torch.manual_seed(seed)
    for _ in range(steps):
        x, y = double(8, 4), torch.randint(3, (8,))
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        elif scheduler is not None:
            scheduler.step()


# ---------------------------------------------------------------------------------------------
# Schedulers

OPTIONS = {
    "LambdaLR": {"lr_lambda": lambda t: 0.5**t},
    "MultiplicativeLR": {"lr_lambda": lambda t: 0.5},
    "StepLR": {"step_size": 1, "gamma": 0.5},
    "MultiStepLR": {"milestones": [1, 2], "gamma": 0.5},
    "ConstantLR": {"factor": 0.5, "total_iters": 2},
    "LinearLR": {"start_factor": 0.5, "total_iters": 4},
    "ExponentialLR": {"gamma": 0.5},
    "PolynomialLR": {"total_iters": 8},
    "CosineAnnealingLR": {"T_max": 8},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.2, "step_size_up": 2},
    "OneCycleLR": {"max_lr": 0.2, "total_steps": 8},
    "ReduceLROnPlateau": {"patience": 0, "factor": 0.5},
    "ChainedScheduler": None,
    "SequentialLR": None,
}


def schedule(name, optimizer):
    if name == "ChainedScheduler":
        parts = [lr_scheduler.StepLR(optimizer, 1, 0.5), lr_scheduler.ExponentialLR(optimizer, 0.9)]
        return lr_scheduler.ChainedScheduler(parts, optimizer)
    if name == "SequentialLR":
        parts = [lr_scheduler.StepLR(optimizer, 1, 0.5), lr_scheduler.ExponentialLR(optimizer, 0.9)]
        return lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])
    return getattr(lr_scheduler, name)(optimizer, **OPTIONS[name])


def test_every_scheduler_of_torch_is_here():
    known = {
        name
        for name, c in vars(lr_scheduler).items()
        if inspect.isclass(c) and issubclass(c, lr_scheduler.LRScheduler)
    }
    assert {n for n in known if n not in ("LRScheduler", "_LRScheduler")} <= set(OPTIONS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_schedulers_change_the_update(backend, name):
    """An exact layer against plain PyTorch under the same scheduler; momentum too (cyclic ones)."""
    rule = fd.SGD(0.1, momentum=0.9)
    layer = linear(4, 5, synthesizer=None, update=rule, backend=backend)
    plain = Plain(layer)
    mine = fd.FusedOptimizer(layer)
    theirs = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9)
    schedules = [schedule(name, o) for o in (mine, theirs)]
    rates = []
    for _ in range(6):
        x, g = double(6, 4), double(6, 5)
        for module, optimizer, told in zip((layer, plain), (mine, theirs), schedules, strict=True):
            optimizer.zero_grad()
            module(x).backward(g)
            optimizer.step()
            told.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        rates.append(mine.param_groups[0]["lr"])
        close(present(layer.local_parameters()), plain.slots())
    assert len(set(rates)) > 1


def test_rates_of_a_rule_are_its_own_group():
    model = network(fd.SGD(0.1))
    optimizer = fd.FusedOptimizer(model)
    names = [g["name"] for g in optimizer.param_groups]
    assert names == ["0", "0.synthesizer", "1", "1.synthesizer", "2"]
    before = kept(model[0].local_parameters())
    for group in optimizer.param_groups:
        if group["name"] == "0":
            group["lr"] = 0.0
    train(model, 2, optimizer)
    close(kept(model[0].local_parameters()), before, 0)
    assert model[1].update.steps == 2


def test_a_rate_may_be_a_tensor():
    layer = linear(4, 5, synthesizer=None, update=fd.SGD(0.1))
    optimizer = fd.FusedOptimizer(layer)
    rate = torch.tensor(0.1)
    optimizer.param_groups[0]["lr"] = rate
    before = kept(layer.local_parameters())
    rate.fill_(0.0)
    layer(double(6, 4)).sum().backward()
    close(kept(layer.local_parameters()), before, 0)


def test_momentum_may_be_raised_from_zero():
    layer = linear(4, 5, synthesizer=None, update=fd.SGD(0.1))
    plain = Plain(layer)
    mine, theirs = fd.FusedOptimizer(layer), torch.optim.SGD(plain.parameters(), 0.1)
    for momentum in (0.0, 0.0, 0.9, 0.9):
        x, g = double(6, 4), double(6, 5)
        mine.param_groups[0]["momentum"] = theirs.param_groups[0]["momentum"] = momentum
        theirs.zero_grad()
        layer(x).backward(g)
        plain(x).backward(g)
        theirs.step()
        close(present(layer.local_parameters()), plain.slots())


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_a_bad_rate_is_refused_before_anything_changes(value):
    layer = linear(4, 5, update=fd.SGD(0.1))
    optimizer = fd.FusedOptimizer(layer)
    optimizer.param_groups[0]["lr"] = value
    before = twins.snapshot(layer)
    with pytest.raises(ValueError, match="lr must be finite and at least 0"):
        layer(double(6, 4))
    twins.unchanged(before, twins.snapshot(layer))


# ---------------------------------------------------------------------------------------------
# State


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("fresh", [True, False])
def test_training_continues_bitwise(rule, fresh):
    """Checkpoint after three steps, through a file, into a fresh model or the same."""
    model = network(rule)
    optimizer = fd.FusedOptimizer(model)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    train(model, 3, optimizer, scheduler)
    file = io.BytesIO()
    state = (model.state_dict(), optimizer.state_dict(), scheduler.state_dict())
    torch.save(state, file)
    train(model, 3, optimizer, scheduler, seed=1)
    expected = twins.snapshot(model)

    torch.manual_seed(99)
    other = network(rule) if fresh else model
    optimizer = fd.FusedOptimizer(other) if fresh else optimizer
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9) if fresh else scheduler
    file.seek(0)
    for what, saved in zip((other, optimizer, scheduler), torch.load(file), strict=True):
        what.load_state_dict(saved)
    train(other, 3, optimizer, scheduler, seed=1)
    after = twins.snapshot(other)
    for key in expected:
        if not key.endswith(("statistics", "grad")):
            assert twins.same(expected[key], after[key]), key


@pytest.mark.parametrize("rule", [fd.SGD(0.1, momentum=0.9), fd.Adam(0.01)], ids=["sgd", "adam"])
def test_state_has_torch_names(rule):
    layer = linear(4, 5, synthesizer=None, update=rule)
    optimizer = fd.FusedOptimizer(layer)
    layer(double(6, 4)).sum().backward()
    plain = nn.Linear(4, 5)
    theirs = (torch.optim.SGD if isinstance(rule, fd.SGD) else torch.optim.Adam)(
        plain.parameters(), **({"momentum": 0.9} if isinstance(rule, fd.SGD) else {})
    )
    plain(torch.randn(3, 4)).sum().backward()
    theirs.step()
    mine, ours = optimizer.state_dict()["state"], theirs.state_dict()["state"]
    assert mine.keys() == ours.keys()
    for key in ours:
        assert set(ours[key]) <= set(mine[key])


def test_a_state_of_before_the_first_step_resets():
    layer = linear(4, 5, update=fd.Adam(0.1))
    optimizer = fd.FusedOptimizer(layer)
    fresh = copy.deepcopy(optimizer.state_dict())
    layer(double(6, 4)).sum().backward()
    assert layer.update.steps == 1
    optimizer.load_state_dict(fresh)
    assert layer.update.steps == 0 and not present(layer.update.moments()[0])


@pytest.mark.parametrize("where", ["shape", "groups", "parameters", "kind"])
def test_a_state_that_does_not_fit_is_refused(where):
    model = network(fd.Adam(0.01))
    optimizer = fd.FusedOptimizer(model)
    train(model, 2, optimizer)
    other = {
        "shape": lambda: network(fd.Adam(0.01), width=7),
        "groups": lambda: network(fd.Adam(0.01))[:2],
        "parameters": lambda: network(fd.Adam(0.01)).requires_grad_(True),
        "kind": lambda: network(fd.SGD(0.1, momentum=0.9)),
    }[where]()
    if where == "parameters":
        other[0].bias.requires_grad_(False)
    theirs = fd.FusedOptimizer(other)
    train(other, 1)
    state = copy.deepcopy(theirs.state_dict())
    before = twins.snapshot(model, optimizer)
    with pytest.raises(ValueError, match="saved"):
        optimizer.load_state_dict(state)
    twins.unchanged(before, twins.snapshot(model, optimizer))
    train(model, 1, optimizer)


# ---------------------------------------------------------------------------------------------
# As an optimizer


def test_it_is_an_optimizer():
    model = network(fd.SGD(0.1))
    optimizer = fd.FusedOptimizer(model)
    assert isinstance(optimizer, torch.optim.Optimizer)
    ran = []

    def closure():
        loss = F.cross_entropy(model(double(8, 4)), torch.randint(3, (8,)))
        loss.backward()
        ran.append(loss)
        return loss

    assert optimizer.step(closure) is ran[0]
    assert optimizer.step() is None
    model[0].weight.grad = torch.ones_like(model[0].weight)
    optimizer.zero_grad()
    assert model[0].weight.grad is None


def test_step_applies_nothing():
    model = network(fd.SGD(0.1))
    optimizer = fd.FusedOptimizer(model)
    train(model, 1)
    before = twins.snapshot(model)
    optimizer.step()
    twins.unchanged(before, twins.snapshot(model))


def test_ordinary_parameters_are_the_rest():
    model = nn.Sequential(
        nn.Linear(4, 4),
        fd.FusedDNILinear(4, 4, update=fd.SGD(0.1)),
        fd.FusedDNILinear(4, 4),
        fd.Decoupled(nn.Linear(4, 4), fd.MLPSynthesizer(4, 3), update=fd.SGD(0.1)),
        fd.FusedDNILinear(4, 4, synthesizer=None, update=fd.SGD(0.1)),
    )
    ordinary = {id(p) for p in fd.ordinary_parameters(model)}
    fused = {id(p) for g in fd.FusedOptimizer(model).param_groups for p in g["params"]}
    assert ordinary == {id(p) for i in (0, 2) for p in model[i].parameters()}
    assert not ordinary & fused
    assert ordinary | fused == {id(p) for p in model.parameters()}


def test_a_model_without_rules():
    with pytest.raises(ValueError, match=r"no layer with a fused rule \(update=...\)"):
        fd.FusedOptimizer(nn.Sequential(fd.FusedDNILinear(4, 4), nn.Linear(4, 4)))
