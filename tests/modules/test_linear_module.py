"""``FusedDNILinear``: what is connected to what, and that it equals what it should."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
import twins
from strategies import paired
from torch import nn
from twins import BACKENDS, NORMALIZATIONS, Plain, close, double, kept, linear, present

import fused_dni as fd
from fused_dni import ops
from fused_dni.ops import registry

RULES = {
    "sgd": (fd.SGD(lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": (
        fd.SGD(lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
    ),
    "adam": (fd.Adam(lr=0.01), lambda p: torch.optim.Adam(p, lr=0.01)),
    "adamw": (fd.AdamW(lr=0.01), lambda p: torch.optim.AdamW(p, lr=0.01)),
}

pytestmark = pytest.mark.usefixtures("one_thread")
backends = pytest.mark.parametrize("backend", BACKENDS)
updates = pytest.mark.parametrize("rule", [None, fd.SGD(lr=0.1)], ids=["returned", "fused"])


class Silent(torch.autograd.Function):
    """Passes on, and returns no gradient at all."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return None


def local_gradients(layer, x, h_gradient):
    """Gradients of a layer's parameters and input by autograd through plain modules."""
    plain = Plain(layer)
    x = x.detach().requires_grad_()
    made = torch.autograd.grad(plain(x), [x, *plain.slots()], h_gradient)
    return made[0], made[1:]


def change(before, after, rule):
    """The gradient that one step of SGD applied."""
    return [(b - a) / rule.lr for b, a in zip(before, kept(after), strict=True)]


# ---------------------------------------------------------------------------------------------
# One step, against autograd on plain modules


@backends
@updates
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize(
    ("activation", "context"),
    [*zip(twins.ACTIVATIONS, itertools.cycle([None, "labels", "vector"]), strict=False)],
)
def test_one_step(backend, rule, normalization, activation, context):
    layer = linear(
        5, 7, normalization=normalization, activation=activation, update=rule, backend=backend,
        context_features=0 if context is None else 4, max_norm=0.5,
    )  # fmt: skip
    x = double(6, 5, grad=True)
    rows = {None: None, "labels": torch.randint(4, (6,)), "vector": double(6, 4)}[context]
    plain = Plain(layer)
    s = twins.synthetic(layer, plain(x).detach(), rows)
    s = s * min(1.0, 0.5 / float(s.norm()))
    dx, expected = local_gradients(layer, x, s)
    arrived = double(6, 7)
    lesson = twins.regression(layer, plain(x), arrived, rows)
    before, m_before = kept(layer.local_parameters()), kept(layer.synthesizer_parameters())

    h = layer(x, context=rows)
    close(h, Plain(layer)(x).detach() if rule is None else h)
    if rule is None:
        assert all(p.grad is None for p in layer.parameters()), "gradients come in the backward"
    h.backward(arrived)

    close(x.grad, dx)
    if rule is None:
        got = [p.grad for p in present(layer.local_parameters())]
        got_m = [p.grad for p in present(layer.synthesizer_parameters())]
    else:
        assert all(p.grad is None for p in layer.parameters()), "a rule leaves no gradients"
        got = change(before, layer.local_parameters(), rule)
        got_m = change(m_before, layer.synthesizer_parameters(), rule)
    if normalization == "batch":
        close(got[1], torch.zeros_like(got[1]), 0)  # the bias in front, exactly
    close(got, list(expected), 1e-11)
    close(got_m, list(lesson), 1e-11)


@backends
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_leading_dimensions_are_rows(backend, normalization):
    options = {"normalization": normalization, "activation": "gelu", "backend": backend}
    layer = linear(4, 3, context_features=5, update=fd.SGD(lr=0.1), **options)
    other = linear(4, 3, context_features=5, update=fd.SGD(lr=0.1), **options)
    other.load_state_dict(layer.state_dict())
    x = double(2, 3, 4, grad=True)
    y = x.detach().reshape(6, 4).requires_grad_()
    labels, arrived = torch.tensor([1, 4]), double(2, 3, 3)
    a = layer(x, context=labels)  # a label a sequence serves every position
    b = other(y, context=labels.repeat_interleave(3))
    assert a.shape == (2, 3, 3)
    a.backward(arrived)
    b.backward(arrived.reshape(6, 3))
    close(a.reshape(6, 3), b, 0)
    close(x.grad.reshape(6, 4), y.grad, 0)
    for p, q in zip(layer.parameters(), other.parameters(), strict=True):
        close(p, q, 0)


def test_target_scale_states_what_the_loss_divides_by():
    x, target = double(8, 4), double(8, 3)
    learned = []
    for scale, loss in ((None, F.mse_loss), (1.0 / 24, lambda a, b: (a - b).square().sum())):
        torch.manual_seed(1)
        layer = linear(4, 3, synthesizer=fd.LinearSynthesizer(3, dtype=torch.float64))
        layer.target_scale = scale if scale is None else scale * 8  # kappa g is the same
        loss(layer(x), target).backward()
        learned.append([p.grad for p in layer.synthesizer.parameters()])
    close(*learned)


# ---------------------------------------------------------------------------------------------
# Connectedness


@backends
@pytest.mark.parametrize("rule", [None, fd.Adam(0.01)], ids=["returned", "fused"])
def test_weights_move_and_synthesizers_learn(backend, rule):
    options = {"context_features": 3, "update": rule, "backend": backend, "dtype": torch.float64}
    model = nn.Sequential(
        fd.FusedDNILinear(8, 16, normalization="batch", activation="relu", **options),
        fd.FusedDNILinear(16, 16, normalization="layer", activation="tanh", **options),
        linear(16, 3, synthesizer=None, update=rule, backend=backend),
    )
    x, y = double(32, 8), torch.randint(3, (32,))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = []
    for step in range(60):
        optimizer.zero_grad()
        with fd.condition_on(y):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step in (39, 59):  # over twenty steps: that of a single one depends on the seed
            found = fd.diagnostics(model, reset=True)
    for name, p in model.named_parameters():
        if name != "0.bias":  # in front of batch normalisation
            assert not torch.equal(p, before[name]), f"{name} never moved"
    assert losses[-1] < 0.5 * losses[0]
    assert found["0"]["cosine"] > 0.4 and found["1"]["cosine"] > 0.7


@backends
@updates
def test_skip_connection(backend, rule):
    """A decoupled consumer and a skip connection: the synthesizer learns from the sum."""
    below = linear(4, 5, activation="tanh", update=rule, backend=backend)
    above = linear(5, 5, activation="tanh", update=rule, backend=backend)
    x = double(6, 4)
    plain = Plain(below)(x).detach()
    s = twins.synthetic(above, Plain(above)(plain))
    dx, _ = local_gradients(above, plain, s)
    arrived = double(6, 5)
    lesson = twins.regression(below, plain, dx + arrived)
    before = kept(below.synthesizer_parameters())
    h = below(x)
    (above(h) + h).backward(arrived)
    got = (
        [p.grad for p in below.synthesizer.parameters()]
        if rule is None
        else change(before, below.synthesizer_parameters(), rule)
    )
    close(got, list(lesson))


@backends
@updates
def test_several_consumers_give_one_lesson(backend, rule):
    layer = linear(4, 5, update=rule, backend=backend)
    x, a, b = double(6, 4), double(6, 5), double(6, 5)
    lesson = twins.regression(layer, Plain(layer)(x), a + 2 * b)
    before = kept(layer.synthesizer_parameters())
    h = layer(x)
    ((h * a).sum() + (2 * h * b).sum()).backward()
    got = (
        [p.grad for p in layer.synthesizer.parameters()]
        if rule is None
        else change(before, layer.synthesizer_parameters(), rule)
    )
    close(got, list(lesson))


@backends
@updates
def test_used_twice(backend, rule):
    """Lessons of both uses add up; local gradients too (with a rule: two updates)."""
    layer = linear(4, 4, activation="tanh", update=rule, backend=backend)
    x, arrived = double(6, 4), double(6, 4)
    original = Plain(layer)
    h1 = original(x).detach()
    s1 = twins.synthetic(layer, h1)
    _, first = local_gradients(layer, x, s1)
    before_m = kept(layer.synthesizer_parameters())
    out1 = layer(x)
    close(out1, h1)
    if rule is not None:
        for p, g in zip(original.slots(), first, strict=True):
            p.data -= rule.lr * g
    h2 = original(h1).detach()
    s2 = twins.synthetic(layer, h2)
    plain = [h1.requires_grad_(), *original.slots()]
    dx, *second = torch.autograd.grad(original(h1), plain, s2)
    lesson1 = twins.regression(layer, h1, dx)
    lesson2 = twins.regression(layer, h2, arrived)
    out2 = layer(out1)
    close(out2, h2)
    out2.backward(arrived)
    if rule is None:
        sums = [a + b for a, b in zip(first, second, strict=True)]
        close([p.grad for p in present(layer.local_parameters())], sums)
        got = [p.grad for p in present(layer.synthesizer_parameters())]
    else:
        assert layer.update.steps == 2
        assert layer.synthesizer_update.steps == 1, "one update at the end of the backward"
        got = change(before_m, layer.synthesizer_parameters(), rule)
    close(got, [a + b for a, b in zip(lesson1, lesson2, strict=True)])


@backends
@updates
def test_undefined_gradients_are_not_materialised(backend, rule):
    """Where nothing arrives the synthesizer learns nothing (zero is not a target), and what lies
    below still gets its local gradient."""
    layer = linear(4, 5, update=rule, backend=backend)
    x = double(6, 4, grad=True)
    dx, _ = local_gradients(layer, x, twins.synthetic(layer, Plain(layer)(x)))
    before = kept(layer.synthesizer_parameters())
    Silent.apply(layer(x)).sum().backward()
    close(x.grad, dx)
    close(kept(layer.synthesizer_parameters()), before, 0)
    assert all(p.grad is None for p in layer.synthesizer.parameters())
    assert fd.diagnostics(layer)[""]["targets"] == 0


# ---------------------------------------------------------------------------------------------
# Steps without targets


def model_without_targets(rule, backend):
    model = nn.Sequential(
        nn.Linear(4, 4, dtype=torch.float64),
        linear(4, 5, activation="tanh", update=rule, backend=backend),
        linear(5, 5, activation="tanh", update=rule, backend=backend),
        linear(5, 3, synthesizer=None, update=rule, backend=backend),
    )
    schedule = fd.Schedule(model, target_every=2)
    schedule.step()  # the next one is without
    return model, schedule


@backends
@updates
def test_no_targets(backend, rule, monkeypatch):
    model, _ = model_without_targets(rule, backend)
    asked = []
    bound, backward = registry.get(backend).bind_step, ops.linear_backward

    def bind(*tensors):
        step = bound(*tensors)

        def spy(*args):
            asked.append(args[-2])  # need_dx
            return step(*args)

        return spy

    def spy(*args):
        asked.append(args[-2])
        return backward(*args)

    monkeypatch.setattr(registry.get(backend), "bind_step", bind)
    monkeypatch.setattr(ops, "linear_backward", spy)
    x = double(6, 4)
    expected = kept(model[1].synthesizer_parameters()) + kept(model[2].synthesizer_parameters())
    dx, _ = local_gradients(
        model[1], model[0](x), twins.synthetic(model[1], Plain(model[1])(model[0](x)))
    )
    owed = torch.autograd.grad(model[0](x), list(model[0].parameters()), dx)
    h = model[2](model[1](model[0](x)))
    assert h.requires_grad
    F.cross_entropy(model[3](h), torch.randint(3, (6,))).backward()
    # made for the ordinary layer below the first; the marks stop the other two
    assert sorted(asked) == [False, False, True]
    close([p.grad for p in model[0].parameters()], list(owed))  # still gets what it is owed
    now = kept(model[1].synthesizer_parameters()) + kept(model[2].synthesizer_parameters())
    close(now, expected, 0)
    for layer in model[1:3]:
        assert all(p.grad is None for p in layer.synthesizer.parameters())
        assert fd.diagnostics(layer)[""]["targets"] == 0
    if rule is None:
        assert all(p.grad is not None for p in present(model[1].local_parameters()))


@backends
@updates
def test_what_arrives_without_a_target_is_ignored(backend, rule):
    model, _ = model_without_targets(rule, backend)
    layer = model[1]
    x = double(6, 4, grad=True)
    dx, _ = local_gradients(layer, x, twins.synthetic(layer, Plain(layer)(x)))
    before = kept(layer.synthesizer_parameters())
    (100 * layer(x)).sum().backward()
    close(x.grad, dx)
    close(kept(layer.synthesizer_parameters()), before, 0)


@updates
@pytest.mark.parametrize("target", [True, False])
@pytest.mark.parametrize("asks", [True, False])
def test_requires_grad_of_h(rule, target, asks):
    layer = linear(4, 5, update=rule)
    if not target:
        fd.Schedule(layer, target_every=None)
    h = layer(double(6, 4, grad=asks))
    assert h.requires_grad == (not (rule is not None and not target and not asks))


def test_everything_frozen_below_a_rule_needs_no_graph():
    layer = linear(4, 5, update=fd.SGD(0.1))
    layer.synthesizer.requires_grad_(False)
    assert not layer(double(6, 4)).requires_grad


# ---------------------------------------------------------------------------------------------
# A perfect synthesizer is backprop


def perfect_stack(normalization, activations, rule, backend, sizes=(6, 8, 7, 5), head=None):
    bias = normalization != "batch"  # without influence there; Adam turns its rounding into noise
    layers = [
        linear(
            i, o, bias, normalization=normalization, activation=a, update=rule, backend=backend,
            synthesizer=None, target_scale=1.0,
        )
        for i, o, a in zip(sizes[:-1], sizes[1:], activations, strict=True)
    ]  # fmt: skip
    for layer in layers:
        layer.attach(twins.perfect(layer.out_features), rule)
    layers.append(linear(sizes[-1], 4, synthesizer=None, update=rule, backend=backend))
    return layers


PERFECT = {
    "sgd": ("relu", "tanh", "gelu"),
    "momentum": ("mish", "sigmoid", "identity"),
    "adam": ("relu", "silu", "gelu_tanh"),
    "adamw": ("softplus", "relu", "tanh"),
}


@paired(backend=BACKENDS, way=("fused", "returned"), normalization=NORMALIZATIONS, name=PERFECT)
def test_perfect_synthesizer_is_backprop(backend, way, normalization, name):
    """Fifty steps, each prediction replaced by the gradient that an independent network of plain
    PyTorch modules found by backprop on the same data."""
    rule, make = RULES[name]
    fused = way == "fused"
    layers = perfect_stack(normalization, PERFECT[name], rule if fused else None, backend)
    plain = [Plain(layer) for layer in layers]
    theirs = make([p for m in plain for p in m.parameters()])
    mine = None if fused else make([p for m in layers for p in m.parameters() if p.requires_grad])
    for step in range(50):
        x, y = double(12, 6), torch.randint(4, (12,))
        theirs.zero_grad()
        gradients = twins.backprop(plain, x, lambda out, y=y: F.cross_entropy(out, y))
        h = x
        for layer, g in zip(layers[:-1], gradients, strict=False):
            h = layer(h, context=g)
        out = layers[-1](h)
        if mine is not None:
            mine.zero_grad()
        F.cross_entropy(out, y).backward()
        theirs.step()
        if mine is not None:
            mine.step()
        for layer, twin in zip(layers, plain, strict=True):
            for p, q in zip(present(layer.local_parameters()), twin.slots(), strict=True):
                close(p, q, 1e-12)
        assert step < 49 or all(layer.skipped_updates == 0 for layer in layers)
    for layer, twin in zip(layers, plain, strict=True):
        if normalization == "batch" and layer.norm is not None:
            close(layer.norm.running_mean, twin.norm.running_mean)
            close(layer.norm.running_var, twin.norm.running_var)


@backends
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("name", RULES)
def test_no_synthesizer_is_backprop(backend, normalization, name):
    """With the update applied where the gradient is made; also a layer that is used twice."""
    rule, make = RULES[name]
    options = {"normalization": normalization, "synthesizer": None, "update": rule}
    bias = normalization != "batch"
    layers = [
        linear(6, 8, bias, activation="relu", backend=backend, **options),
        linear(8, 8, bias, activation="tanh", backend=backend, **options),
        linear(8, 4, synthesizer=None, update=rule, backend=backend),
    ]
    plain = [Plain(layer) for layer in layers]
    theirs = make([p for m in plain for p in m.parameters()])
    for _ in range(20):
        x, y = double(12, 6), torch.randint(4, (12,))
        for stack in (layers, plain):
            h = stack[1](stack[0](x))
            h = stack[1](h) + h
            theirs.zero_grad()
            F.cross_entropy(stack[2](h), y).backward()
        theirs.step()
    for layer, twin in zip(layers, plain, strict=True):
        for p, q in zip(present(layer.local_parameters()), twin.slots(), strict=True):
            close(p, q, 1e-11)


# ---------------------------------------------------------------------------------------------
# One backward, no double backward, undisturbed weights


@updates
@pytest.mark.parametrize("target", [True, False])
def test_a_second_backward_is_an_error(rule, target):
    layer = linear(4, 5, update=rule)
    if not target:
        fd.Schedule(layer, target_every=None)
    h = layer(double(6, 4, grad=True))
    loss = h.square().sum()
    loss.backward(retain_graph=True)
    after = twins.snapshot(layer)
    with pytest.raises(RuntimeError, match=r"second time: its local gradient would be delivered"):
        loss.backward()
    if rule is not None:
        twins.unchanged(after, twins.snapshot(layer))


def test_retain_graph_works_on_the_exact_layer_without_rule():
    layer = linear(4, 5, synthesizer=None)
    loss = layer(double(6, 4)).square().sum()
    loss.backward(retain_graph=True)
    once = layer.weight.grad.clone()
    loss.backward()
    close(layer.weight.grad, 2 * once)


def test_an_exact_rule_refuses_a_second_backward():
    layer = linear(4, 5, synthesizer=None, update=fd.SGD(0.1))
    loss = layer(double(6, 4)).square().sum()
    loss.backward(retain_graph=True)
    after = twins.snapshot(layer)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    twins.unchanged(after, twins.snapshot(layer))


@updates
@pytest.mark.parametrize("synthesizer", ["default", None])
def test_double_backward_is_an_error(rule, synthesizer):
    layer = linear(4, 5, update=rule, synthesizer=synthesizer)
    x = double(6, 4, grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


class Bomb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise ArithmeticError("boom")


@backends
@pytest.mark.parametrize("phase", ["exact", "warmup", "mix", "lesson"])
def test_a_backward_that_raises_changes_nothing(backend, phase):
    rule = fd.Adam(0.1)
    layer = linear(
        5, 5, update=rule, backend=backend, synthesizer=None if phase == "exact" else "default"
    )
    above = linear(5, 5, synthesizer=None, update=rule, backend=backend)
    model = nn.Sequential(layer, above)
    fd.Schedule(model, warmup_steps=int(phase == "warmup"), mix=0.5 if phase == "mix" else 0.0)
    x = double(6, 4, grad=True)
    first = nn.Linear(4, 5, dtype=torch.float64)
    h = layer(Bomb.apply(first(x)))
    out = above(h)
    before = twins.snapshot(model)
    with pytest.raises(ArithmeticError, match="boom"):
        out.square().sum().backward()
    twins.unchanged(before, twins.snapshot(model))
    # and nothing of it is left over for the next backward
    model(double(6, 5)).square().sum().backward()
    assert above.update.steps == 1


@backends
@pytest.mark.parametrize("synthesizer", ["default", None])
def test_updates_are_visible_to_autograd(backend, synthesizer):
    """Somebody who still needs the old weights is told, raw pointers or not."""
    layer = linear(
        4, 5, normalization="batch", update=fd.Adam(0.1), synthesizer=synthesizer, backend=backend
    )
    x = double(6, 4, grad=True)
    other = F.linear(x, layer.weight)
    scaled = x @ torch.ones(4, 5, dtype=torch.float64) * layer.norm.weight
    versions = [p._version for p in layer.local_parameters()]
    layer(double(6, 4)).sum().backward()
    assert all(p._version > v for p, v in zip(layer.local_parameters(), versions, strict=True))
    for out in (other, scaled):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


@pytest.mark.parametrize("rule", [None, fd.SGD(0.1)], ids=["returned", "fused"])
@pytest.mark.parametrize(
    "synthesizer", [None, fd.LinearSynthesizer(5), fd.MLPSynthesizer(5, hidden=4)], ids=repr
)
def test_weights_changed_between_forward_and_backward(rule, synthesizer):
    """As with ``nn.Linear``: the gradient for the input would come from the wrong weights."""
    layer = fd.FusedDNILinear(4, 5, synthesizer=synthesizer, update=rule).double()
    if rule is not None and synthesizer is not None:
        fd.Schedule(layer, warmup_steps=1)
    x = double(6, 4, grad=True)
    h = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


@pytest.mark.parametrize("rule", [None, fd.SGD(0.1)], ids=["returned", "fused"])
@pytest.mark.parametrize("synthesizer", [None, fd.MLPSynthesizer(5, hidden=4)], ids=repr)
def test_input_changed_between_forward_and_backward(rule, synthesizer):
    layer = fd.FusedDNILinear(4, 5, synthesizer=synthesizer, update=rule).double()
    if rule is not None and synthesizer is not None:
        fd.Schedule(layer, warmup_steps=1)
    x = double(6, 4)
    h = layer(x)
    x.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


def test_the_prediction_needs_its_output_as_it_was():
    h = linear(4, 5)(double(6, 4))
    with torch.no_grad():
        h.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


# ---------------------------------------------------------------------------------------------
# Evaluation


@backends
@updates
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("mode", ["eval", "eval no_grad", "train no_grad"])
def test_plain_without_training(backend, rule, normalization, mode):
    layer = linear(
        4, 5, normalization=normalization, activation="gelu", update=rule, backend=backend,
        context_features=3,
    )  # fmt: skip
    with torch.no_grad():
        for _ in range(2):  # running statistics that are no longer the initial ones
            layer(double(9, 4))
    if mode.startswith("eval"):
        layer.eval()
    plain = Plain(layer).train(layer.training)
    x = double(6, 4)
    before = twins.snapshot(layer)
    with torch.set_grad_enabled("no_grad" not in mode):
        close(layer(x), plain(x), 1e-14)
    after = twins.snapshot(layer)
    if mode == "train no_grad" and normalization == "batch":
        close(dict(layer.norm.named_buffers()), dict(plain.norm.named_buffers()), 1e-14)
        names = ("running_mean", "running_var", "num_batches_tracked")
        assert twins.differences(before, after) == [f"state.norm.{n}" for n in names]
    else:
        twins.unchanged(before, after)


@backends
@updates
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_backward_in_eval_mode(backend, rule, normalization):
    layer = linear(
        4, 5, normalization=normalization, activation="silu", update=rule, backend=backend
    )
    with torch.no_grad():
        layer(double(9, 4))
    layer.eval()
    plain = Plain(layer).eval()
    x, g = double(6, 4, grad=True), double(6, 5)
    y = x.detach().clone().requires_grad_()
    layer(x).backward(g)
    plain(y).backward(g)
    close(x.grad, y.grad)
    for p, q in zip(present(layer.local_parameters()), plain.slots(), strict=True):
        close(p.grad, q.grad)


def test_empty_batch_in_eval():
    layer = linear(4, 5, normalization="batch").eval()
    assert layer(double(0, 4)).shape == (0, 5)
    assert layer(double(3, 0, 4)).shape == (3, 0, 5)


@backends
def test_running_statistics_in_training(backend):
    layer = linear(4, 5, normalization="batch", update=fd.SGD(0.0), backend=backend, momentum=0.3)
    plain = Plain(layer)
    for _ in range(3):
        x = double(6, 4)
        layer(x)
        plain(x)
    close(dict(layer.norm.named_buffers()), dict(plain.norm.named_buffers()), 1e-14)


def test_repr_tells_what_is_fused():
    text = repr(fd.FusedDNILinear(4, 5, activation="relu", update=fd.SGD(0.1)))
    assert "in_features=4" in text and "relu" in text and "SGD" in text
