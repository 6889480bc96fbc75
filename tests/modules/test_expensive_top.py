"""Steps on which nothing above the decoupled layers is run."""

from __future__ import annotations

import copy
import gc
import tracemalloc
import warnings
import weakref
from typing import Any

import pytest
import torch
import twins
from torch import Tensor, nn
from twins import close, double

import fused_dni as fd
from fused_dni import schedule as scheduling

pytestmark = [pytest.mark.slow(40), pytest.mark.usefixtures("one_thread")]
RULE = fd.SGD(0.05)


def segment(**options: Any) -> nn.Module:
    """A segment of ordinary layers, predicted for as one."""
    inner = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)).double()
    return fd.Decoupled(inner, fd.LinearSynthesizer(5, dtype=torch.float64), **options)


def layers(**options: Any) -> nn.Module:
    """Two fused layers."""
    options["dtype"] = torch.float64
    return nn.Sequential(
        fd.FusedDNILinear(4, 6, activation="tanh", **options), fd.FusedDNILinear(6, 5, **options)
    )


def on_ordinary(**options: Any) -> nn.Module:
    """A decoupled layer above one of PyTorch's."""
    return nn.Sequential(
        nn.Linear(4, 6).double(), nn.Tanh(), fd.FusedDNILinear(6, 5, dtype=torch.float64, **options)
    )


def contained(**options: Any) -> nn.Module:
    """A container with immediate delivery."""
    return fd.DecoupledSequential(*layers(**options))


BOTTOMS = {"segment": segment, "layers": layers, "ordinary": on_ordinary, "contained": contained}
bottoms = pytest.mark.parametrize("name", BOTTOMS)
updates = pytest.mark.parametrize("rule", [None, RULE], ids=["returned", "fused"])


def made(name: str, rule: fd.SGD | None) -> tuple[nn.Module, torch.optim.Optimizer | None]:
    """A bottom whose synthesizers predict something, and the optimizer of what has no rule."""
    torch.manual_seed(0)
    bottom = BOTTOMS[name](update=rule)
    for m in bottom.modules():
        if getattr(m, "synthesizer", None) is not None:
            twins.disturb(m.synthesizer)
    left = list(fd.ordinary_parameters(bottom) if rule else bottom.parameters())
    return bottom, torch.optim.SGD(left, 0.05) if left else None


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(double(8, 4), double(8, 5)) for _ in range(count)]


@bottoms
@updates
def test_a_loss_that_is_not_computed_changes_no_bit(name: str, rule: fd.SGD | None) -> None:
    results = []
    for skipping in (True, False):
        bottom, optimizer = made(name, rule)
        schedule = fd.Schedule(bottom, warmup_steps=1, target_every=3, mix=1.0)
        for x, y in batches(9):
            if optimizer is not None:
                optimizer.zero_grad()
            h = bottom(x)
            if schedule.target:
                (h - y).square().mean().backward()
            elif skipping:
                fd.backward_local(h)
            elif h.requires_grad:  # a loss that is not needed is ignored
                (h - y).square().mean().backward()
            if optimizer is not None:
                optimizer.step()
            schedule.step()
        results.append(twins.snapshot(bottom))
    twins.unchanged(*results)


def test_a_rule_needs_no_backward_at_all() -> None:
    bottom, optimizer = made("layers", RULE)
    assert optimizer is None
    fd.Schedule(bottom, target_every=None)
    twin = copy.deepcopy(bottom)
    for x, _ in batches(3):
        h = bottom(x)
        assert not h.requires_grad and h.grad_fn is None
        fd.backward_local(twin(x))  # nothing to do
    twins.unchanged(twins.snapshot(bottom), twins.snapshot(twin))


def test_several_outputs_in_any_structure() -> None:
    (a, _), (b, _) = made("segment", None), made("layers", None)
    fd.Schedule(nn.ModuleList([a, b]), target_every=None)
    x = double(8, 4)
    fd.backward_local({"a": a(x)}, [b(x), "no tensor"])
    for bottom in (a, b):
        local = [p for n, p in bottom.named_parameters() if "synthesizer" not in n]
        assert all(p.grad is not None and bool(p.grad.any()) for p in local)
        assert all(p.grad is None for n, p in bottom.named_parameters() if "synthesizer" in n)


@bottoms
def test_no_memory_grows(name: str) -> None:
    """Neither tensors nor Python objects are left by steps whose loss is never computed."""
    bottom, _ = made(name, None)
    fd.Schedule(bottom, target_every=None)
    x = double(8, 4)

    def run(steps: int) -> int:
        for _ in range(steps):
            h = bottom(x)
            del h  # not even the local backward
            fd.backward_local(bottom(x))
            for p in bottom.parameters():
                p.grad = None
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        first = run(550)  # caches fill
        before = len(gc.get_objects())
        assert run(500) - first < 50_000  # a hundred bytes a step
        assert len(gc.get_objects()) - before < 100
    finally:
        tracemalloc.stop()


class Stream(nn.Module):
    """Takes rows as windows [T, B, I] of one stream, whose state it hands on."""

    def __init__(self, lstm: nn.Module, rule: fd.SGD | None) -> None:
        super().__init__()
        synthesizer = fd.LinearSynthesizer(5, dtype=torch.float64)
        twins.disturb(synthesizer)
        self.bottom = fd.Decoupled(lstm, synthesizer, update=rule)
        self.state: Any = None

    def forward(self, x: Tensor) -> Tensor:
        h, self.state = self.bottom(x.view(2, 4, 4), self.state)
        return h


STREAMS = {
    "stream": lambda rule: Stream(nn.LSTM(4, 5).double(), rule),
    "fused stream": lambda rule: Stream(fd.FusedDNILSTM(4, 5, dtype=torch.float64), rule),
    "fused stream with a rule": lambda rule: Stream(
        fd.FusedDNILSTM(4, 5, dtype=torch.float64, update=RULE), rule
    ),
}


class Witness:
    """Lives as long as the graph's node that it is given to."""


def alive() -> dict[str, int]:
    """Tensors and nodes that Python knows of, and its other objects."""
    gc.collect()
    kinds = [type(o) for o in gc.get_objects()]
    tensors = sum(issubclass(kind, Tensor) for kind in kinds)
    nodes = sum(issubclass(kind, torch._C._FunctionBase) for kind in kinds)
    return {"tensors": tensors, "nodes": nodes, "objects": len(kinds)}


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        *((name, 300) for name in (*BOTTOMS, *STREAMS)),
        *(pytest.param(n, 10_000, marks=pytest.mark.repeat) for n in ("segment", "fused stream")),
    ],
)
@updates
def test_steps_leave_nothing(name: str, rule: fd.SGD | None, steps: int) -> None:
    """Whose loss is never computed, needed or not, whose local backward is run, whose loss is
    computed and not needed."""
    torch.manual_seed(0)
    bottom = STREAMS[name](rule) if name in STREAMS else made(name, rule)[0]
    schedule = fd.Schedule(bottom, target_every=5, mix=1.0)
    x = double(8, 4)
    graphs: weakref.WeakSet[Witness] = weakref.WeakSet()

    def run(steps: int) -> None:
        for step in range(steps):
            h = bottom(x)
            if h.grad_fn is not None:
                witness = Witness()
                h.grad_fn.metadata["witness"] = witness
                graphs.add(witness)
                del witness
            way = step % 4
            if way == 1 and not schedule.target:
                fd.backward_local(h)
            elif way >= 2 and h.requires_grad:
                h.square().mean().backward()
            del h
            for p in bottom.parameters():
                p.grad = None
            assert len(graphs) == 0
            schedule.step()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of windows, and of a stream that is not taught
        run(200)  # caches fill
        before = alive()
        run(steps)
        after = alive()
    assert after["tensors"] <= before["tensors"] + 2, (before, after)
    assert after["nodes"] <= before["nodes"], (before, after)
    # Of an LSTM's states some dozen records, a few objects each, wait until they are looked at.
    assert after["objects"] < before["objects"] + 250, (before, after)


@pytest.mark.parametrize("name", ["segment", "ordinary", "layers", "stream"])
def test_steps_whose_loss_is_never_computed_leave_no_trace(name: str) -> None:
    """Without a rule: the step behind them, with targets, is that of a twin without them."""
    found = []
    for skipped in (0, 3):
        torch.manual_seed(0)
        bottom = STREAMS[name](None) if name in STREAMS else made(name, None)[0]
        schedule = fd.Schedule(bottom, target_every=4, mix=0.5)
        x, y = batches(1)[0]
        for step in range(5):
            schedule.steps = step - 1  # 0: with targets
            schedule.step()
            kept = []
            if step in (1, 2, 3):
                if skipped:
                    kept.append(bottom(x))
                continue
            if name in STREAMS:
                bottom.state = None
            bottom.zero_grad()
            (bottom(x).flatten(0, -2) - y).square().mean().backward()
        found.append(twins.snapshot(bottom))
    twins.unchanged(*found)


@pytest.mark.parametrize("rule", [None, RULE], ids=["returned", "fused"])
def test_an_lstm_uses_a_loss_that_is_computed(rule: fd.SGD | None) -> None:
    """Decoupled in time alone, its output is exact in space: there is no step that needs no loss,
    and without targets its synthesizer alone learns nothing."""
    lstm = fd.FusedDNILSTM(4, 5, dtype=torch.float64, update=rule, sg_scale=0.0)
    plain = copy.deepcopy(lstm).to_lstm()
    fd.Schedule(lstm, target_every=None)
    before = twins.kept(plain.parameters())
    x = double(2, 4, 4)
    made = torch.autograd.grad(plain(x)[0].square().mean(), list(plain.parameters()))
    output, _ = lstm(x)
    with pytest.raises(RuntimeError, match="not what a decoupled layer returned"):
        fd.backward_local(output)
    output.square().mean().backward()
    own = [p for n, p in lstm.named_parameters() if "synthesizer" not in n]
    if rule is None:
        close([p.grad for p in own], list(made))
    else:
        close(twins.kept(own), [p - RULE.lr * g for p, g in zip(before, made, strict=True)])
    assert not bool(lstm.statistics.any())


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda h: h.detach(), RuntimeError, "unchanged and not detached"),
        (lambda h: h * 2, RuntimeError, "unchanged and not detached"),
        (lambda h: h.add_(1.0), RuntimeError, "unchanged and not detached"),
        (lambda h: "h", TypeError, "outputs must be tensors"),
    ],
)
def test_what_is_no_output(spoil: Any, error: type[Exception], message: str) -> None:
    bottom, _ = made("layers", None)
    fd.Schedule(bottom, target_every=None)
    with pytest.raises(error, match=message):
        fd.backward_local(spoil(bottom(double(8, 4))))
    assert all(p.grad is None for p in bottom.parameters())


@bottoms
def test_a_step_with_targets_needs_its_loss(name: str) -> None:
    bottom, _ = made(name, None)
    schedule = fd.Schedule(bottom, target_every=2)
    assert schedule.target
    with pytest.raises(RuntimeError, match="run what is above"):
        fd.backward_local(bottom(double(8, 4)))
    schedule.step()
    assert not schedule.target


def test_targets_that_never_come_are_said_once() -> None:
    bottom, _ = made("layers", RULE)
    schedule = fd.Schedule(bottom, target_every=2)
    for _ in range(2 * scheduling.LOOK - 2):
        bottom(double(8, 4))
        schedule.step()
    with pytest.warns(UserWarning, match="of 32 steps with targets none"):
        schedule.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4 * scheduling.LOOK):
            schedule.step()


@bottoms
@updates
def test_targets_that_do_not_come_are_counted(name: str, rule: fd.SGD | None) -> None:
    """By layer, those that did come left out; no warning while some come."""
    bottom, _ = made(name, rule)
    schedule = fd.Schedule(bottom, warmup_steps=4, target_every=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(2 * scheduling.LOOK):
            h = bottom(double(8, 4))
            if schedule.target and step % 3:
                h.square().mean().backward()
            elif not schedule.target:
                fd.backward_local(h)
            schedule.step()
    wanted = [s for s in range(2 * scheduling.LOOK) if s < 4 or not s % 2]
    lost = sum(not s % 3 for s in wanted)
    found = fd.diagnostics(bottom, reset=True)
    # Inside a container a lower layer is taught in the forward, but for the warm-up.
    fewer = sum(not s % 3 for s in wanted if s < 4)
    expected = {n: fewer if name == "contained" and n == "0" else lost for n in found}
    assert {n: d["missed_targets"] for n, d in found.items()} == expected
    assert all(d["missed_targets"] == 0.0 for d in fd.diagnostics(bottom).values())


def test_targets_that_come_are_no_reason_to_warn() -> None:
    bottom, _ = made("segment", RULE)
    schedule = fd.Schedule(bottom, target_every=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5 * scheduling.LOOK):
            h = bottom(double(8, 4))
            if schedule.target:
                h.square().mean().backward()
            schedule.step()


def test_frozen_synthesizers_are_no_reason_to_warn() -> None:
    bottom, _ = made("layers", RULE)
    for m in bottom.modules():
        if getattr(m, "synthesizer", None) is not None:
            m.synthesizer.requires_grad_(False)
    schedule = fd.Schedule(bottom)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2 * scheduling.LOOK + 1):
            schedule.step()


def test_the_schedule_says_which_steps_need_the_top() -> None:
    schedule = fd.Schedule(made("layers", RULE)[0], warmup_steps=2, target_every=3)
    found = []
    for _ in range(9):
        found.append(schedule.target)
        schedule.step()
    assert found == [True, True, True, False, False, True, False, False, True]
    close(torch.tensor(found.count(True)), torch.tensor(5))
