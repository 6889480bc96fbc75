"""RuleState: obeys its group, follows its parameters, is copied, saved and resumed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_dni as fd
from fused_dni.backends.reference.rules import apply_
from fused_dni.ops.types import BETA1, BETA2, LR, STEP, WEIGHT_DECAY
from fused_dni.rules import SGD, Adam, AdamW, Rule, RuleState


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(4)
    return [nn.Parameter(torch.randn(s, generator=g, dtype=dtype)) for s in ((4, 3), (4,))]


def train(
    ps: list[nn.Parameter], state: RuleState, steps: range, dtype: torch.dtype = torch.float64
) -> None:
    for t in steps:
        g = torch.Generator().manual_seed(t)
        apply_(ps, [torch.randn(p.shape, generator=g, dtype=dtype) for p in ps], state.tensors(ps))


def same(a: list[Any], b: list[Any]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_change_of_the_group_is_obeyed() -> None:
    """As a learning-rate scheduler makes them; the twin is torch's optimizer and scheduler."""
    ours, theirs = parameters(), parameters()
    state = RuleState(SGD(0.1, momentum=0.9))
    twin = torch.optim.SGD(theirs, 0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(twin, 0.5, total_steps=8)
    seen = set()
    for t in range(8):
        state.group["lr"] = twin.param_groups[0]["lr"]
        state.group["momentum"] = twin.param_groups[0]["momentum"]
        seen.add((state.group["lr"], state.group["momentum"]))
        train(ours, state, range(t, t + 1))
        g = torch.Generator().manual_seed(t)
        for p in theirs:
            p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64)
        twin.step()
        if t < 7:
            schedule.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-14)
    assert len(seen) == 8
    assert state.tensors(ours).hyper[LR] == twin.param_groups[0]["lr"]


def test_a_rate_that_is_a_tensor_filled_in_place_is_obeyed() -> None:
    ps, state = parameters(), RuleState(Adam())
    state.group["lr"] = torch.tensor(0.5)
    assert state.tensors(ps).hyper[LR] == 0.5
    state.group["lr"].fill_(0.25)
    assert state.tensors(ps).hyper[LR] == 0.25


def test_betas_decay_and_nesterov_are_obeyed() -> None:
    ps, state = parameters(), RuleState(AdamW())
    state.tensors(ps)
    state.group.update(betas=(0.5, 0.6), weight_decay=0.7)
    hyper = state.tensors(ps).hyper
    assert hyper[BETA1] == 0.5 and hyper[BETA2] == 0.6 and hyper[WEIGHT_DECAY] == 0.7
    ps, state = parameters(), RuleState(SGD(momentum=0.5))
    assert not state.tensors(ps).nesterov
    state.group["nesterov"] = True
    assert state.tensors(ps).nesterov


def test_momentum_raised_from_zero_is_obeyed() -> None:
    ours, theirs = parameters(), parameters()
    state, twin = RuleState(SGD(0.1)), torch.optim.SGD(theirs, 0.1)
    for t in range(4):
        if t == 2:
            state.group["momentum"] = twin.param_groups[0]["momentum"] = 0.9
        train(ours, state, range(t, t + 1))
        g = torch.Generator().manual_seed(t)
        for p in theirs:
            p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64)
        twin.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-14)


def test_a_bad_rate_in_the_group_is_refused_and_changes_nothing() -> None:
    ps, state = parameters(), RuleState(SGD(0.1, momentum=0.9))
    train(ps, state, range(2))
    before, hyper = [p.detach().clone() for p in ps], state.hyper.clone()
    state.group["lr"] = -0.1
    for _ in range(2):  # not only the first time
        with pytest.raises(ValueError, match="lr must be"):
            state.tensors(ps)
    assert same(before, [p.detach() for p in ps]) and torch.equal(state.hyper, hyper)
    state.group["lr"] = 0.1
    train(ps, state, range(2, 3))


def test_nothing_is_rebuilt_when_nothing_changed() -> None:
    ps, state = parameters(), RuleState(Adam())
    assert state.tensors(ps) is state.tensors(ps)


def test_moments_are_made_late_and_of_the_parameter() -> None:
    ps, state = parameters(), RuleState(Adam())
    assert state.moments() == ((), ())
    for p in ps:
        p.data = p.data.float()
    tensors = state.tensors([ps[0], None, ps[1]])
    assert [None if m is None else m.dtype for m in tensors.first] == [
        torch.float32,
        None,
        torch.float32,
    ]
    assert tensors.trainable == (True, False, True)
    assert RuleState(SGD()).tensors(parameters()).first == (None, None)


def test_a_move_to_another_dtype_keeps_moments_and_steps() -> None:
    ps, state = parameters(), RuleState(Adam())
    train(ps, state, range(3))
    first = [m.clone() for m in state.tensors(ps).first if m is not None]
    for p in ps:
        p.data = p.data.float()
    moved = state.tensors(ps)
    assert state.steps == 3
    for m, old in zip(moved.first, first, strict=True):
        assert m is not None and m.dtype == torch.float32 and m.any()
        assert torch.equal(m, old.float())
    train(ps, state, range(3, 5), torch.float32)
    assert state.steps == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_move_to_another_device_keeps_moments_and_steps() -> None:
    ps, state = parameters(), RuleState(Adam())
    train(ps, state, range(3))
    for p in ps:
        p.data = p.data.cuda()
    moved = state.tensors(ps)
    assert moved.hyper.is_cuda and state.steps == 3
    assert all(m is not None and m.is_cuda and m.any() for m in moved.first)


def test_a_move_to_the_meta_device_moves_what_belongs_to_it() -> None:
    """The path of a device move, on a machine with one device."""
    ps, state = parameters(), RuleState(SGD(momentum=0.5))
    state.tensors(ps)
    meta = [nn.Parameter(p.detach().to("meta")) for p in ps]
    moved = state.tensors(meta)
    assert moved.hyper.is_meta and all(m is not None and m.is_meta for m in moved.first)


def test_a_new_shape_starts_anew_and_a_frozen_slot_keeps_its_moments() -> None:
    ps, state = parameters(), RuleState(Adam())
    train(ps, state, range(3))
    kept = state.tensors(ps).first[0]
    assert kept is not None
    kept = kept.clone()
    ps[0].requires_grad_(False)
    assert state.tensors(ps).first[0] is None and not state.tensors(ps).trainable[0]
    ps[0].requires_grad_(True)
    thawed = state.tensors(ps).first
    assert thawed[0] is not None and torch.equal(thawed[0], kept)
    grown = [ps[0], nn.Parameter(torch.zeros(9, dtype=torch.float64))]
    after = state.tensors(grown).first
    assert after[0] is not None and torch.equal(after[0], kept)
    assert after[1] is not None and after[1].shape == (9,) and not after[1].any()


@pytest.mark.parametrize("rule", [SGD(0.1, momentum=0.9), Adam(0.1), AdamW(0.1)])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_alone(rule: Rule, how: str) -> None:
    ps, state = parameters(), RuleState(rule)
    train(ps, state, range(3))
    both = (ps, state)
    others, other = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    frozen, hyper = [p.detach().clone() for p in others], other.hyper.clone()
    train(ps, state, range(3, 6))
    assert same(frozen, [p.detach() for p in others]) and torch.equal(hyper, other.hyper)
    train(others, other, range(3, 6))
    assert same([p.detach() for p in ps], [p.detach() for p in others])
    assert other.steps == state.steps == 6
    assert other.tensors(others).hyper is other.hyper
    for m, n in zip(state.moments()[0], other.moments()[0], strict=True):
        assert m is not None and n is not None and m is not n and torch.equal(m, n)


@pytest.mark.parametrize(
    "rule", [SGD(0.1), SGD(0.1, momentum=0.9, nesterov=True), Adam(0.1), AdamW(0.1)], ids=repr
)
@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resume_is_bitwise(rule: Rule, used_before: bool, dtype: torch.dtype) -> None:
    ps, state = parameters(dtype), RuleState(rule)
    train(ps, state, range(3), dtype)
    saved: dict[str, Any] = {
        "steps": state.steps,
        "moments": [[None if m is None else m.clone() for m in ms] for ms in state.moments()],
        "parameters": [p.detach().clone() for p in ps],
    }
    saved = pickle.loads(pickle.dumps(saved))
    train(ps, state, range(3, 7), dtype)

    others, other = parameters(dtype), RuleState(rule)
    if used_before:
        train(others, other, range(20, 25), dtype)
    for p, q in zip(others, saved["parameters"], strict=True):
        p.data.copy_(q)
    other.load(saved["steps"], 3, *saved["moments"])
    train(others, other, range(3, 7), dtype)
    assert same([p.detach() for p in ps], [p.detach() for p in others])
    assert other.hyper[STEP] == 7 and other.skipped == 3

    forgotten = RuleState(rule)
    again = parameters(dtype)
    for p, q in zip(again, saved["parameters"], strict=True):
        p.data.copy_(q)
    train(again, forgotten, range(3, 7), dtype)
    loses = rule.moments() > 0
    assert same([p.detach() for p in ps], [p.detach() for p in again]) != loses


def test_reset_forgets_moments_and_counts() -> None:
    ps, state = parameters(), RuleState(Adam(0.1))
    train(ps, state, range(3))
    state.reset()
    assert state.steps == 0 and state.moments() == ((), ())
    tensors = state.tensors(ps)
    assert not any(m.any() for m in (*tensors.first, *tensors.second) if m is not None)
    assert tensors.hyper[LR] == 0.1


def test_loaded_moments_are_copies() -> None:
    ps, state = parameters(), RuleState(Adam())
    moment: list[Tensor] = [torch.ones(4, 3).double(), torch.ones(4).double()]
    state.load(5, 0, moment, moment)
    train(ps, state, range(1))
    assert state.steps == 6 and all(bool((m == 1).all()) for m in moment)


@pytest.mark.parametrize("rule", [fd.SGD, fd.AdamW])
def test_layers_round_at_random(rule: type[fd.SGD | fd.AdamW]) -> None:
    """bfloat16 layers follow their float32 twins through updates too small for plain rounding."""
    moved = []
    first: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        layer = fd.FusedDNILinear(
            16, 24, activation="tanh", dtype=dtype,
            update=rule(2e-4, stochastic_rounding=dtype == torch.bfloat16),
        )  # fmt: skip
        assert isinstance(layer.synthesizer, fd.LinearSynthesizer)
        with torch.no_grad():
            layer.synthesizer.bias += 10.0
        first = first or {k: t.bfloat16().float() for k, t in layer.state_dict().items()}
        layer.load_state_dict(first)
        before = layer.weight.detach().float().clone()
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
        for _ in range(40):
            layer(x)
        moved.append(layer.weight.detach().float() - before)
    full, low = moved
    assert (low * full).sum() / (full * full).sum() == pytest.approx(1.0, abs=0.05)
