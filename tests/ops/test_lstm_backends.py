"""The LSTM of every backend against the float64 reference, within derived tolerances.

As test_linear_backends.py (tolerances: strategies.py): the reference stands in the list, and errors
planted in it are caught. The order of gates and delta is a backend's own, so that they are
compared only through what is made of them.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    BACKENDS,
    CLOSE_OPTIONS,
    LSTM_OPTIONS,
    REFERENCE,
    LSTMCase,
    Run,
    bind_lstm,
    compare,
    device_of,
    is_slow,
    lstm_rows,
    lstm_shapes,
    make_closing,
    make_lstm,
    named,
    pairwise,
    run_cell,
    run_close,
    run_window,
    same_examples,
    set_threads,
    tolerances,
)
from torch import Tensor

from fused_dni.backends.reference import lstm, rules
from fused_dni.ops import registry
from fused_dni.ops.types import AFFINE, SKIPPED, STEP, Backend, LSTMGradients, LSTMTrace

pytestmark = pytest.mark.slow(220)

# The package shows the function of this name.
lstm_close = importlib.import_module("fused_dni.backends.reference.lstm_close")

SERVED = {"float32": torch.float32, "float64": torch.float64}
TABLE = pairwise(LSTM_OPTIONS)
CLOSINGS = pairwise(CLOSE_OPTIONS)
PLAIN: dict[str, Any] = {
    "rule": "momentum",
    "bias": True,
    "lengths": False,
    "dropout": False,
    "need_dx": True,
    "arriving": "output h c",
    "frozen": None,
}
# (T, B, I, H, L)
CORNERS = [
    (1, 1, 1, 1, 1),
    (2, 1, 150, 1, 2),
    (3, 129, 1, 2, 1),
    (7, 1, 64, 64, 1),
    (3, 16, 33, 97, 2),
    (5, 3, 17, 129, 1),
    (2, 64, 48, 31, 3),
]
RUNS = {"window": run_window, "cell": run_cell}


@functools.cache
def _why_absent(name: str) -> str | None:
    return dict(registry.report())[name]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each registered backend, on one thread unless a test says otherwise."""
    reason = _why_absent(request.param)
    if reason is not None:
        pytest.skip(f"{request.param} {reason}")
    torch.set_num_threads(1)
    return registry.get(request.param)


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The C++ kernels of each instruction set that this machine has."""
    _cpu = pytest.importorskip("fused_dni.backends._cpu")
    available = _cpu.isas()
    if request.param not in available:
        pytest.skip(f"this machine has {', '.join(available)}")
    _cpu.set_isa(request.param)
    torch.set_num_threads(1)
    yield request.param
    _cpu.set_isa(available[-1])


def serve(backend: Backend, dtype: str) -> torch.dtype:
    served = SERVED[dtype]
    one = torch.zeros(1, 1, dtype=served, device=device_of(backend))
    reason = backend.why_not(one, one)
    if reason is not None:
        pytest.skip(f"{backend.name} {reason}")
    return served


def shape_for(run: Run, shape: tuple[int, int, int, int, int]) -> tuple[int, int, int, int, int]:
    """A cell takes one step and has one layer."""
    return (1, *shape[1:4], 1) if run is run_cell else shape


def check(backend: Backend, case: LSTMCase, run: Run) -> None:
    """One op's results against the reference's; inputs and frozen parameters stay as they were."""
    dtype = case.inputs["x"].dtype
    exact, allowed = tolerances(run, case, torch.finfo(dtype).eps)
    fresh = case.to(dtype, dtype).on(device_of(backend))
    versions = {k: t._version for k, t in fresh.inputs.items()}
    got = run(backend, fresh)
    for name, t in got.items():
        wanted = torch.float64 if name in ("hyper", "statistics") else dtype
        assert t.dtype == wanted, name
    compare(got, exact, allowed)
    for name, t in fresh.inputs.items():
        assert torch.equal(t.cpu().nan_to_num(), case.inputs[name].nan_to_num()), name
        assert t._version == versions[name], name
    for name in case.frozen:
        if name in fresh.parameters:
            assert torch.equal(fresh.parameters[name].cpu(), case.parameters[name]), name


@pytest.mark.parametrize("dtype", SERVED)
@pytest.mark.parametrize("options", TABLE, ids=named)
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_options(
    backend: Backend, run: Run, options: dict[str, Any], dtype: str, poisoned: None
) -> None:
    # One shape for fast and slow backends: what they are compared with is derived once.
    shape = shape_for(run, (3, 9, 19, 21, 2))
    check(backend, make_lstm(shape, options, 1, serve(backend, dtype)), run)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", CORNERS, ids=str)
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_corner_shapes(
    backend: Backend,
    run: Run,
    shape: tuple[int, int, int, int, int],
    threads: int,
    poisoned: None,
) -> None:
    dtype = serve(backend, "float32")
    set_threads(backend, threads)
    check(backend, make_lstm(shape_for(run, shape), PLAIN, 2, dtype), run)


@pytest.mark.parametrize("dtype", SERVED)
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@same_examples
@given(
    shape=lstm_shapes(),
    row=st.sampled_from(TABLE),
    seed=st.integers(0, 9),
    threads=st.integers(1, 2),
)
def test_any_shape(
    backend: Backend,
    run: Run,
    dtype: str,
    shape: tuple[int, int, int, int, int],
    row: dict[str, Any],
    seed: int,
    threads: int,
) -> None:
    served = serve(backend, dtype)
    if is_slow(backend) and seed > 0:
        return
    case = make_lstm(shape_for(run, shape), row, seed, served)
    torch.set_num_threads(threads if backend.name == "cpu" else 1)
    check(backend, case, run)


@pytest.mark.parametrize("dtype", SERVED)
@pytest.mark.parametrize("options", CLOSINGS, ids=named)
def test_closing(backend: Backend, options: dict[str, Any], dtype: str, poisoned: None) -> None:
    """A window's backward between its two ends."""
    shape = (2, 7, 9, 13, 2) if is_slow(backend) else (4, 7, 9, 13, 2)
    check(backend, make_closing(shape, options, 7, serve(backend, dtype)), run_close)


@pytest.mark.parametrize("dtype", SERVED)
@same_examples
@given(
    shape=lstm_shapes(),
    row=st.sampled_from(CLOSINGS),
    seed=st.integers(0, 9),
    threads=st.integers(1, 2),
)
def test_closing_of_any_shape(
    backend: Backend,
    dtype: str,
    shape: tuple[int, int, int, int, int],
    row: dict[str, Any],
    seed: int,
    threads: int,
) -> None:
    served = serve(backend, dtype)
    if is_slow(backend) and seed > 0:
        return
    case = make_closing(shape, row, seed, served)
    torch.set_num_threads(threads if backend.name == "cpu" else 1)
    check(backend, case, run_close)


@pytest.mark.parametrize("what", ["inject", "state_rows"])
def test_the_tolerance_catches_wrong_ends(what: str) -> None:
    """As for the formulas of a step, below."""
    options = {name: values[0] for name, values in CLOSE_OPTIONS.items()}
    case = make_closing((4, 7, 9, 13, 2), {**options, "lengths": False}, 7, torch.float32)
    exact, allowed = tolerances(run_close, case, torch.finfo(torch.float32).eps)
    compare(run_close(REFERENCE, case), exact, allowed)
    changes = {
        "inject": lambda arriving: tuple(t * (1 + 2e-5) for t in arriving),
        "state_rows": lambda rows: rows.roll(1, 1),
    }
    with _wrong(what, changes[what], lstm_close)():
        got = run_close(REFERENCE, case)
    with pytest.raises(AssertionError, match="should be"):
        compare(got, exact, allowed)


@pytest.mark.parametrize("kind", AFFINE)
def test_a_lesson_that_is_not_finite_is_not_counted(backend: Backend, kind: str) -> None:
    options = {name: values[0] for name, values in CLOSE_OPTIONS.items()}
    case = make_closing((4, 7, 9, 13, 2), {**options, "kind": kind, "lengths": False}, 7,
                        serve(backend, "float32")).on(device_of(backend))  # fmt: skip
    assert run_close(backend, case)["statistics"].all()
    case.inputs["grad_output"][-1, -1, -1] = torch.inf
    assert not run_close(backend, case)["statistics"].any()


@pytest.mark.parametrize("dtype", SERVED)
@pytest.mark.parametrize(
    "shape", [(4, 5, 13, 19, 2), (3, 18, 33, 31, 1), (2, 1, 64, 48, 1)], ids=str
)
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_every_instruction_set(
    isa: str, run: Run, shape: tuple[int, int, int, int, int], dtype: str, poisoned: None
) -> None:
    options = {**PLAIN, "lengths": run is run_window, "rule": "adamw"}
    check(registry.get("cpu"), make_lstm(shape_for(run, shape), options, 3, SERVED[dtype]), run)


@pytest.mark.parametrize("threads", [2, 4, 7])
@pytest.mark.parametrize(
    "shape", [(3, 64, 67, 3, 1), (4, 40, 5, 16, 2), (2, 2, 150, 97, 1), (3, 150, 1, 33, 1)], ids=str
)
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_more_threads_than_work(
    backend: Backend,
    run: Run,
    shape: tuple[int, int, int, int, int],
    threads: int,
    poisoned: None,
) -> None:
    """Some thread has nothing to do; and what the first run left in scratch is not read again."""
    if backend.name == "reference":
        pytest.skip("the reference's threads are torch's affair")
    dtype = serve(backend, "float32")
    set_threads(backend, threads)
    for _ in range(2):
        check(backend, make_lstm(shape_for(run, shape), PLAIN, 3, dtype), run)


@pytest.mark.parametrize("dtype", SERVED)
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_far_from_zero(backend: Backend, run: Run, dtype: str) -> None:
    """Where exponentials overflow and derivatives vanish."""
    case = make_lstm(shape_for(run, (3, 9, 17, 21, 2)), PLAIN, 4, serve(backend, dtype))
    for p in case.parameters.values():
        p *= 60
    case.inputs["c"] *= 60
    assert (case.inputs["x"][0] @ case.parameters["weight_ih_l0"].t()).abs().max() > 120
    check(backend, case, run)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_strided_inputs(backend: Backend, run: Run) -> None:
    """x may be a view (batch first), and the gradient that arrives may be expanded."""
    case = make_lstm(shape_for(run, (4, 6, 13, 17, 2)), PLAIN, 5, serve(backend, "float32"))
    case.inputs["grad_output"] = torch.ones_like(case.inputs["grad_output"])
    case.inputs["grad_h"] = torch.ones_like(case.inputs["grad_h"])
    exact, allowed = tolerances(run, case, torch.finfo(torch.float32).eps)
    strided = case.to(torch.float32, torch.float32).on(device_of(backend))
    for name, t in strided.inputs.items():
        if name in ("grad_output", "grad_h"):
            strided.inputs[name] = t.new_ones(()).expand_as(t)
        else:  # every second element of the transposed, NaN between
            wide = t.new_full((t.shape[1], t.shape[0], 2 * t.shape[2]), torch.nan)
            wide[:, :, ::2] = t.transpose(0, 1)
            strided.inputs[name] = wide[:, :, ::2].transpose(0, 1)
    compare(run(backend, strided), exact, allowed)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", SERVED)
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_same_input_same_bits(backend: Backend, run: Run, dtype: str, threads: int) -> None:
    served = serve(backend, dtype)
    set_threads(backend, threads)
    # The reference's bits are torch's affair.
    for row in TABLE[:4] if backend.name == "cpu" else TABLE[:1]:
        shape = (2 if is_slow(backend) else 6, 33, 48, 67, 2)
        case = make_lstm(shape_for(run, shape), row, 6, served).on(device_of(backend))
        once, twice = run(backend, case.to(served, served)), run(backend, case.to(served, served))
        for name, t in once.items():
            assert torch.equal(t, twice[name]), name


def window(backend: Backend, case: LSTMCase) -> tuple[LSTMTrace, LSTMGradients]:
    given, layers = case.inputs, case.stack()
    lengths = given.get("lengths")
    trace = backend.lstm_forward(
        given["x"], given["h"], given["c"], layers, lengths, case.dropout(), True
    )
    made = backend.lstm_backward(
        given["grad_output"], given["grad_h"], given["grad_c"], given["x"], layers, lengths,
        case.dropout(), trace, True, True,
    )  # fmt: skip
    return trace, made


def test_results_share_no_memory(backend: Backend) -> None:
    """With the inputs neither: a one-step window too must not hand its state through."""
    case = make_lstm((1, 5, 7, 9, 1), PLAIN, 0, serve(backend, "float32")).on(device_of(backend))
    trace, made = window(backend, case)
    layer = made.layers[0]
    parts = [*trace, made.delta, made.h, made.c, made.x, layer.weight_ih, layer.weight_hh,
             layer.bias_ih, *case.inputs.values()]  # fmt: skip
    there = [t for t in parts if t is not None]
    assert len({t.untyped_storage().data_ptr() for t in there}) == len(there) == len(parts)


def test_what_is_not_asked_for_is_not_made(backend: Backend) -> None:
    case = make_lstm((4, 5, 7, 9, 2), PLAIN, 0, serve(backend, "float32")).on(device_of(backend))
    given, layers = case.inputs, case.stack()
    trace, made = window(backend, case)
    less = backend.lstm_backward(
        given["grad_output"], given["grad_h"], given["grad_c"], given["x"], layers, None, (),
        trace, False, False,
    )  # fmt: skip
    assert less.x is None and less.layers == ()
    for a, b in ((less.delta, made.delta), (less.h, made.h), (less.c, made.c)):
        assert torch.equal(a, b)
    plain = (given["x"][0], given["h"][0], given["c"][0], layers[0])
    step = backend.lstm_cell_forward(*plain, True)
    grad = torch.ones_like(step.h)
    whole = backend.lstm_cell_backward(grad, None, *plain, step, True, True)
    part = backend.lstm_cell_backward(grad, None, *plain, step, False, False)
    assert part.x is None and part.layer is None
    for a, b in ((part.delta, whole.delta), (part.h, whole.h), (part.c, whole.c)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam", "adamw"])
def test_every_mutated_tensor_moves_its_version(backend: Backend, rule: str) -> None:
    case = make_lstm((4, 5, 7, 9, 2), {**PLAIN, "rule": rule, "frozen": "weight_hh_l0"}, 0,
                     serve(backend, "float32")).on(device_of(backend))  # fmt: skip
    state = bind_lstm(case)
    tensors = state.tensors(case.slots())
    trace, made = window(backend, case)
    frozen = case.parameters["weight_hh_l0"]
    watched = [
        (t, t._version, t.detach().clone())
        for t in (*case.slots(), *tensors.first, *tensors.second, tensors.hyper)
        if t is not None
    ]
    rows = lstm_rows(case, trace.hidden, made.delta, case.alive())
    still = [(t, t._version, t.clone()) for r in rows for t in r]
    backend.lstm_update_(rows, case.stack(), tensors)
    for t, version, value in watched:
        assert (t._version > version) == (t is not frozen), tuple(t.shape)
        assert torch.equal(t, value) == (t is frozen), tuple(t.shape)
    for t, version, value in still:
        assert t._version == version and torch.equal(t, value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["input", "hidden", "delta", "overflow"])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_not_finite_is_counted_and_skipped(
    backend: Backend, layer: int, where: str, value: float, rule: str, threads: int
) -> None:
    """In whichever layer; also where only the product is not finite."""
    set_threads(backend, threads)
    if is_slow(backend) and (rule == "sgd") != (layer == 0):
        pytest.skip("one rule a layer is enough for a slow backend")
    case = make_lstm((1, 9, 40, 33, 2), {**PLAIN, "rule": rule}, 0, serve(backend, "float32")).on(
        device_of(backend)
    )
    state = bind_lstm(case)
    tensors = state.tensors(case.slots())
    trace, made = window(backend, case)
    rows = list(lstm_rows(case, trace.hidden, made.delta, case.alive()))
    backend.lstm_update_(tuple(rows), case.stack(), tensors)
    bad = {name: t.clone() for name, t in rows[layer]._asdict().items()}
    if where == "overflow":
        bad["hidden"][-1, -1] = bad["delta"][-1, -1] = 1e30
    else:
        bad[where][-1, -1] = value
    rows[layer] = rows[layer]._replace(**bad)
    watched: list[Tensor] = [
        t for t in (*case.slots(), *tensors.first, *tensors.second) if t is not None
    ]
    before = [t.detach().clone() for t in watched]
    backend.lstm_update_(tuple(rows), case.stack(), tensors)
    for t, old in zip(watched, before, strict=True):
        assert torch.equal(t, old)
    assert tensors.hyper[STEP] == 1 and tensors.hyper[SKIPPED] == 1


def test_large_but_finite_gradients_are_applied(backend: Backend) -> None:
    """The cheap bound on the products is too weak here; the products themselves are finite."""
    case = make_lstm((2, 9, 5, 33, 1), {**PLAIN, "rule": "sgd"}, 0, serve(backend, "float32")).on(
        device_of(backend)
    )
    state = bind_lstm(case)
    trace, made = window(backend, case)
    (rows,) = lstm_rows(case, trace.hidden, made.delta, case.alive())
    rows.delta.zero_()
    rows.input.zero_()
    rows.delta[0], rows.input[1] = 1e30, 1e30  # each meets only the other's zeros
    backend.lstm_update_((rows,), case.stack(), state.tensors(case.slots()))
    assert (state.steps, state.skipped) == (1, 0)


def test_frozen_parameters_need_no_finite_gradient(backend: Backend) -> None:
    case = make_lstm((2, 9, 5, 33, 1), {**PLAIN, "frozen": "weight_ih_l0"}, 0,
                     serve(backend, "float32")).on(device_of(backend))  # fmt: skip
    state = bind_lstm(case)
    trace, made = window(backend, case)
    (rows,) = lstm_rows(case, trace.hidden, made.delta, case.alive())
    rows = rows._replace(input=torch.full_like(rows.input, torch.nan))
    backend.lstm_update_((rows,), case.stack(), state.tensors(case.slots()))
    assert (state.steps, state.skipped) == (1, 0)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_the_tolerance_catches_one_wrong_element(run: Run) -> None:
    """One element of any result off by 200 eps of the largest, or never written: caught."""
    case = make_lstm(shape_for(run, (5, 9, 19, 21, 2)), PLAIN, 1, torch.float32)
    eps = torch.finfo(torch.float32).eps
    exact, allowed = tolerances(run, case, eps)
    compare(exact, exact, allowed)
    for name in exact:
        wrong = {k: t.clone() for k, t in exact.items()}
        flat = wrong[name].view(-1)
        for value in (flat[-1] + 200 * eps * exact[name].abs().max() + 1e-30, torch.nan):
            flat[-1] = value
            with pytest.raises(AssertionError, match=name.replace(".", r"\.")):
                compare(wrong, exact, allowed)


def _wrong(name: str, change: Any, module: Any = lstm) -> Any:
    old = getattr(module, name)
    return lambda: mock.patch.object(module, name, lambda *a, **k: change(old(*a, **k)))


WRONG = {
    "gates": _wrong("squash", lambda z: z * (1 + 2e-5)),
    "gates' order": _wrong("squash", lambda z: torch.cat(z.chunk(4, 1)[::-1], 1)),
    "cell": _wrong("next_cell", lambda c: c * (1 + 2e-5)),
    "hidden": _wrong("shown", lambda h: h * (1 + 2e-5)),
    "delta": _wrong("step_backward", lambda d: (d[0] * (1 + 2e-5), d[1])),
    "carried": _wrong("step_backward", lambda d: (d[0], d[1] * (1 + 2e-5))),
    "biases": _wrong("sum_rows", lambda s: s * (1 + 2e-5)),
    "rule": _wrong("sgd", lambda new: new._replace(parameter=new.parameter + 2e-5), rules),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_the_tolerance_catches_a_wrong_formula(run: Run, what: str) -> None:
    """A backend that errs by 2e-5 in one place does not pass for a float32 one."""
    case = make_lstm(shape_for(run, (5, 9, 19, 21, 2)), PLAIN, 1, torch.float32)
    exact, allowed = tolerances(run, case, torch.finfo(torch.float32).eps)
    compare(run(REFERENCE, case.to(torch.float32, torch.float32)), exact, allowed)
    with WRONG[what]():
        got = run(REFERENCE, case.to(torch.float32, torch.float32))
    with pytest.raises(AssertionError, match="should be"):
        compare(got, exact, allowed)
