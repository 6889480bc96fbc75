"""bfloat16 inputs with float32 parameters in the C++ backend: the kernels that multiply bfloat16
operands, and the float32 ones behind a conversion where the machine (or a narrower instruction
set, chosen by hand) has no such instructions."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    OPTIONS,
    Case,
    bind,
    compare,
    make_case,
    pairwise,
    run_parts,
    run_step,
    shapes,
    slots,
    tolerances,
)
from torch import Tensor

_cpu = pytest.importorskip("fused_dni.backends._cpu")

from fused_dni.backends.cpu import CpuBackend  # noqa: E402
from fused_dni.ops.types import SKIPPED, STEP, LinearConfig, LinearTensors  # noqa: E402

BACKEND = CpuBackend()
HALF, SINGLE = torch.bfloat16, torch.float32
EPS = torch.finfo(HALF).eps
# relu's corner cannot be kept clear of in bfloat16
TABLE = [
    {**row, "activation": "tanh" if row["activation"] == "relu" else row["activation"]}
    for row in pairwise(OPTIONS)
]
PLAIN: dict[str, Any] = {
    **TABLE[0], "activation": "identity", "rule": "sgd", "normalization": None, "kind": "lowrank",
    "context": "label", "max_norm": 0.0, "bias": True, "affine": True, "synthesizer_bias": True,
    "need_dx": True, "frozen": None,
}  # fmt: skip


@pytest.fixture(params=["widest", "narrower"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    names = _cpu.isas()
    if request.param == "narrower":
        if len(names) == 1:
            pytest.skip("this machine runs one instruction set")
        _cpu.set_isa(names[-2])
        assert not _cpu.bf16()
    yield request.param
    _cpu.set_isa(names[-1])


@pytest.fixture
def rounding() -> None:
    if not _cpu.bf16():
        pytest.skip("this machine does not multiply bfloat16 operands")


@pytest.mark.parametrize("parts", [False, True], ids=["step", "parts"])
@pytest.mark.parametrize("threads", [1, 2, 5])
@given(shape=shapes(least_rows=3), row=st.sampled_from(TABLE), seed=st.integers(0, 9))
def test_any_shape(
    isa: str,
    parts: bool,
    threads: int,
    shape: tuple[int, int, int, int, int],
    row: dict[str, Any],
    seed: int,
) -> None:
    torch.set_num_threads(threads)
    if row["normalization"] == "layer" and shape[2] < 7:
        row = {**row, "normalization": None}  # normalised values of few features: ill-conditioned
    case = make_case(shape, row, seed, HALF, SINGLE)
    run = run_parts if parts else run_step
    exact, allowed = tolerances(run, case, EPS)
    compare(run(BACKEND, case.to(HALF, SINGLE)), exact, allowed)


@pytest.mark.parametrize("shape", [(600, 530, 40, 3, 4), (33, 1030, 37, 3, 4), (7, 20, 1027, 3, 4)])
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_depths_of_several_blocks(isa: str, shape: tuple[int, ...], rule: str) -> None:
    case = make_case((*shape[:4], shape[4]), {**PLAIN, "rule": rule}, 1, HALF, SINGLE)
    exact, allowed = tolerances(run_step, case, EPS)
    compare(run_step(BACKEND, case.to(HALF, SINGLE)), exact, allowed)


def near(got: Tensor, exact: Tensor, depth: int) -> None:
    """Equal but for rounding errors of float32 sums of ``depth`` terms."""
    scale = exact.abs().max()
    error = (got.double() - exact).abs().max()
    assert error <= 8 * torch.finfo(SINGLE).eps * depth**0.5 * scale, (error, scale)


@pytest.mark.parametrize("shape", [(64, 96, 80), (37, 151, 45), (300, 33, 17)])
def test_operands_are_rounded_and_nothing_else(rounding: None, shape: tuple[int, int, int]) -> None:
    """Sums, the weight's gradient and the master weight are float32, not bfloat16."""
    n, i, o = shape
    x, grad_h = torch.randn(n, i).to(HALF), torch.randn(n, o)
    layer = LinearTensors(torch.randn(o, i))
    config = LinearConfig("layer")
    h, saved = BACKEND.linear_forward(x, layer, config, True, True)
    z = x.double() @ layer.weight.to(HALF).double().t()
    exact = torch.nn.functional.layer_norm(z, (o,))
    assert saved.normalized is not None and saved.normalized.dtype is SINGLE
    near(saved.normalized, exact, i)
    assert torch.equal(h, saved.normalized.to(HALF))
    made = BACKEND.linear_backward(grad_h, x, h, saved, layer, config, True, True, True)
    delta = made.delta.to(HALF).double()
    assert made.delta.dtype is SINGLE and made.weight is not None and made.x is not None
    near(made.weight, delta.t() @ x.double(), n)
    dx = delta @ layer.weight.to(HALF).double()
    assert made.x.dtype is HALF
    assert ((made.x.double() - dx).abs() <= EPS / 2 * dx.abs() + 1e-5 * dx.abs().max()).all()
    case = make_case((n, i, o, 3, 4), {**PLAIN, "rule": "sgd"}, 0, HALF, SINGLE)
    state, _ = bind(case)
    p = case.layer()
    before = p.weight.detach().clone()
    BACKEND.linear_update_(x, made._replace(bias=p.bias), p, state.tensors(slots(p)))
    near(p.weight.detach(), before.double() - 0.5 * (delta.t() @ x.double()), n)
    assert not torch.equal(p.weight, p.weight.to(HALF).to(SINGLE))


def step_of(case: Case) -> Any:
    state, _ = bind(case)
    return BACKEND.bind_step(
        case.layer(), case.config, case.synthesizer(), 0.0, state.tensors(slots(case.layer()))
    ), state  # fmt: skip


@pytest.mark.parametrize("how", ["in place", "data", "storage"])
def test_a_weight_that_somebody_else_changed(isa: str, how: str) -> None:
    """A bound step reads the weight as it is, whoever wrote to it and with whatever notice."""
    case = make_case((40, 50, 60, 3, 4), PLAIN, 2, HALF, SINGLE)
    step, _ = step_of(case)
    x, label = case.inputs["x"], case.inputs["context"]
    step(x, label, 40.0, True, True)
    weight = case.parameters["weight"]
    with torch.no_grad():
        if how == "in place":
            weight.mul_(-2)
        elif how == "data":
            weight.data.mul_(-2)
        else:
            weight.numpy().__imul__(-2)
    fresh = case.to(HALF, SINGLE)
    again, _ = step_of(fresh)
    for got, wanted in zip(
        step(x, label, 40.0, True, False), again(x, label, 40.0, True, False), strict=True
    ):
        assert got is None or torch.equal(got, wanted)
    for name, p in case.parameters.items():
        assert torch.equal(p, fresh.parameters[name]), name


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["x", "synthesizer.bias"])
@pytest.mark.parametrize("normalization", [None, "batch", "layer"])
def test_what_is_not_finite_is_skipped(
    isa: str, where: str, normalization: str | None, value: float
) -> None:
    row = {**PLAIN, "normalization": normalization, "rule": "adam"}
    case = make_case((19, 17, 33, 3, 4), row, 3, HALF, SINGLE)
    step, state = step_of(case)
    with torch.no_grad():
        if where == "x":
            case.inputs["x"][18, 16] = value
        else:
            case.parameters[where][32] = value
    before = {k: p.detach().clone() for k, p in case.parameters.items()}
    step(case.inputs["x"], case.inputs["context"], 19.0, True, False)
    assert state.hyper[SKIPPED] == 1 and state.hyper[STEP] == 0
    for name, p in case.parameters.items():
        assert torch.equal(p.nan_to_num(), before[name].nan_to_num()), name


@pytest.mark.parametrize("rule", ["sgd", "momentum"])
@pytest.mark.parametrize("size", [1e20, 3.3961e38])
def test_a_product_that_overflows_changes_nothing(isa: str, rule: str, size: float) -> None:
    """Finite factors, and one that the rounding to bfloat16 itself makes infinite."""
    case = make_case((24, 40, 33, 3, 4), {**PLAIN, "rule": rule}, 4, HALF, SINGLE)
    with torch.no_grad():
        for name, p in case.parameters.items():
            if name.startswith("synthesizer"):
                p.zero_()
        case.parameters["synthesizer.bias"][5] = size
        case.parameters["weight"].zero_()
        case.inputs["x"].zero_()
        case.inputs["x"][3, 39] = 1e20
    if rule == "sgd":
        case.frozen = ("bias",)  # whose own gradient may overflow
    step, state = step_of(case)
    before = {k: p.detach().clone() for k, p in case.parameters.items()}
    step(case.inputs["x"], case.inputs["context"], 1.0, False, False)
    assert state.hyper[SKIPPED] == 1 and state.hyper[STEP] == 0
    for name, p in case.parameters.items():
        assert torch.equal(p, before[name]), name


@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_out_of_range_changes_nothing(isa: str, label: int) -> None:
    case = make_case((24, 40, 33, 3, 4), PLAIN, 5, HALF, SINGLE)
    step, state = step_of(case)
    before = {k: p.detach().clone() for k, p in case.parameters.items()}
    case.inputs["context"][7] = label
    with pytest.raises(IndexError):
        step(case.inputs["x"], case.inputs["context"], 24.0, True, True)
    assert state.hyper[SKIPPED] == 0 and state.hyper[STEP] == 0
    for name, p in case.parameters.items():
        assert torch.equal(p, before[name]), name


@pytest.mark.parametrize("normalization", [None, "batch", "layer"])
def test_evaluation(isa: str, normalization: str | None) -> None:
    row = {**PLAIN, "normalization": normalization, "activation": "gelu"}
    case = make_case((23, 18, 35, 4, 6), row, 6, HALF, SINGLE)
    run = functools.partial(run_parts, training=False)
    exact, allowed = tolerances(run, case, EPS)
    compare(run(BACKEND, case.to(HALF, SINGLE)), exact, allowed)


def test_other_mixtures_are_refused_with_a_reason() -> None:
    for x, weight in ((HALF, torch.float64), (HALF, HALF), (torch.float16, SINGLE)):
        why = BACKEND.why_not(torch.zeros(2, 3, dtype=x), torch.zeros(4, 3, dtype=weight))
        assert why is not None and "bfloat16 x with float32" in why
