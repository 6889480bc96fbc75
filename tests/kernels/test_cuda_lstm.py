"""The CUDA kernels of the LSTM: what is theirs alone.

That the backend computes what the reference does is tested in test_lstm_backends.py. Here: the
order in which threads run, grids, where the recurrent weights are, low precision, failures that one
block sees, what the bindings refuse. Without a GPU the kernels run on the CPU, see
csrc/host_emulation/README.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda_machine import BACKEND, CUDA, DEVICE, MARKS, emulated, machine
from strategies import (
    REFERENCE,
    LSTMCase,
    Run,
    bind_lstm,
    compare,
    lstm_rows,
    make_closing,
    make_lstm,
    run_cell,
    run_close,
    run_window,
    tolerances,
)
from torch import Tensor

import fused_dni as fd
from fused_dni.backends.cuda import lstm as adapter
from fused_dni.backends.cuda.calls import described, stream
from fused_dni.ops.types import Backend, LSTMLayer, LSTMRows

pytestmark = MARKS
PLAIN: dict[str, Any] = {
    "rule": "adamw",
    "bias": True,
    "lengths": True,
    "dropout": True,
    "need_dx": True,
    "arriving": "output h c",
    "frozen": None,
}
CLOSING: dict[str, Any] = {
    "kind": "dense",
    "synthesizer_bias": True,
    "ended": "some",
    "fresh": "some",
    "strength": 0.7,
    "max_norm": 0.0,
    "max_target_norm": 2.0,
    "learns": True,
    "entrance": True,
    "statistics": True,
    "arriving": "output h c",
    "lengths": True,
    "need_dx": True,
}
# x's dtype, how float32 is multiplied, and the epsilon of the products' operands.
PRODUCTS = {
    "float32": (torch.float32, "highest", 2.0**-23),
    "tf32": (torch.float32, "high", 2.0**-10),
    "bfloat16": (torch.bfloat16, "highest", 2.0**-7),
    "float16": (torch.float16, "highest", 2.0**-10),
}


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    machine()


def run_steps(backend: Backend, case: LSTMCase) -> dict[str, Tensor]:
    """A window forwards and backwards."""
    given, layers, masks = case.inputs, case.stack(), case.dropout()
    x, lengths = given["x"], given.get("lengths")
    trace = backend.lstm_forward(x, given["h"], given["c"], layers, lengths, masks, True)
    made = backend.lstm_backward(
        given["grad_output"], given["grad_h"], given["grad_c"], x, layers, lengths, masks, trace,
        True, True,
    )  # fmt: skip
    assert made.x is not None
    out = {"hidden": trace.hidden, "h": trace.h, "c": trace.c, "dh": made.h, "dc": made.c}
    out |= {"delta": made.delta, "dx": made.x}
    for k, layer in enumerate(made.layers):
        out |= {f"{name}_{k}": t for name, t in layer._asdict().items() if t is not None}
    return out


def run_closing(backend: Backend, case: LSTMCase) -> dict[str, Tensor]:
    """Gradients at a window's entrance, of the whole closing."""
    out = run_close(backend, case)
    return {name: t for name, t in out.items() if name in ("dh", "dc", "dx") or "weight" in name}


def gradients_of_a_cell(backend: Backend, case: LSTMCase) -> dict[str, Tensor]:
    """Without the updates: Adam's steps do not shrink with the gradients' errors."""
    out = run_cell(backend, case)
    return {name: t for name, t in out.items() if name.startswith("0.")}


def check(case: LSTMCase, run: Run, products: str) -> None:
    """Against the reference in float64 on the same numbers, to what rounding operands and results
    to the products' digits may do."""
    dtype, precision, eps = PRODUCTS[products]
    torch.set_float32_matmul_precision(precision)
    rounded = case.to(dtype, torch.float32).to(torch.float64, torch.float64)
    exact, allowed = tolerances(run, rounded, eps)
    compare(run(BACKEND, rounded.to(dtype, torch.float32).on(DEVICE)), exact, allowed)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, t in a.items():
        assert torch.equal(t, b[name]), name


# ---------------------------------------------------------------------------------------------
# Order, grid, weights


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("run", [run_steps, run_closing])
def test_same_bits_in_any_order_and_grid(products: str, run: Run, poisoned: None) -> None:
    """Three slices of units: one block streams all weights and two do, three have one each on chip,
    seven divide the rows, too; three and more are clusters where there are any."""
    dtype, precision, _ = PRODUCTS[products]
    torch.set_float32_matmul_precision(precision)
    shape = (3, 18, 9, 24, 2)
    if run is run_closing:
        case = make_closing(shape, {**CLOSING, "kind": "lowrank"}, 1)
    else:
        case = make_lstm(shape, PLAIN, 1)
    results = []
    for seed, resident in ((0, 3), (1, 3), (2, 1), (3, 2), (4, 7), (5, 7)):
        machine(seed=seed, resident=resident, clusters=seed % 2 == 0)
        results.append(run(BACKEND, case.to(dtype, torch.float32).on(DEVICE)))
    for result in results[1:]:
        same(results[0], result)


@pytest.mark.parametrize("products", ["tf32", "bfloat16"])
def test_more_depth_than_one_trip_of_all_warps(products: str) -> None:
    """Where a warp holds more than one tile of the weights, on chip or streamed."""
    case = make_lstm((2, 17, 9, 264, 1), {**PLAIN, "lengths": False}, 2)
    machine(resident=33)
    check(case, run_steps, products)
    dtype = PRODUCTS[products][0]
    kept = run_steps(BACKEND, case.to(dtype, torch.float32).on(DEVICE))
    machine(resident=2)
    same(kept, run_steps(BACKEND, case.to(dtype, torch.float32).on(DEVICE)))


@pytest.mark.parametrize("resident", [1, 3, 5])
@pytest.mark.parametrize("run", [run_window, run_cell, run_close])
def test_grids(run: Run, resident: int, poisoned: None) -> None:
    """More rows and units than a block takes at a time, none of them a multiple of anything."""
    machine(seed=resident, resident=resident)
    shape = (1 if run is run_cell else 2, 69, 67, 35, 1 if run is run_cell else 2)
    if run is run_close:
        case = make_closing(shape, {**CLOSING, "kind": "dense"}, 3)
    else:
        case = make_lstm(shape, PLAIN, 3)
    check(case, run, "float32")


@pytest.mark.parametrize("count", [1, 2, 5])
def test_bare_barriers(count: int) -> None:
    """Every round leaves the word's arrivals at zero and turns its generation over."""
    word = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    CUDA.grid_barriers((0, count, 1, described(word), stream(word.device)))
    assert word.item() == (-(2**31) if count % 2 else 0)
    if CUDA.emulated or torch.cuda.get_device_capability() >= (9, 0):
        CUDA.grid_barriers((0, count, 2, described(word), stream(word.device)))


# ---------------------------------------------------------------------------------------------
# The input's product, a launch before


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("products", PRODUCTS)
def test_an_input_that_was_multiplied_before(
    products: str, depth: int, bias: bool, monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    """The kernel takes it as it takes its own: also of rows that have ended, in the cell too."""
    monkeypatch.setattr(adapter, "_LARGE", 0)
    case = make_lstm((3, 17, 5, 24, depth), {**PLAIN, "bias": bias, "dropout": depth > 1}, 5)
    check(case, run_steps, products)
    if depth == 1:
        cell = make_lstm((1, 9, 5, 16, 1), {**PLAIN, "bias": bias, "lengths": False}, 6)
        check(cell, gradients_of_a_cell, products)


@pytest.mark.parametrize(("rows", "before"), [(127, False), (128, True)])
def test_a_large_input_is_multiplied_before(
    rows: int, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small one, in the one launch."""
    monkeypatch.setattr(adapter, "_LARGE", 128 * 16 * 4 * 8)
    made: list[Tensor] = []
    monkeypatch.setattr(adapter, "_project", lambda x, layer, out: made.append(out.zero_()))
    x, state = torch.randn(rows, 1, 16, device=DEVICE), torch.zeros(1, 1, 8, device=DEVICE)
    layer = LSTMLayer(*[torch.randn(32, n, device=DEVICE) for n in (16, 8)], None, None)
    trace = BACKEND.lstm_forward(x, state, state, (layer,), None, (), True)
    assert len(made) == before
    # With nothing but zeros in its place the first step's gates are those of zero.
    assert trace.cells is not None
    assert bool((trace.cells[0, 1] == 0).all()) == before


# ---------------------------------------------------------------------------------------------
# Low precision


@pytest.mark.parametrize("products", ["tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(3, 17, 5, 18, 2), (3, 5, 16, 24, 1)], ids=str)
def test_low_precision(
    products: str, shape: tuple[int, int, int, int, int], poisoned: None
) -> None:
    check(make_lstm(shape, PLAIN, 5), run_steps, products)


@pytest.mark.parametrize("kind", ["dense", "lowrank", "diagonal"])
@pytest.mark.parametrize("products", ["bfloat16", "float16"])
def test_a_boundary_in_low_precision(products: str, kind: str, poisoned: None) -> None:
    check(make_closing((2, 9, 5, 16, 2), {**CLOSING, "kind": kind}, 6), run_closing, products)


@pytest.mark.parametrize("products", ["tf32", "bfloat16", "float16"])
def test_a_cell_in_low_precision(products: str, poisoned: None) -> None:
    case = make_lstm((1, 9, 5, 16, 1), {**PLAIN, "lengths": False}, 6)
    check(case, gradients_of_a_cell, products)


@pytest.mark.parametrize("products", ["bfloat16", "float16"])
def test_an_update_in_low_precision(products: str) -> None:
    """Of the masters, by rows in low precision."""

    def updated(backend: Backend, case: LSTMCase) -> dict[str, Tensor]:
        state = bind_lstm(case)
        backend.lstm_update_((_rows(case),), case.stack(), state.tensors(case.slots()))
        return {name: p.detach() for name, p in case.parameters.items()}

    check(make_lstm((2, 9, 70, 18, 1), {**PLAIN, "rule": "momentum", "lengths": False}, 7),
          updated, products)  # fmt: skip


def test_small_gradients_survive_float16() -> None:
    """Gradients far below float16's smallest number go from step to step, and layer to layer."""
    case = make_lstm((3, 4, 5, 9, 2), {**PLAIN, "arriving": "h", "lengths": False}, 6)
    case = case.to(torch.float16, torch.float32).on(DEVICE)
    given, layers = case.inputs, case.stack()
    trace = BACKEND.lstm_forward(given["x"], given["h"], given["c"], layers, None, (), True)
    tiny = torch.zeros(trace.h.shape, dtype=torch.float16, device=DEVICE)
    tiny[1] = 2.0**-24
    made = BACKEND.lstm_backward(None, tiny, None, given["x"], layers, None, (), trace, False, True)
    for layer in made.layers:
        assert layer.weight_hh.dtype == torch.float32
        # The gradient at a weight is smaller than what arrives; in float16 all would be zero.
        assert (layer.weight_hh != 0).float().mean() > 0.9
        assert layer.weight_hh.abs().max() < 2.0**-24


# ---------------------------------------------------------------------------------------------
# Failures


def _rows(case: LSTMCase) -> LSTMRows:
    """Rows of a one-layer window, by the reference."""
    given = {name: t.double() for name, t in case.inputs.items()}
    layers = tuple(LSTMLayer(*[p.detach().double() for p in layer if p is not None])
                   for layer in case.stack())  # fmt: skip
    trace = REFERENCE.lstm_forward(given["x"], given["h"], given["c"], layers, None, (), True)
    made = REFERENCE.lstm_backward(
        given["grad_output"], None, None, given["x"], layers, None, (), trace, False, False
    )
    (rows,) = lstm_rows(case, trace.hidden, made.delta, case.alive())
    return LSTMRows(*[t.to(case.inputs["x"].dtype) for t in rows])


@pytest.mark.parametrize("where", ["input", "hidden", "delta", "sum"])
def test_a_failure_in_one_tile_stops_all(where: str) -> None:
    """The element that is not finite is one block's, the update is nobody's."""
    case = make_lstm((1, 19, 70, 35, 1), {**PLAIN, "lengths": False}, 4, torch.float32).on(DEVICE)
    state = bind_lstm(case)
    rows, tensors = _rows(case), state.tensors(case.slots())
    bad = {name: t.clone() for name, t in rows._asdict().items()}
    if where == "sum":
        bad["delta"][:, -1] = 3e37  # each is finite, and so are its products
    else:
        bad[where][-1, -1] = torch.nan
    before = [t.detach().clone() for t in case.slots() if t is not None]
    for seed in range(3):
        machine(seed=seed)
        BACKEND.lstm_update_((LSTMRows(**bad),), case.stack(), tensors)
        for p, old in zip((t for t in case.slots() if t is not None), before, strict=True):
            assert torch.equal(p, old)
    assert (state.steps, state.skipped) == (0, 3)
    BACKEND.lstm_update_((rows,), case.stack(), tensors)
    assert (state.steps, state.skipped) == (1, 3)


@emulated
def test_an_error_of_the_launch_has_its_name() -> None:
    word = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(CUDA.CudaError, match=r"grid_barriers \(count \[1\]\): cudaError") as caught:
        CUDA.grid_barriers((4, 1, 1, described(word), 0))
    assert caught.value.name == "cudaErrorCooperativeLaunchTooLarge"
    assert caught.value.code == 720
    CUDA.grid_barriers((3, 1, 1, described(word), 0))  # and it is over


# ---------------------------------------------------------------------------------------------
# Refusals


class _Caught(Exception):
    """An argument tuple on its way to the extension."""


def _caught(monkeypatch: pytest.MonkeyPatch, op: str, call: Any) -> tuple[Any, ...]:
    """The argument tuple that a call makes of an op."""
    from fused_dni.backends.cuda import lstm as cuda_lstm

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            if name != op:
                return getattr(CUDA, name)

            def record(arguments: tuple[Any, ...]) -> None:
                raise _Caught(arguments)

            return record

    with monkeypatch.context() as patch:
        patch.setattr(cuda_lstm, "extension", Recorder)
        with pytest.raises(_Caught) as caught:
            call()
    arguments: tuple[Any, ...] = caught.value.args[0]
    return arguments


def _paths(value: Any, at: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Descriptions of tensors in nested tuples, and where they stand."""
    if not isinstance(value, tuple):
        return
    # An address: no size, flag or type code is as large.
    if value and isinstance(value[0], int) and value[0] > 2**24:
        yield at, value
        return
    for i, item in enumerate(value):
        yield from _paths(item, (*at, i))


def _replaced(value: Any, at: tuple[int, ...], by: Any) -> Any:
    if not at:
        return by
    items = list(value)
    items[at[0]] = _replaced(items[at[0]], at[1:], by)
    return tuple(items)


def _calls(case: LSTMCase) -> dict[str, Any]:
    given, layers = case.inputs, case.stack()
    state = bind_lstm(case)
    lengths, masks = given["lengths"], case.dropout()
    trace = BACKEND.lstm_forward(given["x"], given["h"], given["c"], layers, lengths, masks, True)
    rows = lstm_rows(case, trace.hidden, trace.gates, case.alive())  # type: ignore[arg-type]
    return {
        "lstm_forward": lambda: BACKEND.lstm_forward(
            given["x"], given["h"], given["c"], layers, lengths, masks, True
        ),
        "lstm_backward": lambda: BACKEND.lstm_backward(
            given["grad_output"], given["grad_h"], given["grad_c"], given["x"], layers, lengths,
            masks, trace, True, True,
        ),
        "lstm_update": lambda: BACKEND.lstm_update_(
            rows, case.stack(), state.tensors(case.slots())
        ),
    }  # fmt: skip


@pytest.mark.parametrize("op", ["lstm_forward", "lstm_backward", "lstm_update"])
def test_what_a_tensor_must_be_like(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of every op: another type, another size, other strides, no or a crooked
    address. Nothing is launched: all of the arguments' memory is gone by then."""
    case = make_lstm((3, 4, 5, 6, 2), PLAIN, 0, torch.float32).on(DEVICE)
    arguments = _caught(monkeypatch, op, _calls(case)[op])
    paths = dict(_paths(arguments))
    assert len(paths) > 15
    call = getattr(CUDA, op)
    for at, (address, code, *rest) in paths.items():
        sizes, strides = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        bad = {
            "type": ((address, (code + 1) % 8, *rest), TypeError, "takes .*float|takes .*int"),
            "unknown type": ((address, 99, *rest), TypeError, "type code 99"),
            "size": ((address, code, sizes[0] + 1, *rest[1:]), ValueError, "takes "),
            "dimensions": ((address, code, *sizes[1:], *strides[1:]), ValueError, "got sizes"),
            "address": ((address + 1, code, *rest), ValueError, "a multiple of"),
            "null": ((0, code, *rest), ValueError, "other than 0"),
        }
        if sizes[-1] > 1:
            crooked = (*strides[:-1], strides[-1] + 1)
            bad["strides"] = ((address, code, *sizes, *crooked), ValueError, "got strides")
        for how, (by, error, message) in bad.items():
            with pytest.raises(error, match=message):
                call(_replaced(arguments, at, by))
                pytest.fail(f"{op}: argument {at} with another {how} was taken")
    for wrong in (arguments[:-1], (*arguments, 0)):
        with pytest.raises(TypeError, match="items in an argument tuple"):
            call(wrong)


@pytest.mark.parametrize(
    ("op", "at", "by", "message"),
    [
        ("lstm_forward", 0, 0, "steps: got 0, takes 1 to"),
        ("lstm_forward", 1, 2**24 + 1, "batch: got 16777217, takes 1 to 16777216"),
        ("lstm_forward", 4, 17, "layers: got 17, takes 1 to 16"),
        ("lstm_backward", 15, 3, "steps kept: takes one more than steps"),
        ("lstm_backward", 19, 3, "synthesizer's kind: got 3, takes -1 to 2"),
        ("lstm_update", 3, 3, "rule: got 3, takes 0 to 2"),
    ],
)
def test_numbers_out_of_range(
    op: str, at: int, by: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_lstm((3, 4, 5, 6, 2), PLAIN, 0, torch.float32).on(DEVICE)
    arguments = _caught(monkeypatch, op, _calls(case)[op])
    with pytest.raises(ValueError, match=message):
        getattr(CUDA, op)(_replaced(arguments, (at,), by))


def test_more_rows_than_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_lstm((3, 4, 5, 6, 2), PLAIN, 0, torch.float32).on(DEVICE)
    arguments = _caught(monkeypatch, "lstm_forward", _calls(case)["lstm_forward"])
    with pytest.raises(ValueError, match="steps and batch: got 4194304 and 257, takes a product"):
        CUDA.lstm_forward((2**22, 257, *arguments[2:]))


@pytest.mark.parametrize("moment", ["first", "second"])
def test_a_rule_lacks_a_moment(moment: str) -> None:
    case = make_lstm((1, 4, 5, 6, 1), {**PLAIN, "lengths": False}, 0, torch.float32).on(DEVICE)
    state = bind_lstm(case)
    rows, tensors = _rows(case), state.tensors(case.slots())
    first, second = ((t[0], None, *t[2:]) for t in (tensors.first, tensors.second))
    tensors = (
        tensors._replace(first=first) if moment == "first" else tensors._replace(second=second)
    )
    with pytest.raises(TypeError, match=f"weight_hh's {moment} moment: got None"):
        BACKEND.lstm_update_((rows,), case.stack(), tensors)


def test_more_layers_than_a_launch_takes() -> None:
    module = fd.FusedDNILSTM(2, 2, 17, backend="cuda", device=DEVICE)
    with pytest.raises(ValueError, match="layers: got 17, takes 1 to 16"):
        module(torch.zeros(1, 1, 2, device=DEVICE))


# ---------------------------------------------------------------------------------------------
# On a GPU

# Recurrent weights on chip, in clusters and in a grid of many blocks, and streamed.
LARGE = {
    "clusters": (6, 48, 40, 128, 2),
    "a slice a block": (6, 80, 40, 512, 2),
    "streamed": (3, 33, 40, 1104, 1),
}


@pytest.mark.gpu
@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("run", [run_steps, run_closing])
def test_gpu_same_input_same_bits(run: Run, products: str, shape: str) -> None:
    """Twenty times on each of several grids."""
    dtype, precision, _ = PRODUCTS[products]
    torch.set_float32_matmul_precision(precision)
    if run is run_closing:
        case = make_closing(LARGE[shape], {**CLOSING, "kind": "lowrank"}, 1)
    else:
        case = make_lstm(LARGE[shape], PLAIN, 1)
    case = case.to(dtype, torch.float32).on(DEVICE)
    once = run(BACKEND, case)
    for resident in (0, 100, 64, 17, 5):
        machine(resident=resident, clusters=resident != 64)
        for _ in range(20):
            same(once, run(BACKEND, case))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("products", PRODUCTS)
def test_gpu_large_windows(products: str, shape: str) -> None:
    check(make_lstm(LARGE[shape], PLAIN, 2), run_steps, products)


@pytest.mark.gpu
def test_gpu_graph_and_streams() -> None:
    """Replayed windows are windows, also beside others on a second stream."""
    case = make_lstm(LARGE["a slice a block"], PLAIN, 3).to(torch.float32, torch.float32).on(DEVICE)
    once = run_steps(BACKEND, case)
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_steps(BACKEND, case)
    torch.cuda.synchronize()
    for _ in range(5):
        with torch.cuda.stream(side):
            graph.replay()
        beside = run_steps(BACKEND, case)
        torch.cuda.synchronize()
        same(once, captured)
        same(once, beside)
