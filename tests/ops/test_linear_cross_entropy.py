"""``linear_cross_entropy``: every backend against PyTorch in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fused_dni import ops
from fused_dni.ops import registry
from fused_dni.ops.types import Backend, CrossEntropy

IGNORED = -100


class Case(NamedTuple):
    """What the op is called with."""

    x: Tensor  # [N, I]
    weight: Tensor  # [C, I]
    bias: Tensor | None  # [C]
    target: Tensor  # [N]
    smoothing: float = 0.0


def make(
    rows: int,
    features: int,
    classes: int,
    dtype: torch.dtype,
    *,
    bias: bool = True,
    ignored: float = 0.0,
    smoothing: float = 0.0,
    size: float = 1.0,
) -> Case:
    """A share of the rows is ignored; logits are of a size."""
    x = torch.randn(rows, features, dtype=dtype) * size
    weight = torch.randn(classes, features, dtype=dtype) / features**0.5
    target = torch.randint(0, classes, (rows,))
    target[torch.rand(rows) < ignored] = IGNORED
    shift = torch.randn(classes, dtype=dtype) if bias else None
    return Case(x, weight, shift, target, smoothing)


def run(backend: Backend, case: Case, need_delta: bool = True) -> CrossEntropy:
    return ops.linear_cross_entropy(
        backend, case.x, case.weight, case.bias, case.target, case.smoothing, IGNORED, need_delta
    )


def exact(case: Case) -> tuple[Tensor, Tensor]:
    """The loss and its gradient at the logits, by PyTorch in float64."""
    bias = None if case.bias is None else case.bias.double()
    z = F.linear(case.x.double(), case.weight.double(), bias).requires_grad_()
    loss = F.cross_entropy(z, case.target, label_smoothing=case.smoothing, ignore_index=IGNORED)
    (delta,) = torch.autograd.grad(loss, z)
    return loss.detach(), delta


def compare(got: CrossEntropy, case: Case, eps: float) -> None:
    """Within what rounding may do.

    A logit is a sum of I + 1 products: it is off by (I + 2) eps times the sum of their sizes, d. A
    row's loss moves by 2 d at most, and so does a probability relative to itself. Sums over C
    classes and the exponentials (a few units in the last place) add (C + 16) eps, relative to
    probabilities and to the largest of the logits' distances.
    """
    loss, delta = exact(case)
    counted = int((case.target != IGNORED).sum())
    if not counted:
        assert got.loss.isnan() and got.delta is not None and not bool(got.delta.any())
        return
    x, weight = case.x.double(), case.weight.double()
    sizes = x.abs() @ weight.abs().t()
    if case.bias is not None:
        sizes = sizes + case.bias.double().abs()
    classes = weight.shape[0]
    logit = (weight.shape[1] + 2) * eps * float(sizes.max())
    sums = (classes + 16) * eps
    spread = 1.0 + 2.0 * float(sizes.max())
    torch.testing.assert_close(got.loss.double(), loss, rtol=0, atol=2 * logit + sums * spread)
    assert got.delta is not None
    torch.testing.assert_close(got.delta.double(), delta, rtol=0, atol=(2 * logit + sums) / counted)


def backend_for(name: str, x: Tensor, weight: Tensor) -> Backend:
    reason = dict(registry.report())[name]
    if reason is None:
        reason = registry.get(name).why_not(x, weight)
    if reason is not None:
        pytest.skip(f"{name} {reason}")
    return registry.get(name)


names = pytest.mark.parametrize("backend", registry.names())


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 5, 3), (3, 17, 2), (8, 4, 11), (70, 33, 10), (33, 8, 300)], ids=str
)
@pytest.mark.usefixtures("poisoned")
def test_loss_and_gradient(
    backend: str,
    dtype: torch.dtype,
    smoothing: float,
    ignored: float,
    shape: tuple[int, int, int],
) -> None:
    case = make(*shape, dtype, ignored=ignored, smoothing=smoothing)
    served = backend_for(backend, case.x, case.weight)
    got = run(served, case)
    assert got.loss.dtype is dtype and got.loss.shape == ()
    compare(got, case, torch.finfo(dtype).eps)
    alone = run(served, case, need_delta=False)
    assert alone.delta is None
    assert torch.equal(alone.loss.nan_to_num(7.0), got.loss.nan_to_num(7.0))


@pytest.fixture(params=["widest", "narrowest"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _cpu = pytest.importorskip("fused_dni.backends._cpu")
    names = _cpu.isas()
    _cpu.set_isa(names[-1 if request.param == "widest" else 0])
    yield request.param
    _cpu.set_isa(names[-1])


@given(
    rows=st.integers(1, 70),
    features=st.integers(1, 70),
    classes=st.integers(1, 70),
    threads=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    bias=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.2]),
    ignored=st.sampled_from([0.0, 0.3]),
    size=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_the_kernel_in_any_shape(
    isa: str,
    rows: int,
    features: int,
    classes: int,
    threads: int,
    dtype: torch.dtype,
    bias: bool,
    smoothing: float,
    ignored: float,
    size: float,
) -> None:
    case = make(
        rows, features, classes, dtype, bias=bias, ignored=ignored, smoothing=smoothing, size=size
    )
    torch.set_num_threads(threads)
    backend = registry.get("cpu")
    got = run(backend, case)
    compare(got, case, torch.finfo(dtype).eps)
    again = run(backend, case)
    for a, b in zip(got, again, strict=True):
        assert a is not None and b is not None
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@names
def test_sure_predictions(backend: str) -> None:
    """Logits far apart: nothing overflows, and what is sure has no loss."""
    x = torch.eye(3, dtype=torch.float32) * 1e4
    case = Case(x, torch.eye(3), None, torch.arange(3))
    served = backend_for(backend, x, case.weight)
    loss, delta = run(served, case)
    assert delta is not None
    assert float(loss) == 0.0 and not bool(delta.any())
    wrong = run(served, case._replace(target=torch.tensor([1, 2, 0])))
    assert float(wrong.loss) == 1e4
    assert wrong.delta is not None
    expected = (torch.eye(3) - torch.eye(3)[[1, 2, 0]]) / 3
    torch.testing.assert_close(wrong.delta, expected, rtol=4e-7, atol=0)


@names
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(backend: str, value: float) -> None:
    """In the loss and in the gradient of that row; a row that is ignored is not looked at."""
    case = make(6, 4, 5, torch.float32)
    case.x[2, 1] = value
    served = backend_for(backend, case.x, case.weight)
    loss, delta = run(served, case)
    assert delta is not None
    assert loss.isnan() and delta[2].isnan().any()
    assert torch.isfinite(delta[[0, 1, 3, 4, 5]]).all()
    target = case.target.clone()
    target[2] = IGNORED
    loss, delta = run(served, case._replace(target=target))
    assert delta is not None
    assert torch.isfinite(loss) and not bool(delta[2].any())


@names
@pytest.mark.parametrize("wrong", [-1, 5, 2**40])
def test_a_class_that_there_is_not(backend: str, wrong: int) -> None:
    case = make(6, 4, 5, torch.float32)
    case.target[3] = wrong
    served = backend_for(backend, case.x, case.weight)
    with pytest.raises(IndexError, match=rf"target {wrong} \(row 3\) is outside \[0, 5\)"):
        run(served, case)


@names
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16(backend: str, parameters: torch.dtype) -> None:
    """Logits of bfloat16 operands, or of x as it is: 8 bits; the softmax in float32."""
    case = make(16, 8, 5, torch.float32, smoothing=0.1)
    case = Case(
        case.x.bfloat16(), case.weight.to(parameters), torch.zeros(5, dtype=parameters),
        case.target, 0.1,
    )  # fmt: skip
    served = backend_for(backend, case.x, case.weight)
    got = run(served, case)
    assert got.loss.dtype is parameters
    assert got.delta is not None and got.delta.dtype is torch.float32
    compare(got, case, torch.finfo(torch.bfloat16).eps)


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_noncontiguous_targets(backend: str, dtype: torch.dtype) -> None:
    case = make(9, 4, 5, dtype)
    served = backend_for(backend, case.x, case.weight)
    spread = torch.stack([case.target, case.target], 1)[:, 0]
    for a, b in zip(run(served, case), run(served, case._replace(target=spread)), strict=True):
        assert a is not None and b is not None
        assert torch.equal(a, b)
