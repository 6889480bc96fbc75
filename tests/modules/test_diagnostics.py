"""``diagnostics``: cosine, norm ratio and loss by hand, and the probe that changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import twins
from torch import nn
from twins import BACKENDS, close, double, linear

import fused_dni as fd

pytestmark = pytest.mark.usefixtures("one_thread")
backends = pytest.mark.parametrize("backend", BACKENDS)
updates = pytest.mark.parametrize("rule", [None, fd.SGD(0.1)], ids=["returned", "fused"])


def cosine(a, b):
    return float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))


@backends
@updates
@pytest.mark.parametrize("kind", ["linear", "mlp", "decoupled"])
def test_by_hand(backend, rule, kind):
    if kind == "linear":
        layer = linear(4, 5, update=rule, backend=backend)
    elif kind == "mlp":
        layer = linear(4, 5, update=rule, backend=backend, synthesizer=None)
        layer.attach(fd.MLPSynthesizer(5, 4, dtype=torch.float64), rule)
        twins.disturb(layer.synthesizer)
    else:
        made = fd.LinearSynthesizer(5, dtype=torch.float64)
        twins.disturb(made)
        layer = fd.Decoupled(nn.Linear(4, 5).double(), made, update=rule)
    predicted, arrived = [], []
    for n in (6, 9):
        x, g = double(n, 4), double(n, 5)
        with torch.no_grad():
            h = layer(x)
            predicted.append(n * twins.synthetic(layer, h))
        arrived.append(n * g)
        layer(x).backward(g)
    s, g = torch.cat(predicted), torch.cat(arrived)
    found = fd.diagnostics(layer)[""]
    assert found["cosine"] == pytest.approx(cosine(s, g), rel=1e-12)
    assert found["norm_ratio"] == pytest.approx(float(s.norm() / g.norm()), rel=1e-12)
    assert found["synthesizer_loss"] == pytest.approx(float((s - g).square().sum() / 15), rel=1e-12)
    assert found["targets"] == 15
    assert found["skipped_updates"] == found["skipped_synthesizer_updates"] == 0
    fd.diagnostics(layer, reset=True)
    empty = fd.diagnostics(layer)[""]
    assert empty["targets"] == 0 and math.isnan(empty["cosine"]) and math.isnan(empty["norm_ratio"])


def network(rule, backend=None):
    return nn.Sequential(
        linear(4, 6, normalization="batch", activation="relu", update=rule, backend=backend,
               context_features=3),
        nn.Dropout(0.5),
        linear(6, 6, activation="tanh", update=rule, backend=backend),
        fd.Decoupled(nn.Linear(6, 5).double(), fd.MLPSynthesizer(5, 4, dtype=torch.float64),
                     update=rule),
        linear(5, 3, synthesizer=None, update=rule, backend=backend),
    )  # fmt: skip


@backends
@updates
@pytest.mark.parametrize("sequential", [False, True])
def test_true_gradient(backend, rule, sequential):
    """Against autograd through plain modules; parameters, gradients, buffers, rules, random state
    and phase stay as they were."""
    model = network(rule, backend)
    twins.disturb(model[3].synthesizer)
    if sequential:
        model = fd.DecoupledSequential(*model)
    schedule = fd.Schedule(model, target_every=2)
    x, y = double(16, 4), torch.randint(3, (16,))
    with fd.condition_on(y):
        F.cross_entropy(model(x), y).backward()
    schedule.step()

    def closure():
        with fd.condition_on(y):
            return F.cross_entropy(model(x), y)

    before, phases = twins.snapshot(model), [m.phase for m in model if hasattr(m, "phase")]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = fd.diagnostics(model, closure)
    assert torch.equal(state, torch.get_rng_state())
    twins.unchanged(before, twins.snapshot(model))
    assert [m.phase for m in model if hasattr(m, "phase")] == phases

    plain = [
        twins.Plain(model[0]), model[1], twins.Plain(model[2]), model[3].module,
        twins.Plain(model[4]),
    ]  # fmt: skip
    torch.manual_seed(5)
    outputs = []
    h = x
    for module in plain:
        h = module(h)
        h.retain_grad()
        outputs.append(h)
    F.cross_entropy(h, y).backward()
    for name, context in (("0", y), ("2", None), ("3", None)):
        h, layer = outputs[int(name)], model[int(name)]
        s = twins.synthetic(layer, h.detach(), context)
        if name == "3":  # batch normalisation in the synthesizer: in training, as in the probe
            assert found[name]["true_cosine"] == pytest.approx(cosine(s, h.grad), abs=1e-9)
            continue
        assert found[name]["true_cosine"] == pytest.approx(cosine(s, h.grad), abs=1e-12)
        ratio = float(s.norm() / h.grad.norm())
        assert found[name]["true_norm_ratio"] == pytest.approx(ratio, rel=1e-12)


@updates
def test_a_closure_that_raises_leaves_everything_as_it_was(rule):
    model = network(rule)
    before = twins.snapshot(model)

    def closure():
        model(double(8, 4), None)

    with pytest.raises(TypeError):
        fd.diagnostics(model, closure)
    twins.unchanged(before, twins.snapshot(model))
    assert all(m.phase.probe is None for m in model if hasattr(m, "phase"))


def test_true_gradient_of_a_layer_used_twice():
    layer = linear(5, 5, activation="tanh")
    x = double(6, 5)
    found = fd.diagnostics(layer, lambda: layer(layer(x)).square().sum())[""]
    plain = twins.Plain(layer)
    a = plain(x)
    b = plain(a)
    a.retain_grad()
    b.retain_grad()
    b.square().sum().backward()
    s = torch.cat([twins.synthetic(layer, h.detach()) for h in (a, b)])
    assert found["true_cosine"] == pytest.approx(cosine(s, torch.cat([a.grad, b.grad])), abs=1e-12)


def test_a_perfect_synthesizer_has_cosine_one():
    layer = linear(4, 5, synthesizer=None, target_scale=1.0)
    layer.attach(twins.perfect(5), None)
    g = double(6, 5)
    layer(double(6, 4), context=g).backward(g)
    found = fd.diagnostics(layer)[""]
    assert found["cosine"] == pytest.approx(1.0) and found["norm_ratio"] == pytest.approx(1.0)
    assert found["synthesizer_loss"] == pytest.approx(0.0, abs=1e-20)


@backends
def test_a_gradient_that_is_not_finite_leaves_the_sums(backend):
    layer = linear(4, 5, update=fd.SGD(0.1), backend=backend)
    layer(double(6, 4)).backward(double(6, 5))
    before = layer.statistics.clone()
    layer(double(6, 4)).backward(torch.full((6, 5), torch.nan, dtype=torch.float64))
    close(layer.statistics, before, 0)
    assert fd.diagnostics(layer)[""]["skipped_synthesizer_updates"] == 1


def test_a_model_without_synthesizers():
    """A baseline has nothing to show; a model without decoupled layers was not meant."""
    exact = fd.FusedDNILinear(3, 3, synthesizer=None)
    assert fd.diagnostics(nn.Sequential(nn.Linear(3, 3), exact), reset=True) == {}
    with pytest.raises(ValueError, match=r"no decoupled layers \(see fused_dni.convert\)"):
        fd.diagnostics(nn.Sequential(nn.Linear(3, 3)))
