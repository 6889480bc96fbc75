"""Gradients of a cheap loss, corrected; and synthesizers that see [h, t, h - t]."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import twins
from torch import Tensor, nn
from twins import close, double

import fused_dni as fd

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH, N = 5, 12
OF = {"dtype": torch.float64}


def away(h: Tensor, t: Tensor | None) -> Tensor:
    assert t is not None
    return (h - t).square().flatten(1).sum(1)


def quartic(h: Tensor, t: Tensor | None) -> Tensor:
    assert t is not None
    return (h - t).pow(4).sum(1) + h.exp().prod(1)


def of_labels(h: Tensor, y: Tensor | None) -> Tensor:
    assert y is not None
    return F.cross_entropy(h, y, reduction="none")


def slope(surrogate: Any, h: Tensor, t: Tensor) -> Tensor:
    """N times the gradient of the mean, by autograd."""
    with torch.enable_grad():
        h = h.detach().requires_grad_()
        (found,) = torch.autograd.grad(surrogate(h, t).mean(), h)
    return found * len(h)


@pytest.mark.parametrize("surrogate", [away, quartic, of_labels])
@pytest.mark.parametrize("graph", [True, False])
def test_untaught_it_is_the_surrogates_gradient(surrogate: Any, graph: bool) -> None:
    h = double(N, WIDTH, grad=graph)
    t = torch.randint(WIDTH, (N,)) if surrogate is of_labels else double(N, WIDTH)
    m = fd.SurrogateSynthesizer(WIDTH, surrogate, **OF)
    with torch.set_grad_enabled(graph):
        close(m(h, t), slope(surrogate, h, t), 1e-13)
    assert h.grad is None


CORRECTIONS: dict[str, Any] = {
    "none": lambda: None,
    "linear": lambda: fd.LinearSynthesizer(WIDTH, context_features=WIDTH, **OF),
    "low rank": lambda: fd.LinearSynthesizer(WIDTH, 2, **OF),
    "difference": lambda: fd.DifferenceSynthesizer(WIDTH, 2, **OF),
    "mlp": lambda: fd.MLPSynthesizer(WIDTH, 8, difference=True, **OF),
}


@pytest.mark.parametrize("name", CORRECTIONS)
def test_it_is_its_formula(name: str) -> None:
    m = fd.SurrogateSynthesizer(WIDTH, quartic, CORRECTIONS[name](), **OF)
    h, t = double(N, WIDTH), double(N, WIDTH)
    close(m(h, t), slope(quartic, h, t), 1e-13)
    twins.disturb(m)
    expected = m.gain * slope(quartic, h, t)
    if m.correction is not None:
        expected = expected + m.correction(h, t)
    close(m(h, t), expected, 1e-13)
    before = m(h, t).detach()
    with torch.no_grad():
        for p in m.last_layer():
            p.mul_(4.0)
    assert torch.equal(m(h, t), 4.0 * before)


@pytest.mark.parametrize("name", ["none", "difference"])
@pytest.mark.parametrize("rule", [None, fd.SGD(0.0)], ids=["returned", "fused"])
def test_it_learns_how_much_of_it_to_take(name: str, rule: fd.SGD | None) -> None:
    """Of a squared error that is weighted by feature the gain is the weight."""
    torch.manual_seed(0)
    weight = torch.rand(WIDTH, **OF) + 0.5
    m = fd.SurrogateSynthesizer(WIDTH, away, CORRECTIONS[name](), **OF)
    how = {} if rule is None else {"update": rule, "synthesizer_update": fd.Adam(0.01)}
    layer = fd.Decoupled(nn.Linear(4, WIDTH).double(), m, **how)
    optimizer = torch.optim.Adam(m.parameters(), 0.01)
    for step in range(301):
        if step == 300:
            fd.diagnostics(layer, reset=True)
        x, t = double(32, 4), double(32, WIDTH)
        optimizer.zero_grad()
        (weight * (layer(x, context=t) - t).square()).sum(1).mean().backward()
        if rule is None:
            optimizer.step()
    assert fd.diagnostics(layer)[""]["cosine"] > 0.999
    if name == "none":
        close(m.gain.detach() * m.scale * layer.unit, weight, 1e-2)


@pytest.mark.parametrize("rule", [None, fd.SGD(0.0)], ids=["returned", "fused"])
@pytest.mark.parametrize("size", [1e-4, 1.0, 3e5])
@pytest.mark.parametrize("taught", [False, True])
def test_the_first_lesson_gives_it_the_size_of_the_true_gradient(
    taught: bool, size: float, rule: fd.SGD | None
) -> None:
    """And is itself what it would be with that size; nothing happens to one that was taught."""
    torch.manual_seed(0)
    m = fd.SurrogateSynthesizer(WIDTH, away, **OF)
    if taught:
        with torch.no_grad():
            m.gain[0] = 0.5
    layer = fd.Decoupled(nn.Linear(4, WIDTH).double(), m, update=rule)
    x, t, g = double(8, 4), double(8, WIDTH), size * double(8, WIDTH)
    h = layer(x, context=t)
    slopes = slope(away, h.detach(), t)
    h.backward(g)
    made = slopes * m.gain.detach() * m.scale * layer.unit  # 8 times the gradient, as g is 8 g / 8
    if taught:
        assert m.scale == 1.0 and layer.unit == 1.0
    else:
        close(made.norm(), (8 * g).norm(), 1e-12)
        assert 2**-5 <= 8 * g.norm() / 8**0.5 / layer.unit <= 1.0
    if rule is None:
        assert m.gain.grad is not None
        error = (made - 8 * g) / layer.unit
        expected = 2.0 / 8 * (error * slopes * m.scale).sum(0)
        close(m.gain.grad, expected, 1e-9)
    before = m.scale.clone()
    layer(x, context=t).backward(g)
    assert torch.equal(m.scale, before)


def test_one_from_before_there_was_a_scale() -> None:
    m = fd.SurrogateSynthesizer(WIDTH, away, **OF)
    twins.disturb(m)
    h, t = double(N, WIDTH), double(N, WIDTH)
    expected = m(h, t)
    state = m.state_dict()
    del state["scale"]
    state._metadata[""]["version"] = 1
    other = fd.SurrogateSynthesizer(WIDTH, away, **OF)
    other.scale.fill_(3.0)
    other.load_state_dict(state)
    assert torch.equal(other(h, t), expected)
    del other._buffers["scale"]
    assert torch.equal(copy.deepcopy(other)(h, t), expected)


def test_the_loss_may_have_another_scale() -> None:
    m = fd.SurrogateSynthesizer(WIDTH, away, CORRECTIONS["mlp"](), **OF).eval()
    layer = fd.Decoupled(nn.Linear(4, WIDTH).double(), m, update=fd.SGD(0.0))
    layer.synthesizer.eval()
    twins.disturb(m)
    before = copy.deepcopy(m)
    for _ in range(8):
        layer(double(N, 4), context=double(N, WIDTH)).backward(1e6 * double(N, WIDTH))
    assert layer.unit > 1e4
    h, t = double(N, WIDTH), double(N, WIDTH)
    close(m(h, t) * layer.unit, before(h, t), 1e-9)


def test_a_surrogate_is_neither_registered_nor_trained() -> None:
    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, 3, **OF)

        def forward(self, h: Tensor, t: Tensor | None) -> Tensor:
            assert t is not None
            return (self.inner(h) - self.inner(t)).square().sum(1)

    critic = Critic()
    m = fd.SurrogateSynthesizer(WIDTH, critic, **OF)
    assert [name for name, _ in m.named_parameters()] == ["gain"]
    assert sorted(m.state_dict()) == ["_extra_state", "gain", "scale"]
    layer = fd.Decoupled(nn.Linear(4, WIDTH).double(), m, update=fd.SGD(0.1))
    before = copy.deepcopy(critic.state_dict())
    for _ in range(3):
        t = double(N, WIDTH)
        (2.0 * critic(layer(double(N, 4), context=t), t)).mean().backward()
    assert all(torch.equal(before[name], now) for name, now in critic.state_dict().items())
    assert bool((m.gain * m.scale != 1.0).all())
    # What arrived in the critic's .grad is the loss's, none of the prediction's.
    critic.zero_grad()
    m(double(N, WIDTH), double(N, WIDTH)).sum().backward()
    assert all(p.grad is None for p in critic.parameters())


def test_copies_pickles_and_state_dicts() -> None:
    m = fd.SurrogateSynthesizer(WIDTH, away, CORRECTIONS["low rank"](), **OF)
    twins.disturb(m)
    m.unit.size, m.unit.lessons = 0.5, 7
    h, t = double(N, WIDTH), double(N, WIDTH)
    other = fd.SurrogateSynthesizer(WIDTH, away, CORRECTIONS["low rank"](), **OF)
    other.load_state_dict(m.state_dict())
    for twin in (other, copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert torch.equal(twin(h, t), m(h, t)) and twin.unit == m.unit


def test_starting_anew() -> None:
    m = fd.SurrogateSynthesizer(WIDTH, away, CORRECTIONS["linear"](), **OF)
    layer = fd.Decoupled(nn.Linear(4, WIDTH).double(), m, update=fd.SGD(0.1))
    twins.disturb(m)
    layer.reset_parameters()
    h, t = double(N, WIDTH), double(N, WIDTH)
    close(m(h, t), slope(away, h, t), 1e-13)


@pytest.mark.parametrize("rule", [None, fd.SGD(0.1)], ids=["returned", "fused"])
def test_a_sequence_is_its_rows(rule: fd.SGD | None) -> None:
    torch.manual_seed(0)
    m = fd.SurrogateSynthesizer(WIDTH, away, CORRECTIONS["mlp"](), **OF)
    twins.disturb(m)
    inner, found = nn.Linear(4, WIDTH).double(), []
    for folded in (False, True):
        layer = fd.Decoupled(copy.deepcopy(inner), copy.deepcopy(m), update=rule)
        torch.manual_seed(1)
        for _ in range(3):
            x, t, g = double(3, 4, 4), double(3, 4, WIDTH), double(3, 4, WIDTH)
            if folded:
                x, t, g = x.flatten(0, 1), t.flatten(0, 1), g.flatten(0, 1)
            layer(x, context=t).backward(g)
        found.append(twins.snapshot(layer))
    twins.unchanged(*found)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fd.SurrogateSynthesizer(WIDTH, None), TypeError, "surrogate must be called as"),
        (lambda: fd.SurrogateSynthesizer(0, away), ValueError, "features must be at least 1"),
        (lambda: fd.SurrogateSynthesizer(WIDTH, away, away), TypeError, "correction must be None"),
        (
            lambda: fd.SurrogateSynthesizer(WIDTH, away, fd.LinearSynthesizer(4)),
            ValueError,
            "correction must have features=5",
        ),
        (
            lambda: fd.SurrogateSynthesizer(WIDTH, away, fd.DiagonalSynthesizer(WIDTH, 3)),
            ValueError,
            "context_features=5 or 0, got features=5 and context_features=3",
        ),
        (
            lambda: fd.MLPSynthesizer(WIDTH, context_features=3, difference=True),
            ValueError,
            "the context has the size of h, context_features=5",
        ),
        (
            lambda: fd.ConvSynthesizer(WIDTH, context_features=3, difference=True),
            ValueError,
            "the context has the size of h",
        ),
    ],
)
def test_bad_options(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("surrogate", "message"),
    [
        (lambda h, t: (h - t).square(), r"surrogate must return a cost a row, \[12\], got \[12, 5"),
        (lambda h, t: 0.0, "got float"),
        (lambda h, t: t.sum(1), "surrogate must be differentiable at h"),
    ],
)
def test_a_bad_surrogate_changes_nothing(surrogate: Any, message: str) -> None:
    m = fd.SurrogateSynthesizer(WIDTH, surrogate, **OF)
    layer = fd.Decoupled(nn.Linear(4, WIDTH).double(), m, update=fd.SGD(0.1))
    before = twins.snapshot(layer)
    with pytest.raises(RuntimeError, match=message):
        layer(double(N, 4), context=double(N, WIDTH))
    twins.unchanged(before, twins.snapshot(layer))


# ---------------------------------------------------------------------------------------------
# [h, t, h - t]


def test_an_mlp_sees_the_difference() -> None:
    torch.manual_seed(0)
    m = fd.MLPSynthesizer(WIDTH, 8, difference=True, **OF)
    twins.disturb(m)
    h, t = double(N, WIDTH), double(N, WIDTH)
    close(m(h, t), m.layers(torch.cat([h, t, h - t], 1)), 1e-13)
    assert m.context_features == WIDTH
    for context in (None, t[:, :3]):
        with pytest.raises(RuntimeError, match="context must have the shape of h"):
            m(h, context)


@pytest.mark.parametrize("surrogate", [False, True])
@pytest.mark.parametrize("dims", [1, 2])
def test_maps_are_held_against_maps(dims: int, surrogate: bool) -> None:
    """Through the layer, whose context is not folded to rows."""
    torch.manual_seed(0)
    made = (nn.Conv1d, nn.Conv2d)[dims - 1](2, 3, 3, padding=1).double()
    conv = fd.ConvSynthesizer(3, 6, kernel_size=3, dims=dims, difference=True, **OF)
    m = fd.SurrogateSynthesizer(3, away, conv, **OF) if surrogate else conv
    layer = fd.Decoupled(made, m, update=fd.SGD(0.0), synthesizer_update=fd.Adam(0.01))
    size = (4,) * dims
    # The truth weighs neighbours: more than a gain can say.
    for step in range(201):
        if step == 200:
            fd.diagnostics(layer, reset=True)
        x, t = double(8, 2, *size), double(8, 3, *size, grad=True)
        h = layer(x, context=t)
        assert t.grad is None
        d = h - t.detach()
        d = d + 0.5 * d.roll(1, -1)
        d.square().flatten(1).sum(1).mean().backward()
    assert fd.diagnostics(layer)[""]["cosine"] > (0.93 if surrogate else 0.9)
    before = twins.snapshot(layer)
    with pytest.raises(ValueError, match="context is missing"):
        layer(x)
    said = None if surrogate else "context must have the shape of h"  # else by the surrogate
    with pytest.raises(RuntimeError, match=said):
        layer(x, context=double(8, 3))
    twins.unchanged(before, twins.snapshot(layer))
