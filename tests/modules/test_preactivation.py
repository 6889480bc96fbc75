"""``FusedDNILinear(interface="preactivation")``: the gradient is predicted at z = x W^T + b."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
import twins
from torch import nn
from twins import BACKENDS, NORMALIZATIONS, Plain, close, double, kept, linear, present

import fused_dni as fd
from fused_dni.ops.types import LinearConfig

pytestmark = pytest.mark.usefixtures("one_thread")
backends = pytest.mark.parametrize("backend", BACKENDS)
updates = pytest.mark.parametrize("rule", [None, fd.SGD(lr=0.1)], ids=["returned", "fused"])
norms = pytest.mark.parametrize("normalization", NORMALIZATIONS)


def inside(*sizes, **options):
    return linear(*sizes, interface="preactivation", **options)


class Opened:
    """A layer's plain twin, run with z in sight."""

    def __init__(self, layer, x):
        plain = Plain(layer)
        self.x = x.detach().requires_grad_()
        self.z = plain.linear(self.x)
        self.h = plain.activation(self.z if plain.norm is None else plain.norm(self.z))
        self.own = list(plain.linear.parameters())
        self.behind = [] if plain.norm is None else list(plain.norm.parameters())

    def back_to_z(self, arrived):
        """The gradient at z, and those of scale and shift."""
        made = torch.autograd.grad(self.h, [self.z, *self.behind], arrived, retain_graph=True)
        return made[0], list(made[1:])

    def from_z(self, delta):
        """The gradient at x, and those of weight and bias."""
        made = torch.autograd.grad(self.z, [self.x, *self.own], delta)
        return made[0], list(made[1:])


def moved(layer, rule, run):
    """The gradients of weight and bias, scale and shift, synthesizer that ``run`` made: those that
    it returned, or applied by SGD. None where there is none."""
    parts = (
        present(layer.local_parameters()),
        present(layer.parameters_behind()),
        present(layer.synthesizer_parameters()),
    )
    before = [kept(part) for part in parts]
    run()
    if rule is None:
        return [[p.grad for p in part] for part in parts]
    assert all(p.grad is None for p in layer.parameters()), "a rule leaves no gradients"
    return [
        [
            None if torch.equal(p, b) else (b - p.detach()) / rule.lr
            for p, b in zip(part, old, strict=True)
        ]
        for part, old in zip(parts, before, strict=True)
    ]


def without_bias(normalization, gradients):
    """In front of batch normalisation the bias has no influence, and no gradient."""
    return gradients[:1] if normalization == "batch" else gradients


@backends
@updates
@norms
@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0], ids=["synthetic", "mixed", "warmup"])
def test_one_step(backend, rule, normalization, activation, mix):
    """Against autograd on plain modules: what arrives goes back to z; there it is the target, and
    mixed; scale and shift get what it is worth to them."""
    layer = inside(
        5, 7, normalization=normalization, activation=activation, update=rule, backend=backend,
        max_norm=0.5,
    )  # fmt: skip
    fd.Schedule(layer, warmup_steps=int(mix == 1.0), mix=mix if mix < 1.0 else 0.0)
    x, arrived = double(6, 5, grad=True), double(6, 7)
    plain = Opened(layer, x)
    delta, behind = plain.back_to_z(arrived)
    lesson = twins.regression(layer, plain.h, delta)
    s = twins.synthetic(layer, plain.h.detach())
    s = s * min(1.0, 0.5 / float(s.norm()))
    dx, own = plain.from_z(mix * delta + (1 - mix) * s)

    got = moved(layer, rule, lambda: layer(x).backward(arrived))

    close(x.grad, dx)
    if normalization == "batch":
        assert got[0][1] is None or not got[0][1].any()
    close(without_bias(normalization, got[0]), without_bias(normalization, own), 1e-11)
    close(got[1], behind, 1e-11)
    close(got[2], list(lesson), 1e-11)


@backends
@updates
@norms
def test_a_synthesizer_of_ones_own(backend, rule, normalization):
    """No kernel runs it; the rest is the same."""
    layer = inside(
        4, 5, normalization=normalization, activation="silu", update=rule, backend=backend,
        synthesizer=fd.MLPSynthesizer(5, hidden=4, dtype=torch.float64),
    )  # fmt: skip
    x, arrived = double(6, 4, grad=True), double(6, 5)
    plain = Opened(layer, x)
    delta, behind = plain.back_to_z(arrived)
    lesson = twins.regression(layer, plain.h, delta)
    dx, own = plain.from_z(twins.synthetic(layer, plain.h.detach()))
    got = moved(layer, rule, lambda: layer(x).backward(arrived))
    close(x.grad, dx)
    close(without_bias(normalization, got[0]), without_bias(normalization, own), 1e-11)
    close(got[1], behind, 1e-11)
    close(got[2], list(lesson), 1e-11)


@backends
@updates
@pytest.mark.parametrize("normalization", ["batch", "layer"])
def test_without_a_target_scale_and_shift_stay(backend, rule, normalization):
    """Weight and bias move on every step; what no prediction reaches waits for a target."""
    layer = inside(4, 5, normalization=normalization, update=rule, backend=backend)
    schedule = fd.Schedule(layer, target_every=2)
    x = double(6, 4, grad=True)
    for target in (True, False):
        layer.zero_grad()
        got = moved(layer, rule, lambda: layer(x).backward(double(6, 5)))
        assert got[0][0] is not None
        for part in got[1:]:
            assert all((g is not None) == target for g in part)
        schedule.step()


@backends
@updates
@norms
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_perfect_synthesizer_is_backprop(backend, rule, normalization, name):
    """Thirty steps on the gradients at z that an independent network found by backprop."""
    own, make = {
        "sgd": (fd.SGD(0.1, momentum=0.9), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
        "adam": (fd.Adam(0.01), lambda p: torch.optim.Adam(p, 0.01)),
    }[name]
    options = {
        "normalization": normalization, "backend": backend, "target_scale": 1.0,
        "update": None if rule is None else own,
    }  # fmt: skip
    bias = normalization != "batch"
    layers = [
        inside(6, 8, bias, activation="gelu", synthesizer=twins.perfect(8), **options),
        inside(8, 7, bias, activation="relu", synthesizer=twins.perfect(7), **options),
        linear(7, 4, synthesizer=None, backend=backend, update=options["update"]),
    ]
    for layer in layers[:2]:  # linear() draws it
        layer.synthesizer.load_state_dict(twins.perfect(layer.out_features).state_dict())
    plain = [Plain(layer) for layer in layers]
    theirs = make([p for m in plain for p in m.parameters()])
    mine = None
    if rule is None:
        mine = make([p for m in layers for p in m.parameters() if p.requires_grad])
    for _ in range(30):
        x, y = double(12, 6), torch.randint(4, (12,))
        seen, h = [], x
        for module in plain[:2]:
            z = module.linear(h)
            z.retain_grad()
            seen.append(z)
            h = module.activation(z if module.norm is None else module.norm(z))
        theirs.zero_grad()
        F.cross_entropy(plain[2](h), y).backward()
        h = x
        for layer, z in zip(layers[:2], seen, strict=True):
            h = layer(h, context=z.grad)
        out = layers[2](h)
        if mine is not None:
            mine.zero_grad()
        F.cross_entropy(out, y).backward()
        theirs.step()
        if mine is not None:
            mine.step()
    for layer, twin in zip(layers, plain, strict=True):
        parameters = present((*layer.local_parameters(), *layer.parameters_behind()))
        for p, q in zip(parameters, twin.slots(), strict=True):
            close(p, q, 1e-11)


@backends
def test_used_twice(backend):
    """Two updates of the weight, and one, with the sum, of scale and shift."""
    rule = fd.SGD(0.1)
    layer = inside(
        4, 4, normalization="layer", activation="tanh", update=rule, backend=backend
    )  # fmt: skip
    x, arrived = double(6, 4), double(6, 4)
    first = Opened(layer, x)
    h = layer(x)
    second = Opened(layer, h)
    s = twins.synthetic(layer, second.h.detach())
    _, above = second.back_to_z(arrived)
    _, below = first.back_to_z(second.from_z(s)[0])
    before = kept(layer.parameters_behind())
    layer(h).backward(arrived)
    now = kept(layer.parameters_behind())
    got = [(b - p) / rule.lr for b, p in zip(before, now, strict=True)]
    close(got, [a + b for a, b in zip(above, below, strict=True)], 1e-11)
    assert (layer.update.steps, layer.norm_update.steps, layer.synthesizer_update.steps) == (
        2,
        1,
        1,
    )


def stack(rule, **options):
    return [
        inside(4, 6, normalization="batch", activation="relu", update=rule, **options),
        nn.Linear(6, 6, dtype=torch.float64),
        inside(6, 5, normalization="layer", activation="gelu", update=rule, **options),
        inside(5, 5, activation="tanh", update=rule, **options),
        linear(5, 3, synthesizer=None, update=rule, **options),
    ]


def train(model, steps=6, run=None, **schedule):
    torch.manual_seed(3)
    ordinary = list(fd.ordinary_parameters(model))
    optimizer = torch.optim.Adam(ordinary, 0.01) if ordinary else None
    told = fd.Schedule(model, **schedule)
    losses = []
    for _ in range(steps):
        x, y = double(8, 4), torch.randint(3, (8,))
        model.zero_grad()
        loss = F.cross_entropy((run or model)(x), y)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        told.step()
        losses.append(loss.detach())
    return losses


@backends
@pytest.mark.parametrize("rule", [None, fd.Adam(0.01)], ids=["returned", "fused"])
@pytest.mark.parametrize("target_every", [1, 2])
def test_immediate_delivery_gives_the_same_bits(backend, rule, target_every):
    modules = stack(rule, backend=backend)
    immediate, deferred = fd.DecoupledSequential(*copy.deepcopy(modules)), nn.Sequential(*modules)
    close(
        train(immediate, target_every=target_every), train(deferred, target_every=target_every), 0
    )
    close(dict(immediate.state_dict()), dict(deferred.state_dict()), 0)
    if rule is not None:
        assert immediate[0].norm_update.steps == 6 // target_every


@updates
def test_memory_of_immediate_delivery_does_not_grow(rule):
    """Beside what the output interface keeps, the input of the layer whose lesson is due."""
    model = fd.DecoupledSequential(
        *(inside(6, 6, normalization="layer", update=rule) for _ in range(8))
    )
    alive, most = [], 0

    def remember(module, inputs, h):
        nonlocal most
        alive.append(weakref.ref(h.untyped_storage()))
        most = max(most, sum(r() is not None for r in alive))

    for layer in model:
        layer.register_forward_hook(remember)
    h = model(double(8, 6))
    assert len(alive) == 8 and most <= 4
    del h
    assert not any(r() is not None for r in alive)


@updates
def test_predictions_are_held_against_the_gradient_at_z(rule):
    model = nn.Sequential(*stack(rule))
    x, y = double(8, 4), torch.randint(3, (8,))
    before = twins.snapshot(model)
    found = fd.diagnostics(model, lambda: F.cross_entropy(model(x), y))
    twins.unchanged(before, twins.snapshot(model))
    seen, h = {}, x
    for i, module in enumerate(model):
        if i == 1:
            h = module(h)
            continue
        plain = Plain(module)
        z = plain.linear(h)
        z.retain_grad()
        h = plain.activation(z if plain.norm is None else plain.norm(z))
        seen[i] = (z, h)
    F.cross_entropy(h, y).backward()
    for i in (0, 2, 3):
        z, h = seen[i]
        s = twins.synthetic(model[i], h.detach())
        cosine = float((s * z.grad).sum() / (s.norm() * z.grad.norm()))
        assert found[str(i)]["true_cosine"] == pytest.approx(cosine, abs=1e-12)


def test_a_perfect_synthesizer_has_cosine_one():
    layer = inside(4, 5, normalization="layer", activation="gelu", target_scale=1.0,
                   synthesizer=twins.perfect(5))  # fmt: skip
    layer.synthesizer.load_state_dict(twins.perfect(5).state_dict())
    x, arrived = double(6, 4), double(6, 5)
    delta, _ = Opened(layer, x).back_to_z(arrived)
    layer(x, context=delta).backward(arrived)
    assert fd.diagnostics(layer)[""]["cosine"] == pytest.approx(1.0)


# ---------------------------------------------------------------------------------------------
# Everything around it


@updates
def test_a_loss_scale_that_is_told_changes_nothing(rule):
    model = nn.Sequential(*stack(rule))
    twin, x = copy.deepcopy(model), double(8, 4)
    fd.Schedule(twin, loss_scale=8.0)
    model(x).sum().backward()
    (8.0 * twin(x).sum()).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        close(p, q)
        if p.grad is not None:
            close(8.0 * p.grad, q.grad)


@pytest.mark.parametrize("phase", [{}, {"warmup_steps": 1}], ids=["synthetic", "warmup"])
def test_a_backward_that_raises_changes_nothing(phase):
    model = nn.Sequential(*stack(fd.Adam(0.1)))
    fd.Schedule(model, **phase)
    x = double(8, 4, grad=True)

    def raises(_):
        raise ArithmeticError("boom")

    x.register_hook(raises)
    out = model(x)
    before = twins.snapshot(model)
    with pytest.raises(ArithmeticError, match="boom"):
        out.sum().backward()
    after = twins.snapshot(model)
    before["grad"] = after["grad"]  # those of the ordinary layer had come by then
    twins.unchanged(before, after)


@updates
@pytest.mark.parametrize("kind", ["fused", "composed"])
def test_an_output_that_is_dropped_is_freed(rule, kind):
    synthesizer = fd.LinearSynthesizer(5) if kind == "fused" else fd.MLPSynthesizer(5, hidden=4)
    layer = fd.FusedDNILinear(4, 5, normalization="layer", interface="preactivation", update=rule,
                              synthesizer=synthesizer)  # fmt: skip
    h = layer(torch.randn(6, 4))
    gone = weakref.ref(h)
    del h
    assert gone() is None


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
def test_copies_continue_as_the_original(way):
    model = nn.Sequential(*stack(fd.Adam(0.01)))
    train(model, 3)
    if way == "state_dict":
        other = nn.Sequential(*stack(fd.Adam(0.01)))
        other.load_state_dict(copy.deepcopy(model.state_dict()))
        state = pickle.loads(pickle.dumps(fd.FusedOptimizer(model).state_dict()))
        fd.FusedOptimizer(other).load_state_dict(state)
        other[1].load_state_dict(model[1].state_dict())
    else:
        other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    close(train(model, 4), train(other, 4), 0)
    close(dict(model.state_dict()), dict(other.state_dict()), 0)


def test_the_optimizer_knows_the_rule_of_scale_and_shift():
    model = nn.Sequential(*stack(fd.Adam(0.01)))
    optimizer = fd.FusedOptimizer(model)
    groups = {g["name"]: g for g in optimizer.param_groups}
    assert {"0", "0.norm", "0.synthesizer", "2.norm", "3"} <= groups.keys()
    assert "3.norm" not in groups, "nothing is normalised there"
    norm = model[0].norm
    assert groups["0.norm"]["params"] == [norm.weight, norm.bias]
    assert groups["0"]["params"] == [model[0].weight, model[0].bias]
    assert {id(p) for p in fd.ordinary_parameters(model)} == {id(p) for p in model[1].parameters()}
    groups["0.norm"]["lr"] = 0.0
    before, weight = kept(norm.parameters()), model[0].weight.detach().clone()
    train(model, 2)
    close(kept(norm.parameters()), before, 0)
    assert not torch.equal(model[0].weight, weight)


def test_frozen_scale_and_shift():
    layer = inside(4, 5, normalization="layer", update=fd.SGD(0.1))
    layer.norm.requires_grad_(False)
    before = kept(layer.norm.parameters())
    layer(double(6, 4)).backward(double(6, 5))
    close(kept(layer.norm.parameters()), before, 0)


def test_tied_scales_are_refused_before_anything_changes():
    layers = [inside(4, 4, normalization="layer", update=fd.SGD(0.1)) for _ in range(2)]
    layers[1].norm.weight = layers[0].norm.weight
    h = layers[0](double(6, 4))
    before = twins.snapshot(layers[1])
    with pytest.raises(RuntimeError, match="tied between two layers with fused rules"):
        layers[1](h)
    twins.unchanged(before, twins.snapshot(layers[1]))


def test_only_scale_and_shift_can_learn():
    """They alone make the output require a gradient then."""
    layer = inside(4, 5, normalization="layer", update=fd.SGD(0.1))
    layer.synthesizer.requires_grad_(False)
    before = kept(layer.norm.parameters())
    layer(double(6, 4)).backward(double(6, 5))
    assert not torch.equal(layer.norm.weight, before[0])


def test_skips_are_counted_where_they_happen():
    layer = inside(4, 5, normalization="layer", update=fd.Adam(0.1))
    before = twins.snapshot(layer)
    layer(double(6, 4) * torch.nan)
    twins.unchanged(before, twins.snapshot(layer))
    assert layer.skipped_updates == 1
    h = layer(double(6, 4))
    norm, learned = kept(layer.norm.parameters()), kept(layer.synthesizer.parameters())
    h.backward(torch.full((6, 5), torch.nan, dtype=torch.float64))
    assert layer.skipped_updates == 2 and layer.synthesizer_update.skipped == 1
    close(kept(layer.norm.parameters()), norm, 0)
    close(kept(layer.synthesizer.parameters()), learned, 0)


@updates
def test_scale_changed_between_forward_and_backward(rule):
    layer = inside(4, 5, normalization="layer", update=rule)
    h = layer(double(6, 4))
    with torch.no_grad():
        layer.norm.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


@backends
def test_autocast(backend):
    layer = fd.FusedDNILinear(16, 12, normalization="batch", activation="gelu", backend=backend,
                              interface="preactivation", update=fd.SGD(0.1))  # fmt: skip
    before = kept(layer.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        h = layer(torch.randn(8, 16))
    assert h.dtype == torch.bfloat16
    h.float().square().mean().backward()
    assert layer.skipped_updates == layer.synthesizer_update.skipped == 0
    now = kept(layer.parameters())
    assert all(bool(t.isfinite().all()) for t in now)
    assert not torch.equal(now[2], before[2]), "scale moved"


@pytest.mark.filterwarnings("ignore")  # the compiler's, about itself
def test_compiled():
    """``fullgraph=True``, with and without targets, without a rule."""
    model = nn.Sequential(
        inside(4, 6, normalization="batch", activation="gelu"),
        linear(6, 3, synthesizer=None),
    )
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    a, b = train(model, 4, compiled, target_every=2), train(twin, 4, target_every=2)
    torch._dynamo.reset()
    close(a, b, 1e-12)
    close(twins.values(model), twins.values(twin), 1e-12)


def test_conversion():
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.LSTM(6, 5), nn.Linear(5, 3)
    )
    plain = copy.deepcopy(model.state_dict())
    fd.convert(model, interface="preactivation", update=fd.SGD(0.1))
    assert model[0].config.interface == "preactivation"
    assert model[4].config.interface == "output", "the head has no synthesizer"
    assert "interface='preactivation'" in repr(model[0])
    close(dict(fd.revert(model).state_dict()), dict(plain), 0)
    untouched = fd.convert(nn.Sequential(nn.Linear(4, 3)), synthesizer=None, interface="output")
    assert untouched[0].config.interface == "output"


def test_bad_input():
    with pytest.raises(ValueError, match=r"interface must be one of 'output', 'preactivation'"):
        fd.FusedDNILinear(4, 5, interface="input")
    with pytest.raises(ValueError, match="says what a synthesizer predicts; got synthesizer=None"):
        fd.FusedDNILinear(4, 5, interface="preactivation", synthesizer=None)
    layer = inside(4, 5, normalization="layer", update=fd.SGD(0.1))
    tensors = layer._layer()
    before = twins.snapshot(layer)
    with pytest.raises(ValueError, match="makes no gradient for norm_weight and norm_bias"):
        fd.functional.linear_step_(
            double(6, 4), tensors, LinearConfig("layer", interface="preactivation"),
            layer.synthesizer.fused(), fd.rules.RuleState(fd.SGD(0.1)).tensors(tensors[:4]),
        )  # fmt: skip
    twins.unchanged(before, twins.snapshot(layer))
