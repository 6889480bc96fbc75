"""``DecoupledSequential``: immediate delivery is deferred delivery, earlier and in less memory."""

from __future__ import annotations

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import twins
from torch import nn
from twins import BACKENDS, Plain, close, double, linear, present

import fused_dni as fd

pytestmark = [pytest.mark.slow(50), pytest.mark.usefixtures("one_thread")]
backends = pytest.mark.parametrize("backend", BACKENDS)
rules = pytest.mark.parametrize(
    "rule", [None, fd.SGD(0.1, momentum=0.9), fd.Adam(0.01)], ids=["returned", "sgd", "adam"]
)
RULE = fd.SGD(0.1)


def modules(rule, backend=None, between=True):
    """Decoupled layers with ordinary modules before, between and behind them."""
    options = {"update": rule, "backend": backend, "context_features": 3}
    ordinary = [
        nn.Linear(6, 6, dtype=torch.float64),
        nn.LayerNorm(6, dtype=torch.float64),
        nn.Tanh(),
    ]
    return [
        *([nn.Linear(5, 5, dtype=torch.float64)] if between else []),
        linear(5, 6, normalization="batch", activation="relu", **options),
        *(ordinary if between else []),
        linear(6, 6, normalization="layer", activation="gelu", **options),
        fd.Decoupled(
            nn.Sequential(nn.Linear(6, 7), nn.SiLU()).double(),
            fd.MLPSynthesizer(7, hidden=4, context_features=3, dtype=torch.float64),
            update=rule,
        ),
        *([linear(7, 7, synthesizer=None, update=rule)] if between else []),
        linear(7, 5, activation="tanh", **options),
        linear(5, 3, synthesizer=None, update=rule, backend=backend),
    ]


def both(rule, backend=None, between=True):
    """The same network with immediate and with deferred delivery."""
    made = modules(rule, backend, between)
    for m in made:
        if isinstance(m, fd.Decoupled):
            twins.disturb(m.synthesizer)
    return fd.DecoupledSequential(*made), nn.Sequential(*copy.deepcopy(made))


def train(model, steps, zero="before", context=True, **schedule):
    """The inputs' gradients of every step."""
    torch.manual_seed(1)
    told = fd.Schedule(model, **schedule)
    ordinary = list(fd.ordinary_parameters(model))
    optimizer = torch.optim.Adam(ordinary, 0.01) if ordinary else None
    out = []
    for _ in range(steps):
        x, y = double(8, 5, grad=True), torch.randint(3, (8,))
        if optimizer is not None and zero == "before":
            optimizer.zero_grad()
        with fd.condition_on(y):
            loss = F.cross_entropy(model(x), y)
        if optimizer is not None and zero == "after":
            optimizer.zero_grad()
        loss.backward()
        out.append((loss.detach(), x.grad, [p.grad for p in ordinary]))
        if optimizer is not None:
            optimizer.step()
        told.step()
    return out


@backends
@rules
@pytest.mark.parametrize("between", [True, False], ids=["mixed", "decoupled"])
@pytest.mark.parametrize("target_every", [1, 3, None])
def test_equals_deferred_delivery(backend, rule, between, target_every):
    """Bit by bit: parameters, gradients, running statistics, rules' moments, losses."""
    immediate, deferred = both(rule, backend, between)
    a = train(immediate, 7, target_every=target_every)
    b = train(deferred, 7, target_every=target_every)
    for (loss, dx, grads), (loss_, dx_, grads_) in zip(a, b, strict=True):
        close(loss, loss_, 0)
        # on steps without targets, who marks h wants none; then what arrives is whatever it is
        close(dx, dx_, 0)
        for g, g_ in zip(grads, grads_, strict=True):
            assert (g is None) == (g_ is None) or not present([g, g_])[0].any()
            if g is not None and g_ is not None:
                close(g, g_, 0)
    close(dict(immediate.state_dict()), dict(deferred.state_dict()), 0)
    for m, n in zip(immediate, deferred, strict=True):
        if getattr(m, "update", None) is not None:
            assert twins.same(*(twins._tensors(k.update.moments()) for k in (m, n)))


@rules
@pytest.mark.parametrize("schedule", [{"warmup_steps": 2}, {"mix": 0.5}], ids=["warmup", "mix"])
def test_phases_that_need_the_true_gradient(rule, schedule):
    immediate, deferred = both(rule)
    a, b = (train(m, 4, **schedule) for m in (immediate, deferred))
    close([t[0] for t in a], [t[0] for t in b], 0)
    close(dict(immediate.state_dict()), dict(deferred.state_dict()), 0)


@pytest.mark.parametrize("zero", ["before", "after"])
def test_zero_grad_on_either_side(zero):
    """Nothing is written to ``.grad`` in the forward."""
    a, b = both(None)
    x, y = train(a, 3, zero), train(b, 3, "before")
    close([t[0] for t in x], [t[0] for t in y], 0)
    model, _ = both(None)
    with fd.condition_on(torch.randint(3, (8,))):
        model(double(8, 5))
    assert all(p.grad is None for p in model.parameters())


def test_gradients_accumulate():
    model, twin = both(None)
    x, y = double(8, 5), torch.randint(3, (8,))
    for m, times in ((model, 2), (twin, 1)):
        for _ in range(times):
            for layer in m.modules():
                if isinstance(layer, nn.BatchNorm1d):
                    layer.reset_running_stats()
            with fd.condition_on(y):
                F.cross_entropy(m(x), y).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        if q.grad is not None:
            close(p.grad, 2 * q.grad, 1e-14)


def test_eval_and_no_grad_are_sequential():
    immediate, deferred = both(fd.SGD(0.1))
    x = double(8, 5)
    with torch.no_grad():
        close(immediate(x), deferred(x), 0)
    immediate.eval()
    deferred.eval()
    close(immediate(x), deferred(x), 0)
    close(dict(immediate.state_dict()), dict(deferred.state_dict()), 0)


@rules
@pytest.mark.parametrize("which", [0, -1])
def test_a_module_that_evaluates_is_a_plain_one(rule, which):
    """In a container that trains: what is above it teaches through it, as in nn.Sequential."""
    immediate, deferred = both(rule)
    for model in (immediate, deferred):
        [m for m in model if getattr(m, "synthesizer", None) is not None][which].eval()
    a, b = (train(m, 4) for m in (immediate, deferred))
    close([t[0] for t in a], [t[0] for t in b], 0)
    close(dict(immediate.state_dict()), dict(deferred.state_dict()), 0)


def test_context_as_argument():
    immediate, deferred = both(fd.SGD(0.1))
    x, y = double(8, 5), torch.randint(3, (8,))
    with fd.condition_on(y):
        deferred(x).sum().backward()
    immediate(x, context=y).sum().backward()
    close(dict(immediate.state_dict()), dict(deferred.state_dict()), 0)


# What is wrong with the last of some modules behind a layer 4 -> 5 with a rule.
AHEAD = {
    "width": ([linear(6, 3, update=RULE)], r"input of module '1' must have shape \[..., 6\]"),
    "behind others": (
        [nn.ReLU(), nn.Linear(5, 7, dtype=torch.float64), linear(6, 3, update=RULE)],
        r"input of module '3' must have shape \[..., 6\] .* got \[6, 7\]",
    ),
    "stock": ([nn.Linear(6, 3)], r"input of module '1' must have shape \[..., 6\]"),
    "exact": ([linear(6, 3, synthesizer=None)], "input of module '1' must have shape"),
    "dtype": ([fd.FusedDNILinear(5, 3)], "input of module '1' has dtype torch.float64"),
    "device": ([linear(5, 3, device="meta")], "input of module '1' is on cpu, the weight on meta"),
    "context": ([linear(5, 3, context_features=3)], "context is missing"),
    "norm": ([linear(5, 3, normalization="batch")], "norm is in eval mode but its layer is"),
    "gradient": ([linear(5, 3, update=RULE)], "its .grad holds a gradient"),
    "parametrized": (
        [nn.utils.parametrizations.weight_norm(linear(5, 3, update=RULE))],
        "updates parameters in place; slot 0",
    ),
}


@pytest.mark.parametrize("case", AHEAD)
def test_what_a_module_further_on_refuses_changes_none_in_front(case):
    behind, message = copy.deepcopy(AHEAD[case][0]), AHEAD[case][1]
    if case == "norm":
        behind[-1].norm.eval()
    if case == "gradient":
        behind[-1].weight.grad = torch.ones_like(behind[-1].weight)
    model = fd.DecoupledSequential(linear(4, 5, update=RULE), *behind)
    before = twins.snapshot(model[0])
    with pytest.raises((RuntimeError, ValueError), match=message):
        model(double(6, 4))
    twins.unchanged(before, twins.snapshot(model[0]))


def test_a_label_that_one_further_on_has_not():
    """Also where a step was one call before."""
    model = fd.DecoupledSequential(
        linear(4, 5, update=RULE, context_features=5), linear(5, 3, update=RULE, context_features=3)
    )
    labels = torch.arange(6) % 3
    for _ in range(3):
        model(double(6, 4), context=labels).sum().backward()
    before = twins.snapshot(model)
    with pytest.raises(IndexError, match="label 4 in context is out of range"):
        model(double(6, 4), context=labels + 2)
    twins.unchanged(before, twins.snapshot(model))


def _scaled_out(layer):
    layer.register_forward_hook(lambda module, given, h: 2.0 * h)


def _padded_out(layer):
    layer.register_forward_hook(lambda module, given, h: F.pad(h, (0, 1))[..., :-1] * h)


def _scaled_in(layer):
    layer.register_forward_pre_hook(lambda module, given: (3.0 * given[0],))


def _once(layer):
    """Both ways, and gone behind their first call."""
    handles = [
        layer.register_forward_pre_hook(lambda *a: (handles[0].remove(), (3.0 * a[1][0],))[1]),
        layer.register_forward_hook(lambda *a: (handles[1].remove(), 2.0 * a[2])[1]),
    ]


def _backward(layer):
    layer.register_full_backward_hook(lambda module, dx, grad: tuple(2.0 * g for g in dx))


def _before_backward(layer):
    layer.register_full_backward_pre_hook(lambda module, grad: (2.0 * grad[0],))


@pytest.mark.parametrize("rule", [None, RULE], ids=["returned", "fused"])
@pytest.mark.parametrize("where", [0, 2, 3])
@pytest.mark.parametrize(
    "hook", [_scaled_out, _padded_out, _scaled_in, _once, _backward, _before_backward]
)
def test_hooks_that_change_what_passes(hook, where, rule):
    """Gradients go through them as in nn.Sequential."""
    torch.manual_seed(0)
    layers = [linear(4, 5, update=rule), nn.Linear(5, 5).double(), linear(5, 5, update=rule)]
    models = [fd.DecoupledSequential(*layers, linear(5, 5, update=rule))]
    models.append(nn.Sequential(*copy.deepcopy(list(models[0]))))
    given = [double(2, 3, 4, grad=True)]
    given.append(given[0].detach().requires_grad_())
    for model, x in zip(models, given, strict=True):
        hook(model[where])
        for _ in range(2):
            model(x).square().sum().backward()
    close(twins.values(models[0]), twins.values(models[1]))
    close([p.grad for p in models[0].parameters()], [p.grad for p in models[1].parameters()])
    close(given[0].grad, given[1].grad)


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5).double()

    def forward(self, a, b):
        return self.linear(a) + b


def test_a_hook_may_make_several_arguments_of_one():
    """The gradients of all of them come back to it."""
    torch.manual_seed(0)
    segment = fd.Decoupled(Sum(), fd.LinearSynthesizer(5, dtype=torch.float64), update=RULE)
    twins.disturb(segment.synthesizer)
    models = [fd.DecoupledSequential(linear(4, 5, update=RULE), segment)]
    models.append(nn.Sequential(*copy.deepcopy(list(models[0]))))
    x = double(6, 4)
    for model in models:
        model[1].register_forward_pre_hook(lambda module, given: (given[0], given[0].square()))
        for _ in range(2):
            model(x).square().sum().backward()
    close(twins.values(models[0]), twins.values(models[1]))


def test_a_segment_whose_parameters_are_made_in_its_first_forward():
    segment = fd.Decoupled(nn.LazyLinear(5), fd.LinearSynthesizer(5), update=RULE)
    model = fd.DecoupledSequential(segment, fd.FusedDNILinear(5, 3, update=RULE))
    for _ in range(2):
        model(torch.randn(6, 4)).square().sum().backward()
    assert segment.update.steps == 2


@pytest.mark.parametrize("kind", [nn.Linear, nn.Tanh, fd.FusedDNILinear])
def test_a_forward_in_between_that_was_replaced(kind):
    """It may take an input of another shape than its module's own."""
    options = {fd.FusedDNILinear: {"synthesizer": None}}.get(kind, {})
    between = kind(*(() if kind is nn.Tanh else (4, 4)), **options)
    own = between.forward
    between.forward = lambda x: own(x[..., :4])
    layers = [fd.FusedDNILinear(6, 5, update=RULE), between, fd.FusedDNILinear(4, 3, update=RULE)]
    model = fd.DecoupledSequential(*layers)
    model(torch.randn(6, 6)).sum().backward()
    assert layers[0].update.steps == layers[2].update.steps == 1


@pytest.mark.parametrize("calls", [True, False])
def test_a_forward_that_was_replaced(calls):
    """As in nn.Sequential, whether it calls the layer's own or not."""
    torch.manual_seed(0)
    models = [fd.DecoupledSequential(*[linear(4, 4, update=RULE) for _ in range(3)])]
    models.append(nn.Sequential(*copy.deepcopy(list(models[0]))))
    x = double(6, 4)
    for model in models:
        own = model[1].forward
        given = (lambda x, context=None, own=own: 2.0 * own(x)) if calls else (lambda x: 2.0 * x)
        model[1].forward = given
        for _ in range(2):
            model(x).square().sum().backward()
    close(twins.values(models[0]), twins.values(models[1]))


def test_a_hook_may_change_the_shape_of_what_is_handed_on():
    model = fd.DecoupledSequential(linear(4, 5, update=RULE), linear(6, 3, update=RULE))
    model[0].register_forward_hook(lambda module, given, h: F.pad(h, (0, 1)))
    model(double(6, 4)).sum().backward()
    assert model[0].synthesizer_update.steps == 1


@pytest.mark.parametrize("given", [[[1.0] * 4] * 6, np.ones((6, 4)), None], ids=type)
@pytest.mark.parametrize("head", [False, True])
def test_what_is_no_tensor(given, head):
    last = fd.FusedDNILinearCrossEntropyLoss(5, 3) if head else linear(5, 3)
    model = fd.DecoupledSequential(linear(4, 5), last)
    with pytest.raises(
        TypeError, match=f"input must be a torch.Tensor, got {type(given).__name__}"
    ):
        model(given, target=torch.zeros(6, dtype=torch.int64) if head else None)


def test_without_decoupled_modules():
    plain = [nn.Linear(3, 4), nn.ReLU(), fd.FusedDNILinear(4, 2, synthesizer=None)]
    x = torch.randn(5, 3)
    torch.testing.assert_close(fd.DecoupledSequential(*plain)(x), nn.Sequential(*plain)(x))
    assert fd.DecoupledSequential()(x) is x


# ---------------------------------------------------------------------------------------------
# One consumer


@rules
def test_a_second_consumer_is_an_error(rule):
    model = fd.DecoupledSequential(linear(5, 6, update=rule), linear(6, 4, update=rule))
    taken = []
    model[0].register_forward_hook(lambda m, i, h: taken.append(h))
    out = model(double(8, 5))
    (inner,) = taken
    assert inner.requires_grad
    with pytest.raises(RuntimeError, match="has one consumer, the next module"):
        (out.sum() + inner.sum()).backward()


@rules
def test_a_second_backward_is_an_error(rule):
    model = fd.DecoupledSequential(linear(5, 6, update=rule), linear(6, 4, update=rule))
    loss = model(double(8, 5)).square().sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_hooks_on_parameters_in_between_run_once():
    model, twin = both(None)
    for m in (model, twin):
        m[2].weight.register_hook(lambda g: 3 * g)
        m[1].weight.register_hook(lambda g: 5 * g)
    a, b = train(model, 2), train(twin, 2)
    for (_, _, grads), (_, _, grads_) in zip(a, b, strict=True):
        for g, g_ in zip(grads, grads_, strict=True):
            if g_ is not None and g is not None:
                close(g, g_, 0)


def test_a_loss_scale_that_is_told():
    model, twin = both(None)
    for m, scale in ((model, 64.0), (twin, None)):
        fd.Schedule(m, loss_scale=scale)
        torch.manual_seed(1)
        x, y = double(8, 5), torch.randint(3, (8,))
        with fd.condition_on(y):
            (F.cross_entropy(m(x), y) * (scale or 1.0)).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        if q.grad is not None:
            close(p.grad / 64.0, q.grad, 1e-14)


@backends
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "returned"])
@pytest.mark.parametrize("make", ["sgd", "adam"])
def test_perfect_synthesizers_are_backprop(backend, fused, make):
    """Each layer's context is the gradient that an independent twin found, fifty steps long."""
    rule = {"sgd": fd.SGD(0.1), "adam": fd.Adam(0.01)}[make]
    build = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[make]
    update = rule if fused else None
    layers = []
    for normalization, activation in (("batch", "relu"), ("layer", "gelu"), (None, "tanh")):
        layer = linear(
            6, 6, normalization != "batch", normalization=normalization, activation=activation,
            update=update, backend=backend, synthesizer=None, target_scale=1.0,
        )  # fmt: skip
        layer.attach(Slice(len(layers)), update)
        layers.append(layer)
    head = linear(6, 4, synthesizer=None, update=update, backend=backend)
    plain = [Plain(m) for m in (*layers, head)]
    model = fd.DecoupledSequential(*layers, head)
    theirs = build([p for m in plain for p in m.parameters()], rule.lr)
    mine = None if fused else build([p for p in model.parameters() if p.requires_grad], rule.lr)
    for _ in range(50):
        x, y = double(12, 6), torch.randint(4, (12,))
        theirs.zero_grad()
        found = twins.backprop(plain, x, lambda out, y=y: F.cross_entropy(out, y))
        if mine is not None:
            mine.zero_grad()
        with fd.condition_on(torch.cat(found[:3], dim=1)):
            F.cross_entropy(model(x), y).backward()
        theirs.step()
        if mine is not None:
            mine.step()
        for layer, twin in zip(model, plain, strict=True):
            for p, q in zip(present(layer.local_parameters()), twin.slots(), strict=True):
                close(p, q, 1e-12)


class Slice(nn.Module):
    """A perfect synthesizer of layer ``i``: its share of the recorded gradients."""

    context_features = 18

    def __init__(self, i):
        super().__init__()
        self.i = i
        self.exact = twins.perfect(6)

    def forward(self, h, context):
        return self.exact(h, context[:, 6 * self.i : 6 * self.i + 6])


# ---------------------------------------------------------------------------------------------
# Memory


@rules
@pytest.mark.parametrize("target_every", [1, None])
def test_nothing_of_a_layer_is_kept(rule, target_every):
    """When a layer has run, nothing of the layer before the one below it is alive."""
    model = fd.DecoupledSequential(
        *(linear(6, 6, activation="gelu", update=rule) for _ in range(6))
    )
    fd.Schedule(model, target_every=target_every)
    alive, most = [], 0

    def remember(module, inputs, h):
        nonlocal most
        alive.append(weakref.ref(h.untyped_storage()))
        most = max(most, sum(r() is not None for r in alive))

    for layer in model:
        layer.register_forward_hook(remember)
    h = model(double(8, 6))
    assert len(alive) == 6
    assert most <= 3  # of this layer, of the one below, whose lesson is due, and a free one
    assert sum(r() is not None for r in alive) <= 1
    del h


@pytest.mark.parametrize("rule", [None, fd.SGD(0.1)], ids=["returned", "fused"])
def test_memory_does_not_grow_with_depth(rule):
    """Live activations of [N, O] in the middle of the step, at two depths."""

    def peak(depth):
        model = fd.DecoupledSequential(
            *(fd.FusedDNILinear(16, 16, update=rule, synthesizer=fd.DiagonalSynthesizer(16))
              for _ in range(depth))
        )  # fmt: skip
        most = 0

        def count(*_):
            nonlocal most
            found = {
                t.untyped_storage().data_ptr()
                for t in gc.get_objects()
                if type(t) is torch.Tensor and t.shape == (97, 16)
            }
            most = max(most, len(found))

        for layer in model:
            layer.register_forward_hook(count)
        model(torch.randn(97, 16)).sum().backward()
        return most

    assert peak(3) == peak(9)
