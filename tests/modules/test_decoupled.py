"""``Decoupled``: the semantics of the linear layer around any segment."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import twins
from torch import nn
from twins import close, double, kept, present

import fused_dni as fd

pytestmark = pytest.mark.usefixtures("one_thread")
updates = pytest.mark.parametrize("rule", [None, fd.SGD(lr=0.1)], ids=["returned", "fused"])


def conv(rule=None, **options):
    segment = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()).double()
    synthesizer = fd.ConvSynthesizer(3, hidden=4, context_features=5, dtype=torch.float64)
    twins.disturb(synthesizer)
    return fd.Decoupled(segment, synthesizer, update=rule, **options)


def dense(rule=None, segment=None, **options):
    segment = segment or nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 5)).double()
    synthesizer = fd.LinearSynthesizer(5, rank=2, dtype=torch.float64)
    twins.disturb(synthesizer)
    return fd.Decoupled(segment, synthesizer, update=rule, **options)


def moved(before, after, rule):
    return [(b - a) / rule.lr for b, a in zip(before, kept(after), strict=True)]


@updates
@pytest.mark.parametrize("kind", ["conv", "dense"])
def test_one_step(rule, kind):
    layer = conv(rule) if kind == "conv" else dense(rule)
    x = double(6, 2, 4, 4, grad=True) if kind == "conv" else double(6, 4, grad=True)
    labels = torch.randint(5, (6,)) if kind == "conv" else None
    segment = copy.deepcopy(layer.module)
    y = x.detach().clone().requires_grad_()
    h = segment(y)
    m = copy.deepcopy(layer.synthesizer)
    s = m(h.detach(), labels).detach() / 6
    dx, *expected = torch.autograd.grad(h, [y, *segment.parameters()], s)
    arrived = torch.randn_like(h)
    loss = (m(h.detach(), labels) - 6 * arrived).square().sum() / 6
    lesson = torch.autograd.grad(
        loss, present(layer.synthesizer_parameters()) and list(m.parameters())
    )
    before, before_m = kept(layer.module.parameters()), kept(layer.synthesizer.parameters())

    out = layer(x, context=labels)
    close(out.detach(), h.detach(), 0)
    out.backward(arrived)
    close(x.grad, dx)
    if rule is None:
        close([p.grad for p in layer.module.parameters()], expected)
        close([p.grad for p in layer.synthesizer.parameters()], list(lesson))
    else:
        assert all(p.grad is None for p in layer.parameters())
        close(moved(before, layer.module.parameters(), rule), expected)
        close(moved(before_m, layer.synthesizer.parameters(), rule), list(lesson))


@updates
def test_equals_the_fused_layer(rule):
    """Around ``nn.Linear`` it does what ``FusedDNILinear`` does."""
    fused = twins.linear(4, 5, update=rule, context_features=3, max_norm=0.2)
    wrapped = fd.Decoupled(
        nn.Linear(4, 5, dtype=torch.float64),
        copy.deepcopy(fused.synthesizer),
        update=rule,
        max_norm=0.2,
    )
    with torch.no_grad():
        wrapped.module.weight.copy_(fused.weight)
        wrapped.module.bias.copy_(fused.bias)
    told = [fd.Schedule(m, warmup_steps=1, target_every=2, mix=0.3) for m in (fused, wrapped)]
    for _ in range(5):
        x, labels, arrived = double(6, 4), torch.randint(3, (6,)), double(6, 5)
        grads = []
        for m, schedule in zip((fused, wrapped), told, strict=True):
            y = x.clone().requires_grad_()
            with fd.condition_on(labels):
                m(y).backward(arrived)
            grads.append(y.grad)
            schedule.step()
        close(*grads)
    close(kept(fused.parameters()), kept(wrapped.parameters()))
    a, b = (fd.diagnostics(m)[""] for m in (fused, wrapped))
    assert a["cosine"] == pytest.approx(b["cosine"]) and a["targets"] == b["targets"] > 0


@updates
def test_several_inputs(rule):
    class Segment(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 5, dtype=torch.float64)
            self.mix = nn.Linear(5, 5, dtype=torch.float64)

        def forward(self, x, indices, scale, y):
            return self.mix(x * scale + self.embed(indices)) * y

    layer = dense(rule, Segment())
    twin = copy.deepcopy(layer.module)
    x, y, indices = double(6, 5, grad=True), double(6, 5), torch.randint(7, (6,))
    z = x.detach().clone().requires_grad_()
    h = twin(z, indices, 2.0, y)
    (dx,) = torch.autograd.grad(h, z, twins.synthetic(layer, h.detach()))
    layer(x, indices, 2.0, y).sum().backward()
    close(x.grad, dx)


@updates
def test_no_targets(rule):
    model = nn.Sequential(
        nn.Linear(4, 4).double(), dense(rule), dense(rule, nn.Linear(5, 5).double())
    )
    fd.Schedule(model, target_every=None)
    before = kept(model[1].synthesizer.parameters())
    h = model[1](model[0](double(6, 4)))
    assert h.requires_grad
    model[2](h).sum().backward()
    close(kept(model[1].synthesizer.parameters()), before, 0)
    assert model[0].weight.grad is not None and model[0].weight.grad.any()
    if rule is not None:
        assert not model[1](double(6, 4)).requires_grad


@updates
def test_used_twice(rule):
    layer = dense(rule, nn.Linear(5, 5).double())
    h = layer(layer(double(6, 5)))
    h.square().sum().backward()
    if rule is None:
        assert layer.module.weight.grad is not None
    else:
        assert layer.update.steps == 2 and layer.synthesizer_update.steps == 1


@pytest.mark.parametrize("rule", [fd.SGD(0.1), fd.Adam(0.01)], ids=repr)
@pytest.mark.parametrize("warmup", [True, False])
def test_true_gradients_with_a_rule_are_backprop(rule, warmup):
    """No synthesizer, and warm-up; the segment used twice."""
    layer = dense(rule, nn.Sequential(nn.Linear(5, 5), nn.Tanh()).double())
    if not warmup:
        layer = fd.Decoupled(layer.module, None, update=rule)
    else:
        fd.Schedule(layer, warmup_steps=100)
    twin = copy.deepcopy(layer.module)
    make = torch.optim.SGD if isinstance(rule, fd.SGD) else torch.optim.Adam
    optimizer = make(twin.parameters(), rule.lr)
    for _ in range(20):
        x, y = double(6, 5), double(6, 5)
        optimizer.zero_grad()
        for m in (layer, twin):
            F.mse_loss(m(m(x)), y).backward()
        optimizer.step()
    close(kept(layer.module.parameters()), kept(twin.parameters()), 1e-11)


@updates
@pytest.mark.parametrize("mode", ["eval", "no_grad"])
def test_plain_without_training(rule, mode):
    layer = conv(rule)
    if mode == "eval":
        layer.eval()
    twin = copy.deepcopy(layer.module)
    x = double(6, 2, 4, 4)
    with torch.set_grad_enabled(mode == "eval"):
        close(layer(x), twin(x), 0)
    close(dict(layer.module.state_dict()), dict(twin.state_dict()), 0)


def test_hooks_on_parameters_run_once():
    layer = dense()
    twin = copy.deepcopy(layer)
    layer.module[0].weight.register_hook(lambda g: 3 * g)
    x, arrived = double(6, 4), double(6, 5)
    for m in (layer, twin):
        m(x).backward(arrived)
    close(layer.module[0].weight.grad, 3 * twin.module[0].weight.grad)


def test_nothing_to_train_in_the_segment():
    layer = dense(fd.SGD(0.1), nn.Tanh())
    x = double(6, 5, grad=True)
    h = layer(x)
    s = twins.synthetic(layer, h.detach())
    h.sum().backward()
    close(x.grad, s * (1 - torch.tanh(x.detach()) ** 2))


def test_second_backward_is_an_error():
    for rule in (None, fd.SGD(0.1)):
        loss = dense(rule)(double(6, 4)).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


def test_bad_arguments():
    synthesizer = fd.LinearSynthesizer(5)
    with pytest.raises(TypeError, match="module must be an nn.Module"):
        fd.Decoupled(torch.tanh, synthesizer)
    with pytest.raises(TypeError, match=r"synthesizer must be None or an nn\.Module"):
        fd.Decoupled(nn.Tanh(), torch.tanh)
    with pytest.raises(TypeError, match="update must be None or a fused_dni rule"):
        fd.Decoupled(nn.Tanh(), synthesizer, update=torch.optim.SGD)

    layer = fd.Decoupled(nn.Tanh(), Wrong(), update=fd.SGD(0.1))
    with pytest.raises(RuntimeError, match=r"synthesizer must return the shape of h"):
        layer(torch.randn(6, 5))


class Wrong(nn.Module):
    def forward(self, h, context):
        return h[:, :1]


def test_a_synthesizer_of_ones_own():
    """The protocol: any module called as ``synthesizer(h, context)``."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.full((1,), 0.5, dtype=torch.float64))

        def forward(self, h, context):
            return self.scale * h if context is None else self.scale * h + context[:, None]

    for rule in (None, fd.SGD(0.01)):
        layer = twins.linear(4, 5, synthesizer=None, update=rule)
        layer.attach(Own(), rule)
        before = layer.synthesizer.scale.detach().clone()
        layer(double(6, 4)).square().sum().backward()
        layer(double(6, 4), context=double(6)).square().sum().backward()
        assert layer.synthesizer.scale.grad is not None or not torch.equal(
            layer.synthesizer.scale, before
        )


@pytest.mark.parametrize("features", [4, 6])
@pytest.mark.parametrize(
    "make",
    [fd.LinearSynthesizer, lambda n: fd.LinearSynthesizer(n, 2), fd.DiagonalSynthesizer],
    ids=["dense", "low rank", "diagonal"],
)
@pytest.mark.parametrize("rule", [None, fd.SGD(0.1)], ids=["returned", "fused"])
def test_a_synthesizer_of_another_size_is_refused(features, make, rule):
    """Kernels take addresses: they would read and write beyond the prediction."""
    segment = fd.Decoupled(nn.Linear(3, 5), make(features), update=rule)
    before = {name: p.detach().clone() for name, p in segment.named_parameters()}
    for x in (torch.randn(2, 3), torch.randn(2, 4, 3)):
        message = (
            rf"h must have shape \[..., {features}\], the synthesizer's features, got \[..., 5\]"
        )
        with pytest.raises(RuntimeError, match=message):
            segment(x).sum().backward()
    for name, p in segment.named_parameters():
        assert torch.equal(p.detach(), before[name]) and p.grad is None
