"""Steps on which nothing above the decoupled layers is run."""

from __future__ import annotations

import copy
import gc
import tracemalloc
import warnings
from typing import Any

import pytest
import torch
import twins
from torch import Tensor, nn
from twins import close, double

import fused_dni as fd
from fused_dni import schedule as scheduling

pytestmark = pytest.mark.usefixtures("one_thread")
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
