"""The CUDA kernels of the linear layer and its synthesizer: what is theirs alone.

That the backend computes what the reference does is tested in test_linear_backends.py, what both
GPU backends owe beyond that in test_gpu_linear.py. Here: tiles across blocks, the order in which
threads run, grids of a few blocks, low precision, what the bindings refuse. Without a GPU the
kernels run on the CPU, see csrc/host_emulation/README.md.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_machine import BACKEND, CUDA, DEVICE, MARKS, emulated, machine
from divided import CUDA_SHAPES, FULL, SMOOTH, TABLE
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    Case,
    Run,
    bind,
    compare,
    make_case,
    named,
    run_parts,
    run_step,
    shapes,
    slots,
    slots_of_step,
    tolerances,
)
from torch import Tensor

import fused_dni as fd
from fused_dni.backends.cuda import backend as adapter
from fused_dni.backends.cuda.calls import TYPES, barrier
from fused_dni.ops import types as base

pytestmark = MARKS
SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
# Every barrier has something to do in one of these.
BARRED = [
    {**TABLE[0], **SMOOTH, "normalization": "batch", "kind": "lowrank", "context": "label"},
    {**TABLE[0], **SMOOTH, "normalization": "layer", "kind": "diagonal", "context": "label"},
]
ORDERED = [
    *TABLE[::9], *BARRED, *[{**options, "interface": "preactivation"} for options in BARRED],
]  # fmt: skip


@pytest.fixture(autouse=True)
def _as_usual(one_thread: None) -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    machine()


def results(case: Case, dtypes: tuple[torch.dtype, torch.dtype], run: Run) -> dict[str, Tensor]:
    return {name: t.cpu() for name, t in run(BACKEND, case.to(*dtypes).on(DEVICE)).items()}


def check(
    case: Case, dtypes: tuple[torch.dtype, torch.dtype], run: Run, eps: float = 0.0
) -> dict[str, Tensor]:
    """One op's results against the float64 reference's, within derived tolerances."""
    exact, allowed = tolerances(run, case, eps or torch.finfo(dtypes[0]).eps)
    got = results(case, dtypes, run)
    compare(got, exact, allowed)
    return got


@pytest.mark.parametrize("shape", CUDA_SHAPES)
@pytest.mark.parametrize("options", ORDERED, ids=named)
def test_any_grid_in_any_order(options: dict[str, Any], shape: str, poisoned: None) -> None:
    """Right on any grid; on the same grid the same bits, in whatever order threads run."""
    case = make_case(CUDA_SHAPES[shape], options, 1, *FULL)
    for run in (run_step, run_parts) if options in BARRED else (run_step,):
        exact, allowed = tolerances(run, case, torch.finfo(torch.float32).eps)
        for resident in (1, 3):
            machine(seed=0, resident=resident)
            compare(results(case, FULL, run), exact, allowed)
        machine(seed=0, resident=2)
        once = results(case, FULL, run)
        compare(once, exact, allowed)
        for seed in (1, 2):
            machine(seed=seed, resident=2)
            for name, t in results(case, FULL, run).items():
                assert torch.equal(t, once[name]), name


@given(
    shape=shapes(least_rows=2),
    row=st.sampled_from(TABLE),
    parts=st.booleans(),
    order=st.integers(1, 1000),
    resident=st.integers(1, 4),
)
def test_any_shape_in_any_order(
    shape: tuple[int, int, int, int, int],
    row: dict[str, Any],
    parts: bool,
    order: int,
    resident: int,
) -> None:
    run = run_parts if parts else run_step
    case = make_case(shape, row, 1, *FULL)
    machine(seed=order, resident=resident)
    got = check(case, FULL, run)
    machine(seed=order + 1, resident=resident)
    for name, t in results(case, FULL, run).items():
        assert torch.equal(t, got[name]), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", ["tall, not whole", "square"])
@pytest.mark.parametrize("options", TABLE[4::9], ids=named)
def test_parts(options: dict[str, Any], shape: str, training: bool, poisoned: None) -> None:
    run = functools.partial(run_parts, training=training)
    check(make_case(CUDA_SHAPES[shape], options, 2, *FULL), FULL, run)


@pytest.mark.parametrize("shape", CUDA_SHAPES)
@pytest.mark.parametrize("normalization", [None, "batch", "layer"])
@pytest.mark.parametrize("x", ["tf32", "float16", "bfloat16"])
def test_tensor_cores(x: str, normalization: str | None, shape: str, poisoned: None) -> None:
    kind = {None: "dense", "batch": "lowrank", "layer": "diagonal"}[normalization]
    context = {None: "vector", "batch": "label", "layer": "vector"}[normalization]
    options = {**TABLE[0], **SMOOTH, "normalization": normalization, "kind": kind,
               "context": context, "rule": "momentum"}  # fmt: skip
    dtype, eps = FULL[0], 2.0**-10
    if x == "tf32":
        torch.set_float32_matmul_precision("high")
    else:
        dtype = getattr(torch, x)
        eps = torch.finfo(dtype).eps
    dtypes = (dtype, torch.float32)
    check(make_case(CUDA_SHAPES[shape], options, 3, *dtypes), dtypes, run_step, eps)
    if shape == "tall":
        check(make_case(CUDA_SHAPES[shape], options, 3, *dtypes), dtypes, run_parts, eps)


def test_precision_is_as_torch_says() -> None:
    """IEEE arithmetic where it says "highest": then, and only then, float32's own tolerance."""
    options = {**TABLE[0], **SMOOTH, "normalization": None, "rule": "sgd"}
    case = make_case((45, 61, 37, 5, 7), options, 3, *FULL)
    check(case, FULL, run_step)
    torch.set_float32_matmul_precision("high")
    with pytest.raises(AssertionError, match="should be"):
        check(case, FULL, run_step)


# ---------------------------------------------------------------------------------------------
# The interface at the preactivation


@emulated
@pytest.mark.parametrize(
    ("normalization", "saved"), [(None, 0), ("batch", 1), ("layer", 1)], ids=str
)
@pytest.mark.parametrize("resident", [1, 3])
def test_a_step_at_the_preactivation_meets_less_often(
    normalization: str | None, saved: int, resident: int
) -> None:
    """Nothing is summed over rows or features on the way back, where tiles do not hold them all."""
    CUDA.emulate(resident=resident)
    counts = []
    for interface in ("output", "preactivation"):
        options = {**TABLE[0], **SMOOTH, "normalization": normalization, "kind": "lowrank",
                   "context": None, "interface": interface}  # fmt: skip
        case = make_case(CUDA_SHAPES["tall, not whole"], options, 1, *FULL)
        state, _ = bind(case)
        BACKEND.linear_step_(
            case.inputs["x"], case.layer(), case.config, case.synthesizer(), None, 150.0, 0.0,
            state.tensors(slots_of_step(case)), False, False,
        )  # fmt: skip
        counts.append(CUDA.additions() / resident)
    # h and its product with U^T, delta; and the statistics.
    assert counts[1] == 3 + (normalization is not None)
    assert counts[0] - counts[1] == saved


@pytest.mark.parametrize("rows", [45, 150, 261])
def test_a_bias_before_a_batchs_own_statistics_does_not_move(rows: int) -> None:
    options = {**TABLE[0], **SMOOTH, "normalization": "batch", "rule": "nesterov"}
    case = make_case((rows, 20, 37, 5, 7), options, 7, *FULL)
    bias = case.parameters["bias"].clone()
    got = results(case, FULL, run_step)
    assert torch.equal(got["after.bias"], bias)
    assert not torch.equal(got["after.norm_bias"], case.parameters["norm_bias"])


# ---------------------------------------------------------------------------------------------
# What the bindings refuse, before a launch

Items = tuple[Any, ...]


def _where(room: Tensor) -> tuple[Any, int]:
    """Room as an op takes it, and the stream."""
    word, stream = barrier(room.device)
    return (room.data_ptr(), 4 * room.numel(), word), stream


def _recorded(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> list[Any]:
    """The launches of a call: (op, arguments, room), each of which went well."""
    made: list[Any] = []

    def launch(op: Any, items: Items, room: Tensor) -> None:
        made.append((op, items, room))
        op(items, *_where(room))

    monkeypatch.setattr(adapter, "launch", launch)
    call()
    return made


def _changed(items: Items, at: tuple[int, ...], to: Any) -> Items:
    """With another value in one place; ``to`` may be a function of the old one."""
    first, *rest = at
    new = _changed(items[first], tuple(rest), to) if rest else to
    if not rest and callable(to):
        new = to(items[first])
    return (*items[:first], new, *items[first + 1 :])


def _code(t: Items, code: int) -> Items:
    return (t[0], code, *t[2:])


# In a step's arguments: where, what instead, and what is said of it.
REFUSED: dict[str, tuple[tuple[int, ...], Any, type[Exception], str]] = {
    "no rows": ((0, 0), 0, ValueError, "rows: got 0, takes 1 to"),
    "x is float64": ((0, 3), 3, TypeError, "x: type code 3 is none of float32"),
    "activation": ((1, 2), 9, ValueError, "activation: got 9, takes 0 to 8"),
    "no weight": ((2, 0), None, TypeError, "weight: got None, takes a tensor"),
    "weight's type": (
        (2, 0), lambda t: _code(t, 1), TypeError, "weight: got bfloat16, takes float32",
    ),
    "weight's sizes": (
        (2, 0), lambda t: (*t[:2], t[3], t[2], t[2], 1), ValueError,
        r"weight: got sizes \[20, 37\], takes \[37, 20\]",
    ),
    "weight's strides": (
        (2, 0), lambda t: (*t[:4], 1, t[2]), ValueError, "weight: got strides .* contiguous",
    ),
    "bias's address": ((2, 1), lambda t: (t[0] + 2, *t[1:]), ValueError, "bias: got address"),
    "no address": ((2, 1), lambda t: (0, *t[1:]), ValueError, "bias: got address 0"),
    "half of the running statistics": ((2, 5), None, TypeError, "running_var: got None"),
    "rule": ((3, 0), 3, ValueError, "rule: got 3, takes 0 to 2"),
    "hyper": ((3, 2), lambda t: (*t[:2], 6, 1), ValueError, r"hyper: got sizes \[6\]"),
    "no moment": ((3, 3, 0), None, TypeError, "first moment of weight: got None"),
    "a moment's type": ((3, 4, 1), lambda t: _code(t, 3), TypeError, "second moment of bias: got"),
    "trainable, not there": ((2, 2), None, TypeError, "norm_weight: got None, .* is trainable"),
    "synthesizer": ((4, 0), 3, ValueError, "synthesizer: got 3, takes 0 to 2"),
    "rank": ((4, 1), 0, ValueError, "rank: got 0, takes 1 to"),
    "another rank": ((4, 1), 6, ValueError, r"synthesizer weight: got sizes \[37, 5\]"),
    "no down": ((4, 6), None, TypeError, "down: got None"),
    "table's type": (
        (4, 3), lambda _: (64, 2, 7, 37, 37, 1), TypeError,
        "table: got float16, takes float32 or bfloat16",
    ),
    "table's sizes": (
        (4, 3), lambda _: (64, 0, 6, 37, 37, 1), ValueError,
        r"table: got sizes \[6, 37\], takes \[7, 37\]",
    ),
    "a table and a gain for each class": (
        (4, 3), lambda _: (64, 0, 7, 37, 37, 1), ValueError,
        r"context_weight: got sizes \[37, 7\], takes \[\]",
    ),
    "unwanted context": ((4, 2), 0, TypeError, "context_weight: got a tensor, takes None"),
    "rows of x overlap": (
        (5,), lambda t: (*t[:4], 19, 1), ValueError, "x: got strides .* do not overlap",
    ),
    "x is of another type": ((5,), lambda t: _code(t, 2), TypeError, "x: got float16, takes"),
    "unknown type": ((5,), lambda t: _code(t, -1), TypeError, "x: got type code -1"),
    "labels are int32": ((6,), lambda t: _code(t, 5), TypeError, "labels: got int32, takes int64"),
    "no context": ((6,), None, TypeError, "context: got None"),
    "two contexts": ((7,), lambda _: (64, 0, 45, 7, 7, 1), TypeError, "context: got a tensor"),
    "interface": ((10,), 2, ValueError, "interface: got 2, takes 0 to 1"),
    "h": ((11,), None, TypeError, "h: got None"),
    "reduced": ((13,), lambda t: (*t[:3], 6, 6, 1), ValueError, r"reduced: got sizes \[45, 6\]"),
    "dx": ((14,), lambda t: (*t[:4], 21, 1), ValueError, "dx: got strides"),
    "saved where the step reads it": (
        (15,), lambda _: (64, 0, 45, 37, 37, 1), TypeError, "normalized: got a tensor, takes None",
    ),
    "no tuple": ((2,), None, TypeError, "lacks a tuple"),
}  # fmt: skip


def _step_case() -> tuple[Case, Callable[[], Any]]:
    options = {**TABLE[0], **SMOOTH, "normalization": "batch", "kind": "lowrank",
               "context": "label", "rule": "adam"}  # fmt: skip
    case = make_case((45, 20, 37, 5, 7), options, 4, *FULL).on(DEVICE)
    state, _ = bind(case)
    return case, lambda: BACKEND.linear_step_(
        case.inputs["x"], case.layer(), case.config, case.synthesizer(), case.inputs["context"],
        45.0, 0.0, state.tensors(slots(case.layer())), True, True,
    )  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_step_refuses(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, step = _step_case()
    ((op, items, room),) = _recorded(monkeypatch, step)
    before = {name: p.detach().clone() for name, p in case.parameters.items()}
    at, to, error, message = REFUSED[what]
    where, stream = _where(room)
    for given_room in (None, where):
        with pytest.raises(error, match=message):
            op(_changed(items, at, to), given_room, stream)
    for name, p in case.parameters.items():
        assert torch.equal(p, before[name]), name


def test_too_few_too_many_and_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    ((op, items, room),) = _recorded(monkeypatch, _step_case()[1])
    (where, size, word), stream = _where(room)
    with pytest.raises(TypeError, match="too few items"):
        op(items[:-1], None, 0)
    with pytest.raises(TypeError, match="too many items"):
        op((*items, None), None, 0)
    needed = op(items, None, 0)
    assert 0 < needed <= size
    for bad, message in (
        ((where, needed - 1, word), rf"got {needed - 1} bytes, takes {needed}"),
        ((where + 4, size, word), "multiple of 16"),
        ((0, size, word), "other than 0"),
        ((where, size, (*word[:2], 2, 1)), r"barrier: got sizes \[2\], takes \[1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            op(items, bad, stream)
    with pytest.raises(TypeError, match="barrier: got None"):
        op(items, (where, size, None), stream)


def test_the_parts_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**TABLE[0], **SMOOTH, "normalization": None, "activation": "gelu", "bias": False,
               "kind": "diagonal", "context": "vector", "rule": "sgd"}  # fmt: skip
    case = make_case((19, 20, 37, 5, 7), options, 4, *FULL).on(DEVICE)
    made = _recorded(monkeypatch, lambda: run_parts(BACKEND, case))
    calls = {op.__name__: (op, items) for op, items, _ in made}
    vector = (64, 0, 37, 1)
    for name, at, to, error, message in (
        ("linear_forward", (6,), vector, TypeError, "rstd: got a tensor, takes None"),
        ("linear_forward", (2, 4), vector, TypeError, "running_mean: got a tensor"),
        ("linear_backward", (6,), None, TypeError, "normalized: got None"),
        ("linear_backward", (8,), None, TypeError, "delta: got None"),
        ("linear_backward", (11,), vector, TypeError, "gradient of bias: got a tensor"),
        ("linear_update", (3,), None, TypeError, "delta: got None"),
        ("linear_update", (7, 4, 0), (64, 0, 37, 20, 20, 1), TypeError, "second moment of weight"),
        ("synthesizer_predict", (4,), None, TypeError, "context: got None"),
        ("synthesizer_predict", (6,), vector, TypeError, "reduced: got a tensor"),
        ("synthesizer_gradients", (9,), (64, 3, 4, 1), ValueError, "statistics: got sizes"),
        ("synthesizer_gradients", (11,), vector, TypeError, "gradient of down: got a tensor"),
        ("synthesizer_gradients", (10,), (64, 0, 36, 1), ValueError, "gradient of synthesizer w"),
    ):  # fmt: skip
        op, items = calls[name]
        with pytest.raises(error, match=message):
            op(_changed(items, at, to), None, 0)


@emulated
def test_a_failed_launch_is_an_exception_with_its_name() -> None:
    _, step = _step_case()
    CUDA.emulate(resident=0)
    name = "cudaErrorCooperativeLaunchTooLarge"
    what = rf"linear_step \(x \[45, 20\], weight \[37, 20\]\): {name}: asks for 1 blocks"
    with pytest.raises(RuntimeError, match=what) as caught:
        step()
    assert isinstance(caught.value, CUDA.CudaError)
    assert caught.value.name == name and caught.value.code == 720
    CUDA.emulate()
    step()


# ---------------------------------------------------------------------------------------------
# Plans


def _enumerators(name: str, file: str) -> list[str]:
    """What an enum of the sources lists, without its k."""
    text = (SOURCES / file).read_text()
    found = re.search(rf"enum {name}\b[^{{]*{{([^}}]*)}}", text)
    assert found is not None
    return [entry.split("=")[0].strip()[1:] for entry in found[1].split(",")]


def test_constants_are_those_of_the_signature() -> None:
    assert _enumerators("Type", "matrix.hpp") == [
        str(dtype).removeprefix("torch.").capitalize() for dtype in TYPES
    ]
    assert list(TYPES.values()) == list(range(len(TYPES)))

    def plain(names: Any) -> list[str]:
        return [str(name).replace("_", "").lower() for name in names]

    assert plain(_enumerators("Activation", "common.cuh")) == plain(base.ACTIVATIONS)
    assert plain(_enumerators("RuleKind", "common.cuh"))[1:] == plain(base.RULES)
    assert plain(_enumerators("Source", "synthesizer.hpp"))[:3] == plain(base.AFFINE)
    assert plain(_enumerators("Interface", "linear.hpp")) == list(base.INTERFACES)
    assert _enumerators("Normalization", "linear.hpp")[1:] == [
        f"{name.capitalize()}Normalization" for name in base.NORMALIZATIONS if name
    ]
    hyper = [name.upper() for name in _enumerators("Hyper", "common.cuh")]
    hyper[hyper.index("WEIGHTDECAY")] = "WEIGHT_DECAY"
    assert [getattr(base, name) for name in hyper] == list(range(base.HYPER_SIZE))


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    one = torch.zeros(2, 2, device=DEVICE)
    for x in (one, one.half(), one.bfloat16()):
        assert BACKEND.why_not(x, one) is None
    assert "float32 parameters" in str(BACKEND.why_not(one.double(), one.double()))
    assert "float32 parameters" in str(BACKEND.why_not(one.bfloat16(), one.bfloat16()))
    assert "one device" in str(BACKEND.why_not(one, one.to("meta")))
    with pytest.raises(RuntimeError, match=r"'cuda' cannot serve this call: it serves a float32"):
        fd.functional.linear(one.double(), one.double(), backend="cuda")
    monkeypatch.setattr(BACKEND, "emulated", False)
    cpu = torch.zeros(2, 2)
    assert "serves tensors on cuda, got x on cpu" in str(BACKEND.why_not(cpu, cpu))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a CUDA device" in str(BACKEND.available())
