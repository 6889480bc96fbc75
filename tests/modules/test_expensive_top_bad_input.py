"""What is wrong with a step under an expensive top is said, and leaves everything as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import twins
from torch import Tensor, nn
from twins import close, double

import fused_dni as fd

pytestmark = pytest.mark.usefixtures("one_thread")
T, B, WIDTH, CLASSES = 3, 4, 5, 7
RULE = fd.Adam(0.05)
updates = pytest.mark.parametrize("rule", [None, RULE], ids=["returned", "fused"])


class Segment(nn.Module):
    """Draws, and keeps running statistics: both would show that it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, WIDTH, dtype=torch.float64)
        self.norm = nn.BatchNorm1d(WIDTH, dtype=torch.float64)
        self.returns: Callable[[Tensor], Any] = lambda h: (h, h * 2)

    def forward(self, x: Tensor) -> Any:
        h = self.norm(self.linear(x).flatten(0, -2)).view(*x.shape[:-1], WIDTH)
        return self.returns(F.dropout(h, 0.5, self.training))


class Case:
    """A bottom that has been trained for some steps, and its head."""

    def __init__(self, rule: fd.Adam | None, kind: str = "softmax", **phase: Any) -> None:
        torch.manual_seed(0)
        self.head = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
        self.kind = kind
        synthesizer = {
            "softmax": lambda: fd.SoftmaxSynthesizer(self.head),
            "difference": lambda: fd.DifferenceSynthesizer(WIDTH, dtype=torch.float64),
            "linear": lambda: fd.LinearSynthesizer(WIDTH, None, CLASSES, dtype=torch.float64),
        }[kind]()
        self.bottom = fd.Decoupled(Segment(), synthesizer, update=rule)
        own = [*self.bottom.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.Adam(own, 0.01)
        for _ in range(9):
            self.bottom(double(T, B, 4), context=self.context())[0].backward(double(T, B, WIDTH))
            if rule is None:
                self.optimizer.step()
            self.optimizer.zero_grad()
        self.schedule = fd.Schedule(self.bottom, **phase)

    def context(self, *shape: int) -> Tensor:
        shape = shape or (T, B)
        return double(*shape, WIDTH) if self.kind == "difference" else torch.randint(CLASSES, shape)

    def all(self) -> dict[str, Any]:
        unit = self.bottom.synthesizer.unit
        made = twins.snapshot(nn.ModuleList([self.bottom, self.head]), self.optimizer)
        return made | {"unit": [unit.size, unit.lessons], "random": torch.get_rng_state()}

    def refuses(self, error: type[Exception], message: str, *args: Any, **named: Any) -> None:
        before = self.all()
        with pytest.raises(error, match=message):
            self.bottom(*args, **named)
        twins.unchanged(before, self.all())


PHASES: dict[str, dict[str, Any]] = {
    "target": {},
    "mix": {"mix": 1.0},
    "warmup": {"warmup_steps": 5},
    "no target": {"target_every": None},
}
phases = pytest.mark.parametrize("phase", PHASES)

CONTEXTS: dict[str, tuple[str, Callable[[Case], Any], type[Exception], str]] = {
    "too high": ("softmax", lambda c: c.context().fill_(CLASSES), IndexError, "label 7 in context"),
    "too low": ("linear", lambda c: c.context().fill_(-100), IndexError, "label -100 in context"),
    "missing": ("softmax", lambda c: None, ValueError, "context is missing"),
    "no difference": ("difference", lambda c: None, ValueError, "context is missing"),
    "one step": ("softmax", lambda c: c.context(B), RuntimeError, r"context covers rows \[4\]"),
    "transposed": ("linear", lambda c: c.context(B, T), RuntimeError, r"covers rows \[4, 3\]"),
    "too much": ("softmax", lambda c: c.context(T, B, 1), RuntimeError, "context covers rows"),
    "of rows": ("softmax", lambda c: c.context(T * B), RuntimeError, r"covers rows \[12\]"),
    "difference": ("difference", lambda c: c.context(B, T), RuntimeError, "context covers rows"),
    "width": (
        "difference", lambda c: double(T, B, WIDTH + 1), RuntimeError, r"must have shape \[..., 5\]"
    ),
    "int32": ("softmax", lambda c: c.context().int(), RuntimeError, "class indices"),
    "vectors": (
        "softmax", lambda c: double(T, B, CLASSES), RuntimeError, "context must be labels, int64"
    ),
    "labels": (
        "difference",
        lambda c: torch.randint(CLASSES, (T, B)).clamp(max=WIDTH - 1),
        RuntimeError,
        r"floating point \[\.\.\., 5\]",
    ),
    "meta": ("softmax", lambda c: c.context().to("meta"), RuntimeError, "context is on meta"),
}  # fmt: skip


@updates
@phases
@pytest.mark.parametrize("name", CONTEXTS)
def test_contexts(name: str, phase: str, rule: fd.Adam | None) -> None:
    kind, make, error, message = CONTEXTS[name]
    case = Case(rule, kind, **PHASES[phase])
    case.refuses(error, message, double(T, B, 4), context=make(case))


OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "detached": (lambda h: h.detach(), RuntimeError, "carries no graph"),
    "detached first": (lambda h: (h.detach(), h), RuntimeError, "carries no graph"),
    "integers": (lambda h: (h.argmax(-1), h), TypeError, "torch.int64, which carries no gradient"),
    "features": (
        lambda h: h[..., :-1],
        RuntimeError,
        r"shape \[\.\.\., 5\].*\.\.\., 4\]",
    ),
    "steps": (lambda h: h[1:], RuntimeError, "context covers rows"),
    "dictionary": (lambda h: {"h": h}, TypeError, "got dict"),
}


@updates
@phases
@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs(name: str, phase: str, rule: fd.Adam | None) -> None:
    """In the first call of such a shape: what ran is put back."""
    returns, error, message = OUTPUTS[name]
    case = Case(rule, **PHASES[phase])
    case.bottom.module.returns = returns
    case.refuses(error, message, double(T, B + 1, 4), context=case.context(T, B + 1))


@updates
def test_maps_of_other_channels(rule: fd.Adam | None) -> None:
    inner = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))
    bottom = fd.Decoupled(inner, fd.ConvSynthesizer(4), update=rule)
    before = twins.snapshot(bottom)
    with pytest.raises(RuntimeError, match=r"4 dimensions \[N, 4, \*spatial\], got \[2, 3, 3, 3\]"):
        bottom(torch.randn(2, 1, 5, 5))
    twins.unchanged(before, twins.snapshot(bottom))


@updates
@phases
@pytest.mark.parametrize("how", ["resized", "moved"])
def test_a_head_that_does_not_fit_any_more(how: str, phase: str, rule: fd.Adam | None) -> None:
    case = Case(rule, **PHASES[phase])
    if how == "resized":
        case.head.weight = nn.Parameter(double(CLASSES + 1, WIDTH))
        message = "make a new synthesizer"
    else:
        case.head.to("meta")
        message = "the head is on meta, the synthesizer on cpu"
    x, y = double(T, B, 4), case.context()
    before = twins.snapshot(case.bottom) | {"random": torch.get_rng_state()}
    with pytest.raises(RuntimeError, match=message):
        case.bottom(x, context=y)
    twins.unchanged(before, twins.snapshot(case.bottom) | {"random": torch.get_rng_state()})


@updates
@pytest.mark.parametrize("phase", PHASES)
def test_a_fused_layer_under_a_head_that_was_resized(phase: str, rule: fd.Adam | None) -> None:
    head = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    layer = fd.FusedDNILinear(
        4, WIDTH, normalization="batch", synthesizer=fd.SoftmaxSynthesizer(head), update=rule,
        dtype=torch.float64,
    )  # fmt: skip
    fd.Schedule(layer, **PHASES[phase])
    head.weight = nn.Parameter(double(CLASSES + 1, WIDTH))
    before = twins.snapshot(layer)
    with pytest.raises(RuntimeError, match="make a new synthesizer"):
        layer(double(T, 4), context=torch.zeros(T, dtype=torch.int64))
    twins.unchanged(before, twins.snapshot(layer))


def test_another_weight_of_the_head_is_seen_and_another_head_is_not() -> None:
    case = Case(None, target_every=None)
    synthesizer, h, y = case.bottom.synthesizer, double(T, WIDTH), case.context(T)
    before = synthesizer(h, y)
    case.head.weight = nn.Parameter(2 * case.head.weight.detach())
    after = synthesizer(h, y)
    assert not torch.equal(before, after)
    case.head = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    close(synthesizer(h, y), after, 0)


@updates
@pytest.mark.parametrize("phase", ["target", "mix", "warmup"])
def test_a_local_backward_of_a_step_with_targets(phase: str, rule: fd.Adam | None) -> None:
    case = Case(rule, **PHASES[phase])
    h, more = case.bottom(double(T, B, 4), context=case.context())
    before = case.all()
    for given in (h, [h], more):
        with pytest.raises(RuntimeError, match="On a step with targets"):
            fd.backward_local(given)
    twins.unchanged(before, case.all())
    F.cross_entropy(case.head(h).flatten(0, 1), case.context().flatten()).backward()  # as ever


def test_a_frozen_segment_may_have_no_graph() -> None:
    """Nothing in it asks for a gradient: its synthesizer learns all the same."""
    case = Case(None)
    case.bottom.module.requires_grad_(False)
    case.bottom(double(T, B, 4), context=case.context())[0].backward(double(T, B, WIDTH))
    assert case.bottom.synthesizer.weight.grad is not None


def test_a_top_that_draws_is_learned_in_the_mean() -> None:
    """Dropout between interface and loss: nothing can be noticed, and the mean is predicted."""
    torch.manual_seed(0)
    bottom = fd.Decoupled(
        nn.Identity(), fd.DifferenceSynthesizer(WIDTH, dtype=torch.float64),
        update=fd.SGD(0.0), synthesizer_update=fd.Adam(0.02),
    )  # fmt: skip
    for step in range(400):
        if step == 200:
            bottom.synthesizer_update.group["lr"] = 0.002
        x, t = double(64, WIDTH), double(64, WIDTH)
        away = bottom(x, context=t) - t
        (0.5 * F.dropout(away.square(), 0.5).sum(1).mean()).backward()
    weight = bottom.synthesizer.weight.detach() * bottom.unit
    close(weight, torch.ones_like(weight), 0.1)
