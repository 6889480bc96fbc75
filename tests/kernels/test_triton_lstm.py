"""The Triton kernels of the LSTM: what is theirs alone.

That the backend computes what the reference does is tested in test_lstm_backends.py. Here: tiling
across programs, the window in one launch against one launch a step, low precision, indices beyond
32 bits, which tiles are chosen; and, on a GPU, barriers among many programs, CUDA graphs, streams.
Without a GPU kernels are interpreted, one program after another: a grid barrier then needs a grid
of one.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from strategies import (
    REFERENCE,
    LSTMCase,
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
from fused_dni.ops import registry
from fused_dni.ops.types import STEP, LSTMBoundary, LSTMRows, RuleTensors, SynthesizerTensors

pytestmark = pytest.mark.slow(40)

registry_reason = dict(registry.report())["triton"]
if registry_reason is not None:
    pytest.skip(f"triton {registry_reason}", allow_module_level=True)

from fused_dni.kernels import lstm, tuning  # noqa: E402
from fused_dni.kernels.barrier import RECORD, GridBarrier  # noqa: E402

from fused_dni.backends.triton import lstm as triton_lstm  # noqa: E402

BACKEND = registry.get("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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
# More than one program along both axes, the last ones only partly filled; several trips through a
# product's depth.
STEPWISE = lstm.WindowTiles(False, 16, 16, 16, 4)
# Several chunks, in groups that do not divide their number.
PERSISTENT = lstm.WindowTiles(True, 16, 32, 16, 1, 2)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


def forced(tiles: lstm.WindowTiles, *ops: str) -> Any:
    """All ops of a window with these tiles."""
    stack = contextlib.ExitStack()
    for op in ops or ("lstm_forward", "lstm_backward"):
        stack.enter_context(tuning.using(op, tiles))
    return stack


def check(case: LSTMCase, run: Any) -> None:
    exact, allowed = tolerances(run, case, torch.finfo(torch.float32).eps)
    compare(run(BACKEND, case.to(torch.float32, torch.float32)), exact, allowed)


on_cpu = pytest.mark.skipif(
    DEVICE == "cuda", reason="where there is a GPU, kernels are not interpreted"
)


@on_cpu
@pytest.mark.parametrize("tiles", [STEPWISE, PERSISTENT], ids=["a step", "a window"])
def test_a_window_in_many_tiles(tiles: lstm.WindowTiles, poisoned: None) -> None:
    shape = (2, 19, 5, 35, 2) if tiles is STEPWISE else (3, 13, 5, 27, 2)
    with forced(tiles):
        check(make_lstm(shape, PLAIN, 1, torch.float32), run_window)


@on_cpu
@pytest.mark.parametrize("kind", ["dense", "lowrank", "diagonal"])
@pytest.mark.parametrize("tiles", [STEPWISE, PERSISTENT], ids=["a step", "a window"])
def test_a_boundary_in_many_tiles(tiles: lstm.WindowTiles, kind: str, poisoned: None) -> None:
    shape = (2, 19, 5, 35, 2) if tiles is STEPWISE else (2, 13, 5, 27, 2)
    with forced(tiles):
        check(make_closing(shape, {**CLOSING, "kind": kind}, 2, torch.float32), run_close)


@on_cpu
def test_a_cell_and_an_update_in_many_tiles(poisoned: None) -> None:
    update = lstm.UpdateTiles(3, 16, 16, 16, 4, 1)
    with forced(STEPWISE, "lstm_cell"), tuning.using("lstm_update", update):
        check(make_lstm((1, 19, 21, 35, 1), PLAIN, 3, torch.float32), run_cell)


@on_cpu
def test_bfloat16_parameters_are_rounded_at_random() -> None:
    """By the same bits as in the reference, each slot by its own: but for values that the order of
    a sum moves across one of them, the same parameters."""
    results = []
    for backend in (REFERENCE, BACKEND):
        case = make_lstm((1, 9, 11, 13, 2), {**PLAIN, "lengths": False}, 8, torch.float32)
        trace = REFERENCE.lstm_forward(
            case.inputs["x"], case.inputs["h"], case.inputs["c"], case.stack(), None,
            case.dropout(), True,
        )  # fmt: skip
        made = REFERENCE.lstm_backward(
            case.inputs["grad_output"], None, None, case.inputs["x"], case.stack(), None,
            case.dropout(), trace, False, False,
        )  # fmt: skip
        rows = lstm_rows(case, trace.hidden, made.delta, case.alive())
        case.rule = fd.AdamW(lr=1e-4, eps=1e-3, stochastic_rounding=True)
        case = case.to(torch.float32, torch.bfloat16)
        before = [p.clone() for p in case.parameters.values()]
        state = bind_lstm(case)
        for _ in range(3):
            backend.lstm_update_(rows, case.stack(), state.tensors(case.slots()))
        assert (state.steps, state.skipped) == (3, 0)
        after = list(case.parameters.values())
        assert all(0 < (a != b).float().mean() < 1 for a, b in zip(after, before, strict=True))
        results.append(torch.cat([p.detach().flatten() for p in after]))
    assert (results[0] != results[1]).float().mean() < 0.01


@on_cpu
@pytest.mark.parametrize("where", ["input", "hidden", "delta"])
def test_a_failure_in_one_tile_stops_all(where: str) -> None:
    """The element that is not finite is one program's, the update is nobody's."""
    case = make_lstm((1, 19, 21, 35, 1), {**PLAIN, "lengths": False}, 4, torch.float32)
    state = bind_lstm(case)
    rows, tensors = _rows(case), state.tensors(case.slots())
    bad = {name: t.clone() for name, t in rows._asdict().items()}
    bad[where][-1, -1] = torch.nan
    before = [t.detach().clone() for t in case.slots() if t is not None]
    with tuning.using("lstm_update", lstm.UpdateTiles(2, 16, 16, 16, 4, 1)):
        BACKEND.lstm_update_((rows._replace(**bad),), case.stack(), tensors)
    for p, old in zip((t for t in case.slots() if t is not None), before, strict=True):
        assert torch.equal(p, old)
    assert (state.steps, state.skipped) == (0, 1)


def _rows(case: LSTMCase) -> Any:
    """Rows of a one-layer window, by the reference."""
    given = case.inputs
    trace = REFERENCE.lstm_forward(given["x"], given["h"], given["c"], case.stack(), None, (), True)
    made = REFERENCE.lstm_backward(
        given["grad_output"], None, None, given["x"], case.stack(), None, (), trace, False, False
    )
    (rows,) = lstm_rows(case, trace.hidden, made.delta, case.alive())
    return rows


# ---------------------------------------------------------------------------------------------
# Low precision


def low_precision(case: LSTMCase, dtype: torch.dtype, parameter: torch.dtype, device: str) -> None:
    """A window's results against the float64 reference's on the same numbers, to what rounding
    operands and results to ``dtype`` may do: :func:`strategies.tolerances` with its epsilon. The
    interpreter's casts to bfloat16 truncate, which is twice the error."""
    eps = torch.finfo(dtype).eps * (2 if device == "cpu" else 1)
    # What is rounded is the same for both.
    rounded = case.to(dtype, parameter).to(torch.float64, torch.float64)

    def run(backend: Any, case: LSTMCase) -> dict[str, Tensor]:
        given = case.inputs
        x, lengths = given["x"], given.get("lengths")
        layers = case.stack()
        trace = backend.lstm_forward(
            x, given["h"], given["c"], layers, lengths, case.dropout(), True
        )
        made = backend.lstm_backward(
            given["grad_output"], given["grad_h"], given["grad_c"], x, layers, lengths,
            case.dropout(), trace, True, True,
        )  # fmt: skip
        out = {"hidden": trace.hidden, "h": trace.h, "c": trace.c, "dh": made.h, "dc": made.c}
        out["dx"] = made.x
        for k, layer in enumerate(made.layers):
            out |= {f"{name}_{k}": t for name, t in layer._asdict().items()}
        return out

    exact, allowed = tolerances(run, rounded, eps)
    on_device = rounded.to(dtype, parameter)
    for tensors in (on_device.inputs, on_device.parameters):
        for name, t in tensors.items():
            tensors[name] = t.to(device)
    got = run(BACKEND, on_device)
    for name, t in got.items():
        assert t.dtype == (parameter if "weight" in name or "bias" in name else dtype), name
    compare({name: t.cpu() for name, t in got.items()}, exact, allowed)


@on_cpu
@pytest.mark.parametrize("parameter", [torch.float32, None], ids=["masters", "all low"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tiles", [STEPWISE, PERSISTENT], ids=["a step", "a window"])
def test_low_precision(
    tiles: lstm.WindowTiles, dtype: torch.dtype, parameter: torch.dtype | None, poisoned: None
) -> None:
    shape = (3, 17, 5, 18, 1) if tiles is STEPWISE else (3, 7, 5, 18, 2)
    with forced(tiles):
        low_precision(make_lstm(shape, PLAIN, 5), dtype, parameter or dtype, "cpu")


def test_small_gradients_survive_float16() -> None:
    """Gradients far below float16's smallest number go from step to step."""
    case = make_lstm((3, 4, 5, 9, 1), {**PLAIN, "arriving": "h", "lengths": False}, 6)
    case = case.to(torch.float16, torch.float32)
    given = {name: t.to(DEVICE) for name, t in case.inputs.items()}
    case.parameters = {name: p.to(DEVICE) for name, p in case.parameters.items()}
    layers = case.stack()
    trace = BACKEND.lstm_forward(given["x"], given["h"], given["c"], layers, None, (), True)
    tiny = torch.full(trace.h.shape, 2.0**-24, dtype=torch.float16, device=DEVICE)
    made = BACKEND.lstm_backward(None, tiny, None, given["x"], layers, None, (), trace, False, True)
    weight = made.layers[0].weight_hh
    assert weight.dtype == torch.float32
    # The gradient at a weight is smaller than what arrives; in float16 all would be zero.
    assert (weight != 0).float().mean() > 0.9 and weight.abs().max() < 2.0**-24


# ---------------------------------------------------------------------------------------------
# Plans


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_a_window_that_fits_runs_in_one_launch() -> None:
    """By the machine: one program a multiprocessor, its weights in shared memory."""
    for architecture, largest in ((80, 1024), (90, 1536), (100, 1536)):
        machine = lstm.MACHINES[architecture]
        for size in (64, 512, largest):
            tiles = lstm.window_tiles(16, size, 2, False, machine)
            assert tiles.persistent
            assert lstm.shared_bytes(tiles, size, 4, 2) <= machine.shared
            assert -(-size // tiles.units) <= machine.processors
        assert not lstm.window_tiles(16, 2 * largest, 2, False, machine).persistent
        assert not lstm.window_tiles(4096, 512, 2, False, machine).persistent
        # float32 of three products takes two copies of twice the size.
        assert not lstm.window_tiles(16, largest, 8, True, machine).persistent


def test_all_candidates_are_resident() -> None:
    machine = lstm.Machine(20, 99 * 1024)
    for batch, size, width in ((1, 1, 8), (16, 256, 2), (40, 100, 4), (300, 700, 2)):
        for backward in (False, True):
            found = list(lstm.window_candidates(batch, size, width, backward, machine))
            assert not found[-1].persistent
            for tiles in found:
                blocks = -(-batch // tiles.rows) * -(-size // tiles.units)
                assert blocks <= machine.processors or not tiles.persistent
                if tiles.persistent:
                    depth, gates = (4 * size, 1) if backward else (size, 4)
                    assert lstm.shared_bytes(tiles, depth, gates, width) <= machine.shared


def test_plans_run_nothing_and_allocate_nothing() -> None:
    """They plan on tensors without memory, the step number apart from the same arguments."""
    batch, size, steps = 20, 40, 3
    layer = lstm.Layer(meta(4 * size, 7), meta(4 * size, size), None, None)
    trace = lstm.Trace(
        meta(steps + 1, batch, size), meta(batch, size), meta(batch, size),
        meta(steps + 1, batch, size), meta(steps, batch, 4 * size),
    )  # fmt: skip
    products = lstm.Products(torch.float32, "tf32")
    carry, words = meta(batch, size), meta(2, dtype=torch.int32)
    barrier = GridBarrier(words, meta(RECORD, dtype=torch.int32), 0)
    launches = lstm.plan_forward(
        layer, trace.c, trace, None, carry, barrier, True, STEPWISE, products
    )
    assert [launch.arguments["t"] for launch in launches] == [0, 1, 2]
    assert {launch.grid for launch in launches} == {(3, 2)}
    made = lstm.Gradients(meta(steps, batch, 4 * size), trace.h, trace.c)
    launches = lstm.plan_backward(
        layer, (None, None, None), trace, None, made, None, "none", 0, None, carry, barrier,
        STEPWISE, products,
    )  # fmt: skip
    assert [launch.arguments["t"] for launch in launches] == [2, 1, 0]
    assert [launch.arguments["LAST"] for launch in launches] == [True, False, False]
    tiles = PERSISTENT._replace(rows=32, units=64)
    (launch,) = lstm.plan_forward(
        layer, trace.c, trace, None, carry, barrier, True, tiles, products
    )
    assert launch.grid == (1, 1) and launch.options["launch_cooperative_grid"]
    assert lstm.groups(tiles, batch) == 1


COMPILE = """
import json
from fused_dni.kernels import aot, specimens
wanted = [s for s in specimens.lstm_specimens(90) if s.name.startswith("16x1024 bf16")]
print(json.dumps([aot.compile_launch(s.launch, 90).asm["ptx"] for s in wanted]))
"""


def time_loop(ptx: str) -> str:
    """The longest loop that multiplies."""
    lines = ptx.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\$L\w+):", line))}
    jumps = [
        (m[1], i) for i, line in enumerate(lines) if (m := re.search(r"bra\S*\s+(\$L\w+)", line))
    ]
    loops = ["\n".join(lines[labels[to] : i]) for to, i in jumps if labels[to] < i]
    return max((loop for loop in loops if "mma.sync" in loop), key=len)


@on_cpu
def test_weights_are_read_once() -> None:
    """In machine code for Hopper: a step reads the state and its own gates and cells, and no
    weight; the products are all there, and none is made twice."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=True
    )
    rows, size, units, threads = 16, 1024, 16, 256
    for ptx, depth in zip(json.loads(done.stdout), (size, 4 * size), strict=True):
        loop = time_loop(ptx)
        # One multiplies 16 x 16 by 16 x 8, for a warp.
        assert loop.count("mma.sync") * threads // 32 == size * 4 * units // (16 * 8)
        loads = re.findall(r"ld\.global(?!\S*acquire)\S*?(?:\.v(\d))?\.[bfsu](\d+) ", loop)
        read = sum(int(vector or 1) * int(width) // 8 for vector, width in loads) * threads
        state, own = 2 * rows * depth, 2 * rows * units
        assert state < read <= state + 16 * own < state + 2 * 4 * size * units


@on_cpu
def test_offsets_beyond_32_bits() -> None:
    """A step whose gates lie beyond 2^31 elements; memory that nobody touches takes no room."""
    batch, size = 64, 512
    t = 2**31 // (4 * size * batch)
    low = functools.partial(torch.empty, dtype=torch.bfloat16)
    try:
        gates, delta = low(t + 1, batch, 4 * size), low(t + 1, batch, 4 * size)
        states, cells = low(t + 2, batch, size), low(t + 2, batch, size)
    except RuntimeError as error:
        pytest.skip(f"no address space for it: {error}")
    g = torch.Generator().manual_seed(0)
    z, h, c = (torch.randn(batch, n, generator=g) for n in (4 * size, size, size))
    gates[t], states[t], cells[t] = z, h, c
    layer = lstm.Layer(None, torch.randn(4 * size, size, generator=g) * size**-0.5)
    trace = lstm.Trace(states, low(batch, size), low(batch, size), cells, gates)
    carry = torch.empty(batch, size)
    tiles = lstm.WindowTiles(False, 64, 128, 128, 4)
    products = lstm.Products(torch.bfloat16, "tf32")
    launches = lstm.plan_forward(layer, c, trace, None, carry, None, True, tiles, products)
    launches[t]._replace(arguments=launches[t].arguments | {"c": c}).run()
    i, f, o = (
        (z + states[t].float() @ layer.weight_hh.bfloat16().float().t())
        .unflatten(1, (4, size))[:, [0, 1, 3]].sigmoid().unbind(1)
    )  # fmt: skip
    # To what rounding z, the operands, the gates and the results to 8 bits may do.
    torch.testing.assert_close(gates[t, :, :size].float(), i, rtol=0.02, atol=0.02)
    assert (states[t + 1].float().abs() <= o + 0.02).all()
    made = lstm.Gradients(delta, low(batch, size), low(batch, size))
    grad = torch.ones(batch, size)
    launches = lstm.plan_backward(
        layer, (None, grad, grad), trace, None, made, None, "none", 0, None, carry, None, tiles,
        products,
    )  # fmt: skip
    launches[0].run()
    assert launches[0].arguments["t"] == t
    e = 1 + o * (1 - cells[t + 1].float().tanh() ** 2)
    torch.testing.assert_close(carry, e * f, rtol=0.03, atol=0.03)
    torch.testing.assert_close(
        delta[t, :, :size].float(), e * gates[t, :, 2 * size : 3 * size].float() * i * (1 - i),
        rtol=0.03, atol=0.03,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# On a GPU


gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
SHAPES = [(7, 16, 48, 64, 2), (5, 70, 33, 200, 1), (9, 33, 129, 256, 2), (3, 1, 1, 17, 1)]


def on(device: str, case: LSTMCase) -> LSTMCase:
    case.inputs = {name: t.to(device) for name, t in case.inputs.items()}
    case.parameters = {name: t.to(device) for name, t in case.parameters.items()}
    return case


def run_steps(backend: Any, case: LSTMCase) -> dict[str, Tensor]:
    """A window forwards and backwards."""
    given, layers = case.inputs, case.stack()
    x, lengths = given["x"], given.get("lengths")
    trace = backend.lstm_forward(x, given["h"], given["c"], layers, lengths, case.dropout(), True)
    made = backend.lstm_backward(
        given["grad_output"], given["grad_h"], given["grad_c"], x, layers, lengths,
        case.dropout(), trace, True, True,
    )  # fmt: skip
    out = {"hidden": trace.hidden, "h": trace.h, "c": trace.c, "dh": made.h, "dc": made.c}
    assert made.x is not None
    out |= {"delta": made.delta, "dx": made.x}
    for k, layer in enumerate(made.layers):
        out |= {f"{name}_{k}": t for name, t in layer._asdict().items() if t is not None}
    return out


def step_by_step(case: LSTMCase) -> lstm.WindowTiles:
    """Tiles of one launch a step for a case on a GPU."""
    h = case.inputs["h"]
    width = triton_lstm._backward_products(h.dtype).width
    return lstm.step_tiles(*h.shape[1:], width, triton_lstm.machine(h.device))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gpu_window_in_one_launch_and_step_by_step(
    shape: tuple[int, int, int, int, int], poisoned: None
) -> None:
    """Both are what the reference says, and give the same bits twice."""
    case = make_lstm(shape, PLAIN, 1, torch.float32)
    exact, allowed = tolerances(run_steps, case, torch.finfo(torch.float32).eps)
    here = on("cuda", case.to(torch.float32, torch.float32))
    h = here.inputs["h"]
    products = triton_lstm._forward_products(torch.float32)
    whole = lstm.window_tiles(*h.shape[1:], products.width, False, triton_lstm.machine(h.device))
    if not whole.persistent:
        pytest.skip("this GPU has too little shared memory for a window in one launch")
    for stack in (contextlib.nullcontext(), forced(step_by_step(here))):
        with stack:
            once, twice = run_steps(BACKEND, here), run_steps(BACKEND, here)
        compare({name: t.cpu() for name, t in once.items()}, exact, allowed)
        for name, t in once.items():
            assert torch.equal(t, twice[name]), name


@pytest.mark.gpu
@gpu
def test_gpu_window_many_times() -> None:
    """A barrier that lets a program through too early shows up as other bits, now and then."""
    case = on("cuda", make_lstm((64, 64, 32, 512, 1), PLAIN, 2, torch.float32))
    case = case.to(torch.bfloat16, torch.float32)
    first = run_steps(BACKEND, case)
    for _ in range(20):
        again = run_steps(BACKEND, case)
        for name, t in first.items():
            assert torch.equal(t, again[name]), name


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("persistent", [True, False], ids=["a window", "a step"])
def test_gpu_low_precision(dtype: torch.dtype, persistent: bool) -> None:
    case = make_lstm((5, 33, 40, 200, 2), PLAIN, 5)
    tiles = step_by_step(on("cuda", case.to(dtype, torch.float32)))
    with contextlib.nullcontext() if persistent else forced(tiles):
        low_precision(case, dtype, torch.float32, "cuda")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("kind", ["dense", "lowrank", "diagonal"])
def test_gpu_boundary(kind: str) -> None:
    case = make_closing((5, 33, 20, 90, 2), {**CLOSING, "kind": kind}, 3, torch.float32)
    exact, allowed = tolerances(run_close, case, torch.finfo(torch.float32).eps)
    here = on("cuda", case.to(torch.float32, torch.float32))
    for stack in (contextlib.nullcontext(), forced(step_by_step(here))):
        with stack:
            got = run_close(BACKEND, here)
        compare({name: t.cpu() for name, t in got.items()}, exact, allowed)


@pytest.mark.gpu
@gpu
def test_gpu_update_and_cell() -> None:
    case = make_lstm((1, 70, 130, 96, 1), {**PLAIN, "lengths": False}, 4, torch.float32)
    exact, allowed = tolerances(run_cell, case, torch.finfo(torch.float32).eps)
    got = run_cell(BACKEND, on("cuda", case.to(torch.float32, torch.float32)))
    compare({name: t.detach().cpu() for name, t in got.items()}, exact, allowed)


def train_once(case: LSTMCase, state: Any, statistics: Tensor) -> dict[str, Tensor]:
    """All ops of a training step on a window with a boundary: forward, close, update."""
    given, layers, options = case.inputs, case.stack(), case.options
    x = given["x"]
    trace = BACKEND.lstm_forward(x, given["h"], given["c"], layers, given["lengths"], (), True)
    p = case.parameters
    synthesizer = SynthesizerTensors(
        options["kind"],
        **{name: p.get(f"synthesizer.{name}") for name in SynthesizerTensors._fields[1:5]},
    )
    boundary = LSTMBoundary(
        synthesizer, given["ended"], 35.0, **{k: options[k] for k in LSTMBoundary._fields[3:]}
    )
    closed = BACKEND.lstm_close(
        given["grad_output"], given["grad_h"], given["grad_c"], x, layers, given["lengths"], (),
        trace, True, False, boundary, statistics,
    )  # fmt: skip
    made = closed.gradients
    below, rows = x.nan_to_num(), []  # NaN where a row has ended
    for k in range(case.layers):
        parts = (below, trace.hidden[k, :-1], made.delta[k])
        rows.append(LSTMRows(*[t.flatten(0, 1) for t in parts]))
        below = trace.hidden[k, 1:]
    BACKEND.lstm_update_(tuple(rows), layers, state)
    out = {"h": trace.h, "dh": made.h, "learned": closed.synthesizer[0]}
    return {name: t for name, t in out.items() if t is not None}


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("max_norm", [0.0, 0.05])
def test_gpu_training_step_in_a_graph(max_norm: float) -> None:
    """Captured once and replayed, a training step does what it does outside: nothing in it waits
    for the device."""
    options = {**CLOSING, "max_norm": max_norm}
    results = []
    for captured in (False, True):
        case = on("cuda", make_closing((5, 7, 20, 90, 2), options, 3, torch.float32))
        p = {k: t for k, t in case.parameters.items() if not k.startswith("synthesizer")}
        slots = case.slots()
        hyper = torch.tensor([0.1, 0.9, 0, 0, 0.01, 0, 0], dtype=torch.float64, device="cuda")
        first = tuple(None if t is None else torch.zeros_like(t) for t in slots)
        rule = RuleTensors(
            "sgd", False, hyper, first, (None,) * len(slots), tuple(t is not None for t in slots)
        )
        statistics = torch.zeros(5, dtype=torch.float64, device="cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles; and the first of three steps
            out = train_once(case, rule, statistics)
        torch.cuda.current_stream().wait_stream(stream)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = train_once(case, rule, statistics)
            graph.replay()
            graph.replay()
        else:
            for _ in range(2):
                out = train_once(case, rule, statistics)
        results.append({**out, **p, "hyper": hyper, "statistics": statistics})
    eager, replayed = results
    assert eager["hyper"][STEP] == 3
    for name, t in eager.items():
        assert torch.equal(t, replayed[name]), name


@pytest.mark.gpu
@gpu
def test_gpu_side_stream() -> None:
    """Launches go to the current stream: what was put there before is awaited."""
    case = on("cuda", make_lstm((5, 16, 32, 128, 1), PLAIN, 7, torch.float32))
    wanted = run_steps(BACKEND, case)
    late = {name: t.clone() for name, t in case.inputs.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for t in case.inputs.values():
            if t.is_floating_point():
                t.zero_()
        torch.cuda._sleep(50_000_000)
        for name, t in case.inputs.items():
            t.copy_(late[name])
        got = run_steps(BACKEND, case)
    stream.synchronize()
    for name, t in wanted.items():
        assert torch.equal(t, got[name]), name


@pytest.mark.gpu
@gpu
@pytest.mark.filterwarnings("ignore")
def test_gpu_module_compiles() -> None:
    """FusedDNILSTM under fullgraph, its window in our kernels, as in eager mode."""
    torch.manual_seed(0)
    module = fd.FusedDNILSTM(16, 32, 2, backend="triton").cuda()
    x = torch.randn(6, 4, 16, device="cuda")
    results = []
    torch._dynamo.reset()
    for run in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        module.zero_grad()
        state, out = None, []
        for _ in range(2):
            output, state = run(x, state)
            output.square().mean().backward()
            out += [output.detach(), *[t.detach() for t in state]]
        results.append([*out, *[p.grad.clone() for p in module.parameters() if p.grad is not None]])
    torch._dynamo.reset()
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)
