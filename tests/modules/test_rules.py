"""The update rules: checks of their arguments, and their formulas against ``torch.optim``."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import fused_dni.backends.reference.rules as formulas
from fused_dni.ops.types import HYPER_SIZE, SKIPPED, STEP, RuleTensors
from fused_dni.rules import SGD, Adam, AdamW, Rule, RuleState

RULES = [
    SGD(0.1),
    SGD(0.1, weight_decay=0.02),
    SGD(0.1, momentum=0.9),
    SGD(0.05, momentum=0.5, weight_decay=0.1, nesterov=True),
    Adam(0.01),
    Adam(0.01, betas=(0.5, 0.9), eps=1e-4, weight_decay=0.1),
    Adam(0.01, betas=(0.0, 0.0)),
    AdamW(0.01),
    AdamW(0.02, betas=(0.8, 0.99), weight_decay=0.0),
]


def optimizer(rule: Rule, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    made: dict[str, Any] = {
        "sgd": torch.optim.SGD,
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
    }
    result: torch.optim.Optimizer = made[rule.kind](parameters, **rule.defaults())
    return result


def parameters() -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(2)
    return [
        nn.Parameter(torch.randn(size, generator=g, dtype=torch.float64))
        for size in ((5, 3), (5,), (1,))
    ]


def compare_with_torch(rule: Rule, steps: int = 6) -> None:
    ours, theirs = parameters(), parameters()
    state, twin = RuleState(rule), optimizer(rule, theirs)
    for t in range(steps):
        gradients = [torch.randn(p.shape, dtype=torch.float64) for p in ours]
        gradients[0][0, 0] = 0.0  # and a gradient that is exactly zero
        for p, g in zip(theirs, gradients, strict=True):
            p.grad = g.clone()
        formulas.apply_(ours, gradients, state.tensors(ours))
        twin.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-14, msg=f"after {t + 1} steps")
    first, second = state.moments()
    keys = ("momentum_buffer",) if rule.kind == "sgd" else ("exp_avg", "exp_avg_sq")
    for key, moments in zip(keys, (first, second), strict=False):
        for m, q in zip(moments, theirs, strict=True):
            if m is not None:
                torch.testing.assert_close(m, twin.state[q][key], rtol=1e-13, atol=1e-14)
    assert state.steps == steps and state.skipped == 0


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_formulas_are_torch_optim(rule: Rule) -> None:
    compare_with_torch(rule)


@pytest.mark.parametrize("rule", [RULES[3], RULES[4], RULES[7]], ids=repr)
def test_a_planted_error_is_caught(rule: Rule) -> None:
    name = "sgd" if rule.kind == "sgd" else "adam"
    exact = getattr(formulas, name)

    def off(*args: Any, **kwargs: Any) -> Any:
        if name == "adam":
            kwargs["eps"] += 1e-10
        else:
            kwargs["weight_decay"] *= 1 + 1e-9
        return exact(*args, **kwargs)

    with mock.patch.object(formulas, name, off), pytest.raises(AssertionError):
        compare_with_torch(rule)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("slot", [0, 2])
@pytest.mark.parametrize("rule", [RULES[3], RULES[5], RULES[7]], ids=repr)
def test_a_gradient_that_is_not_finite_only_counts(rule: Rule, slot: int, bad: float) -> None:
    ps = parameters()
    state = RuleState(rule)
    gradients = [torch.ones_like(p) for p in ps]
    formulas.apply_(ps, gradients, state.tensors(ps))
    tensors = state.tensors(ps)
    watched = [*ps, *[m for m in (*tensors.first, *tensors.second) if m is not None]]
    before = [(t.detach().clone(), t._version) for t in watched]
    hyper = tensors.hyper.clone()
    gradients[slot].view(-1)[0] = bad
    formulas.apply_(ps, gradients, tensors)
    for t, (value, version) in zip(watched, before, strict=True):
        assert torch.equal(t, value) and t._version == version
    hyper[SKIPPED] += 1
    assert torch.equal(tensors.hyper, hyper) and hyper[STEP] == 1


def test_a_frozen_slot_may_hold_any_gradient() -> None:
    ps = parameters()
    ps[1].requires_grad_(False)
    state = RuleState(Adam())
    tensors = state.tensors(ps)
    assert tensors.trainable == (True, False, True) and tensors.first[1] is None
    before = ps[1].clone()
    formulas.apply_(ps, [torch.ones(5, 3), torch.full((5,), torch.nan), torch.ones(1)], tensors)
    assert torch.equal(ps[1], before) and state.steps == 1


def test_nothing_is_written_before_everything_is_computed() -> None:
    """An error in the last slot leaves the first as it was."""
    ps = parameters()
    tensors = RuleState(SGD(0.1)).tensors(ps)
    before = [p.detach().clone() for p in ps]
    with pytest.raises(RuntimeError):
        formulas.apply_(ps, [torch.ones(5, 3), torch.ones(5), torch.ones(7)[:3]], tensors._replace(
            first=(None, None, torch.zeros(2))))  # fmt: skip
    for p, q in zip(ps, before, strict=True):
        assert torch.equal(p, q)
    assert tensors.hyper[STEP] == 0


def test_low_precision_parameters_are_refused() -> None:
    ps = [nn.Parameter(torch.ones(3, dtype=torch.bfloat16))]
    with pytest.raises(TypeError, match="float32 masters"):
        formulas.apply_(ps, [torch.ones(3)], RuleState(SGD()).tensors(ps))


def test_missing_gradient_missing_moments_and_unknown_rules_are_refused() -> None:
    ps = [nn.Parameter(torch.ones(3))]
    tensors = RuleState(Adam()).tensors(ps)
    gradient = [torch.ones(3)]
    with pytest.raises(ValueError, match="no gradient"):
        formulas.apply_(ps, [None], tensors)
    with pytest.raises(ValueError, match="no moments"):
        formulas.apply_(ps, gradient, tensors._replace(first=(None,)))
    with pytest.raises(ValueError, match="unknown update rule 'lion'"):
        formulas.apply_(ps, gradient, tensors._replace(kind="lion"))
    assert torch.equal(ps[0], torch.ones(3))


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (SGD, {"lr": -1.0}, "lr must be"),
        (SGD, {"lr": math.nan}, "lr must be"),
        (SGD, {"lr": math.inf}, "lr must be"),
        (SGD, {"momentum": 1.0}, "momentum must be"),
        (SGD, {"momentum": -0.1}, "momentum must be"),
        (SGD, {"weight_decay": -1e-9}, "weight_decay must be"),
        (SGD, {"nesterov": True}, "needs momentum"),
        (Adam, {"betas": (1.0, 0.9)}, r"betas\[0\]"),
        (Adam, {"betas": (0.9, math.nan)}, r"betas\[1\]"),
        (Adam, {"eps": -1e-8}, "eps must be"),
        (AdamW, {"lr": -1e-3}, "lr must be"),
        (AdamW, {"weight_decay": math.inf}, "weight_decay must be"),
    ],
)
def test_bad_rates(make: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_defaults_are_those_of_torch() -> None:
    p = [nn.Parameter(torch.ones(1))]
    for rule, twin in (
        (SGD(), torch.optim.SGD(p)),
        (Adam(), torch.optim.Adam(p)),
        (AdamW(), torch.optim.AdamW(p)),
    ):
        assert rule.defaults().items() <= twin.defaults.items()


def test_bias_correction_far_out() -> None:
    """The step count is exact in float64 where a product of betas would have run out."""
    p = [nn.Parameter(torch.ones(1, dtype=torch.float64))]
    hyper = torch.zeros(HYPER_SIZE, dtype=torch.float64)
    hyper[:5] = torch.tensor([0.1, 0.9, 0.999, 1e-8, 0.0], dtype=torch.float64)
    hyper[STEP] = 10**9
    zero = torch.zeros(1, dtype=torch.float64)
    rule = RuleTensors("adam", False, hyper, (zero.clone(),), (zero.clone(),), (True,))
    formulas.apply_(p, [torch.ones(1, dtype=torch.float64)], rule)
    assert hyper[STEP] == 10**9 + 1
    expected = 1 - 0.1 * 0.1 / (math.sqrt(0.001) + 1e-8)  # nothing left to correct
    torch.testing.assert_close(p[0].item(), expected, rtol=1e-12, atol=0)


def test_rounding_at_random_is_right_in_the_mean() -> None:
    """Each value becomes a neighbour, by the distances to both; anew in each step and slot."""
    value = torch.tensor([1.0, 1.0 + 2**-9, -(1.0 + 3 * 2**-9), 3.1e-39, 0.0, 1e20])
    many = value.expand(4096, 6).contiguous()
    rounded = formulas.rounded_at_random(many, 3, 1).float()
    below = (value.view(torch.int32) & -0x10000).view(torch.float32)
    above = ((value.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    assert ((rounded == below) | (rounded == above)).all()
    share = (rounded == above).float().mean(0)
    wanted = (value - below) / (above - below)
    # Five standard deviations of a share of 4,096.
    assert ((share - wanted).abs() <= 5 * (wanted * (1 - wanted) / 4096).sqrt() + 1e-9).all()
    assert torch.equal(rounded, formulas.rounded_at_random(many, 3, 1).float())
    for step, slot in ((4, 1), (3, 2)):  # a quarter goes up: 2 * 1/4 * 3/4 of them differ
        other = formulas.rounded_at_random(many, step, slot).float()
        assert 0.3 < (other[:, 1] != rounded[:, 1]).float().mean() < 0.45


def test_small_updates_of_bfloat16_parameters_are_not_lost() -> None:
    """Steps of a thirty-second of the distance between two numbers."""
    p = nn.Parameter(torch.ones(2000, dtype=torch.bfloat16))
    state = RuleState(SGD(2.0**-13, momentum=0.5, stochastic_rounding=True))
    for _ in range(200):
        tensors = state.tensors([p])
        formulas.apply_([p], [torch.ones(2000, dtype=torch.bfloat16)], tensors)
    assert tensors.first[0] is not None and tensors.first[0].dtype == torch.float32
    moved = 1 - p.detach().float().mean()
    assert moved == pytest.approx(2 * 198 * 2.0**-13, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_without_the_right_to_round_is_refused(dtype: torch.dtype) -> None:
    ps = [nn.Parameter(torch.ones(3, dtype=dtype))]
    rule = SGD(stochastic_rounding=dtype == torch.float16)
    with pytest.raises(TypeError, match="stochastic_rounding=True"):
        formulas.apply_(ps, [torch.ones(3)], RuleState(rule).tensors(ps))
