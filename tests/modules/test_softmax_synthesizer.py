"""Gradients in front of a softmax, and segments whose output has more dimensions than two."""

from __future__ import annotations

import copy
import io
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
WIDTH, CLASSES, N = 5, 7, 12


def head_of(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, CLASSES, bias, dtype=torch.float64)


def labels_of(*shape: int, ignored: bool = False) -> Tensor:
    y = torch.randint(0, CLASSES, shape)
    if ignored:
        y.view(-1)[::3] = -100
    return y


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("rank", [None, 2])
def test_the_labels_part_is_the_truths(smoothing: float, ignored: bool, rank: int | None) -> None:
    """Untaught, M is what the label contributes to kappa times the gradient, to the last bit but
    rounding; the rest is what the model expects."""
    head, h, y = head_of(), double(N, WIDTH, grad=True), labels_of(N, ignored=ignored)
    loss = F.cross_entropy(head(h), y, label_smoothing=smoothing)
    (truth,) = torch.autograd.grad(loss, h)
    counted = (y != -100).double().unsqueeze(1)
    p = head(h).softmax(1) - smoothing / CLASSES
    expected = counted * (p @ head.weight) / counted.sum()
    synthesizer = fd.SoftmaxSynthesizer(head, rank, label_smoothing=smoothing)
    close(synthesizer(h, y) / N, truth - expected, 1e-12)
    assert not bool(synthesizer(h, y)[y == -100].any())


def test_it_learns_what_the_model_expects() -> None:
    torch.manual_seed(0)
    head = head_of()
    layer = fd.Decoupled(
        nn.Linear(4, WIDTH).double(), fd.SoftmaxSynthesizer(head),
        update=fd.SGD(0.0), synthesizer_update=fd.Adam(0.02),
    )  # fmt: skip
    for _ in range(300):
        x, y = double(64, 4), labels_of(64)
        F.cross_entropy(head(layer(x, context=y)), y).backward()
    fd.diagnostics(layer, reset=True)
    F.cross_entropy(head(layer(x, context=y)), y).backward()
    found = fd.diagnostics(layer)[""]
    assert found["cosine"] > 0.99 and 0.9 < found["norm_ratio"] < 1.1
    assert abs(float(layer.synthesizer.gain.detach()) * layer.unit - 1.0) < 0.1


def test_the_loss_may_have_another_scale() -> None:
    """The gain and what is predicted are one linear model: they follow the unit together."""
    layer = fd.Decoupled(
        nn.Linear(4, WIDTH).double(), fd.SoftmaxSynthesizer(head_of()), update=fd.SGD(0.0)
    )
    before = copy.deepcopy(layer.synthesizer)
    for _ in range(8):
        layer(double(N, 4), context=labels_of(N)).backward(1e6 * double(N, WIDTH))
    assert layer.unit > 1e4
    h, y = double(N, WIDTH), labels_of(N)
    close(layer.synthesizer(h, y) * layer.unit, before(h, y), 1e-9)


def test_nothing_of_the_head_is_registered_or_saved() -> None:
    head = head_of()
    synthesizer = fd.SoftmaxSynthesizer(head)
    assert [n for n, _ in synthesizer.named_parameters()] == ["weight", "bias", "gain"]
    assert "head" not in "".join(synthesizer.state_dict())
    model = nn.ModuleDict({"head": head, "synthesizer": synthesizer})
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin["synthesizer"].head is twin["head"] is not head
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    other = nn.ModuleDict({"head": (h := head_of()), "synthesizer": fd.SoftmaxSynthesizer(h)})
    file.seek(0)
    other.load_state_dict(torch.load(file))


@pytest.mark.parametrize("where", ["embedding", "fused layer"])
def test_other_heads(where: str) -> None:
    if where == "embedding":
        head: Any = nn.Embedding(CLASSES, WIDTH, dtype=torch.float64)
    else:
        head = fd.FusedDNILinear(WIDTH, CLASSES, synthesizer=None, dtype=torch.float64)
    h, y = double(N, WIDTH), labels_of(N)
    close(fd.SoftmaxSynthesizer(head)(h, y), -head.weight[y].detach())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fd.SoftmaxSynthesizer(nn.ReLU()), TypeError, "head must be a module with a weigh"),
        (lambda: fd.SoftmaxSynthesizer(head_of(), 9), ValueError, "rank must be in"),
        (
            lambda: fd.SoftmaxSynthesizer(head_of(), label_smoothing=1.0),
            ValueError,
            "label_smoothing must be in",
        ),
    ],
)
def test_bad_options(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("context", "error", "message"),
    [
        (None, ValueError, "context is missing"),
        (torch.full((N,), CLASSES), IndexError, "label 7 in context is out of range"),
        (torch.full((N,), -1), IndexError, "label -1 in context is out of range"),
        (torch.zeros(N + 1, dtype=torch.int64), RuntimeError, "context covers rows"),
        (torch.zeros(N, CLASSES, dtype=torch.float64), RuntimeError, "context must be labels"),
    ],
)
def test_bad_context_changes_nothing(
    context: Tensor | None, error: type[Exception], message: str
) -> None:
    layer = fd.Decoupled(
        nn.Linear(4, WIDTH).double(), fd.SoftmaxSynthesizer(head_of()), update=fd.SGD(0.1)
    )
    before = twins.snapshot(layer)
    with pytest.raises(error, match=message):
        layer(double(N, 4), context=context)
    twins.unchanged(before, twins.snapshot(layer))


def test_a_head_that_was_resized_is_an_error() -> None:
    head = head_of()
    layer = fd.Decoupled(
        nn.Linear(4, WIDTH).double(), fd.SoftmaxSynthesizer(head), update=fd.SGD(0.1)
    )
    head.weight = nn.Parameter(double(CLASSES + 1, WIDTH))
    before = twins.snapshot(layer)
    with pytest.raises(RuntimeError, match="make a new synthesizer"):
        layer(double(N, 4), context=labels_of(N))
    twins.unchanged(before, twins.snapshot(layer))


# ---------------------------------------------------------------------------------------------
# On the fused kernels, against the same under autograd


class ByAutograd(fd.SoftmaxSynthesizer):
    def fused(self) -> None:
        return None


def by_autograd(layer: Any) -> Any:
    """A copy of a layer whose synthesizer no kernel runs, with the same head."""
    memo = {id(layer.synthesizer.head): layer.synthesizer.head}
    twin = copy.deepcopy(layer, memo)
    twin.synthesizer.__class__ = ByAutograd
    return twin


def learned(layer: Any) -> dict[str, Tensor]:
    """All that training moves, but moments, whose order is the form's; without .grad None."""
    found = {n: p.detach() for n, p in layer.named_parameters()}
    found |= {f"{n}.grad": p.grad for n, p in layer.named_parameters() if p.grad is not None}
    unit = torch.tensor(layer.unit)
    return found | {"statistics": layer.statistics, "unit": unit}


def same(layer: Any, twin: Any, tolerance: float = 1e-10) -> None:
    assert layer.synthesizer.fused() is not None and twin.synthesizer.fused() is None
    mine, other = learned(layer), learned(twin)
    assert mine.keys() == other.keys()
    for name, t in mine.items():
        close(t, other[name], tolerance)


@pytest.mark.parametrize("phase", ["k=1", "mix", "warmup"])
@pytest.mark.parametrize("rule", [None, fd.Adam(0.01, eps=1e-3)], ids=["returned", "fused"])
@pytest.mark.parametrize("rank", [None, 2])
def test_kernels_are_autograd(rank: int | None, rule: fd.Adam | None, phase: str) -> None:
    torch.manual_seed(0)
    synthesizer = fd.SoftmaxSynthesizer(head_of(), rank)
    twins.disturb(synthesizer)
    layer = fd.Decoupled(nn.Linear(4, WIDTH).double(), synthesizer, update=rule)
    both = (layer, by_autograd(layer))
    for _ in range(4):
        x, y, g = double(3, 4, 4), labels_of(3, 4, ignored=True), double(3, 4, WIDTH)
        for each in both:
            each.phase = fd.modules.base.Phase(
                warmup=phase == "warmup", mix=0.5 if phase == "mix" else 0.0
            )
            each(x, context=y).backward(g)
        same(*both)


@pytest.mark.parametrize("interface", ["output", "preactivation"])
@pytest.mark.parametrize("rule", [None, fd.SGD(0.1)], ids=["returned", "fused"])
def test_in_a_linear_layer(rule: fd.SGD | None, interface: str) -> None:
    """A step in one launch, against one in pieces."""
    torch.manual_seed(0)
    synthesizer = fd.SoftmaxSynthesizer(head_of(), 2)
    twins.disturb(synthesizer)
    layer = fd.FusedDNILinear(
        4, WIDTH, normalization="batch", activation="gelu", synthesizer=synthesizer, update=rule,
        interface=interface, dtype=torch.float64,
    )  # fmt: skip
    both = (layer, by_autograd(layer))
    for _ in range(3):
        x, y, g = double(N, 4), labels_of(N, ignored=True), double(N, WIDTH)
        for each in both:
            each(x, context=y).backward(g)
        same(*both)


@pytest.mark.filterwarnings("ignore")  # the compiler's about itself
def test_compiled() -> None:
    torch.manual_seed(0)
    synthesizer = fd.SoftmaxSynthesizer(head_of(), 2)
    twins.disturb(synthesizer)
    layer = fd.FusedDNILinear(
        4, WIDTH, synthesizer=synthesizer, target_scale=1.0, dtype=torch.float64
    )
    twin = by_autograd(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x, y, g = double(N, 4), labels_of(N, ignored=True), double(N, WIDTH)
        compiled(x, context=y).backward(g)
        twin(x, context=y).backward(g)
        same(layer, twin)
        with torch.no_grad():
            synthesizer.head.weight.mul_(1.5)  # seen by the next call


def test_lessons_come_before_the_head_moves() -> None:
    found = []
    for form in (lambda layer: layer, by_autograd):
        torch.manual_seed(0)
        head = fd.FusedDNILinear(
            WIDTH, CLASSES, synthesizer=None, update=fd.SGD(10.0), dtype=torch.float64
        )
        layer = form(
            fd.Decoupled(
                nn.Linear(4, WIDTH).double(), fd.SoftmaxSynthesizer(head), update=fd.SGD(0.1)
            )
        )
        for _ in range(2):
            x, y = double(N, 4), labels_of(N)
            F.cross_entropy(head(layer(x, context=y)), y).backward()
        found.append((layer, head))
    same(found[0][0], found[1][0])
    close(found[0][1].weight, found[1][1].weight)


@pytest.mark.parametrize("width", [WIDTH, 19])
def test_a_bfloat16_head(width: int) -> None:
    torch.manual_seed(0)
    head = nn.Linear(width, CLASSES)
    layer = fd.Decoupled(nn.Linear(4, width), fd.SoftmaxSynthesizer(head), update=fd.SGD(0.1))
    head.bfloat16()
    both = (layer, by_autograd(layer))
    for _ in range(2):
        x, y, g = torch.randn(N, 4), labels_of(N), torch.randn(N, width)
        for each in both:
            each(x, context=y).backward(g)
    same(*both, tolerance=1e-5)


class Elsewhere(Tensor):
    """A subclass, of which nobody knows where its elements are."""


@pytest.mark.parametrize(
    "changed",
    [
        lambda weight: weight.t().contiguous().t(),
        lambda weight: weight.as_subclass(Elsewhere),
        lambda weight: weight.float(),
    ],
    ids=["strided", "subclass", "dtype"],
)
def test_a_head_that_kernels_cannot_read_goes_by_autograd(changed: Any) -> None:
    head = head_of()
    synthesizer = fd.SoftmaxSynthesizer(head)
    assert synthesizer.fused() is not None
    head.weight = nn.Parameter(changed(head.weight.detach()))
    assert synthesizer.fused() is None
    layer = fd.Decoupled(nn.Linear(4, WIDTH).double(), synthesizer, update=fd.SGD(0.1))
    layer(double(N, 4), context=labels_of(N)).backward(double(N, WIDTH))
    assert layer.synthesizer_update is not None and layer.synthesizer_update.steps == 1


def test_a_head_elsewhere_is_an_error() -> None:
    head = head_of()
    layer = fd.Decoupled(
        nn.Linear(4, WIDTH).double(), fd.SoftmaxSynthesizer(head), update=fd.SGD(0.1)
    )
    head.to("meta")
    before = twins.snapshot(layer)
    with pytest.raises(RuntimeError, match="the head is on meta, the synthesizer on cpu"):
        layer(double(N, 4), context=labels_of(N))
    twins.unchanged(before, twins.snapshot(layer))


# ---------------------------------------------------------------------------------------------
# Sequences: an output [B, T, WIDTH] is B T rows

SYNTHESIZERS: dict[str, Any] = {
    "linear": lambda: fd.LinearSynthesizer(WIDTH, context_features=CLASSES),
    "low rank": lambda: fd.LinearSynthesizer(WIDTH, 2, CLASSES),
    "mlp": lambda: fd.MLPSynthesizer(WIDTH, hidden=6, context_features=CLASSES),
    "softmax": lambda: fd.SoftmaxSynthesizer(head_of(), ignore_index=3),
    "cross-entropy": lambda: fd.CrossEntropySynthesizer(WIDTH, CLASSES),
}


@pytest.mark.parametrize("phase", ["k=1", "mix", "warmup"])
@pytest.mark.parametrize("rule", [None, fd.SGD(0.1)], ids=["returned", "fused"])
@pytest.mark.parametrize("name", SYNTHESIZERS)
def test_a_sequence_is_its_rows(name: str, rule: fd.SGD | None, phase: str) -> None:
    """[B, T, WIDTH] with labels [B, T] against the same as [B T, WIDTH]: the same bits."""
    torch.manual_seed(0)
    synthesizer = SYNTHESIZERS[name]().double()
    twins.disturb(synthesizer)
    inner = nn.Linear(4, WIDTH).double()
    found = []
    for folded in (False, True):
        layer = fd.Decoupled(copy.deepcopy(inner), copy.deepcopy(synthesizer), update=rule)
        schedule = fd.Schedule(
            layer, warmup_steps=3 if phase == "warmup" else 0, mix=0.5 if phase == "mix" else 0.0
        )
        torch.manual_seed(1)
        for _ in range(3):
            x, y, g = double(3, 4, 4), labels_of(3, 4), double(3, 4, WIDTH)
            if folded:
                x, y, g = x.flatten(0, 1), y.flatten(), g.flatten(0, 1)
            x.requires_grad_()
            h = layer(x, context=y)
            assert h.shape == g.shape
            h.backward(g)
            schedule.step()
        assert x.grad is not None
        found.append((twins.snapshot(layer), x.grad.flatten()))
    twins.unchanged(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_a_context_of_the_first_dimensions_is_spread() -> None:
    synthesizer = fd.LinearSynthesizer(WIDTH, None, CLASSES).double()
    twins.disturb(synthesizer)
    inner, y = nn.Linear(4, WIDTH).double(), labels_of(3, 2)
    x = double(3, 2, 4, 4)
    found = []
    for given in (y, y.unsqueeze(2).expand(3, 2, 4)):
        layer = fd.Decoupled(copy.deepcopy(inner), copy.deepcopy(synthesizer), update=fd.SGD(0.1))
        layer(x, context=given)
        found.append(twins.snapshot(layer))
    twins.unchanged(*found)


def test_true_gradients_are_held_against_predictions_of_sequences() -> None:
    torch.manual_seed(0)
    head, x, y = head_of(), double(3, 4, 4), labels_of(3, 4)
    layer = fd.Decoupled(nn.Linear(4, WIDTH).double(), fd.SoftmaxSynthesizer(head))
    model = nn.Sequential(layer, head)

    def closure() -> Tensor:
        with fd.condition_on(y):
            return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    assert 0.5 < fd.diagnostics(model, closure)["0"]["true_cosine"] < 1.0
