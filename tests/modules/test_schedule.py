"""``Schedule``: warm-up, targets on every k-th step, mixing, loss scales."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
import twins
from torch import nn
from twins import BACKENDS, Plain, close, double, kept, linear, present

import fused_dni as fd

pytestmark = pytest.mark.usefixtures("one_thread")
backends = pytest.mark.parametrize("backend", BACKENDS)
SGD = fd.SGD(lr=0.1)
updates = pytest.mark.parametrize("rule", [None, SGD], ids=["returned", "fused"])
NAMES = ("warmup", "target")


def phases(schedule, steps):
    out = []
    for _ in range(steps):
        phase = schedule.phase()
        out.append("w" if phase.warmup else "t" if phase.target else "-")
        schedule.step()
    return "".join(out)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, "tttttt"),
        ({"target_every": 3}, "t--t--t--"),
        ({"target_every": None}, "-----"),
        ({"warmup_steps": 2, "target_every": 2}, "wwt-t-"),
        ({"warmup_steps": 3, "target_every": None}, "www---"),
    ],
)
def test_order_of_phases(arguments, expected):
    assert phases(fd.Schedule(linear(3, 3), **arguments), len(expected)) == expected


def test_flags_reach_every_layer_and_steps_are_not_forwards():
    inner = fd.Decoupled(nn.Linear(3, 3).double(), fd.LinearSynthesizer(3, dtype=torch.float64))
    model = nn.Sequential(linear(3, 3), inner, linear(3, 3, synthesizer=None))
    schedule = fd.Schedule(model, target_every=2)
    for expected in (True, False, True):
        for _ in range(3):  # forwards do not count
            model(double(4, 3))
        assert all(layer.phase.target is expected for layer in model)
        schedule.step()


def test_a_new_schedule_replaces_an_old_one():
    model = nn.Sequential(linear(3, 3), linear(3, 3))
    fd.Schedule(model[1], target_every=None)
    fd.Schedule(model)
    assert model[1].phase == model[0].phase == fd.Schedule(model).phase()


def test_state_dict():
    model = linear(3, 3)
    schedule = fd.Schedule(model, warmup_steps=2, target_every=3)
    for _ in range(4):
        schedule.step()
    state, phase = schedule.state_dict(), model.phase
    assert state == {"steps": 4}
    other = linear(3, 3)
    resumed = fd.Schedule(other, warmup_steps=2, target_every=3)
    resumed.load_state_dict(state)
    assert other.phase == phase
    assert phases(resumed, 5) == phases(schedule, 5) == "-t--t"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"target_every": 0}, 'a whole number of at least 1, "auto" or None, got 0'),
        ({"target_every": 2.5}, 'a whole number of at least 1, "auto" or None, got 2.5'),
        ({"target_every": True}, 'a whole number of at least 1, "auto" or None, got True'),
        ({"mix": 1.5}, r"mix must be in \[0, 1\], got 1.5"),
        ({"mix": float("nan")}, r"mix must be in \[0, 1\], got nan"),
        ({"loss_scale": 0.0}, "loss_scale must be None or positive and finite"),
        ({"loss_scale": -2.0}, "loss_scale must be None or positive and finite"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        fd.Schedule(linear(3, 3), **arguments)


def test_a_model_without_decoupled_layers():
    with pytest.raises(ValueError, match=r"no decoupled layers \(see fused_dni.convert\)"):
        fd.Schedule(nn.Linear(3, 3))


# ---------------------------------------------------------------------------------------------
# What the phases do


def network(rule, backend=None, normalization="layer"):
    options = {"update": rule, "backend": backend}
    return nn.Sequential(
        linear(4, 6, normalization is None, normalization=normalization, activation="gelu",
               context_features=3, **options),
        linear(6, 5, activation="relu", **options),
        linear(5, 3, synthesizer=None, **options),
    )  # fmt: skip


@backends
@pytest.mark.parametrize("normalization", twins.NORMALIZATIONS)
@pytest.mark.parametrize(
    ("rule", "make"),
    [
        (None, functools.partial(torch.optim.Adam, lr=0.01)),
        (fd.Adam(0.01), functools.partial(torch.optim.Adam, lr=0.01)),
        (
            fd.SGD(0.1, momentum=0.9),
            functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        ),
    ],
    ids=["returned", "adam", "sgd"],
)
def test_warmup_is_backprop_while_the_synthesizers_learn(backend, normalization, rule, make):
    model = network(rule, backend, normalization)
    fd.Schedule(model, warmup_steps=1000)
    plain = [Plain(layer) for layer in model]
    theirs = make([p for m in plain for p in m.parameters()])
    mine = None if rule is not None else make(model.parameters())
    before = kept(model[0].synthesizer.parameters())
    for _ in range(20):
        x, y = double(12, 4), torch.randint(3, (12,))
        theirs.zero_grad()
        twins.backprop(plain, x, lambda out, y=y: F.cross_entropy(out, y))
        if mine is not None:
            mine.zero_grad()
        with fd.condition_on(y):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        theirs.step()
        if mine is not None:
            mine.step()
    for layer, twin in zip(model, plain, strict=True):
        for p, q in zip(present(layer.local_parameters()), twin.slots(), strict=True):
            close(p, q, 1e-11)
    for p, b in zip(model[0].synthesizer.parameters(), before, strict=True):
        assert not torch.equal(p, b)
    found = fd.diagnostics(model)
    assert found["0"]["targets"] == found["1"]["targets"] == 20 * 12


@backends
@updates
@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_mixing(backend, rule, mix):
    """``mix * true + (1 - mix) * synthetic`` on steps with targets, synthetic alone on others."""
    layer = linear(4, 5, activation="tanh", update=rule, backend=backend)
    schedule = fd.Schedule(layer, mix=mix, target_every=2)
    for target in (True, False):
        x, arrived = double(6, 4, grad=True), double(6, 5)
        plain = Plain(layer)
        y = x.detach().clone().requires_grad_()
        h = plain(y)
        s = twins.synthetic(layer, h.detach())
        share = mix if target else 0.0
        used = share * arrived + (1 - share) * s
        dx, *expected = torch.autograd.grad(h, [y, *plain.slots()], used, retain_graph=True)
        lesson = twins.regression(layer, h, arrived)
        before = kept(layer.local_parameters())
        before_m = kept(layer.synthesizer_parameters())
        layer.zero_grad()
        layer(x).backward(arrived)
        close(x.grad, dx)
        if rule is None:
            close([p.grad for p in present(layer.local_parameters())], expected)
        else:
            now = kept(layer.local_parameters())
            close([(b - a) / 0.1 for b, a in zip(before, now, strict=True)], expected)
        learned = [p.grad for p in present(layer.synthesizer_parameters())]
        if rule is not None:
            now = kept(layer.synthesizer_parameters())
            learned = [(b - a) / 0.1 for b, a in zip(before_m, now, strict=True)]
        if target:
            close(learned, list(lesson))
        else:
            assert not any(t is not None and t.any() for t in learned)
        schedule.step()


# ---------------------------------------------------------------------------------------------
# Loss scales


@backends
@pytest.mark.parametrize(
    "schedule",
    [{}, {"warmup_steps": 10}, {"mix": 0.3}, {"target_every": 2}],
    ids=["dni", "warmup", "mix", "every second"],
)
@updates
@pytest.mark.parametrize("kind", ["linear", "decoupled"])
def test_a_scale_that_is_told_changes_nothing(backend, schedule, rule, kind):
    """A power of two: the same bits with the loss scaled, and gradients in ``.grad`` scaled."""
    torch.manual_seed(3)
    if kind == "linear":
        model = network(rule, backend)
    else:
        made = fd.MLPSynthesizer(6, 4, context_features=3, dtype=torch.float64)
        twins.disturb(made)
        model = nn.Sequential(
            fd.Decoupled(nn.Linear(4, 6).double(), made, update=rule),
            nn.Linear(6, 3).double(),
        )
    twin = copy.deepcopy(model)
    scale = 1024.0
    told = [fd.Schedule(model, loss_scale=scale, **schedule), fd.Schedule(twin, **schedule)]
    for _ in range(3):
        x, y = double(8, 4), torch.randint(3, (8,))
        for m, factor, s in ((model, scale, told[0]), (twin, 1.0, told[1])):
            m.zero_grad()
            with fd.condition_on(y):
                (F.cross_entropy(m(x), y) * factor).backward()
            s.step()
        close(dict(model.state_dict()), dict(twin.state_dict()), 0)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                close(p.grad, scale * q.grad, 0)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "returned"])
def test_grad_scaler(fused):
    """Told of a ``GradScaler``, training equals training without one, while the scale moves."""
    torch.manual_seed(3)
    rule = SGD if fused else None
    layers = [linear(4, 6, update=rule), linear(6, 5, update=rule), nn.Linear(5, 3).double()]
    model = nn.Sequential(*layers)
    twin = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
    schedule = fd.Schedule(model, loss_scale=scaler)
    assert model[0].phase.loss_scale == 256.0
    ordinary = [list(fd.ordinary_parameters(m)) for m in (model, twin)]
    mine, theirs = (torch.optim.SGD(p, 0.1) for p in ordinary)
    optimizer = fd.FusedOptimizer(model) if fused else None
    for _ in range(5):
        x, y = double(8, 4), torch.randint(3, (8,))
        mine.zero_grad()
        theirs.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        F.cross_entropy(twin(x), y).backward()
        scaler.step(mine)
        if optimizer is not None:
            scaler.step(optimizer)
        scaler.update()
        theirs.step()
        schedule.step()
    assert model[0].phase.loss_scale == scaler.get_scale() == 1024.0
    close(kept(model.parameters()), kept(twin.parameters()), 1e-14)


def test_an_untold_grad_scaler_is_refused():
    model = linear(4, 3, update=SGD)
    optimizer = fd.FusedOptimizer(model)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(double(6, 4)).sum()).backward()
    with pytest.raises(RuntimeError, match=r"Schedule\(model, loss_scale=scaler\)"):
        scaler.step(optimizer)


@backends
def test_an_overflow_is_skipped_and_counted(backend):
    """What arrives is not finite: the synthesizer and the exact layers skip, and count."""
    model = network(SGD, backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**1000)
    fd.Schedule(model, loss_scale=scaler)
    x, y = double(8, 4), torch.randint(3, (8,))
    before_m = kept(model[1].synthesizer.parameters())
    before = kept(model[2].parameters())
    with fd.condition_on(y):
        (F.cross_entropy(model(x), y) * 1e300 * 1e300).backward()
    close(kept(model[1].synthesizer.parameters()), before_m, 0)
    close(kept(model[2].parameters()), before, 0)
    assert model[2].skipped_updates == 1
    assert fd.diagnostics(model)["1"]["skipped_synthesizer_updates"] == 1


def test_a_scaler_that_has_no_gradients_to_check_says_so():
    """All parameters have fused rules: a fixed ``loss_scale`` is the way."""
    model = linear(4, 3, update=SGD)
    scaler = torch.amp.GradScaler("cpu")
    fd.Schedule(model, loss_scale=scaler)
    optimizer = fd.FusedOptimizer(model)
    scaler.scale(model(double(6, 4)).sum()).backward()
    scaler.step(optimizer)
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.update()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mix", 5), ("mix", float("nan")), ("mix", "x"), ("target_every", "4"), ("target_every", 0),
        ("target_every", 2.5), ("lessons", 0), ("lessons", 1.5), ("lessons", True),
        ("warmup_steps", -1), ("warmup_steps", "a"),
    ],
)  # fmt: skip
def test_what_is_set_later_is_looked_at_as_what_is_given(name, value):
    layer = fd.FusedDNILinear(3, 2, update=fd.SGD(0.1))
    schedule = fd.Schedule(layer)
    before = dict(vars(schedule))
    with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
        setattr(schedule, name, value)
    with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
        fd.Schedule(layer, **{name: value})
    assert vars(schedule) == before


def test_another_k_counts_from_the_next_step_on():
    layer = fd.FusedDNILinear(3, 2, update=fd.SGD(0.1))
    schedule = fd.Schedule(layer, target_every=2)
    schedule.target_every = None
    for _ in range(4):
        schedule.step()
        assert not layer.phase.target and schedule.k is None
