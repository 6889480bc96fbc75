"""Rules on parameters of any module: PyTorch's fused kernels against the reference's formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fused_dni.backends.reference import rules as reference
from fused_dni.functional import update
from fused_dni.ops.types import SKIPPED, STEP
from fused_dni.rules import SGD, Adam, AdamW, RuleState

RULES = {
    "sgd": SGD(0.1, weight_decay=0.01),
    "momentum": SGD(0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": SGD(0.1, momentum=0.9, nesterov=True),
    "adam": Adam(0.05, eps=1e-3, weight_decay=0.01),
    "adamw": AdamW(0.05, eps=1e-3, weight_decay=0.1),
}


def problem(rule, dtype=torch.float32, steps=3):
    """Two trained slots, one absent, one frozen; their rule's tensors; gradients of some steps."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    slots = [torch.nn.Parameter(randn(5, 7)), None, torch.nn.Parameter(randn(9))]
    slots.append(torch.nn.Parameter(randn(4), requires_grad=False))
    made = [[randn(5, 7), None, randn(9), None] for _ in range(steps)]
    return slots, RuleState(rule).tensors(slots), made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_same_formulas_as_the_reference(monkeypatch, rule, dtype):
    slots, tensors, made = problem(RULES[rule], dtype)
    others, expected, _ = problem(RULES[rule], dtype)
    versions = [p._version for p in (slots[0], slots[2])]
    for gradients in made:
        reference.apply_(others, gradients, expected)
        with monkeypatch.context() as patched:
            patched.setattr(reference, "apply_", None)  # it is the kernels that are tested
            update.apply_(slots, gradients, tensors)
    assert all(p._version > v for p, v in zip((slots[0], slots[2]), versions, strict=True))
    assert tensors.hyper[STEP] == 3 and tensors.hyper[SKIPPED] == 0
    # Three steps of a few roundings each; the rules' slopes in the gradient are below lr / eps.
    eps = torch.finfo(dtype).eps
    for got, exact in zip(
        [*slots, *tensors.first, *tensors.second],
        [*others, *expected.first, *expected.second],
        strict=True,
    ):
        assert (got is None) == (exact is None)
        if exact is not None:
            torch.testing.assert_close(got, exact, rtol=60 * eps, atol=60 * eps)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(rule, value):
    slots, tensors, made = problem(RULES[rule])
    update.apply_(slots, made[0], tensors)
    held = [t for t in (*slots, *tensors.first, *tensors.second) if t is not None]
    before = [t.detach().clone() for t in held]
    made[1][2][3] = value
    update.apply_(slots, made[1], tensors)
    assert (tensors.hyper[STEP], tensors.hyper[SKIPPED]) == (1, 1)
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))


def test_a_gradient_whose_square_overflows_is_finite():
    slots, tensors, made = problem(RULES["sgd"])
    made[0][2][3] = 1e30
    update.apply_(slots, made[0], tensors)
    assert (tensors.hyper[STEP], tensors.hyper[SKIPPED]) == (1, 0)
    assert slots[2][3].item() == pytest.approx(-1e29)


@pytest.mark.parametrize("what", ["strides", "dtypes"])
def test_what_the_kernels_do_not_take_the_reference_does(what):
    slots, _, made = problem(RULES["adam"])
    if what == "strides":
        slots[0] = torch.nn.Parameter(slots[0].detach().t().contiguous().t())
    else:
        slots[0] = torch.nn.Parameter(slots[0].detach().double())
        made[0][0] = made[0][0].double()
    others = [None if p is None else torch.nn.Parameter(p.detach().clone()) for p in slots]
    others[3].requires_grad_(False)
    tensors, expected = (RuleState(RULES["adam"]).tensors(s) for s in (slots, others))
    update.apply_(slots, made[0], tensors)
    reference.apply_(others, made[0], expected)
    assert all(torch.equal(a, b) for a, b in zip(slots, others, strict=True) if a is not None)


def test_errors_are_the_reference_s():
    slots, tensors, made = problem(RULES["adam"])
    made[0][0] = None
    with pytest.raises(ValueError, match="no gradient for the trainable slot 0"):
        update.apply_(slots, made[0], tensors)
    with pytest.raises(ValueError, match="unknown update rule 'lion'"):
        update.apply_(slots, made[1], tensors._replace(kind="lion"))
    low = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="needs float32 or float64 parameters"):
        update.apply_([low], [low.detach()], RuleState(replace(RULES["sgd"])).tensors([low]))
