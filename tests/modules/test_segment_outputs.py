"""Segments that return more than their output, and what that output may be."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import twins
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_flatten, tree_leaves
from twins import close, double

import fused_dni as fd

pytestmark = pytest.mark.usefixtures("one_thread")
T, B, INPUTS, H, CLASSES = 4, 3, 5, 6, 7
RULE = fd.SGD(0.1)
updates = pytest.mark.parametrize("rule", [None, RULE], ids=["returned", "fused"])


class Pair(NamedTuple):
    first: Any
    second: Any


def synthesizer(features: int = H) -> fd.LinearSynthesizer:
    made = fd.LinearSynthesizer(features, 2, CLASSES, dtype=torch.float64)
    twins.disturb(made)
    return made


def recurrent(kind: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    if kind == "fused":
        made = fd.FusedDNILSTM(INPUTS, H, dtype=torch.float64, **options)
        twins.disturb(made.synthesizer)
        return made
    return {"lstm": nn.LSTM, "gru": nn.GRU}[kind](INPUTS, H, **options).double()


def without_graph(out: Any) -> bool:
    return not any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(out))


@updates
@pytest.mark.parametrize("target_every", [1, None])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_recurrent_layer_hands_its_state_on(
    kind: str, batch_first: bool, target_every: int | None, rule: fd.SGD | None
) -> None:
    """Windows by hand: local gradients of h alone, from the state that was returned."""
    bottom = fd.Decoupled(recurrent(kind, batch_first=batch_first), synthesizer(), update=rule)
    fd.Schedule(bottom, target_every=target_every)
    leading = (B, T) if batch_first else (T, B)
    state = None
    for _ in range(3):
        x, y = double(*leading, INPUTS), torch.randint(CLASSES, leading)
        plain = copy.deepcopy(bottom.module)
        expected, after = plain(x, state)
        gradient = twins.synthetic(bottom, expected.detach(), y.flatten())
        made = torch.autograd.grad(expected, list(plain.parameters()), gradient)
        before = twins.kept(bottom.module.parameters())
        h, state = bottom(x, state, context=y)
        close(h, expected, 0)
        close(tree_leaves(state), [t.detach() for t in tree_leaves(after)], 0)
        assert without_graph(state) and h.requires_grad == (rule is None or target_every == 1)
        if target_every == 1:
            h.square().mean().backward()
        else:
            fd.backward_local(h)
        if rule is None:
            close([p.grad for p in bottom.module.parameters()], list(made))
            bottom.zero_grad()
        else:
            moved = [
                b - p.detach() for b, p in zip(before, bottom.module.parameters(), strict=True)
            ]
            close(moved, [rule.lr * g for g in made])


@updates
@pytest.mark.parametrize("mode", ["eval", "no_grad", "exact"])
def test_otherwise_it_is_as_the_segment_returns_it(mode: str, rule: fd.SGD | None) -> None:
    inner = recurrent("lstm")
    bottom = fd.Decoupled(inner, None if mode == "exact" else synthesizer(), update=rule)
    bottom.train(mode != "eval")
    x = double(T, B, INPUTS)
    with torch.set_grad_enabled(mode != "no_grad"):
        h, state = bottom(x)
        expected, after = inner(x)
    close((h, *state), (expected, *after), 0)
    connected = mode == "eval" or (mode == "exact" and rule is None)
    assert without_graph(state) != connected
    assert h.requires_grad == (mode != "no_grad")


class Returns(nn.Module):
    """Returns ``structure`` with h in the place of the first leaf, and others computed of it."""

    def __init__(self, structure: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(4, H, dtype=torch.float64)
        self.structure = structure

    def forward(self, x: Tensor) -> Any:
        h = self.linear(x)
        first = True

        def filled(part: Any) -> Any:
            nonlocal first
            if part == "h" and first:
                first = False
                return h
            if part == "of h":
                return h * 2
            if type(part) in (tuple, list):
                return type(part)(map(filled, part))
            if isinstance(part, Pair):
                return Pair(*map(filled, part))
            return {k: filled(v) for k, v in part.items()} if isinstance(part, dict) else part

        return filled(self.structure)


others = st.recursive(
    st.sampled_from(["of h", None, 3, "word"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.tuples(inner, inner)
        | st.builds(Pair, inner, inner)
        | st.dictionaries(st.sampled_from("ab"), inner, max_size=2)
    ),
    max_leaves=4,
)
structures = st.recursive(
    st.just("h"),
    lambda inner: (
        st.tuples(inner, others)
        | st.tuples(inner)
        | st.builds(Pair, inner, others)
        | st.builds(lambda a, b: [a, *b], inner, st.lists(others, max_size=2))
    ),
    max_leaves=3,
)


@given(structure=structures, ruled=st.booleans(), target_every=st.sampled_from([1, None]))
def test_any_structure(structure: Any, ruled: bool, target_every: int | None) -> None:
    inner = Returns(structure)
    bottom = fd.Decoupled(
        inner, fd.LinearSynthesizer(H, dtype=torch.float64), update=RULE if ruled else None
    )
    fd.Schedule(bottom, target_every=target_every)
    x = double(5, 4)
    with torch.no_grad():
        expected, spec = tree_flatten(inner(x))
    found, got = tree_flatten(bottom(x))
    assert got == spec and len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) if isinstance(b, Tensor) else a == b
    assert without_graph(found[1:])
    if target_every is None:
        fd.backward_local(found[0])
    else:
        found[0].square().mean().backward()
    assert ruled or bool(inner.linear.weight.grad is not None)


@pytest.mark.parametrize("mode", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(
    ("structure", "named"),
    [
        ({"h": "h"}, "got dict"),
        (({"h": "h"}, 1), "got dict in tuple"),
        ((3, "h"), "got int in tuple"),
        ([], "got NoneType in list"),
        (((), "h"), "got NoneType in tuple in tuple"),
        (None, "got NoneType"),
    ],
    ids=str,
)
@updates
def test_an_output_without_a_tensor_first(
    structure: Any, named: str, rule: fd.SGD | None, mode: bool
) -> None:
    bottom = fd.Decoupled(Returns(structure), synthesizer(), update=rule).train(mode)
    before = twins.snapshot(bottom)
    with pytest.raises(TypeError, match=rf"must return a tensor, or a tuple .*; {named}$"):
        bottom(double(5, 4), context=torch.zeros(5, dtype=torch.int64))
    twins.unchanged(before, twins.snapshot(bottom))


def test_a_container_takes_tensors_alone() -> None:
    """Nothing is updated before that is said."""
    for rule in (None, RULE):
        model = fd.DecoupledSequential(
            fd.Decoupled(Returns(("h", "of h")), fd.LinearSynthesizer(H).double(), update=rule),
            nn.Linear(H, 1).double(),
        )
        before = twins.snapshot(model)
        with pytest.raises(TypeError, match="must return one tensor, got 2 leaves"):
            model(double(5, 4))
        twins.unchanged(before, twins.snapshot(model))


def test_the_state_is_no_output() -> None:
    bottom = fd.Decoupled(recurrent("lstm"), synthesizer())
    fd.Schedule(bottom, target_every=None)
    h, state = bottom(double(T, B, INPUTS), context=torch.zeros(T, B, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="not what a decoupled layer returned"):
        fd.backward_local(h, state)
    with pytest.raises(TypeError, match="outputs must be tensors"):
        fd.backward_local(torch.arange(3))
    assert all(p.grad is None for p in bottom.parameters())


# ---------------------------------------------------------------------------------------------
# Lengths and masks

LENGTHS = torch.tensor([4, 1, 3])


def masked() -> tuple[Tensor, Tensor]:
    """Windows [T, B, I], and labels, -100 behind each row's length."""
    y = torch.randint(CLASSES, (T, B))
    return double(T, B, INPUTS), y.masked_fill(torch.arange(T).unsqueeze(1) >= LENGTHS, -100)


def softmax(seed: int = 0) -> tuple[nn.Linear, fd.SoftmaxSynthesizer]:
    torch.manual_seed(seed)
    head = nn.Linear(H, CLASSES, dtype=torch.float64)
    made = fd.SoftmaxSynthesizer(head)
    twins.disturb(made)
    return head, made


@updates
@pytest.mark.parametrize("target", [True, False], ids=["target", "no target"])
def test_a_packed_sequence_is_the_rows_that_count(rule: fd.SGD | None, target: bool) -> None:
    """Packed, against padded with labels to ignore: the same gradients and the same lesson."""
    x, y = masked()
    found = []
    for packed in (True, False):
        head, made = softmax()
        bottom = fd.Decoupled(recurrent("lstm"), made, update=rule)
        fd.Schedule(bottom, target_every=1 if target else None)
        if packed:
            p = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
            labels = pack_padded_sequence(y, LENGTHS, enforce_sorted=False).data
            out, _ = bottom(p, context=labels)
            assert isinstance(out, PackedSequence)
            h = out.data
        else:
            out, _ = bottom(x, context=y)
            h, labels = out.flatten(0, 1), y.flatten()
        if target:
            F.cross_entropy(head(h), labels).backward()
        else:
            fd.backward_local(out)
        slots = [p.detach() if rule else p.grad for p in bottom.module.parameters()]
        found.append((slots, fd.diagnostics(bottom)[""]["cosine"]))
    close(found[0][0], found[1][0])
    if target:
        assert found[0][1] == pytest.approx(found[1][1], rel=1e-9)


@given(ignored=st.lists(st.booleans(), min_size=T * B, max_size=T * B), ruled=st.booleans())
def test_what_is_ignored_gets_no_gradient_and_teaches_nothing(
    ignored: list[bool], ruled: bool
) -> None:
    torch.manual_seed(1)
    mask = torch.tensor(ignored).view(T, B)
    y = torch.randint(CLASSES, (T, B)).masked_fill(mask, -100)
    _, made = softmax()
    bottom = fd.Decoupled(nn.Identity(), made, update=RULE if ruled else None)
    arrived = double(T, B, H).masked_fill(mask.unsqueeze(2), 0.0)  # as a mean over the others sends
    lessons = []
    for garbage in (0.0, 1e3):  # what stands in the rows that are ignored does not matter
        layer = copy.deepcopy(bottom)
        x = double(T, B, H).mul_(0.1) + garbage * mask.unsqueeze(2)
        x.requires_grad_()
        torch.manual_seed(2)
        x.data[~mask] = double(int((~mask).sum()), H)
        layer(x, context=y).backward(arrived)
        assert x.grad is not None and not bool(x.grad[mask].any())
        assert bool(x.grad[~mask].any()) == (not all(ignored))
        lessons.append([p.detach() if ruled else p.grad for p in layer.synthesizer.parameters()])
    close(*lessons)


def test_padding_is_a_target_of_zero_to_other_synthesizers() -> None:
    """They cannot tell it from a label: rows of padding learn towards zero as any other."""
    bottom = fd.Decoupled(
        nn.Identity(), synthesizer(), update=fd.SGD(0.0), synthesizer_update=fd.Adam(0.02)
    )
    x, y = double(T, B, H), torch.zeros(T, B, dtype=torch.int64)
    for _ in range(600):
        bottom(x, context=y).backward(torch.zeros(T, B, H, dtype=torch.float64))
    assert float(twins.synthetic(bottom, x, y.flatten()).abs().max()) < 1e-4
    assert int(bottom.statistics[-1]) == 600 * T * B


# ---------------------------------------------------------------------------------------------
# Images


@updates
def test_images(rule: fd.SGD | None) -> None:
    """Maps [N, C, H, W] below a top that is run on each third step."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()).double()
    made = fd.ConvSynthesizer(3, hidden=4, kernel_size=3, context_features=2, dtype=torch.float64)
    twins.disturb(made)
    top = nn.Conv2d(3, 1, 5, dtype=torch.float64).requires_grad_(False)
    bottom = fd.Decoupled(inner, made, update=rule)
    schedule = fd.Schedule(bottom, target_every=3, mix=1.0)
    for step in range(6):
        x, y = double(4, 1, 6, 6), torch.randint(2, (4,))
        plain, twin = copy.deepcopy(bottom.module), copy.deepcopy(bottom.synthesizer)
        h = plain(x)
        if schedule.target:
            gradient = torch.autograd.grad(top(h).square().mean(), h, retain_graph=True)[0]
        else:
            gradient = twin(h.detach(), y).detach() / bottom.scale_of(h)
        expected = torch.autograd.grad(h, list(plain.parameters()), gradient)
        before = twins.kept(plain.parameters())
        bottom.zero_grad()
        out = bottom(x, context=y)
        if schedule.target:
            top(out).square().mean().backward()
        else:
            fd.backward_local(out)
        if rule is None:
            close([p.grad for p in bottom.module.parameters()], list(expected))
        else:
            after = [b - rule.lr * g for b, g in zip(before, expected, strict=True)]
            close(twins.kept(bottom.module.parameters()), after)
        assert int(bottom.statistics[-1]) == 4 * (step // 3 + 1)
        schedule.step()


# ---------------------------------------------------------------------------------------------
# Decoupled in space around what is decoupled in time


def steps_apart(inner: fd.SGD | None, outer: fd.SGD | None, mix: float, kind: str) -> list[float]:
    """How far a stream under a perfect synthesizer in space is from the same under backprop, after
    each step: layers and the synthesizer in time, over a schedule's warm-up, steps with and without
    targets."""
    rate = 0.05
    lstm = recurrent("fused", update=inner)
    if kind == "two layers":
        lstm = recurrent("fused", update=inner, num_layers=2)
    twin = copy.deepcopy(lstm)
    bottom = fd.Decoupled(lstm, twins.perfect(H), update=outer, target_scale=1.0)
    head = nn.Linear(H, CLASSES, dtype=torch.float64).requires_grad_(False)
    schedules = [fd.Schedule(m, warmup_steps=3, target_every=3, mix=mix) for m in (bottom, twin)]
    ordinary = [[p for p in fd.ordinary_parameters(m) if p.requires_grad] for m in (bottom, twin)]
    optimizers = [torch.optim.SGD(p, rate) for p in ordinary if p]
    states: list[Any] = [None, None]
    apart = []
    for _ in range(12):
        x, y = double(T, B, INPUTS), torch.randint(CLASSES, (T * B,))
        for optimizer in optimizers:
            optimizer.zero_grad()
        output, states[1] = twin(x, states[1])
        output.retain_grad()
        F.cross_entropy(head(output.flatten(0, 1)), y).backward()
        h, states[0] = bottom(x, states[0], context=output.grad)
        assert without_graph(states[0])
        if not h.requires_grad:  # with a rule, as nothing learns in space
            assert outer is not None
        elif schedules[0].target:
            F.cross_entropy(head(h.flatten(0, 1)), y).backward()
        else:
            fd.backward_local(h)
        for optimizer in optimizers:
            optimizer.step()
        for schedule in schedules:
            schedule.step()
        ends = zip(bottom.module.parameters(), twin.parameters(), strict=True)
        apart.append(max(float((a - b).detach().abs().max()) for a, b in ends))
    sums = [m.statistics for m in (bottom.module, twin)]
    assert float(sums[1][-1]) > 0
    close(sums[0], sums[1], 1e-9)
    return apart


@pytest.mark.parametrize("kind", ["one layer", "two layers"])
@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("outer", [None, fd.SGD(0.05)], ids=["returned", "fused"])
@pytest.mark.parametrize("inner", [None, fd.SGD(0.05)], ids=["inner returned", "inner fused"])
def test_in_space_around_in_time(
    inner: fd.SGD | None, outer: fd.SGD | None, mix: float, kind: str
) -> None:
    assert max(steps_apart(inner, outer, mix, kind)) < 1e-12


@pytest.mark.parametrize("outer", [None, RULE], ids=["returned", "fused"])
def test_layers_with_rules_inside_keep_them(outer: fd.SGD | None) -> None:
    """Also where the segment's gradient is made in the backward, exact or not."""
    for warmup in (0, 9):
        torch.manual_seed(0)
        inner = nn.Sequential(twins.linear(4, 5, update=RULE), nn.Linear(5, H).double())
        bottom = fd.Decoupled(inner, fd.LinearSynthesizer(H).double(), update=outer)
        twins.disturb(bottom.synthesizer)
        schedule = fd.Schedule(bottom, warmup_steps=warmup, target_every=2)
        for _ in range(2):
            before = twins.kept(bottom.module.parameters())
            h, target = bottom(double(8, 4)), schedule.target
            if target:
                h.square().mean().backward()
            else:
                fd.backward_local(h)
            schedule.step()
            for (name, p), old in zip(bottom.module.named_parameters(), before, strict=True):
                still = "synthesizer" in name and not target
                still = still or (name.startswith("1.") and outer is None)
                assert still or not torch.equal(p, old), name
                assert p.grad is None or (name.startswith("1.") and outer is None)
        assert len(bottom.local_parameters()) == 2
        assert {g["name"] for g in fd.FusedOptimizer(bottom).param_groups} >= {"module.0"}


# ---------------------------------------------------------------------------------------------
# torch.compile


@updates
def test_a_compiled_model_and_a_compiled_segment(rule: fd.SGD | None) -> None:
    """In training the layer itself is not traced; the segment may be compiled on its own."""
    inner = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, H)).double()
    made = fd.LinearSynthesizer(H, dtype=torch.float64)
    twins.disturb(made)
    kinds = [
        lambda m: m,
        lambda m: torch.compile(m, backend="aot_eager"),
        lambda m: fd.Decoupled(
            torch.compile(m.module, backend="aot_eager"), m.synthesizer, update=rule
        ),
    ]
    found = []
    for kind in kinds:
        layer = fd.Decoupled(copy.deepcopy(inner), copy.deepcopy(made), update=rule)
        schedule = fd.Schedule(layer, target_every=2)
        run = kind(layer)
        if run is not layer and isinstance(run, fd.Decoupled):
            schedule = fd.Schedule(run, target_every=2)
        torch.manual_seed(1)
        for _ in range(3):
            h = run(double(8, 4))
            if schedule.target:
                h.square().mean().backward()
            else:
                fd.backward_local(h)
            schedule.step()
        found.append([p.detach() if rule else p.grad for p in layer.parameters()])
    for other in found[1:]:
        close(found[0], other)
    layer.eval()
    x = double(8, 4)
    close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
