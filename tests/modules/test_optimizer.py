"""``FusedOptimizer``: the fused rules where PyTorch looks for hyper-parameters and state."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
import twins
from torch import nn
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
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


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("exp_avg", "junk"),
        ("exp_avg", None),
        ("exp_avg_sq", 1.0),
        ("exp_avg", torch.zeros(())),
        ("exp_avg_sq", torch.zeros(3).to_sparse()),
        ("exp_avg", lambda saved: torch.full_like(saved, float("nan"))),
        ("exp_avg_sq", lambda saved: saved.to("meta")),
        ("step", -3.0),
        ("step", float("nan")),
        ("skipped", "junk"),
    ],
)
def test_a_broken_state_is_refused_before_any_of_it_is_taken(name, wrong):
    model = network(fd.Adam(0.01))
    optimizer = fd.FusedOptimizer(model)
    train(model, 2, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    train(model, 1, optimizer)
    before = twins.snapshot(model, optimizer)
    entry = state["state"][max(state["state"])]
    entry[name] = wrong(entry[name]) if callable(wrong) else wrong
    with pytest.raises(ValueError, match=f"saved (state|{name}) of group"):
        optimizer.load_state_dict(state)
    twins.unchanged(before, twins.snapshot(model, optimizer))


def test_moments_of_other_strides_go_on_as_their_values_say():
    made = []
    for turned in (False, True):
        torch.manual_seed(0)
        model = network(fd.Adam(0.01))
        optimizer = fd.FusedOptimizer(model)
        train(model, 2, optimizer)
        state = copy.deepcopy(optimizer.state_dict())
        for entry in state["state"].values():
            for name in ("exp_avg", "exp_avg_sq"):
                if turned and name in entry and entry[name].dim() == 2:
                    entry[name] = entry[name].t().contiguous().t()
        optimizer.load_state_dict(state)
        train(model, 2, optimizer)
        made.append(twins.snapshot(model, optimizer))
    twins.unchanged(*made)


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


def other_shapes():
    return nn.Sequential(
        fd.FusedDNILinear(4, 6, update=fd.Adam(0.01)),
        fd.Decoupled(nn.Linear(6, 6), fd.LinearSynthesizer(6), update=fd.AdamW(0.01)),
        fd.FusedDNILinear(6, 3, synthesizer=None, update=fd.SGD(0.1, momentum=0.9)),
    ).double()


def carried(pair):
    return pickle.loads(pickle.dumps(pair))


def saved(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("way", [copy.deepcopy, carried, saved])
@pytest.mark.parametrize("make", [lambda: network(fd.Adam(0.01)), other_shapes])
def test_a_copy_is_the_copy_s_optimizer(make, way, steps):
    model = make()
    optimizer = fd.FusedOptimizer(model)
    train(model, steps, optimizer)
    other, theirs = way((model, optimizer))
    assert repr(theirs) == repr(optimizer) and theirs.defaults.items() >= optimizer.defaults.items()
    held = {id(p) for p in other.parameters()}
    assert {id(p) for g in theirs.param_groups for p in g["params"]} <= held
    theirs.load_state_dict(theirs.state_dict())
    scheduler, told = (lr_scheduler.ExponentialLR(o, 0.5) for o in (optimizer, theirs))
    train(model, 3, optimizer, scheduler, seed=1)
    train(other, 3, theirs, told, seed=1)
    close(dict(other.state_dict()), dict(model.state_dict()), 0)
    for group in theirs.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    before = kept(other.parameters())
    train(other, 1, theirs)
    close(kept(other.parameters()), before, 0)
    assert optimizer.param_groups[0]["lr"] > 0.0


def test_a_pickle_without_its_rules_is_refused():
    optimizer = fd.FusedOptimizer(network(fd.SGD(0.1)))
    before = torch.optim.Optimizer.__getstate__(optimizer)
    with pytest.raises(TypeError, match=r"make a new FusedOptimizer\(model\)"):
        fd.FusedOptimizer.__new__(fd.FusedOptimizer).__setstate__(before)


@pytest.mark.filterwarnings("ignore")  # PyTorch's, about checkpoints of one process
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_distributed_checkpoint(rule, tmp_path):
    """Into a fresh model and optimizer, beside an ordinary optimizer."""
    checkpoint = pytest.importorskip("torch.distributed.checkpoint")
    of = pytest.importorskip("torch.distributed.checkpoint.state_dict")

    def make():
        model = nn.Sequential(network(rule), nn.Linear(3, 3).double())
        ordinary = torch.optim.Adam(fd.ordinary_parameters(model), 0.01)
        return model, [fd.FusedOptimizer(model), ordinary]

    def go(model, optimizers, seed):
        for _ in range(3):
            optimizers[-1].zero_grad()
            train(model, 1, seed=seed)
            for optimizer in optimizers:
                optimizer.step()

    model, optimizers = make()
    go(model, optimizers, 0)
    a, b = of.get_state_dict(model, optimizers)
    checkpoint.save({"model": a, "optimizer": b}, checkpoint_id=tmp_path)
    go(model, optimizers, 1)
    torch.manual_seed(5)
    again, fresh = make()
    a, b = of.get_state_dict(again, fresh)
    state = {"model": a, "optimizer": b}
    checkpoint.load(state, checkpoint_id=tmp_path)
    of.set_state_dict(again, fresh, model_state_dict=state["model"],
                      optim_state_dict=state["optimizer"])  # fmt: skip
    assert again[0][0].update.steps == 3
    go(again, fresh, 1)
    close(dict(again.state_dict()), dict(model.state_dict()), 0)


def test_a_fresh_state_shows_zeros():
    optimizer = fd.FusedOptimizer(network(fd.Adam(0.01)))
    for state in (optimizer.state_dict()["state"].values(), optimizer.state.values()):
        for entry in state:
            assert entry["step"] == entry["skipped"] == 0
            moments = [v for name, v in entry.items() if name not in ("step", "skipped")]
            assert len(moments) in (0, 2)
            assert not any(m.any() for m in moments)
    assert list(optimizer.state) == [p for g in optimizer.param_groups for p in g["params"]]


def test_state_is_that_of_now():
    """By parameter, without a state_dict before; moments may be changed in place."""
    model = network(fd.Adam(0.01))
    optimizer, p = fd.FusedOptimizer(model), model[0].weight
    for steps in (1, 2):
        train(model, 1, seed=steps)
        assert optimizer.state[p]["step"] == steps
        assert optimizer.state[p]["exp_avg"] is model[0].update.moments()[0][0]
    optimizer.state[p]["exp_avg"].zero_()
    assert not model[0].update.moments()[0][0].any()
    assert optimizer.state[nn.Parameter(torch.ones(1))] == {}
    for change in (
        lambda: optimizer.state.clear(),
        lambda: optimizer.state[p].update(step=0),
        lambda: optimizer.state[p].__setitem__("exp_avg", torch.ones_like(p)),
        lambda: optimizer.state[p].__setitem__("step", 1),
    ):
        with pytest.raises(TypeError, match="cannot be changed key by key"):
            change()
    for value in (optimizer.state[p]["exp_avg"], torch.zeros_like(p)):  # as Lightning does
        optimizer.state[p]["exp_avg"] = value  # what it is: nothing is changed
        assert optimizer.state[p]["exp_avg"] is model[0].update.moments()[0][0]
    held = {q: dict(entry) for q, entry in optimizer.state.items()}
    optimizer.state = {}
    assert model[0].update.steps == 0 and optimizer.state[p]["step"] == 0
    optimizer.state = held
    assert model[0].update.steps == 2


def test_moments_of_low_precision_parameters_are_restored_exactly():
    layer = fd.FusedDNILinear(4, 5, synthesizer=None, dtype=torch.bfloat16,
                              update=fd.Adam(0.01, stochastic_rounding=True))  # fmt: skip
    optimizer = fd.FusedOptimizer(layer)
    layer(torch.randn(6, 4, dtype=torch.bfloat16)).sum().backward()
    before = layer.update.moments()[0][0].clone()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    after = layer.update.moments()[0][0]
    assert after.dtype == torch.float32 and torch.equal(after, before)


# ---------------------------------------------------------------------------------------------
# Groups, freezing, thawing


def test_add_param_group_refuses_what_no_rule_updates():
    model = nn.Sequential(network(fd.SGD(0.1)), nn.Linear(3, 3))
    optimizer = fd.FusedOptimizer(model)
    before = copy.deepcopy(optimizer.state_dict())
    for group, message in (
        (
            {"params": model[1].parameters(), "lr": 0.1},
            r"shape \[3, 3\] in params is updated by no",
        ),
        ({"params": model[0][0].weight}, "more than one parameter group: 0.0.weight is in one"),
        ({"params": {model[0][0].weight}}, "must have an order"),
        ({"params": [3]}, "params must be tensors, got int"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            optimizer.add_param_group(group)
        assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("named", [False, True])
def test_thawed_layers_are_added(named):
    """As ``BaseFinetuning`` of PyTorch Lightning does: everything thawed, in one group."""
    model = network(fd.SGD(0.1, momentum=0.9))
    model[:2].requires_grad_(False)
    optimizer = fd.FusedOptimizer(model)
    assert [g["name"] for g in optimizer.param_groups] == ["2"]
    model.requires_grad_(True)
    with pytest.warns(UserWarning, match="'0' was frozen when this FusedOptimizer was made"):
        optimizer.step()
    optimizer.step()  # said once
    given = model[:2].named_parameters() if named else model[:2].parameters()
    group = {"params": list(given), "lr": 0.02}
    for bad, message in (
        ({"betas": (0.9, 0.9)}, "'betas' is no hyper-parameter"),
        ({"lr": -1.0}, "lr must be"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({**group, **bad})
        assert len(optimizer.param_groups) == 1 and model[0].update.group["lr"] == 0.1
    optimizer.add_param_group(group)
    assert {g["name"]: g["lr"] for g in optimizer.param_groups} == {
        "2": 0.1, "0": 0.02, "0.synthesizer": 0.02, "1": 0.02, "1.synthesizer": 0.02
    }  # fmt: skip
    train(model, 2, optimizer, lr_scheduler.ExponentialLR(optimizer, 0.5))
    assert optimizer.param_groups[1]["lr"] == 0.005
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.state[model[0].weight]["momentum_buffer"].any()


def test_a_thawed_parameter_joins_its_group():
    model = network(fd.Adam(0.01))
    model[0].weight.requires_grad_(False)
    optimizer, whole = fd.FusedOptimizer(model), fd.FusedOptimizer(network(fd.Adam(0.01)))
    model[0].weight.requires_grad_(True)
    train(model, 2, optimizer)
    assert optimizer.param_groups[0]["params"][0] is model[0].weight
    assert optimizer.state[model[0].weight]["exp_avg"].any()
    whole.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_what_was_frozen_keeps_its_state_in_checkpoints():
    model = network(fd.Adam(0.01))
    optimizer = fd.FusedOptimizer(model)
    train(model, 2, optimizer)
    expected = model[0].update.moments()[0][0].clone()
    model[0].weight.requires_grad_(False)
    train(model, 1, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    other = network(fd.Adam(0.01))
    fd.FusedOptimizer(other).load_state_dict(state)
    train(other, 0)
    assert torch.equal(other[0].update.moments()[0][0], expected)


def test_groups_by_regular_expression():
    model = nn.ModuleDict({"body": network(fd.Adam(0.01)), "head": network(fd.Adam(0.01))})
    optimizer = fd.FusedOptimizer(model)
    for group in optimizer.param_groups:
        if re.match(r"body\.\d+$", group["name"]):
            group["lr"] = 0.0
    before = kept(model["body"][0].local_parameters())
    for part in model.values():
        train(part, 1)
    close(kept(model["body"][0].local_parameters()), before, 0)
    with pytest.raises(TypeError, match="model must be an nn.Module, .* got generator"):
        fd.FusedOptimizer(model.parameters())


# ---------------------------------------------------------------------------------------------
# Hooks, profilers, averages


@pytest.mark.parametrize("closure", [None, lambda: 3.0])
def test_hooks_see_what_they_see_of_torch_optim(closure):
    seen = {}

    def watch(optimizer):
        told = seen.setdefault(type(optimizer).__name__, [])
        optimizer.register_step_pre_hook(lambda o, a, k: told.append(("pre", a[0] is o, a[1:], k)))
        optimizer.register_step_post_hook(lambda o, a, k: told.append(("post", a[1:], k)))
        optimizer.register_state_dict_pre_hook(lambda o: told.append("state"))
        optimizer.register_state_dict_post_hook(lambda o, s: told.append(sorted(s)))
        optimizer.register_load_state_dict_pre_hook(lambda o, s: told.append(sorted(s)))
        optimizer.register_load_state_dict_post_hook(lambda o: told.append("loaded"))
        with (
            pre(lambda o, a, k: told.append(("all", a[1:], k))),
            post(lambda o, a, k: told.append("all, behind")),
        ):
            told.append(optimizer.step() if closure is None else optimizer.step(closure))
        optimizer.load_state_dict(optimizer.state_dict())

    pre, post = register_optimizer_step_pre_hook, register_optimizer_step_post_hook
    watch(fd.FusedOptimizer(network(fd.SGD(0.1))))
    watch(torch.optim.SGD(nn.Linear(3, 3).parameters(), 0.1))
    assert seen["FusedOptimizer"] == seen["SGD"] and len(seen["SGD"]) == 9


def test_a_hook_may_change_the_closure():
    optimizer = fd.FusedOptimizer(network(fd.SGD(0.1)))
    optimizer.register_step_pre_hook(lambda o, a, k: ((a[0], lambda: 7.0), k))
    assert optimizer.step(lambda: 3.0) == 7.0


def test_a_profiler_sees_the_step():
    model = network(fd.SGD(0.1))
    optimizer = fd.FusedOptimizer(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(model, 1, optimizer)
    names = {event.key for event in profile.key_averages()}
    assert "Optimizer.step#FusedOptimizer.step" in names


def test_zero_grad_either_way():
    model = network(fd.SGD(0.1))
    optimizer = fd.FusedOptimizer(model)
    for to_none in (True, False):
        model[0].weight.grad = torch.ones_like(model[0].weight)
        optimizer.zero_grad(set_to_none=to_none)
        grad = model[0].weight.grad
        assert grad is None if to_none else not grad.any()
        train(model, 2, optimizer)  # zeros are no gradient that is lost


@pytest.mark.parametrize("averaging", [None, "ema"])
def test_averaged_copies(averaging):
    """``AveragedModel`` holds a mean of the weights, has a state of its own and changes nothing."""
    rule = fd.Adam(0.01)
    model = network(rule)
    optimizer = fd.FusedOptimizer(model)
    average = {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.5)} if averaging else {}
    averaged = swa_utils.AveragedModel(model, **average)
    seen = []
    for step in range(3):
        train(model, 1, optimizer, seed=step)
        averaged.update_parameters(model)
        seen.append(model[0].weight.detach().clone())
    weights = [0.25, 0.25, 0.5] if averaging else [1 / 3] * 3
    expected = sum(w * t for w, t in zip(weights, seen, strict=True))
    close(averaged.module[0].weight.detach(), expected)
    assert averaged.module[0].update.steps == 0 and model[0].update.steps == 3
    assert averaged.eval()(double(3, 4)).isfinite().all()
