"""The synthesizers: shapes, zero start, protocol, and one formula in two forms."""

from __future__ import annotations

import copy

import pytest
import torch
import twins
from torch import nn
from twins import BACKENDS, close, double

import fused_dni as fd
from fused_dni.ops import registry
from fused_dni.ops.types import AFFINE

pytestmark = pytest.mark.usefixtures("one_thread")

MADE = {
    "dense": lambda k: fd.LinearSynthesizer(5, context_features=k, dtype=torch.float64),
    "lowrank": lambda k: fd.LinearSynthesizer(5, 2, k, dtype=torch.float64),
    "diagonal": lambda k: fd.DiagonalSynthesizer(5, k, dtype=torch.float64),
    "mlp": lambda k: fd.MLPSynthesizer(5, 4, 2, k, dtype=torch.float64),
}


def context(k, kind, n=6):
    if not k:
        return None
    return torch.randint(k, (n,)) if kind == "labels" else double(n, k)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("kind", ["labels", "vector"])
def test_starts_at_zero_and_learns(name, k, kind):
    m = MADE[name](k)
    h, rows = double(6, 5), context(k, kind)
    assert m(h, rows).shape == h.shape and not m(h, rows).any()
    optimizer = torch.optim.Adam(m.parameters(), 0.05)
    target = h.flip(1) + 1
    first = None
    for _ in range(60):
        optimizer.zero_grad()
        loss = (m(h, rows) - target).square().mean()
        loss.backward()
        first = first or loss.item()
        optimizer.step()
    assert loss.item() < 0.9 * first
    assert all(p.grad is not None for p in m.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["dense", "lowrank", "diagonal"])
@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("kind", ["labels", "vector"])
def test_forward_is_what_the_kernels_predict(backend, name, k, kind):
    m = MADE[name](k)
    twins.disturb(m)
    h, rows = double(6, 5), context(k, kind)
    fused = m.fused()
    assert fused.kind == name
    assert {id(p) for p in m.parameters()} == {id(p) for p in fused.parameters() if p is not None}
    made = registry.get(backend).synthesizer_predict(h, fused, rows)
    close(made.scaled, m(h, rows), 1e-13)
    made = fd.functional.synthesizer_predict(h, fused, rows, backend=backend)
    close(made.scaled, m(h, rows), 1e-13)


@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions(k, dims):
    m = fd.ConvSynthesizer(4, hidden=3, layers=2, kernel_size=3, context_features=k, dims=dims)
    h = torch.randn(6, 4, *(5,) * dims)
    assert m(h, torch.randint(3, (6,)) if k else None).shape == h.shape
    assert not m(h, torch.randint(3, (6,)) if k else None).any()
    with pytest.raises(RuntimeError, match=rf"h must have {dims + 2} dimensions"):
        m(torch.randn(6, 4), None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fd.LinearSynthesizer(0), "features must be at least 1, got 0"),
        (lambda: fd.LinearSynthesizer(4, 5), r"rank must be in \[1, features=4\] or None, got 5"),
        (lambda: fd.LinearSynthesizer(4, 0), "rank must be in"),
        (lambda: fd.DiagonalSynthesizer(4, -1), "context_features must be at least 0, got -1"),
        (lambda: fd.MLPSynthesizer(4, 0), "hidden must be at least 1, got 0"),
        (lambda: fd.MLPSynthesizer(4, 4, 0), "layers must be at least 1, got 0"),
        (lambda: fd.ConvSynthesizer(4, 4, kernel_size=2), "kernel_size must be odd and positive"),
        (lambda: fd.ConvSynthesizer(4, 4, dims=4), "dims must be 1, 2 or 3, got 4"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", MADE)
def test_context_missing(name):
    with pytest.raises(ValueError, match="context is missing"):
        MADE[name](3)(double(6, 5), None)


def test_the_default():
    layer = fd.FusedDNILinear(4, 40, context_features=3)
    assert isinstance(layer.synthesizer, fd.LinearSynthesizer)
    assert layer.synthesizer.rank == 16 and layer.synthesizer.context_features == 3
    assert fd.FusedDNILinear(4, 5).synthesizer.rank == 5


def test_a_parametrized_synthesizer_has_no_fused_form():
    m = nn.utils.parametrizations.weight_norm(fd.LinearSynthesizer(5))
    assert m.fused() is None


# ---------------------------------------------------------------------------------------------
# From how far h is from a context


@pytest.mark.parametrize("rank", [0, 2])
def test_difference_synthesizer_is_its_formula(rank):
    synthesizer = fd.DifferenceSynthesizer(5, rank, dtype=torch.float64)
    h, t = double(6, 5), double(6, 5)
    assert not synthesizer(h, t).any()  # untaught
    twins.disturb(synthesizer)
    expected = (h - t) * synthesizer.weight + synthesizer.bias
    if rank:
        expected = expected + (h - t) @ synthesizer.down.t() @ synthesizer.up.t()
    close(synthesizer(h, t), expected)
    before = synthesizer(h, t).detach()
    with torch.no_grad():
        for p in synthesizer.last_layer():
            p.mul_(4.0)
    assert torch.equal(synthesizer(h, t), 4.0 * before)


def test_difference_synthesizer_is_exact_for_a_weighted_squared_error():
    torch.manual_seed(0)
    scale = torch.rand(5, dtype=torch.float64) + 0.5
    layer = fd.Decoupled(
        nn.Linear(4, 5).double(), fd.DifferenceSynthesizer(5, dtype=torch.float64),
        update=fd.SGD(0.0), synthesizer_update=fd.Adam(0.03),
    )  # fmt: skip
    for _ in range(400):
        x, t = double(32, 4), double(32, 5)
        h = layer(x, context=t)
        (scale * (h - t).square()).sum(1).mean().backward()
    fd.diagnostics(layer, reset=True)
    h = layer(x, context=t)
    (scale * (h - t).square()).sum(1).mean().backward()
    assert fd.diagnostics(layer)[""]["cosine"] > 0.9999


@pytest.mark.parametrize("context", [None, torch.zeros(6, 4, dtype=torch.float64)])
def test_difference_synthesizer_refuses_another_shape(context):
    with pytest.raises(RuntimeError, match="context must have the shape of h"):
        fd.DifferenceSynthesizer(5, dtype=torch.float64)(double(6, 5), context)
    with pytest.raises(ValueError, match="rank must be in"):
        fd.DifferenceSynthesizer(5, 6)


# ---------------------------------------------------------------------------------------------
# Of the form that a classifier's gradient has


def of_head(head, rank=0):
    """Its synthesizer with the head's own weights: what it predicts is known."""
    m = fd.CrossEntropySynthesizer(5, 3, rank, dtype=torch.float64)
    with torch.no_grad():
        m.logits.weight.copy_(head.weight)
        m.logits.bias.copy_(head.bias)
        m.weight.copy_(head.weight.t())
    return m


@pytest.mark.parametrize("kind", ["labels", "vector"])
@pytest.mark.parametrize("rank", [0, 2])
def test_with_the_heads_weights_it_is_the_gradient_of_the_loss(kind, rank):
    head, h = nn.Linear(5, 3, dtype=torch.float64), double(6, 5, grad=True)
    y = torch.randint(3, (6,)) if kind == "labels" else double(6, 3).softmax(1)
    (true,) = torch.autograd.grad(nn.functional.cross_entropy(head(h), y), h)
    close(of_head(head, rank)(h.detach(), y) / 6, true)


@pytest.mark.parametrize("rank", [0, 2])
def test_cross_entropy_synthesizer_is_its_formula(rank):
    m = fd.CrossEntropySynthesizer(5, 3, rank, dtype=torch.float64)
    h, y = double(6, 5), torch.randint(3, (6,))
    assert not m(h, y).any()  # untaught
    twins.disturb(m)
    wrong = (h @ m.logits.weight.t() + m.logits.bias).softmax(1) - nn.functional.one_hot(y, 3)
    expected = wrong @ m.weight.t() + m.bias
    if rank:
        expected = expected + h @ m.down.t() @ m.up.t()
    close(m(h, y), expected)
    before = m(h, y).detach()
    with torch.no_grad():
        for p in m.last_layer():
            p.mul_(4.0)
    assert torch.equal(m(h, y), 4.0 * before)


class ByAutograd(fd.CrossEntropySynthesizer):
    def fused(self):
        return None


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("cpu", "reference")])
@pytest.mark.parametrize("kind", ["labels", "vector"])
def test_kernels_predict_what_it_does(backend, kind):
    m = fd.CrossEntropySynthesizer(5, 3, dtype=torch.float64)
    twins.disturb(m)
    h, y = double(6, 5), context(3, kind)
    fused = m.fused()
    assert fused.kind == "cross_entropy"
    assert {id(p) for p in m.parameters()} == {id(p) for p in fused.parameters()}
    made = fd.functional.synthesizer_predict(h, fused, y, backend=backend)
    close(made.scaled, m(h, y), 1e-13)
    with pytest.raises(IndexError):
        fd.functional.synthesizer_predict(h, fused, torch.full((6,), 3), backend=backend)


def test_its_names_in_a_state_dict():
    """Which checkpoints have."""
    m = fd.CrossEntropySynthesizer(5, 3)
    assert list(m.state_dict()) == [
        "weight", "bias", "_extra_state", "logits.weight", "logits.bias"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        lambda m: nn.utils.parametrizations.weight_norm(m.logits),
        lambda m: nn.utils.parametrizations.weight_norm(m),
        lambda m: setattr(m, "logits", nn.Linear(5, 3, bias=False)),
        lambda m: setattr(m, "__class__", type("Own", (type(m),), {"forward": lambda *a: None})),
    ],
    ids=["logits parametrized", "parametrized", "no bias", "another forward"],
)
def test_what_no_kernel_computes_goes_by_autograd(change):
    m = fd.CrossEntropySynthesizer(5, 3)
    assert m.fused() is not None
    change(m)
    assert m.fused() is None
    assert fd.CrossEntropySynthesizer(5, 3, 2).fused() is None


@pytest.mark.parametrize("phase", ["k=1", "mix", "warm-up"])
@pytest.mark.parametrize("rule", [None, fd.Adam(0.01, eps=1e-3)], ids=["returned", "fused"])
@pytest.mark.parametrize("layer", ["linear", "preactivation", "segment"])
@pytest.mark.parametrize("kind", ["labels", "vector"])
def test_kernels_teach_it_as_autograd_does(layer, rule, phase, kind):
    torch.manual_seed(0)
    synthesizer = fd.CrossEntropySynthesizer(5, 3, dtype=torch.float64)
    twins.disturb(synthesizer)
    if layer == "segment":
        mine = fd.Decoupled(nn.Linear(4, 5).double(), synthesizer, update=rule)
    else:
        mine = fd.FusedDNILinear(
            4, 5, normalization="batch", activation="gelu", synthesizer=synthesizer, update=rule,
            interface="preactivation" if layer == "preactivation" else "output",
            dtype=torch.float64,
        )  # fmt: skip
    theirs = copy.deepcopy(mine)
    theirs.synthesizer.__class__ = ByAutograd
    for _ in range(4):
        x, y, g = double(6, 4), context(3, kind), double(6, 5)
        for each in (mine, theirs):
            each.phase = fd.modules.base.Phase(
                warmup=phase == "warm-up", mix=0.5 if phase == "mix" else 0.0, lessons=1
            )
            each(x, context=y).backward(g)
        # Moments have their slots in another order.
        for (name, p), q in zip(mine.named_parameters(), theirs.parameters(), strict=True):
            close(p.detach(), q.detach(), 1e-10)
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                close(p.grad, q.grad, 1e-10)
        close(mine.statistics, theirs.statistics, 1e-10)
        assert mine.unit == theirs.unit


def test_on_a_backend_without_the_kind_it_runs_under_autograd(monkeypatch):
    """As on a GPU."""
    layer = fd.FusedDNILinear(
        4, 5, synthesizer=fd.CrossEntropySynthesizer(5, 3), update=fd.SGD(0.1), backend="reference"
    )
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    assert layer.fused_synthesizer(x) is not None
    monkeypatch.setattr(type(registry.get("reference")), "synthesizers", AFFINE)
    assert layer.fused_synthesizer(x) is None
    layer(x, context=y).square().sum().backward()
    assert layer.synthesizer_update.steps == 1
    assert "a CrossEntropySynthesizer, runs under autograd" in repr(layer)


def test_a_classifiers_gradient_is_learned_from_targets_alone():
    """To a tenth of the squared error that the best linear synthesizer leaves."""
    torch.manual_seed(0)
    head, h = nn.Linear(5, 3, dtype=torch.float64), double(400, 5, grad=True)
    with torch.no_grad():
        head.weight.mul_(4.0)
    y = torch.randint(3, (400,))
    loss = nn.functional.cross_entropy(head(h), y, reduction="sum")
    (true,) = torch.autograd.grad(loss, h)
    rows = torch.cat([h.detach(), nn.functional.one_hot(y, 3).double()], dim=1)
    least = (rows @ torch.linalg.lstsq(rows, true).solution - true).square().sum()
    m = fd.CrossEntropySynthesizer(5, 3, dtype=torch.float64)
    optimizer = torch.optim.Adam(m.parameters(), 0.05)
    for _ in range(500):
        optimizer.zero_grad()
        error = (m(h.detach(), y) - true).square().sum()
        error.backward()
        optimizer.step()
    assert error < 0.1 * least


def test_bad_arguments_of_a_cross_entropy_synthesizer():
    for sizes, message in (
        ((0, 3), "features must be at least 1, got 0"),
        ((5, 0), "context_features must be at least 1, got 0"),
        ((5, -1), "context_features must be at least 0, got -1"),
        ((5, 3, 6), r"rank must be in \[0, features=5\], got 6"),
    ):
        with pytest.raises(ValueError, match=message):
            fd.CrossEntropySynthesizer(*sizes)
    m = fd.CrossEntropySynthesizer(5, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="context is missing"):
        m(double(6, 5))
    layer = fd.FusedDNILinear(4, 5, synthesizer=m, update=fd.SGD(0.1), dtype=torch.float64)
    before = [p.clone() for p in layer.parameters()]
    with pytest.raises(IndexError):
        layer(double(3, 4), context=torch.tensor([0, 1, 3]))
    assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), before, strict=True))
