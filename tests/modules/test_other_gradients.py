"""Gradients that come by another way than the layer, or a second time: added, or an error that
says so; never thrown away, never zeros."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import twins
from torch import nn
from torch.autograd import forward_ad
from torch.autograd import functional as AF
from twins import close, double

import fused_dni as fd

pytestmark = pytest.mark.usefixtures("one_thread")

RULE = fd.SGD(0.1, momentum=0.9)


def _linear(**options):
    return fd.FusedDNILinear(4, 4, activation="tanh", dtype=torch.float64, **options)


def _segment(synthesizer="default", **options):
    made = None if synthesizer is None else fd.LinearSynthesizer(4, dtype=torch.float64)
    return fd.Decoupled(nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double(), made, **options)


def _lstm(**options):
    return fd.FusedDNILSTM(4, 4, dtype=torch.float64, **options)


def _cell(**options):
    return fd.FusedDNILSTMCell(4, 4, dtype=torch.float64, **options)


def call(layer, x):
    """The layer's output for x [B, 4]."""
    if isinstance(layer, fd.FusedDNILSTM):
        return layer(x.unsqueeze(0))[0]
    out = layer(x)
    return out[0] if isinstance(out, tuple) else out


LAYERS = {"linear": _linear, "segment": _segment, "lstm": _lstm, "cell": _cell}
layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
REFUSED = "is updated by a fused rule .* came by another way"


def first(layer):
    """A parameter under ``update`` and its name."""
    return next((n, p) for n, p in layer.named_parameters() if "synthesizer" not in n)


# ---------------------------------------------------------------------------------------------
# What reaches .grad


@layers
@pytest.mark.parametrize("rule", [RULE, fd.Adam(0.01)], ids=["sgd", "adam"])
@pytest.mark.parametrize("scale", [None, 8.0])
def test_a_penalty_is_added_where_gradients_are_exact(make, rule, scale):
    """An exact layer's update is ``torch.optim``'s on the sum of both gradients."""
    layer = make(synthesizer=None, update=rule)
    if scale is not None:
        fd.Schedule(layer, loss_scale=scale)
    twin = make(synthesizer=None)
    twin.load_state_dict(layer.state_dict())
    optimizer = fd.FusedOptimizer(layer)
    kind = torch.optim.SGD if isinstance(rule, fd.SGD) else torch.optim.Adam
    plain = kind(twin.parameters(), **rule.defaults())
    for _ in range(4):
        x = double(6, 4)
        for model, o, factor in ((layer, optimizer, scale or 1.0), (twin, plain, 1.0)):
            o.zero_grad()
            penalty = sum(p.square().sum() for p in model.parameters())
            (factor * (call(model, x).square().mean() + penalty)).backward()
            o.step()
    close(dict(layer.state_dict()), dict(twin.state_dict()))
    assert all(p.grad is None for p in layer.parameters())


@layers
@pytest.mark.parametrize("sparse", [False, True])
def test_an_embedding_tied_to_an_exact_layer(make, sparse):
    layer, twin = make(synthesizer=None, update=fd.SGD(0.1)), make(synthesizer=None)
    twin.load_state_dict(layer.state_dict())
    (_, weight), (_, other) = first(layer), first(twin)
    start = weight.detach().clone()
    tokens = torch.tensor([0, 1, 1])
    x = double(6, 4)
    (call(layer, x).sum() + F.embedding(tokens, weight, sparse=sparse).sum()).backward()
    (call(twin, x).sum() + F.embedding(tokens, other).sum()).backward()
    close(weight.detach(), start - 0.1 * other.grad)


@layers
@pytest.mark.parametrize("observed", ["backward", "step", "forward"])
def test_what_no_rule_sees_is_refused(make, observed):
    """With a synthesizer; nothing is changed by what raises."""
    layer = make(update=RULE)
    optimizer = fd.FusedOptimizer(layer)
    x = double(6, 4)
    call(layer, x).sum().backward()
    name, p = first(layer)
    if observed == "backward":
        out = call(layer, x)
        with pytest.raises(RuntimeError, match=f"'{name}' {REFUSED}"):
            (out.sum() + p.square().sum()).backward()
        return
    p.square().sum().backward()
    before = twins.snapshot(layer, optimizer)
    with pytest.raises(RuntimeError, match=f"'{name}' {REFUSED}"):
        optimizer.step() if observed == "step" else call(layer, x)
    twins.unchanged(before, twins.snapshot(layer, optimizer))
    optimizer.zero_grad()
    optimizer.step()
    call(layer, x).sum().backward()


@layers
@pytest.mark.parametrize("synthesizer", ["default", None])
def test_the_next_forward_refuses_without_an_optimizer(make, synthesizer):
    layer = make(synthesizer=synthesizer, update=RULE)
    call(layer, double(6, 4)).sum().backward()
    name, p = first(layer)
    p.square().sum().backward()
    with pytest.raises(RuntimeError, match=f"'{name}' {REFUSED}"):
        call(layer, double(6, 4))
    p.grad.zero_()
    call(layer, double(6, 4)).sum().backward()


def test_a_synthesizer_s_gradient_is_refused_too():
    layer = _linear(update=RULE)
    call(layer, double(6, 4)).sum().backward()
    layer.synthesizer.weight.sum().backward()
    with pytest.raises(RuntimeError, match=f"'synthesizer.weight' {REFUSED}"):
        call(layer, double(6, 4))


def test_nothing_of_a_backward_is_applied_if_one_layer_refuses():
    model = nn.Sequential(_linear(update=RULE), _linear(synthesizer=None, update=RULE))
    optimizer = fd.FusedOptimizer(model)
    model(double(6, 4)).sum().backward()
    out = model(double(6, 4))
    before = twins.snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match=f"'weight' {REFUSED}"):
        (out.sum() + model[0].weight.square().sum()).backward()
    model[0].weight.grad = None
    twins.unchanged(before, twins.snapshot(model, optimizer))


def test_names_are_those_of_the_model():
    model = nn.Sequential(nn.Sequential(_linear(update=RULE)))
    optimizer = fd.FusedOptimizer(model)
    model(double(6, 4)).sum().backward()
    model[0][0].bias.sum().backward()
    with pytest.raises(RuntimeError, match=f"'0.0.bias' {REFUSED}"):
        optimizer.step()


@layers
def test_frozen_parameters_may_keep_a_gradient(make):
    layer = make(update=RULE)
    _, p = first(layer)
    p.grad = torch.ones_like(p)
    p.requires_grad_(False)
    for _ in range(2):
        call(layer, double(6, 4)).sum().backward()
    fd.FusedOptimizer(layer).step()


# ---------------------------------------------------------------------------------------------
# Second derivatives, forward mode


def _again(f, x, **options):
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.autograd.grad(g.sum() + 0.0 * x.sum(), x, **options)


def _penalty(f, x):
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.autograd.grad(f(x) + g.square().sum(), x)


def _dual(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


SECOND = {
    "hessian": AF.hessian,
    "hessian, strict": lambda f, x: AF.hessian(f, x, strict=True),
    "hessian, vectorized": lambda f, x: AF.hessian(f, x, vectorize=True),
    "hessian, create_graph": lambda f, x: AF.hessian(f, x, create_graph=True),
    "hvp": lambda f, x: AF.hvp(f, x, torch.ones_like(x)),
    "vhp": lambda f, x: AF.vhp(f, x, torch.ones_like(x)),
    "jvp by double backward": lambda f, x: AF.jvp(f, x, torch.ones_like(x)),
    "grad of grad": _again,
    "allow_unused": lambda f, x: _again(f, x, allow_unused=True),
    "materialize_grads": lambda f, x: _again(f, x, allow_unused=True, materialize_grads=True),
    "gradient penalty": _penalty,
    "func.hessian": lambda f, x: torch.func.hessian(f)(x),
}
FORWARD = {
    "dual": _dual,
    "dual under no_grad": torch.no_grad()(_dual),
    "func.jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "func.jvp under no_grad": torch.no_grad()(
        lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))
    ),
    "func.jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "jacobian": lambda f, x: AF.jacobian(f, x, vectorize=True, strategy="forward-mode"),
}
KERNELS = {n: m for n, m in LAYERS.items() if n != "segment"}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rule", [None, RULE], ids=["returned", "fused"])
@pytest.mark.parametrize("synthesizer", ["default", None])
@pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS.keys())
@pytest.mark.parametrize("form", [*SECOND, *FORWARD])
def test_no_silent_zeros(form, make, synthesizer, rule, training):
    layer = make(synthesizer=synthesizer, update=rule).train(training)
    message = "@once_differentiable|setup_context|would mutate a captured Tensor"
    if form in FORWARD:
        message = "carries a tangent.*no forward-mode derivatives"
    # A strict Hessian is PyTorch's own error where the synthesizer, zero at first, cuts the graph.
    message += "|independent of|strict"
    with pytest.raises(RuntimeError, match=message):
        {**SECOND, **FORWARD}[form](lambda x: call(layer, x).sum(), double(3, 4))


@pytest.mark.parametrize("rule", [None, RULE], ids=["returned", "fused"])
@pytest.mark.parametrize("target", [True, False])
@pytest.mark.parametrize("form", [*SECOND, *FORWARD])
def test_no_silent_zeros_of_a_segment(form, target, rule):
    layer = _segment(update=rule)
    fd.Schedule(layer, target_every=1 if target else None)
    if "no_grad" in form:  # the segment itself, which has forward-mode derivatives
        made = {**SECOND, **FORWARD}[form](lambda x: call(layer, x).sum(), double(3, 4))
        assert all(t.any() for t in (made if isinstance(made, tuple) else (made,)))
        return
    with pytest.raises(RuntimeError):
        {**SECOND, **FORWARD}[form](lambda x: call(layer, x).sum(), double(3, 4))


@pytest.mark.parametrize("form", [*SECOND, *FORWARD])
def test_no_silent_zeros_of_a_container(form):
    model = fd.DecoupledSequential(_linear(), _linear())
    with pytest.raises(RuntimeError):
        {**SECOND, **FORWARD}[form](lambda x: model(x).sum(), double(3, 4))


def test_tangents_of_parameters_are_refused():
    layer = _linear(synthesizer=None)
    with forward_ad.dual_level(), torch.no_grad():
        dual = {"weight": forward_ad.make_dual(layer.weight, torch.ones_like(layer.weight))}
        with pytest.raises(RuntimeError, match="weight carries a tangent"):
            torch.func.functional_call(layer, dual, (double(3, 4),))


@layers
def test_a_first_derivative_with_create_graph_is_the_same(make):
    layer, x = make(synthesizer=None), double(3, 4, grad=True)
    (plain,) = torch.autograd.grad(call(layer, x).sum(), x)
    (kept,) = torch.autograd.grad(call(layer, x).sum(), x, create_graph=True)
    assert kept.requires_grad
    close(kept.detach(), plain, 0)
