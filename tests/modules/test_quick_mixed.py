"""Steps of a layer with a synthesizer by the true gradient, or mixed with it, as calls: the bits
and errors of the usual way, and the usual way wherever anything is not as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import twins
from torch import Tensor, nn

import fused_dni as fd
from fused_dni.modules import nodes

pytest.importorskip("fused_dni.backends._cpu")
pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, CLASSES, ROWS = 6, 5, 8
SCHEDULES: dict[str, dict[str, Any]] = {
    "warm-up": {"warmup_steps": 100},
    "warm-up, then predictions": {"warmup_steps": 5, "target_every": 2},
    "mixed": {"mix": 0.4},
    "mixed, k=2": {"mix": 0.4, "target_every": 2},
    "true, k=2": {"mix": 1.0, "target_every": 2},
    "warm-up, then mixed": {"warmup_steps": 5, "mix": 0.4},
    "a loss scale": {"mix": 0.4, "loss_scale": 8.0},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norms": {"max_norm": 0.01, "normalization": "layer", "activation": "gelu"},
    "kappa": {"target_scale": 16.0, "bias": False},
    "no labels": {"context_features": 0},
    "diagonal": {"synthesizer": fd.DiagonalSynthesizer(SIZE, CLASSES)},
    "cross-entropy": {"synthesizer": fd.CrossEntropySynthesizer(SIZE, CLASSES)},
    "float64": {"dtype": torch.float64},
    "preactivation": {"interface": "preactivation"},
    "a module": {"synthesizer": fd.MLPSynthesizer(SIZE, 4, CLASSES)},
}
NOT_BOUND = ("preactivation", "a module")


class Usual(fd.FusedDNILinear):
    """Has no such call: it is bound for the layer itself alone."""


class Twins:
    """Layers in training, and the same in the usual way."""

    def __init__(self, schedule: str, rule: Any = None, options: str = "plain") -> None:
        torch.manual_seed(0)
        given = {"normalization": "batch", "activation": "relu", "context_features": CLASSES}
        given |= OPTIONS[options]
        if "synthesizer" in given:
            del given["context_features"]
        rule = fd.Adam(0.01) if rule is None else rule
        self.dtype = given.get("dtype", torch.float32)
        made = []
        for _ in range(2):
            own = {**given, "synthesizer": copy.deepcopy(given.get("synthesizer", "default"))}
            made.append(fd.FusedDNILinear(SIZE, SIZE, backend="cpu", update=rule, **own))
            twins.disturb(made[-1].synthesizer)
        quick = nn.Sequential(*made, nn.Linear(SIZE, CLASSES, dtype=self.dtype))
        usual = copy.deepcopy(quick)
        for layer in usual[:2]:
            layer.__class__ = Usual
        self.models = quick, usual
        self.schedules = [fd.Schedule(m, **SCHEDULES[schedule]) for m in self.models]
        self.scale = SCHEDULES[schedule].get("loss_scale", 1.0)
        self.count = 0

    @property
    def layers(self) -> list[fd.FusedDNILinear]:
        """The first layer of each."""
        return [model[0] for model in self.models]

    def change(self, change: Callable[[fd.FusedDNILinear], object]) -> None:
        for layer in self.layers:
            change(layer)

    def step(
        self,
        between: Callable[[fd.FusedDNILinear, Tensor], object] = lambda layer, h: None,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        labels: Callable[[Tensor], Tensor] = lambda y: y,
    ) -> None:
        """One step of both; all that came of it is the same."""
        seen = []
        for model, schedule in zip(self.models, self.schedules, strict=True):
            torch.manual_seed(self.count)
            x = torch.randn(ROWS, SIZE, dtype=self.dtype).requires_grad_()
            y = torch.randint(0, CLASSES, (ROWS,))
            try:
                with fd.condition_on(labels(y)):
                    h = model[0](x)
                    out = model[2](model[1](h))
                between(model[0], h)
                (loss(out, y) * self.scale).backward()
                found: list[Any] = [h, h.requires_grad, x.grad]
            except Exception as error:
                found = [f"{type(error).__name__}: {error}"[:80]]
            schedule.step()
            found += [t for p in model.parameters() for t in (p, p.grad)]
            found += model.buffers()
            for layer in model[:2]:
                found += [layer.statistics, layer.unit]
                for _, rule, _ in layer.rules():
                    found += [rule.hyper, *[t for held in rule.moments() for t in held]]
            model[2].zero_grad()
            seen.append([t.detach().clone() if isinstance(t, Tensor) else t for t in found])
        self.count += 1
        assert len(seen[0]) == len(seen[1]), (seen[0][0], seen[1][0])
        for i, (a, b) in enumerate(zip(*seen, strict=True)):
            if isinstance(a, Tensor):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=f"{i}")
            else:
                assert a == b, i


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_bits_are_those_of_the_usual_way(
    schedule: str, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    forward = nodes.Mixed.forward
    monkeypatch.setattr(
        nodes.Mixed, "forward", staticmethod(lambda ctx, *a: (ran.append(a), forward(ctx, *a))[1])
    )
    both = Twins(schedule, options=options)
    for _ in range(12):
        both.step()
    # Of two layers: all steps but those by predictions alone and a few until it is bound.
    wanted = {"warm-up": 12, "mixed": 12, "warm-up, then mixed": 12, "a loss scale": 12}
    most = 2 * wanted.get(schedule, 6)
    if options in NOT_BOUND:
        assert not ran
    else:
        assert most - 10 <= len(ran) < most


@pytest.mark.parametrize(
    "rule", [fd.SGD(0.05), fd.SGD(0.05, momentum=0.9), fd.AdamW(0.01)], ids=str
)
@pytest.mark.parametrize("schedule", ["warm-up", "mixed, k=2"])
def test_rules(schedule: str, rule: Any) -> None:
    both = Twins(schedule, rule)
    for _ in range(8):
        both.step()


def set_rates(layer: fd.FusedDNILinear) -> None:
    for _, rule, _ in layer.rules():
        rule.group["lr"] = 0.002


def set_a_bad_rate(layer: fd.FusedDNILinear) -> None:
    assert layer.synthesizer_update is not None
    layer.synthesizer_update.group["lr"] = -1.0


def freeze(layer: fd.FusedDNILinear) -> None:
    layer.weight.requires_grad_(False)


def freeze_the_synthesizer(layer: fd.FusedDNILinear) -> None:
    assert layer.synthesizer is not None
    layer.synthesizer.requires_grad_(False)


def another_synthesizer(layer: fd.FusedDNILinear) -> None:
    torch.manual_seed(5)
    layer.synthesizer = fd.LinearSynthesizer(SIZE, 2, CLASSES)


def another_weight(layer: fd.FusedDNILinear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach() * 0.5)


def strange_gradient(layer: fd.FusedDNILinear) -> None:
    layer.weight.grad = torch.ones_like(layer.weight)


def strange_gradient_of_the_synthesizer(layer: fd.FusedDNILinear) -> None:
    p = next(layer.synthesizer.parameters())  # type: ignore[union-attr]
    p.grad = torch.ones_like(p)


def bound_predictions(layer: fd.FusedDNILinear) -> None:
    layer.max_norm = 0.001


def move_the_unit(layer: fd.FusedDNILinear) -> None:
    layer.synthesizer.unit.lessons = 63  # type: ignore[union-attr]


def evaluate(layer: fd.FusedDNILinear) -> None:
    layer.eval()


def hook(layer: fd.FusedDNILinear) -> None:
    layer.register_forward_hook(lambda module, args, out: out * 2.0)


@pytest.mark.parametrize(
    "change",
    [
        set_rates,
        set_a_bad_rate,
        freeze,
        freeze_the_synthesizer,
        another_synthesizer,
        another_weight,
        strange_gradient,
        strange_gradient_of_the_synthesizer,
        bound_predictions,
        move_the_unit,
        evaluate,
        hook,
    ],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize("schedule", ["warm-up", "mixed", "warm-up, then predictions"])
def test_a_change_between_two_steps(
    schedule: str, change: Callable[[fd.FusedDNILinear], object]
) -> None:
    both = Twins(schedule)
    for _ in range(4):
        both.step()
    assert both.layers[0]._binding.exact is not None
    both.change(change)
    for _ in range(4):
        both.step()


def change_the_weight(layer: fd.FusedDNILinear, h: Tensor) -> None:
    with torch.no_grad():
        layer.weight.mul_(0.5)


def change_the_scale(layer: fd.FusedDNILinear, h: Tensor) -> None:
    assert layer.norm is not None
    with torch.no_grad():
        layer.norm.weight.mul_(0.5)


def change_the_output(layer: fd.FusedDNILinear, h: Tensor) -> None:
    h.detach().mul_(0.5)


def thaw(layer: fd.FusedDNILinear, h: Tensor) -> None:
    layer.config = layer.config  # the same
    layer.statistics = layer.statistics.clone()  # another


def end_the_warm_up(layer: fd.FusedDNILinear, h: Tensor) -> None:
    layer.phase = fd.modules.base.Phase()


@pytest.mark.parametrize(
    "between",
    [change_the_weight, change_the_scale, change_the_output, thaw, end_the_warm_up],
    ids=lambda between: between.__name__,
)
@pytest.mark.parametrize("schedule", ["warm-up", "mixed"])
def test_between_forward_and_backward(
    schedule: str, between: Callable[[fd.FusedDNILinear, Tensor], object]
) -> None:
    both = Twins(schedule)
    for _ in range(4):
        both.step()
    both.step(between=between)
    for _ in range(2):
        both.step()


def nothing(out: Tensor, y: Tensor) -> Tensor:
    """No gradient arrives but zeros."""
    return (out * 0.0).sum()


def expanded(out: Tensor, y: Tensor) -> Tensor:
    """A gradient that is no memory of its own."""
    return out.sum()


def infinite(out: Tensor, y: Tensor) -> Tensor:
    return (out * torch.inf).sum()


@pytest.mark.parametrize("loss", [nothing, expanded, infinite])
@pytest.mark.parametrize("schedule", ["warm-up", "mixed"])
def test_what_arrives(schedule: str, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    both = Twins(schedule)
    for _ in range(4):
        both.step()
    both.step(loss=loss)
    for _ in range(2):
        both.step()


def beyond(y: Tensor) -> Tensor:
    return y + CLASSES


def too_few(y: Tensor) -> Tensor:
    return y[1:]


def dense(y: Tensor) -> Tensor:
    return F.one_hot(y, CLASSES).float()


@pytest.mark.parametrize("labels", [beyond, too_few, dense])
@pytest.mark.parametrize("schedule", ["warm-up", "mixed"])
def test_labels(schedule: str, labels: Callable[[Tensor], Tensor]) -> None:
    """Errors come before anything is changed, as in the usual way."""
    both = Twins(schedule)
    for _ in range(4):
        both.step()
    both.step(labels=labels)
    for _ in range(2):
        both.step()


def test_used_twice_and_a_second_backward() -> None:
    both = Twins("warm-up")
    for _ in range(4):
        both.step()
    states = []
    for model in both.models:
        torch.manual_seed(9)
        x, y = torch.randn(ROWS, SIZE), torch.randint(0, CLASSES, (ROWS,))
        with fd.condition_on(y):
            out = model[0](model[0](x))
        out.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="a second time"):
            out.sum().backward()
        states.append(copy.deepcopy(model.state_dict()))
    for name, t in states[0].items():
        assert torch.equal(t, states[1][name]), name


def test_the_way_is_said() -> None:
    both = Twins("warm-up, then predictions")
    layer = both.layers[0]
    both.step()
    both.step()
    assert "steps by one call forward and one back, and a lesson" in repr(layer)
    for _ in range(4):
        both.step()
    assert repr(layer).count("steps by one call") and "forward and one back" not in repr(layer)
    torch.manual_seed(0)
    stack = fd.DecoupledSequential(*both.models[0][:2])
    schedule = fd.Schedule(stack)
    for _ in range(4):
        with fd.condition_on(torch.zeros(ROWS, dtype=torch.int64)):
            stack(torch.randn(ROWS, SIZE)).sum().backward()
    assert "steps by one call" in repr(stack)
    schedule = fd.Schedule(stack, warmup_steps=3)
    assert schedule.phase().warmup
    assert "steps by its layers, one by one (by the true gradient)" in repr(stack)
