"""Interfaces under an expensive top whose prediction is exact, and streams that are continued."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import twins
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from twins import close, double

import fused_dni as fd

pytestmark = pytest.mark.usefixtures("one_thread")
INPUTS, WIDTH, CLASSES = 4, 9, 7
EPS = torch.finfo(torch.float64).eps
updates = pytest.mark.parametrize("rule", [None, fd.SGD(0.05)], ids=["returned", "fused"])


def bottom_of(rule: fd.SGD | None, synthesizer: nn.Module, **options: Any) -> fd.Decoupled:
    torch.manual_seed(0)
    inner = nn.LSTM(INPUTS, WIDTH).double()
    return fd.Decoupled(inner, synthesizer, update=rule, **options)


def gradients(bottom: fd.Decoupled, before: list[Tensor], rule: fd.SGD | None) -> list[Tensor]:
    """The segment's, by its rule's step or in .grad."""
    now = bottom.module.parameters()
    if rule is None:
        return [p.grad for p in now]
    return [(b - p.detach()) / rule.lr for b, p in zip(before, now, strict=True)]


def plant(
    synthesizer: fd.SoftmaxSynthesizer, head: nn.Linear, h: Tensor, smoothing: float
) -> float:
    """Have A h + c be what the model expects at these rows, no more than WIDTH + 1; the relative
    error that the solution may have."""
    with torch.no_grad():
        expected = (head(h).softmax(1) - smoothing / CLASSES) @ head.weight  # [N, O]
        rows = torch.cat([h, h.new_ones(len(h), 1)], 1)  # [N, O + 1]
        solved = torch.linalg.pinv(rows) @ expected  # [O + 1, O]
        synthesizer.weight.copy_(solved[:-1].t())
        synthesizer.bias.copy_(solved[-1])
        values = torch.linalg.svdvals(rows)
        return float(64 * len(h) * EPS * values[0] / values[-1])


@updates
@given(
    steps=st.integers(1, 3),
    batch=st.integers(1, 3),
    smoothing=st.sampled_from([0.0, 0.25]),
    ignored=st.booleans(),
)
def test_a_softmax_synthesizer_with_the_expectation_is_backprop(
    rule: fd.SGD | None, steps: int, batch: int, smoothing: float, ignored: bool
) -> None:
    """On a step without targets, [T, B, O], labels to ignore among them."""
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    synthesizer = fd.SoftmaxSynthesizer(head, label_smoothing=smoothing)
    bottom = bottom_of(rule, synthesizer)
    fd.Schedule(bottom, target_every=None)
    x, y = double(steps, batch, INPUTS), torch.randint(CLASSES, (steps, batch))
    if ignored and y.numel() > 1:
        y[0, 0] = -100
    plain = copy.deepcopy(bottom.module)
    out, _ = plain(x)
    loss = F.cross_entropy(head(out).flatten(0, 1), y.flatten(), label_smoothing=smoothing)
    expected = torch.autograd.grad(loss, list(plain.parameters()))
    tolerance = plant(synthesizer, head, out.detach().flatten(0, 1), smoothing)
    before = twins.kept(plain.parameters())
    h, _ = bottom(x, context=y)
    fd.backward_local(h)
    close(gradients(bottom, before, rule), list(expected), max(tolerance, 1e-12))


@updates
def test_a_softmax_synthesizer_without_the_expectation_is_not(rule: fd.SGD | None) -> None:
    """The plant is what makes the test above pass."""
    head = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    bottom = bottom_of(rule, fd.SoftmaxSynthesizer(head))
    fd.Schedule(bottom, target_every=None)
    x, y = double(2, 2, INPUTS), torch.randint(CLASSES, (2, 2))
    plain = copy.deepcopy(bottom.module)
    loss = F.cross_entropy(head(plain(x)[0]).flatten(0, 1), y.flatten())
    expected = torch.autograd.grad(loss, list(plain.parameters()))
    before = twins.kept(plain.parameters())
    fd.backward_local(bottom(x, context=y)[0])
    with pytest.raises(AssertionError):
        close(gradients(bottom, before, rule), list(expected), 1e-3)


@updates
@given(steps=st.integers(1, 4), batch=st.integers(1, 4), rank=st.integers(0, 2))
def test_a_difference_is_the_gradient_of_a_squared_distance(
    rule: fd.SGD | None, steps: int, batch: int, rank: int
) -> None:
    """0.5 |h - t|^2, a mean over rows: a = 1, on steps without targets and [T, B, O]."""
    synthesizer = fd.DifferenceSynthesizer(WIDTH, rank, dtype=torch.float64)
    nn.init.ones_(synthesizer.weight)
    bottom = bottom_of(rule, synthesizer)
    fd.Schedule(bottom, target_every=None)
    x, t = double(steps, batch, INPUTS), double(steps, batch, WIDTH)
    plain = copy.deepcopy(bottom.module)
    loss = 0.5 * (plain(x)[0] - t).square().sum(2).mean()
    expected = torch.autograd.grad(loss, list(plain.parameters()))
    before = twins.kept(plain.parameters())
    fd.backward_local(bottom(x, context=t)[0])
    close(gradients(bottom, before, rule), list(expected))


@pytest.mark.parametrize("warmup", [True, False], ids=["warm-up", "mix=1"])
@pytest.mark.parametrize("kind", ["softmax", "difference"])
def test_a_step_with_targets_is_backprop_to_the_bit(kind: str, warmup: bool) -> None:
    """Without a rule, over steps of torch's Adam on the segment and the head."""
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    heads = [head, copy.deepcopy(head)]
    synthesizer: nn.Module = fd.SoftmaxSynthesizer(head)
    if kind == "difference":
        synthesizer = fd.DifferenceSynthesizer(WIDTH, 2, dtype=torch.float64)
    twins.disturb(synthesizer)
    bottom = bottom_of(None, synthesizer)
    schedule = fd.Schedule(bottom, warmup_steps=9 * warmup, mix=1.0)
    plain = copy.deepcopy(bottom.module)
    optimizers = [
        torch.optim.Adam([*m.parameters(), *h.parameters()], 0.01)
        for m, h in zip((bottom, plain), heads, strict=True)
    ]
    states: list[Any] = [None, None]
    for _ in range(5):
        x, y = double(3, 2, INPUTS), torch.randint(CLASSES, (3, 2))
        context = y if kind == "softmax" else double(3, 2, WIDTH)
        h, states[0] = bottom(x, states[0], context=context)
        out, states[1] = plain(x, states[1])
        states[1] = tuple(t.detach() for t in states[1])
        for rows, last, optimizer in zip((h, out), heads, optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(last(rows).flatten(0, 1), y.flatten()).backward()
            optimizer.step()
        schedule.step()
        close(twins.kept(bottom.module.parameters()), twins.kept(plain.parameters()), 0)
        close(states[0], states[1], 0)
    assert int(bottom.statistics[-1]) == 5 * 6


def test_a_rules_step_with_targets_is_backprop() -> None:
    """As torch.optim.SGD, but for the order of its roundings."""
    rule = fd.SGD(0.05, momentum=0.5)
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    bottom = bottom_of(rule, fd.SoftmaxSynthesizer(head))
    schedule = fd.Schedule(bottom, mix=1.0)
    plain = copy.deepcopy(bottom.module)
    optimizer = torch.optim.SGD(plain.parameters(), rule.lr, rule.momentum)
    for _ in range(10):
        x, y = double(3, 2, INPUTS), torch.randint(CLASSES, (3, 2))
        optimizer.zero_grad()
        for m, given_context in ((bottom, {"context": y}), (plain, {})):
            out, _ = m(x, **given_context)
            F.cross_entropy(head(out).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
        schedule.step()
    close(twins.kept(bottom.module.parameters()), twins.kept(plain.parameters()))


# ---------------------------------------------------------------------------------------------
# Killed and continued


class Words:
    """A small word model in training: embedding, LSTM, softmax on each third step."""

    def __init__(self, rule: fd.Adam | None, fused_lstm: bool, seed: int) -> None:
        torch.manual_seed(seed)
        lstm = fd.FusedDNILSTM(WIDTH, WIDTH) if fused_lstm else nn.LSTM(WIDTH, WIDTH)
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.lstm = lstm
        self.bottom = fd.Decoupled(lstm, fd.SoftmaxSynthesizer(self.head, 3), update=rule)
        self.schedule = fd.Schedule(self.bottom, warmup_steps=3, target_every=3, mix=1.0)
        rest = [*self.embedding.parameters(), *self.head.parameters()]
        bottom = [] if rule else [*self.bottom.parameters()]
        self.optimizer = torch.optim.Adam([*rest, *bottom], 0.01)
        self.fused = fd.FusedOptimizer(self.bottom) if rule else None
        self.state: Any = None

    def step(self, words: Tensor) -> None:
        self.optimizer.zero_grad()
        h, self.state = self.bottom(self.embedding(words[:-1]), self.state, context=words[1:])
        if self.schedule.target:
            F.cross_entropy(self.head(h).flatten(0, 1), words[1:].flatten()).backward()
        else:
            fd.backward_local(h)
        self.optimizer.step()
        if self.fused is not None:
            self.fused.step()
        self.schedule.step()

    def parts(self) -> dict[str, Any]:
        made = {
            "embedding": self.embedding, "head": self.head, "bottom": self.bottom,
            "optimizer": self.optimizer, "schedule": self.schedule,
        }  # fmt: skip
        return made | ({"fused": self.fused} if self.fused is not None else {})

    def saved(self) -> bytes:
        file = io.BytesIO()
        torch.save({k: v.state_dict() for k, v in self.parts().items()} | {"s": self.state}, file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        found = torch.load(io.BytesIO(saved))
        for name, part in self.parts().items():
            part.load_state_dict(found[name])
        self.state = found["s"]
        if isinstance(self.lstm, fd.FusedDNILSTM):
            self.lstm.remember(self.state)


@pytest.mark.parametrize("killed_at", [1, 4, 8])
@pytest.mark.parametrize("fused_lstm", [False, True], ids=["nn.LSTM", "FusedDNILSTM"])
@pytest.mark.parametrize("rule", [None, fd.Adam(0.01)], ids=["returned", "fused"])
def test_killed_and_continued_with_the_same_bits(
    rule: fd.Adam | None, fused_lstm: bool, killed_at: int
) -> None:
    words = torch.randint(CLASSES, (12, 5, 2))
    whole = Words(rule, fused_lstm, 0)
    for window in words:
        whole.step(window)
    first = Words(rule, fused_lstm, 0)
    for window in words[:killed_at]:
        first.step(window)
    saved = first.saved()
    del first
    second = Words(rule, fused_lstm, 1)
    second.load(saved)
    for window in words[killed_at:]:
        second.step(window)
    for name, part in whole.parts().items():
        other = second.parts()[name]
        assert twins.same(part.state_dict(), other.state_dict()), name
    assert twins.same(list(whole.state), list(second.state))
    fresh = Words(rule, fused_lstm, 1)
    assert not twins.same(twins.values(fresh.bottom), twins.values(whole.bottom))
