"""``FusedDNILinearCrossEntropyLoss``: ``F.cross_entropy`` of ``nn.Linear``, as a drop-in alone, and
as the end of a ``DecoupledSequential``. Steps as one call: ``test_quick_stack.py``."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import twins
from strategies import paired
from torch import Tensor, nn
from twins import BACKENDS, close, double, linear

import fused_dni as fd
from fused_dni.modules.base import Phase

pytestmark = pytest.mark.usefixtures("one_thread")
backends = pytest.mark.parametrize("backend", BACKENDS)
CLASSES = 5

RULES: dict[str, tuple[Any, Callable[[Any], torch.optim.Optimizer]]] = {
    "sgd": (fd.SGD(0.1), lambda p: torch.optim.SGD(p, 0.1)),
    "momentum": (
        fd.SGD(0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    ),
    "adam": (fd.Adam(0.01, eps=1e-3), lambda p: torch.optim.Adam(p, 0.01, eps=1e-3)),
    "adamw": (
        fd.AdamW(0.01, eps=1e-3, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, 0.01, eps=1e-3, weight_decay=0.1),
    ),
}


def head(*sizes: int, **options: Any) -> fd.FusedDNILinearCrossEntropyLoss:
    return fd.FusedDNILinearCrossEntropyLoss(*sizes, dtype=torch.float64, **options)


def labels(rows: int, ignored: int = 0) -> Tensor:
    y = torch.randint(0, CLASSES, (rows,))
    y[:ignored] = -100
    return y


def plain_loss(linear: nn.Linear, x: Tensor, y: Tensor, smoothing: float = 0.0) -> Tensor:
    return F.cross_entropy(linear(x), y, label_smoothing=smoothing)


# ---------------------------------------------------------------------------------------------
# Alone


@paired(
    backend=BACKENDS,
    smoothing=(0.0, 0.1, 1.0),
    ignored=(0, 3, 8),
    bias=(True, False),
    leading=((8,), (2, 4)),
    rule=(None, *RULES),
)
def test_it_is_pytorchs_loss(
    backend: str,
    smoothing: float,
    ignored: int,
    bias: bool,
    leading: tuple[int, ...],
    rule: str | None,
) -> None:
    """Loss, gradients and steps, in float64 to 1e-12; the loss's gradient is not 1."""
    update = None if rule is None else RULES[rule][0]
    mine = head(4, CLASSES, bias, label_smoothing=smoothing, backend=backend, update=update)
    theirs = copy.deepcopy(mine.to_linear())
    parameters = list(theirs.parameters())
    made = RULES["sgd" if rule is None else rule][1]
    optimizers = [made(parameters)]
    if rule is None:
        optimizers.append(made(mine.parameters()))
    for step in range(4):
        x = double(*leading, 4, grad=True)
        y = labels(8, ignored if step < 3 else 0).reshape(leading)
        twin = x.detach().clone().requires_grad_()
        got = mine(x, y)
        expected = plain_loss(theirs, twin.flatten(0, -2), y.flatten(), smoothing)
        close(got.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert got.dtype is torch.float64 and got.shape == ()
        for optimizer in optimizers:
            optimizer.zero_grad()
        (got * 0.3).backward()
        (expected * 0.3).backward()
        close(x.grad, twin.grad)
        for p, q in zip(mine.parameters(), parameters, strict=True):
            if rule is None:
                close(p.grad, q.grad)
            else:
                assert p.grad is None
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(mine.parameters(), parameters, strict=True):
            close(p, q)


@backends
@pytest.mark.parametrize("rule", [None, fd.SGD(0.1)])
def test_evaluation(backend: str, rule: fd.SGD | None) -> None:
    """Without a target the logits; with one the loss, whose backward updates nothing."""
    layer = head(4, CLASSES, backend=backend, update=rule)
    x, y = double(6, 4, grad=True), labels(6)
    layer(x, y).backward()  # there is a call to be in the way
    layer(x, y).backward()
    layer.zero_grad()
    layer.eval()
    before = twins.kept(layer.parameters())
    logits = F.linear(x, layer.weight, layer.bias)
    close(layer(x), logits)
    close(layer.logits(x[None]), logits[None])
    loss = layer(x, y)
    close(loss, F.cross_entropy(logits, y))
    loss.backward()
    close(list(layer.parameters()), before)
    assert layer.weight.grad is not None
    with torch.no_grad():
        close(layer(x, y), loss)
        layer.train()
        close(layer(x, y), loss)
        close(layer.logits(x), logits)
        assert layer.logits(x[:0]).shape == (0, CLASSES)
    close(list(layer.parameters()), before)


def test_logits_in_training_update_nothing() -> None:
    """A gradient through them is added to the layer's own, as an exact layer's are."""
    layer = head(4, CLASSES, update=fd.SGD(0.1))
    twin = copy.deepcopy(layer.to_linear())
    x, y = double(6, 4), labels(6)
    (layer(x, y) + layer.logits(x).square().mean()).backward()
    (plain_loss(twin, x, y) + twin(x).square().mean()).backward()
    with torch.no_grad():
        for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
            assert q.grad is not None
            close(p, q - 0.1 * q.grad)


@backends
@pytest.mark.parametrize("rule", [None, fd.SGD(0.1)])
def test_used_twice(backend: str, rule: fd.SGD | None) -> None:
    """In one backward the uses add up to one update."""
    layer = head(4, CLASSES, backend=backend, update=rule)
    twin = copy.deepcopy(layer.to_linear())
    for _ in range(3):
        a, b = double(6, 4), double(3, 4)
        y, z = labels(6), labels(3)
        layer.zero_grad(), twin.zero_grad()
        (layer(a, y) + 2 * layer(b, z)).backward()
        (plain_loss(twin, a, y) + 2 * plain_loss(twin, b, z)).backward()
        for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
            assert q.grad is not None
            if rule is None:
                close(p.grad, q.grad)
            with torch.no_grad():
                q -= 0.1 * q.grad
                if rule is None:
                    p -= 0.1 * q.grad
                close(p, q)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_second_backward_is_an_error(steps: int) -> None:
    layer = head(4, CLASSES, update=fd.SGD(0.1))
    for _ in range(steps):
        loss = layer(double(6, 4), labels(6))
        loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward a second time"):
        loss.backward()


@pytest.mark.parametrize("steps", [1, 4])
def test_a_backward_that_raises_changes_nothing(steps: int) -> None:
    layer = head(4, CLASSES, update=fd.Adam(0.1))
    for _ in range(steps):
        layer(double(6, 4), labels(6)).backward()
    before = twins.snapshot(layer)
    x = double(6, 4, grad=True)

    def refuse(_: Tensor) -> None:
        raise RuntimeError("refused")

    x.register_hook(refuse)
    with pytest.raises(RuntimeError, match="refused"):
        layer(x, labels(6)).backward()
    twins.unchanged(before, twins.snapshot(layer))


@pytest.mark.parametrize("rule", [None, fd.SGD(0.1)])
def test_changes_between_forward_and_backward(rule: fd.SGD | None) -> None:
    """Of what the backward reads they are an error; of the loss itself they are not."""
    for steps in (1, 3):
        layer = head(4, CLASSES, update=rule)
        for _ in range(steps):
            layer(double(6, 4), labels(6)).backward()
        x = double(6, 4)
        loss = layer(x, labels(6))
        x.mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        x = double(6, 4, grad=True)
        loss = layer(x, labels(6))
        with torch.no_grad():
            layer.weight.mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        twin, y = copy.deepcopy(layer), labels(6)
        for each, in_place in ((layer, True), (twin, False)):
            each.zero_grad()
            made = each(x.detach(), y)
            if in_place:
                made /= 4
            else:
                made = made / 4
            made.backward()
        close(list(layer.parameters()), list(twin.parameters()), 0)


def test_second_derivatives_are_refused() -> None:
    for rule in (None, fd.SGD(0.1)):
        layer = head(4, CLASSES, update=rule)
        x = double(6, 4, grad=True)
        (dx,) = torch.autograd.grad(layer(x, labels(6)), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            dx.square().sum().backward()


def test_autocast() -> None:
    """Logits of a bfloat16 input, the loss in float32, as F.cross_entropy's."""
    layer = fd.FusedDNILinearCrossEntropyLoss(8, CLASSES, update=fd.SGD(0.1))
    twin = copy.deepcopy(layer.to_linear())
    x, y = torch.randn(16, 8), labels(16)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            mine, theirs = layer(x, y), plain_loss(twin, x, y)
        assert mine.dtype is theirs.dtype is torch.float32
        # bfloat16 has 8 bits, and logits here are below 4.
        torch.testing.assert_close(mine, theirs, rtol=0, atol=4 * 2.0**-8)
        mine.backward()
        theirs.backward()
        with torch.no_grad():
            for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
                assert q.grad is not None
                q -= 0.1 * q.grad
                q.grad = None
                torch.testing.assert_close(p, q, rtol=0, atol=4 * 2.0**-8)
                p.copy_(q)


def test_low_precision_parameters() -> None:
    """Without a rule: the loss of bfloat16 parameters is bfloat16, as PyTorch's."""
    layer = fd.FusedDNILinearCrossEntropyLoss(8, CLASSES, dtype=torch.bfloat16)
    x, y = torch.randn(16, 8, dtype=torch.bfloat16), labels(16)
    loss = layer(x, y)
    loss.backward()
    twin = copy.deepcopy(layer.to_linear()).float()
    expected = plain_loss(twin, x.float(), y)
    expected.backward()
    assert loss.dtype is torch.bfloat16
    torch.testing.assert_close(loss.float(), expected, rtol=2.0**-6, atol=0)
    assert layer.weight.grad is not None and twin.weight.grad is not None
    torch.testing.assert_close(
        layer.weight.grad.float(), twin.weight.grad, rtol=2.0**-6, atol=2.0**-7
    )


# ---------------------------------------------------------------------------------------------
# The stock module's life


def test_state_dicts_are_those_of_a_linear_layer() -> None:
    layer, twin = head(4, CLASSES, update=fd.Adam(0.1)), nn.Linear(4, CLASSES).double()
    assert list(layer.state_dict()) == ["weight", "bias"]
    layer.load_state_dict(twin.state_dict())
    close(layer.weight, twin.weight, 0)
    layer(double(6, 4), labels(6)).backward()
    twin.load_state_dict(layer.state_dict())
    close(layer.logits(double(1, 4)[:0]), twin(double(1, 4)[:0]))
    assert layer.to_linear().weight is layer.weight
    back = fd.FusedDNILinearCrossEntropyLoss.from_linear(twin, label_smoothing=0.1)
    assert back.weight is twin.weight and back.label_smoothing == 0.1
    with pytest.raises(ValueError, match="only nn.Linear itself"):
        fd.FusedDNILinearCrossEntropyLoss.from_linear(nn.Bilinear(2, 2, 2))  # type: ignore[arg-type]


def test_a_seed_gives_the_weights_of_a_linear_layer() -> None:
    torch.manual_seed(3)
    layer = head(4, CLASSES)
    torch.manual_seed(3)
    twin = nn.Linear(4, CLASSES, dtype=torch.float64)
    close(list(layer.parameters()), list(twin.parameters()), 0)
    torch.manual_seed(3)
    layer.reset_parameters()
    close(list(layer.parameters()), list(twin.parameters()), 0)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_continue_as_the_original(how: str) -> None:
    layer = head(4, CLASSES, update=fd.Adam(0.1), label_smoothing=0.1, ignore_index=2)
    batches = [(double(6, 4), labels(6)) for _ in range(6)]
    for x, y in batches[:3]:
        layer(x, y).backward()
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    for x, y in batches[3:]:
        a, b = layer(x, y), other(x, y)
        close(a, b, 0)
        a.backward()
        b.backward()
    twins.unchanged(twins.snapshot(layer), twins.snapshot(other))
    assert layer.update is not None and layer.update.steps == 6


def test_the_optimizer_and_the_schedule_know_it() -> None:
    """Its rule is a group, whose rate counts; a loss scale is taken out of its gradient."""
    layer = head(4, CLASSES, update=fd.SGD(0.1))
    twin = copy.deepcopy(layer.to_linear())
    optimizer = fd.FusedOptimizer(layer)
    schedule = fd.Schedule(layer, loss_scale=8.0)
    for step in range(4):
        rate = optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        x, y = double(6, 4, grad=True), labels(6)
        other = x.detach().clone().requires_grad_()
        (8 * layer(x, y)).backward()
        plain_loss(twin, other, y).backward()
        optimizer.step()
        schedule.step()
        assert other.grad is not None
        close(x.grad, 8 * other.grad)
        with torch.no_grad():
            for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
                assert q.grad is not None
                q -= rate * q.grad
                q.grad = None
                close(p, q)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert layer.update is not None and layer.update.steps == 4


def test_frozen() -> None:
    for rule in (None, fd.SGD(0.1)):
        layer = head(4, CLASSES, update=rule).requires_grad_(False)
        before = twins.kept(layer.parameters())
        for _ in range(3):
            x = double(6, 4, grad=True)
            layer(x, labels(6)).backward()
            assert x.grad is not None
        close(list(layer.parameters()), before, 0)
        assert not layer(double(6, 4), labels(6)).requires_grad


def test_hooks_on_the_module() -> None:
    layer = head(4, CLASSES, update=fd.SGD(0.1))
    seen: list[Tensor] = []
    for step in range(4):
        if step == 2:
            layer.register_forward_hook(lambda m, given, out: seen.append(out.detach()))
        loss = layer(double(6, 4), labels(6))
        loss.backward()
    assert len(seen) == 2 and torch.equal(seen[-1], loss.detach())


def test_the_way_is_said() -> None:
    layer = head(4, CLASSES, update=fd.SGD(0.1), label_smoothing=0.1, ignore_index=1, backend="cpu")
    assert "label_smoothing=0.1, ignore_index=1" in repr(layer)
    for _ in range(2):
        layer(double(6, 4), labels(6)).backward()
    assert "steps by one call forward and one back" in repr(layer)
    layer.ignore_index = 2
    assert "steps by the usual way (ignore_index is not as it was)" in repr(layer)
    layer(double(6, 4), labels(6)).backward()
    assert "steps by one call forward and one back" in repr(layer)
    other = head(4, CLASSES, update=fd.SGD(0.1), backend="reference")
    other(double(6, 4), labels(6)).backward()
    assert "steps by the usual way (backend 'reference' has none)" in repr(other)


def test_one_call_forward_and_one_back() -> None:
    """Of Python's functions hardly more than those of PyTorch's own nodes."""
    layer = head(4, CLASSES, update=fd.SGD(0.1), backend="cpu")
    x, y = double(6, 4), labels(6)
    for _ in range(3):
        layer(x, y).backward()
    count = 0

    def note(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event == "call"

    gc.disable()  # who listens to the collector, and what it finds, calls Python's functions
    sys.setprofile(note)
    try:
        layer(x, y)
    finally:
        sys.setprofile(None)
        gc.enable()
    assert count < 25


# ---------------------------------------------------------------------------------------------
# As the end of a container


def network(kind: str, ends: bool, rule: Any = "sgd", **options: Any) -> fd.DecoupledSequential:
    """Layers by the true gradient, by predictions, or of both kinds, and a head with its loss in it
    or outside of it."""
    torch.manual_seed(0)
    update = RULES[rule][0] if isinstance(rule, str) else rule
    layers: list[nn.Module] = []
    for i in range(3):
        own = dict(options)
        if kind == "exact" or (kind == "mixed" and i == 2):
            own["synthesizer"] = None
        else:
            own["context_features"] = CLASSES
        layers.append(linear(6, 6, normalization="batch", activation="tanh", update=update, **own))
    if ends:
        layers.append(head(6, CLASSES, update=update, **options))
    else:
        layers.append(linear(6, CLASSES, synthesizer=None, update=update, **options))
    return fd.DecoupledSequential(*layers)


SCHEDULES: dict[str, dict[str, Any]] = {
    "every": {},
    "fourth": {"target_every": 4},
    "never": {"target_every": None},
    "warm-up": {"warmup_steps": 5},
    "mixing": {"mix": 0.5, "target_every": 2},
    "scaled": {"loss_scale": 16.0, "target_every": 2},
}


@paired(
    backend=BACKENDS,
    kind=("exact", "prediction", "mixed"),
    schedule=tuple(SCHEDULES),
    rule=(None, *RULES),
    rows=(2, 3, 8),
)
def test_a_classifiers_step(
    backend: str, kind: str, schedule: str, rule: str | None, rows: int
) -> None:
    """The same as with the loss outside, in float64, over a dozen steps; the two losses differ by
    roundings, which training makes larger."""
    models = [network(kind, ends, rule, backend=backend) for ends in (True, False)]
    schedules = [fd.Schedule(model, **SCHEDULES[schedule]) for model in models]
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in models] if rule is None else []
    scale = SCHEDULES[schedule].get("loss_scale", 1.0)
    twins_of = list(zip(models[0].parameters(), models[1].parameters(), strict=True))
    for step in range(12):
        torch.manual_seed(step)
        x, y = double(rows, 6), labels(rows)
        inputs = [x.clone().requires_grad_(step % 3 == 0) for _ in models]
        a = models[0](inputs[0], context=y, target=y)
        b = F.cross_entropy(models[1](inputs[1], context=y), y)
        close(a, b, 1e-9)
        for optimizer in optimizers:
            optimizer.zero_grad()
        (a * scale).backward()
        (b * scale).backward()
        close(inputs[0].grad, inputs[1].grad, 1e-8)
        for each in (*optimizers, *schedules):
            each.step()
        for p, q in twins_of:
            close(p, q, 1e-8)
            with torch.no_grad():  # so that roundings do not grow
                q.copy_(p)
    shown = [fd.diagnostics(m) for m in models] if kind != "exact" else []
    for name in shown[0] if shown else ():
        close(torch.tensor(list(shown[0][name].values())).nan_to_num(7.0),
              torch.tensor(list(shown[1][name].values())).nan_to_num(7.0), 1e-4)  # fmt: skip


@pytest.mark.parametrize("kind", ["exact", "prediction"])
def test_evaluation_of_a_container(kind: str) -> None:
    model = network(kind, True)
    x, y = double(8, 6), labels(8)
    for _ in range(4):
        model(x, context=y, target=y).backward()
    model.eval()
    logits = model(x)
    assert logits.shape == (8, CLASSES)
    close(model(x, target=y), F.cross_entropy(logits, y))
    with torch.no_grad():
        close(model(x), logits)
    model.train()
    with torch.no_grad():
        before = twins.kept(model[3].parameters())
        model(x, context=y, target=y)
        close(list(model[3].parameters()), before, 0)


def test_a_target_is_no_context() -> None:
    """Where the classes are both they are given twice, or the context surrounds the call."""
    model = network("prediction", True)
    x, y = double(8, 6), labels(8)
    with pytest.raises(ValueError, match="context is missing"):
        model(x, target=y)
    with fd.condition_on(y):
        a = model(x, target=y)
    other = network("prediction", True)
    close(a, other(x, y, y), 0)


def test_predictions_are_held_against_the_truth() -> None:
    """fd.diagnostics with a closure: exact gradients, nothing updated."""
    models = [network("prediction", ends) for ends in (True, False)]
    x, y = double(8, 6), labels(8)
    before = twins.snapshot(models[0])
    shown = [
        fd.diagnostics(models[0], lambda: models[0](x, context=y, target=y)),
        fd.diagnostics(models[1], lambda: F.cross_entropy(models[1](x, context=y), y)),
    ]
    twins.unchanged(before, twins.snapshot(models[0]))
    for name in shown[1]:
        for what in ("true_cosine", "true_norm_ratio"):
            assert shown[0][name][what] == pytest.approx(shown[1][name][what], rel=1e-9)


def test_training_is_resumed_with_the_same_bits() -> None:
    """From a state dict and the optimizer's, into a model whose steps are not one call yet."""
    model = network("prediction", True, "adam")
    optimizer, schedule = fd.FusedOptimizer(model), fd.Schedule(model, target_every=2)

    def run(model: Any, schedule: fd.Schedule, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            x, y = double(8, 6), labels(8)
            model(x, context=y, target=y).backward()
            schedule.step()

    run(model, schedule, range(9))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), schedule.state_dict()))
    run(model, schedule, range(9, 16))
    other = network("prediction", True, "adam")
    resumed, again = fd.FusedOptimizer(other), fd.Schedule(other, target_every=2)
    for each, state in zip((other, resumed, again), saved, strict=True):
        each.load_state_dict(state)
    run(other, again, range(9, 16))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_synthesizer_of_ones_own_in_the_middle() -> None:
    """The slower way serves it, the head by a call of its own; and repr says so."""
    update = fd.SGD(0.1)
    torch.manual_seed(0)
    model = fd.DecoupledSequential(
        linear(6, 6, update=update, backend="cpu"),
        linear(6, 6, update=update, backend="cpu",
               synthesizer=fd.MLPSynthesizer(6, 4, dtype=torch.float64)),
        head(6, CLASSES, update=update, backend="cpu"),
    )  # fmt: skip
    twin = copy.deepcopy(model)
    twin[2] = fd.FusedDNILinear.from_linear(
        twin[2].to_linear(), synthesizer=None, update=update, backend="cpu"
    )
    for step in range(6):
        torch.manual_seed(step)
        x, y = double(8, 6), labels(8)
        model(x, target=y).backward()
        F.cross_entropy(twin(x), y).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        close(p, q, 1e-10)
    assert model._stack is None
    said = repr(model)
    assert "steps by the usual way (its synthesizer is a MLPSynthesizer)" in said
    assert "steps by one call forward and one back" in said


def test_the_steps_of_annotated_containers() -> None:
    """Ranges are named after the head, too, and the bits are the same."""
    model, twin = network("prediction", True), network("prediction", True)
    for step in range(8):
        torch.manual_seed(step)
        x, y = double(8, 6), labels(8)
        model(x, y, y).backward()
        if step in (5, 6):
            with fd.annotate(twin), torch.profiler.profile() as profile:
                twin(x, y, y).backward()
            found = {event.key for event in profile.key_averages()}
            assert {"3: forward", "3: backward", "3: local backward", "3: update"} <= found
        else:
            twin(x, y, y).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


# ---------------------------------------------------------------------------------------------
# Bad input


TARGETS: dict[str, tuple[Any, type[Exception], str]] = {
    "missing": (None, ValueError, r"target is missing: .*int64 \[6\].*head.logits"),
    "list": ([0] * 6, TypeError, "target must be a torch.Tensor, got list"),
    "dtype": (torch.zeros(6, dtype=torch.int32), RuntimeError, "torch.int64 .*got torch.int32"),
    "probabilities": (torch.rand(6, CLASSES), RuntimeError, "for class probabilities take"),
    "rows": (labels(5), RuntimeError, r"leading dimensions of the input, \[6\], got \[5\]"),
    "dimensions": (labels(6)[:, None], RuntimeError, r"\[6\], got \[6, 1\]"),
    "device": (labels(6).to("meta"), RuntimeError, "target is on meta, the input on cpu"),
    "too large": (labels(6) * 0 + CLASSES, IndexError, r"target 5 \(row 0\) is out of bounds"),
    "negative": (labels(6) * 0 - 1, IndexError, r"target -1 \(row 0\).*ignore_index is -100"),
}


@backends
@pytest.mark.parametrize("rule", [None, fd.Adam(0.1)])
@pytest.mark.parametrize("case", TARGETS)
def test_bad_targets(backend: str, rule: fd.Adam | None, case: str) -> None:
    target, error, message = TARGETS[case]
    layer = head(4, CLASSES, backend=backend, update=rule)
    for _ in range(3):
        layer(double(6, 4), labels(6)).backward()
        before = twins.snapshot(layer)
        with pytest.raises(error, match=message):
            layer(double(6, 4), target)
        twins.unchanged(before, twins.snapshot(layer))
    layer.eval()
    if case != "missing":
        with pytest.raises(error, match=message):
            layer(double(6, 4), target)


@pytest.mark.parametrize("kind", ["exact", "prediction", "mixed"])
@pytest.mark.parametrize("case", TARGETS)
def test_bad_targets_of_a_container(kind: str, case: str) -> None:
    """Nothing of the layers in front is changed, in the first step and in later ones."""
    target, error, message = TARGETS[case]
    model = network(kind, True)
    for _ in range(5):
        before = twins.snapshot(model)
        with pytest.raises(error, match=message):
            model(double(6, 6), context=labels(6), target=target)
        twins.unchanged(before, twins.snapshot(model))
        y = labels(6)
        model(double(6, 6), context=y, target=y).backward()


def test_a_target_behind_other_modules_is_looked_at_first() -> None:
    """Where rows need not be those of the input, but for their number."""
    model = network("prediction", True)
    model.insert(3, nn.Identity())
    y = labels(6)
    for _ in range(3):
        model(double(6, 6), context=y, target=y).backward()
        before = twins.snapshot(model)
        with pytest.raises(IndexError, match="target 9"):
            model(double(6, 6), context=y, target=y * 0 + 9)
        twins.unchanged(before, twins.snapshot(model))


def test_misplaced() -> None:
    x, y = double(6, 6), labels(6)
    model = fd.DecoupledSequential(head(6, 6), linear(6, 6, synthesizer=None))
    with pytest.raises(ValueError, match="must be the last module"):
        model(x, target=y)
    with pytest.raises(ValueError, match="must be the last module"):
        model(x)
    for plain in (network("exact", False), network("prediction", False)):
        for _ in range(3):
            plain(x, context=y).sum().backward()
            before = twins.snapshot(plain)
            with pytest.raises(ValueError, match="target is unexpected"):
                plain(x, context=y, target=y)
            twins.unchanged(before, twins.snapshot(plain))
    with pytest.raises(ValueError, match="but NoneType"):
        fd.DecoupledSequential()(x, target=y)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ({"label_smoothing": float("nan")}, ValueError, "label_smoothing must be in"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"in_features": 0}, ValueError, "in_features must be at least 1, got 0"),
        ({"backend": "cup"}, ValueError, "backend must be None or one of"),
        ({"update": 0.1}, TypeError, "update must be None or a fused_dni rule"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fd.FusedDNILinearCrossEntropyLoss(**{"in_features": 4, "num_classes": CLASSES, **options})


def test_bad_inputs() -> None:
    layer = head(4, CLASSES, update=fd.SGD(0.1))
    for x, message in (
        (double(6, 3), r"input must have shape \[..., 4\]"),
        (double(0, 4), "the batch is empty"),
        (torch.randn(6, 4), "input has dtype torch.float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            layer(x, labels(len(x)))
    with pytest.raises(ValueError, match="label_smoothing"):
        fd.functional.linear_cross_entropy(
            double(6, 4), layer.weight, labels(6), label_smoothing=-0.1
        )
    layer.phase = Phase(probe=lambda at, forecast, kappa: None)
    before = twins.snapshot(layer)
    layer(double(6, 4), labels(6)).backward()
    layer.zero_grad()
    twins.unchanged(before, twins.snapshot(layer))
