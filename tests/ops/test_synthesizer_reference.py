"""The reference's synthesizers against autograd and ``torch.optim``, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from strategies import REFERENCE, Case, bind, make_case
from test_linear_reference import PLAIN, close, torch_optimizer, torch_prediction
from torch import Tensor

import fused_dni.backends.common.synthesizer as synthesizer
from fused_dni.ops.types import (
    G_DOT_G,
    ROWS,
    S_DOT_G,
    S_DOT_S,
    SKIPPED,
    SQUARED_ERROR,
    STATISTICS_SIZE,
    SYNTHESIZERS,
    Prediction,
)
from fused_dni.rules import SGD, Adam, AdamW, Rule

SHAPE = (10, 4, 9, 3, 6)
NAMES = ("weight", "down", "context_weight", "bias")


def make(kind: str, context: str | None, bias: bool = True, seed: int = 0) -> Case:
    options = {**PLAIN, "kind": kind, "context": context, "synthesizer_bias": bias}
    case = make_case(SHAPE, options, seed)
    case.inputs["h"] = torch.randn(10, 9, dtype=torch.float64)
    return case


def gradients(case: Case, statistics: Tensor | None = None, **changes: Any) -> Any:
    if statistics is None:
        statistics = torch.zeros(STATISTICS_SIZE, dtype=torch.float64)
    given = {**case.inputs, **changes}
    prediction = REFERENCE.synthesizer_predict(given["h"], case.synthesizer(), given.get("context"))
    return prediction, REFERENCE.synthesizer_gradients(
        given["h"], prediction, given["grad_h"], case.synthesizer(), given.get("context"),
        changes.get("target_scale", case.target_scale), statistics,
    )  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("context", [None, "label", "vector", "table"])
@pytest.mark.parametrize("kind", SYNTHESIZERS)
def test_prediction_and_gradients_are_autograd(kind: str, context: str | None, bias: bool) -> None:
    case = make(kind, context, bias)
    prediction, made = gradients(case)
    p = {k: t.clone().requires_grad_() for k, t in case.parameters.items()}
    scaled = torch_prediction(case.inputs["h"], case, p)
    close(prediction.scaled, scaled, "scaled")
    assert (prediction.reduced is not None) == (kind in ("lowrank", "cross_entropy"))
    loss = ((scaled - case.target_scale * case.inputs["grad_h"]) ** 2).sum() / 10
    loss.backward()
    for name, g in zip(NAMES, made, strict=True):
        leaf = p.get("synthesizer." + name)
        close(g, None if leaf is None else leaf.grad, name)


@pytest.mark.parametrize(
    "rule",
    [SGD(0.1), SGD(0.1, 0.9, 0.01, True), Adam(0.01, eps=1e-3), AdamW(0.01, eps=1e-3)],
    ids=lambda r: f"{r.kind}{'-nesterov' * getattr(r, 'nesterov', False)}",
)
@pytest.mark.parametrize("context", ["label", "table"])
@pytest.mark.parametrize("kind", SYNTHESIZERS)
def test_update_is_torch_optim(kind: str, context: str, rule: Rule) -> None:
    case = make(kind, context)
    case.rule = rule
    _, state = bind(case)
    twin = case.to(torch.float64, torch.float64)
    p = {k: t.detach().requires_grad_() for k, t in twin.parameters.items()}
    leaves = [p["synthesizer." + n] for n in NAMES if "synthesizer." + n in p]
    optimizer = torch_optimizer(rule, leaves)
    h, given = case.inputs["h"], case.inputs["context"]
    statistics = torch.zeros(STATISTICS_SIZE, dtype=torch.float64)
    for t in range(4):
        grad_h = torch.randn(10, 9, dtype=torch.float64) / 10
        now = case.synthesizer()
        versions = [q._version for q in now.parameters() if q is not None]
        prediction = REFERENCE.synthesizer_predict(h, now, given)
        REFERENCE.synthesizer_update_(
            h, prediction, grad_h, now, given, 10.0, statistics,
            state.tensors(now.parameters()),
        )  # fmt: skip
        assert all(
            q._version > v
            for q, v in zip([q for q in now.parameters() if q is not None], versions, strict=True)
        )
        optimizer.zero_grad()
        ((torch_prediction(h, twin, p) - 10 * grad_h) ** 2).sum().div(10).backward()
        optimizer.step()
        for name in NAMES:
            if "synthesizer." + name in p:
                close(
                    case.parameters["synthesizer." + name], p["synthesizer." + name],
                    f"{name} after {t}", 1e-11,
                )  # fmt: skip
    assert state.steps == 4 and statistics[ROWS] == 40


def test_regression_does_not_depend_on_batch_size() -> None:
    """Twice the rows, half the gradient (a mean loss), twice kappa: the same regression."""
    case = make("lowrank", "label")
    _, once = gradients(case)
    double = {k: torch.cat([t, t]) for k, t in case.inputs.items()}
    double["grad_h"] /= 2
    _, twice = gradients(case, target_scale=20.0, **double)
    for name, a, b in zip(NAMES, once, twice, strict=True):
        close(a, b, name)
    _, wrong = gradients(case, target_scale=10.0, **double)
    with pytest.raises(AssertionError):
        close(once[0], wrong[0])


def test_statistics() -> None:
    case = make("dense", "vector")
    statistics = torch.arange(5, dtype=torch.float64)
    prediction, _ = gradients(case, statistics)
    s, g = prediction.scaled, 10 * case.inputs["grad_h"]
    expected = torch.arange(5, dtype=torch.float64)
    expected[S_DOT_G] += (s * g).sum()
    expected[S_DOT_S] += (s * s).sum()
    expected[G_DOT_G] += (g * g).sum()
    expected[SQUARED_ERROR] += ((s - g) ** 2).sum()
    expected[ROWS] += 10
    close(statistics, expected)


@pytest.mark.parametrize("where", ["grad_h", "scaled"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_target_that_is_not_finite_is_counted_and_skipped(where: str, value: float) -> None:
    case = make("lowrank", "label")
    _, state = bind(case)
    now, h, context = case.synthesizer(), case.inputs["h"], case.inputs["context"]
    prediction, grad_h = REFERENCE.synthesizer_predict(h, now, context), case.inputs["grad_h"]
    bad = (grad_h if where == "grad_h" else prediction.scaled).clone()
    bad[1, 1] = value
    if where == "grad_h":
        grad_h = bad
    else:
        prediction = Prediction(bad, prediction.reduced)
    statistics = torch.ones(STATISTICS_SIZE, dtype=torch.float64)
    rule = state.tensors(now.parameters())
    before = {k: t.detach().clone() for k, t in case.parameters.items()}
    REFERENCE.synthesizer_update_(h, prediction, grad_h, now, context, 10.0, statistics, rule)
    assert torch.equal(statistics, torch.ones_like(statistics))
    assert (state.steps, state.skipped) == (0, 1)
    assert rule.hyper[SKIPPED] == 1
    for name, t in case.parameters.items():
        assert torch.equal(t, before[name]), name
    assert not any(m.any() for m in rule.first if m is not None)
    REFERENCE.synthesizer_gradients(h, prediction, grad_h, now, context, 10.0, statistics)
    assert torch.equal(statistics, torch.ones_like(statistics))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_labels_of_any_integer_dtype(dtype: torch.dtype) -> None:
    case = make("dense", "label")
    prediction, made = gradients(case)
    narrow, made_narrow = gradients(case, context=case.inputs["context"].to(dtype))
    assert torch.equal(prediction.scaled, narrow.scaled)
    assert torch.equal(made[2], made_narrow[2])


@pytest.mark.parametrize("kind", ["dense", "cross_entropy"])
def test_label_range(kind: str) -> None:
    case = make(kind, "label")
    for label in (-1, 6):
        context = torch.full((10,), label)
        with pytest.raises(IndexError, match=f"label {label} is out of range"):
            REFERENCE.synthesizer_predict(case.inputs["h"], case.synthesizer(), context)


@pytest.mark.parametrize("shift", [0.0, 1e3, -1e3])
def test_a_softmax_of_large_logits(shift: float) -> None:
    """Of which exponentials overflow: the same but for what is common to all."""
    case = make("cross_entropy", "label")
    prediction, made = gradients(case)
    case.parameters["synthesizer.context_weight"] += shift
    moved, far = gradients(case)
    for a, b in zip((*prediction, *made), (*moved, *far), strict=True):
        close(a, b, tolerance=1e-11)


def test_a_cross_entropy_is_told_the_classes() -> None:
    case = make("cross_entropy", "label")
    with pytest.raises(ValueError, match="takes a context, got none"):
        REFERENCE.synthesizer_predict(case.inputs["h"], case.synthesizer(), None)


def test_unknown_kind() -> None:
    case = make("dense", None)
    with pytest.raises(ValueError, match="unknown synthesizer 'convolutional'"):
        synthesizer.synthesizer_predict(
            case.inputs["h"], case.synthesizer()._replace(kind="convolutional"), None
        )
