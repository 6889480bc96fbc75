"""The Triton kernels of the linear layer and its synthesizer: what is theirs alone.

That the backend computes what the reference does is tested in test_linear_backends.py, what both
GPU backends owe beyond that in test_gpu_linear.py. Here: tiling across programs, one launch against
several, low precision, random rounding, indices beyond 32 bits, copy-engine operands, which tiles
are chosen; and, on a GPU, streams side by side. Without a GPU kernels are interpreted, one program
after another: a grid barrier then needs a grid of one.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from divided import (
    FAST_TILES,
    FULL,
    SMOOTH,
    TABLE,
    TILES,
    TRITON_SHAPE,
    Way,
    tiled,
)
from strategies import (
    Case,
    Run,
    bind,
    compare,
    make_case,
    named,
    paired,
    run_parts,
    run_step,
    slots,
    slots_of_step,
    tolerances,
)

import fused_dni as fd
from fused_dni.backends.reference.rules import rounded_at_random
from fused_dni.ops import registry
from fused_dni.ops import types as base

pytestmark = pytest.mark.slow(100)

registry_reason = dict(registry.report())["triton"]
if registry_reason is not None:
    pytest.skip(f"triton {registry_reason}", allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from fused_dni.kernels import common, linear, specimens  # noqa: E402
from fused_dni.kernels.tiles import round_at_random, tile_offsets  # noqa: E402

BACKEND = registry.get("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WAYS = list(TILES)


def described(value: Any) -> str:
    """Of a test's id."""
    return named(value) if isinstance(value, dict) else str(value)


def check(
    case: Case,
    dtypes: tuple[torch.dtype, torch.dtype],
    run: Run,
    way: str | None = None,
) -> None:
    """One op's results against the float64 reference's, within derived tolerances."""
    Way(BACKEND, TRITON_SHAPE, None if way is None else TILES[way]).check(case, dtypes, run)


@pytest.mark.parametrize(
    ("options", "way"), [*zip(TABLE[::3], itertools.cycle(WAYS), strict=False)], ids=described
)
def test_step_tile_by_tile(options: dict[str, Any], way: str, poisoned: None) -> None:
    check(make_case(TRITON_SHAPE, options, 1, *FULL), FULL, run_step, way)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("options", "way"), [*zip(TABLE[1::4], itertools.cycle(WAYS), strict=False)], ids=described
)
def test_parts_tile_by_tile(
    options: dict[str, Any], training: bool, way: str, poisoned: None
) -> None:
    run = functools.partial(run_parts, training=training)
    check(make_case((35, 20, 37, 19, 33), options, 2, *FULL), FULL, run, way)


@pytest.mark.parametrize("way", WAYS)
def test_a_step_at_the_preactivation_has_no_room_for_a_way_that_it_does_not_go(way: str) -> None:
    options = {**TABLE[0], **SMOOTH, "normalization": "batch", "activation": "gelu",
               "kind": "dense", "context": None, "interface": "preactivation"}  # fmt: skip
    case = make_case(TRITON_SHAPE, options, 1, *FULL).on(DEVICE)
    state, _ = bind(case)
    step: Any = BACKEND.bind_step(
        case.layer(), case.config, case.synthesizer(), 0.0, state.tensors(slots_of_step(case))
    )
    with tiled(TILES[way]):
        step(case.inputs["x"], None, 35.0, True, False)
    (room,) = step.workspaces.values()
    t = room.tensors
    assert (t.normalized, t.rstd, t.columns, t.gradient, t.across) == (None,) * 5


@pytest.mark.skipif(DEVICE == "cuda", reason="counted as kernels are interpreted")
@pytest.mark.parametrize(
    ("normalization", "saved"), [(None, 0), ("batch", 1), ("layer", 1)], ids=str
)
def test_a_step_at_the_preactivation_meets_less_often(
    normalization: str | None, saved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is summed over rows or features on the way back, where tiles do not hold them all."""
    met = []
    monkeypatch.setattr(linear, "wait_for_all", lambda *_: met.append(1) or True)
    counts = []
    for interface in ("output", "preactivation"):
        options = {**TABLE[0], **SMOOTH, "normalization": normalization, "kind": "lowrank",
                   "context": None, "interface": interface}  # fmt: skip
        case = make_case(TRITON_SHAPE, options, 1, *FULL)
        state, _ = bind(case)
        rule = state.tensors(slots_of_step(case))
        met.clear()
        with tiled(TILES["one"]):
            BACKEND.linear_step_(
                case.inputs["x"], case.layer(), case.config, case.synthesizer(), None, 35.0, 0.0,
                rule, False, False,
            )  # fmt: skip
        counts.append(len(met))
    # h U^T's parts and their sum, delta; and the statistics.
    assert counts[1] == 3 + (normalization is not None)
    assert counts[0] - counts[1] == saved


@paired(dtype=[torch.float16, torch.bfloat16], normalization=[None, "batch", "layer"], way=[*WAYS])
def test_low_precision(
    dtype: torch.dtype, normalization: str | None, way: str, poisoned: None
) -> None:
    dtypes = (dtype, torch.float32)
    options = {**TABLE[0], **SMOOTH, "normalization": normalization, "kind": "lowrank",
               "context": "label", "rule": "momentum"}  # fmt: skip
    check(make_case((37, 24, 40, 5, 7), options, 3, *dtypes), dtypes, run_step, way)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_parameters_in_low_precision(dtype: torch.dtype, poisoned: None) -> None:
    """Forward, backward and prediction; an update is refused, as by the reference."""
    options = {**TABLE[0], **SMOOTH, "normalization": "layer", "kind": "dense", "context": "vector"}
    case = make_case((19, 24, 40, 5, 7), options, 4, dtype, dtype)

    def run(backend: Any, case: Case) -> dict[str, torch.Tensor]:
        x, grad_h, layer = case.inputs["x"], case.inputs["grad_h"], case.layer()
        h, saved = backend.linear_forward(x, layer, case.config, True, True)
        made = backend.linear_backward(grad_h, x, h, saved, layer, case.config, True, True, True)
        m = backend.synthesizer_predict(h, case.synthesizer(), case.inputs["context"])
        out = {"h": h, "scaled": m.scaled, "delta": made.delta, "dx": made.x, "dw": made.weight}
        return {name: t for name, t in out.items() if t is not None}

    check(case, (dtype, dtype), run)
    fresh = case.to(dtype, dtype).on(DEVICE)
    state, _ = bind(fresh)
    with pytest.raises(TypeError, match="float32 or float64 parameters"):
        BACKEND.linear_step_(
            fresh.inputs["x"], fresh.layer(), fresh.config, fresh.synthesizer(),
            fresh.inputs["context"], 1.0, 0.0, state.tensors(slots(fresh.layer())), False, True,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operands_by_the_copy_engine(
    dtype: torch.dtype, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Descriptors bring the same tiles as pointers do; here as far as the interpreter shows it."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    made = []
    real = linear._described

    def described(*args: Any) -> Any:
        made.append(real(*args))
        return made[-1]

    monkeypatch.setattr(linear, "_described", described)
    options = {**TABLE[0], **SMOOTH, "normalization": "batch", "kind": "lowrank",
               "context": None, "rule": "sgd"}  # fmt: skip
    try:
        with tiled(TILES["several"], descriptors=True):
            # TF32 on a GPU: operands are rounded to ten bits there.
            rounded = dtype == torch.float32 and DEVICE == "cuda"
            eps = 2.0**-10 if rounded else torch.finfo(dtype).eps
            case = make_case((37, 24, 40, 5, 7), options, 5, dtype, torch.float32)
            exact, allowed = tolerances(run_step, case, eps)
            got = run_step(BACKEND, case.to(dtype, torch.float32).on(DEVICE))
            compare({name: t.cpu() for name, t in got.items()}, exact, allowed)
            assert any(made)
            # A row that does not begin at 16 bytes: plain pointers.
            made.clear()
            check(make_case((37, 23, 41, 5, 7), options, 5, dtype, torch.float32),
                  (dtype, torch.float32), run_step)  # fmt: skip
            assert made and not any(made)
    finally:
        torch.set_float32_matmul_precision(precision)


# ---------------------------------------------------------------------------------------------
# bfloat16 parameters


@triton.jit
def _round(out, value, step, SLOT: tl.constexpr):
    at = tl.arange(0, 256)
    v = tl.load(value + 512 + at)
    tl.store(out + at, round_at_random(v, 512, at, tl.load(step), SLOT))


def test_random_rounding_is_the_references() -> None:
    value = torch.randn(768, device=DEVICE)
    out = torch.empty(256, dtype=torch.bfloat16, device=DEVICE)
    step = torch.tensor([41.0], dtype=torch.float64, device=DEVICE)
    _round[(1,)](out, value, step, 2)
    assert torch.equal(out, rounded_at_random(value, 41, 2)[512:])


@pytest.mark.parametrize(
    ("kind", "way"), [("dense", "one"), ("lowrank", "several"), ("diagonal", "one")]
)
def test_parameters_that_are_rounded_at_random(way: str, kind: str) -> None:
    """Within a tolerance of bfloat16 all the way; moments are float32."""
    options = {**TABLE[0], **SMOOTH, "normalization": "layer", "kind": kind, "context": "label",
               "rule": "momentum"}  # fmt: skip
    half = (torch.bfloat16, torch.bfloat16)
    case = make_case(TRITON_SHAPE, options, 4, *half)
    case.rule = replace(case.rule, stochastic_rounding=True)
    check(case, half, run_step, way)
    with tiled(TILES[way]):
        got = run_step(BACKEND, case.to(*half).on(DEVICE))
    for name, t in got.items():
        if name.startswith("after."):
            assert t.dtype == torch.bfloat16
        elif "moment" in name:
            assert t.dtype == torch.float32


# ---------------------------------------------------------------------------------------------
# Plans


def test_constants_are_those_of_the_signature() -> None:
    for name in ("LR", "BETA1", "BETA2", "EPS", "WEIGHT_DECAY", "STEP", "SKIPPED"):
        assert getattr(common, name).value == getattr(base, name), name


@triton.jit
def _offsets(out, row, column, columns):
    first, at = tile_offsets(row, column, columns, 16, 16)
    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    tl.store(out + i * 16 + j, first + at)


def test_offsets_beyond_32_bits() -> None:
    out = torch.empty(16, 16, dtype=torch.int64, device=DEVICE)
    row, column, columns = 3_000_000, 48, 100_003
    _offsets[(1,)](out, row, column, columns)
    i, j = torch.arange(16)[:, None], torch.arange(16)[None, :]
    assert torch.equal(out.cpu(), (row + i) * columns + column + j)
    assert out.max() > 2**31


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 129, 4096, 100_000])
@pytest.mark.parametrize("features", [1, 1024, 4097])
def test_default_tiles(architecture: int, dtype: torch.dtype, rows: int, features: int) -> None:
    """Products take sixteen at least, in powers of two; every program has its place in lists."""
    for rule in ("sgd", "adam"):
        tiles = linear.default_tiles(rows, 64, features, dtype, rule, "ieee", architecture)
        for size in tiles[1:10]:
            assert size >= 16 and size & (size - 1) == 0
        problem = linear.Problem("batch", True, source="diagonal", rule=rule,
                                 trainable=(True,) * 4)  # fmt: skip
        launches = specimens._linear_step(rows, 64, features, dtype, problem, tiles, True, False)
        assert all(1 <= launch.grid[0] <= linear.FLAGS.value for launch in launches)
        if tiles.launches == "one":
            assert len(launches) == 1 and launches[0].options["launch_cooperative_grid"]
    for candidate in linear.tile_candidates(tiles):
        assert all(size >= 16 and size & (size - 1) == 0 for size in candidate[1:10])


def test_what_a_step_remembers_of_a_shape_keeps_no_batch_alive() -> None:
    options = {**TABLE[0], **SMOOTH, "normalization": None, "kind": "diagonal", "context": None}
    case = make_case((21, 35, 41, 5, 7), options, 8, *FULL).on(DEVICE)
    state, _ = bind(case)
    step: Any = BACKEND.bind_step(
        case.layer(), case.config, case.synthesizer(), 0.0, state.tensors(slots(case.layer()))
    )
    step(case.inputs["x"], None, 21.0, False, False)
    (room,) = step.workspaces.values()
    for launch in (launch for plan in room.plans.values() for launch in plan):
        assert launch.arguments.keys() == {"s", "C", "FIRST", "LAST"}


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    one = torch.zeros(2, 2, device=DEVICE)
    assert BACKEND.why_not(one, one) is None
    assert "float32" in str(BACKEND.why_not(one.double(), one.double()))
    assert "parameters of its dtype" in str(BACKEND.why_not(one.bfloat16(), one.double()))
    assert "one device" in str(BACKEND.why_not(one, one.to("meta")))
    with pytest.raises(RuntimeError, match=r"'triton' cannot serve this call: it serves float32"):
        fd.functional.linear(one.double(), one.double(), backend="triton")
    monkeypatch.setattr(BACKEND, "interpreted", False)
    cpu = torch.zeros(2, 2)
    assert "serves tensors on cuda, got x on cpu" in str(BACKEND.why_not(cpu, cpu))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a CUDA device" in str(BACKEND.available())


# ---------------------------------------------------------------------------------------------
# On a GPU

gpu = pytest.mark.gpu


@gpu
@pytest.mark.parametrize("shape", [(128, 1024, 1024, 16, 10), (64, 256, 256, 16, 10)], ids=str)
def test_gpu_default_tiles(shape: tuple[int, int, int, int, int]) -> None:
    options = {**TABLE[0], **SMOOTH, "normalization": "batch", "kind": "lowrank",
               "context": "label", "rule": "adam"}  # fmt: skip
    check(make_case(shape, options, 3, *FULL), FULL, run_step)


@gpu
def test_gpu_streams_side_by_side() -> None:
    """Forwards of one layer on two streams and in a graph, at a time: the same bits as alone."""
    options = {**TABLE[0], **SMOOTH, "normalization": "layer", "kind": "lowrank", "context": None}
    case = make_case((64, 64, 328, 16, 10), options, 5, *FULL).on(DEVICE)

    def run() -> torch.Tensor:
        h, _ = BACKEND.linear_forward(case.inputs["x"], case.layer(), case.config, True, True)
        return h

    with tiled(FAST_TILES["one, rows divided"]):
        alone = run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = run()
        made = []
        streams = [torch.cuda.Stream() for _ in range(3)]
        torch.cuda.synchronize()
        for _ in range(50):
            for stream in streams[:2]:
                with torch.cuda.stream(stream):
                    made.append(run())
            with torch.cuda.stream(streams[2]):
                graph.replay()
                made.append(replayed.clone())
        torch.cuda.synchronize()
    for h in made:
        assert torch.equal(h, alone)


@gpu
def test_gpu_training() -> None:
    """Layers with rules, captured or not, learn on a GPU as with the reference."""
    results = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        options: dict[str, Any] = {"normalization": "batch", "activation": "gelu",
                                   "context_features": 10, "backend": backend}  # fmt: skip
        rule = fd.SGD(0.1)
        model = torch.nn.Sequential(
            fd.FusedDNILinear(64, 128, update=rule, **options),
            fd.FusedDNILinear(128, 96, update=rule, **options),
            fd.FusedDNILinear(96, 10, synthesizer=None, update=rule, backend=backend),
        ).cuda()
        x, y = torch.randn(256, 64, device="cuda"), torch.randint(0, 10, (256,), device="cuda")
        for _ in range(10):
            with fd.condition_on(y):
                loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
        results.append(loss.item())
    assert results[0] == pytest.approx(results[1], rel=1e-3)
