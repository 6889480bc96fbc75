"""The Triton kernels of the linear layer and its synthesizer: what is theirs alone.

That the backend computes what the reference does is tested in test_linear_backends.py. Here: tiling
across programs, one launch against several, low precision, updates that are all or nothing, indices
beyond 32 bits, copy-engine operands, which tiles are chosen; and, on a GPU, barriers among many
programs, CUDA graphs, streams. Without a GPU kernels are interpreted, one program after another: a
grid barrier then needs a grid of one.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from strategies import (
    OPTIONS,
    Case,
    Run,
    bind,
    compare,
    make_case,
    named,
    paired,
    pairwise,
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
from fused_dni.ops.types import SKIPPED, STATISTICS_SIZE, STEP, LinearGradients

pytestmark = pytest.mark.slow(100)

registry_reason = dict(registry.report())["triton"]
if registry_reason is not None:
    pytest.skip(f"triton {registry_reason}", allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from fused_dni.kernels import common, linear, synthesizer, tuning  # noqa: E402
from fused_dni.kernels.tiles import round_at_random, tile_offsets  # noqa: E402

from fused_dni.backends.triton import backend as adapter  # noqa: E402
from fused_dni.functional import linear_step_  # noqa: E402

BACKEND = registry.get("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TABLE = pairwise(OPTIONS)
SMOOTH = {"frozen": None, "need_dx": True, "bias": True, "affine": True, "synthesizer_bias": True,
          "activation": "tanh", "max_norm": 0.0, "interface": "output"}  # fmt: skip

# Several programs along both axes in every phase, the last ones only partly filled.
SEVERAL = (
    linear.Tiles("several", 16, 32, 32, 16, 16, 32, 16, 32, 16, 4, 1),
    synthesizer.Tiles("several", 16, 16, 16, 32, 16, 4, 1),
)
# The same in one launch, in which a program has several tiles.
ONE = (
    linear.Tiles("one", 16, 16, 16, 16, 16, 32, 32, 16, 16, 4, 1),
    synthesizer.Tiles("one", 16, 32, 32, 16, 16, 4, 1),
)
WAYS = {"several": SEVERAL, "one": ONE}


@contextlib.contextmanager
def divided(tiles: tuple[linear.Tiles, synthesizer.Tiles]) -> Iterator[None]:
    """Run all ops with these tiles."""
    with contextlib.ExitStack() as stack:
        for op in ("step", "forward", "backward", "update"):
            stack.enter_context(tuning.using(f"linear_{op}", tiles[0]))
        for op in ("predict", "train"):
            stack.enter_context(tuning.using(f"synthesizer_{op}", tiles[1]))
        yield


def described(value: Any) -> str:
    """Of a test's id."""
    return named(value) if isinstance(value, dict) else str(value)


def check(case: Case, dtypes: tuple[torch.dtype, torch.dtype], run: Run) -> None:
    """One op's results against the float64 reference's, within derived tolerances."""
    exact, allowed = tolerances(run, case, torch.finfo(dtypes[0]).eps)
    got = run(BACKEND, case.to(*dtypes).on(DEVICE))
    compare({name: t.cpu() for name, t in got.items()}, exact, allowed)


FULL = (torch.float32, torch.float32)


@pytest.mark.parametrize(
    ("options", "way"), [*zip(TABLE[::3], itertools.cycle(WAYS), strict=False)], ids=described
)
def test_step_tile_by_tile(options: dict[str, Any], way: str, poisoned: None) -> None:
    with divided(WAYS[way]):
        check(make_case((35, 20, 37, 5, 7), options, 1, *FULL), FULL, run_step)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("options", "way"), [*zip(TABLE[1::4], itertools.cycle(WAYS), strict=False)], ids=described
)
def test_parts_tile_by_tile(
    options: dict[str, Any], training: bool, way: str, poisoned: None
) -> None:
    with divided(WAYS[way]):
        run = functools.partial(run_parts, training=training)
        check(make_case((35, 20, 37, 19, 33), options, 2, *FULL), FULL, run)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("normalization", [None, "batch", "layer"])
def test_a_step_at_the_preactivation_saves_what_a_forward_would(
    normalization: str | None, way: str, poisoned: None
) -> None:
    """On demand; and it has no room for a way back that it does not go."""
    options = {**TABLE[0], **SMOOTH, "normalization": normalization, "activation": "gelu",
               "kind": "dense", "context": None, "interface": "preactivation"}  # fmt: skip
    case = make_case((35, 20, 37, 5, 7), options, 1, *FULL).on(DEVICE)
    state, _ = bind(case)
    layer, x = case.layer(), case.inputs["x"]
    with divided(WAYS[way]):
        h, saved = BACKEND.linear_forward(x, layer, case.config, True, True)
        step: Any = BACKEND.bind_step(
            layer, case.config, case.synthesizer(), 0.0, state.tensors(slots_of_step(case))
        )
        before = [p.detach().clone() for p in slots(layer) if p is not None]
        asked = step(x, None, 35.0, True, True)
        with torch.no_grad():
            for p, old in zip([p for p in slots(layer) if p is not None], before, strict=True):
                p.copy_(old)
        unasked = step(x, None, 35.0, True, False)
    assert unasked.prediction is None and unasked.saved is None
    assert torch.equal(asked.h, h) and torch.equal(unasked.h, h)
    assert torch.equal(asked.dx, unasked.dx)
    for made, expected in zip(asked.saved, saved, strict=True):
        assert (made is None) == (expected is None)
        assert made is None or torch.equal(made, expected)
    (room,) = step.rooms.values()
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
    monkeypatch.setattr(linear, "meet", lambda *_: met.append(1) or True)
    counts = []
    for interface in ("output", "preactivation"):
        options = {**TABLE[0], **SMOOTH, "normalization": normalization, "kind": "lowrank",
                   "context": None, "interface": interface}  # fmt: skip
        case = make_case((35, 20, 37, 5, 7), options, 1, *FULL)
        state, _ = bind(case)
        rule = state.tensors(slots_of_step(case))
        met.clear()
        with divided(ONE):
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
    with divided(WAYS[way]):
        check(make_case((37, 24, 40, 5, 7), options, 3, *dtypes), dtypes, run_step)


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
    tiles = (SEVERAL[0]._replace(descriptors=True), SEVERAL[1])
    try:
        with divided(tiles):
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
# All or nothing


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rule", ["momentum", "adamw"])
def test_products_are_looked_at_where_bounds_do_not_tell(way: str, rule: str) -> None:
    """Rows of 1e30 in delta and x that meet only zeros are applied; those that meet, skipped."""
    options = {**TABLE[0], **SMOOTH, "normalization": None, "rule": rule}
    case = make_case((40, 35, 41, 5, 7), options, 6, *FULL).on(DEVICE)
    state, _ = bind(case)
    x, layer = torch.zeros_like(case.inputs["x"]), case.layer()
    delta = torch.zeros_like(case.inputs["grad_h"])
    delta[0], x[39] = 1e30, 1e30
    made = LinearGradients(delta, bias=torch.zeros(41, device=DEVICE))
    with divided(WAYS[way]):
        BACKEND.linear_update_(x, made, layer, state.tensors(slots(layer)))
        assert (state.steps, state.skipped) == (1, 0)
        before = [p.detach().clone() for p in slots(layer) if p is not None]
        x[0] = 1e30
        BACKEND.linear_update_(x, made, layer, state.tensors(slots(layer)))
        assert (state.steps, state.skipped) == (1, 1)
        after = [p for p in slots(layer) if p is not None]
        assert all(torch.equal(p, q) for p, q in zip(after, before, strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["dense", "lowrank", "diagonal"])
def test_a_synthesizers_products_are_looked_at(way: str, kind: str) -> None:
    options = {**TABLE[0], **SMOOTH, "normalization": None, "kind": kind, "context": "label",
               "rule": "sgd"}  # fmt: skip
    case = make_case((40, 35, 41, 5, 7), options, 6, *FULL).on(DEVICE)
    _, state = bind(case)
    tensors, context = case.synthesizer(), case.inputs["context"]
    statistics = torch.zeros(STATISTICS_SIZE, dtype=torch.float64, device=DEVICE)
    with divided(WAYS[way]):
        h = torch.zeros_like(case.inputs["grad_h"])
        h[39] = 1e25
        prediction = BACKEND.synthesizer_predict(h, tensors, context)
        zero = prediction._replace(scaled=torch.zeros_like(prediction.scaled))
        grad = torch.zeros_like(h)
        for row, steps, skipped in ((0, 1, 0), (39, 1, 1)):
            grad[row] = 1e25
            if kind == "lowrank":  # what goes back through V is larger than e
                zero = zero._replace(reduced=torch.zeros_like(zero.reduced))
            BACKEND.synthesizer_update_(
                h, zero, grad, tensors, context, 1.0, statistics,
                state.tensors(tensors.parameters()),
            )  # fmt: skip
            assert (state.steps, state.skipped) == (steps, skipped)
    assert float(statistics[4]) == 40.0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("label", "interface", "context"),
    [
        (-1, "output", "label"),
        (7, "output", "label"),
        (2**33, "output", "label"),
        (7, "preactivation", "label"),
        (-1, "output", "table"),
        (2**33, "preactivation", "table"),
    ],
)
def test_on_a_gpu_a_label_that_there_is_not_is_skipped_and_counted(
    way: str, label: int, interface: str, context: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing waits for the data there: its row is NaN, and the update does not happen."""
    monkeypatch.setattr(adapter, "check_context", lambda *_: None)
    options = {**TABLE[0], **SMOOTH, "normalization": "batch", "context": context, "rule": "adam",
               "interface": interface}  # fmt: skip
    case = make_case((37, 35, 41, 5, 7), options, 7, *FULL).on(DEVICE)
    state, other = bind(case)
    layer, tensors = case.layer(), case.synthesizer()
    own, its = state.tensors(slots_of_step(case)), other.tensors(tensors.parameters())
    before = [t.detach().clone() for t in (*layer, *tensors.parameters()) if t is not None]
    bad = case.inputs["context"].clone()
    bad[30] = label
    statistics = torch.zeros(STATISTICS_SIZE, dtype=torch.float64, device=DEVICE)
    with divided(WAYS[way]):
        step = BACKEND.linear_step_(
            case.inputs["x"], layer, case.config, tensors, bad, 37.0, 0.0, own, False, True
        )
        assert step.prediction is not None
        known = torch.arange(37) != 30
        assert torch.isfinite(step.prediction.scaled[known.to(DEVICE)]).all()
        assert torch.isnan(step.prediction.scaled[30]).all()
        good = BACKEND.synthesizer_predict(step.h, tensors, case.inputs["context"])
        BACKEND.synthesizer_update_(
            step.h, good, case.inputs["grad_h"], tensors, bad, 37.0, statistics, its
        )
    after = [t for t in (*layer, *tensors.parameters()) if t is not None]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    for hyper in (own.hyper, its.hyper):
        assert hyper[SKIPPED] == 1 and hyper[STEP] == 0


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
    case = make_case((35, 20, 37, 5, 7), options, 4, *half)
    case.rule = replace(case.rule, stochastic_rounding=True)
    with divided(WAYS[way]):
        check(case, half, run_step)
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
        launches = linear._specimen_step(rows, 64, features, dtype, problem, tiles, True)
        assert all(1 <= launch.grid[0] <= linear.FLAGS.value for launch in launches)
        if tiles.launches == "one":
            assert len(launches) == 1 and launches[0].options["launch_cooperative_grid"]
    for candidate in linear.tile_candidates(tiles):
        assert all(size >= 16 and size & (size - 1) == 0 for size in candidate[1:10])


def test_a_step_keeps_its_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a bound step allocates from call to call are its results."""
    case = make_case((37, 35, 41, 5, 7), {**TABLE[0], **SMOOTH, "kind": "lowrank",
                                          "context": None}, 8, *FULL).on(DEVICE)  # fmt: skip
    state, _ = bind(case)
    step = BACKEND.bind_step(
        case.layer(), case.config, case.synthesizer(), 0.0, state.tensors(slots(case.layer()))
    )
    made = []
    real = torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        made.append(args)
        return real(self, *args, **kwargs)

    step(case.inputs["x"], None, 37.0, False, True)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    step(case.inputs["x"], None, 37.0, False, True)
    made = [args for args in made if args != (0,)]  # the interpreter's own
    assert len(made) == len(("h", "scaled", "reduced"))


def test_a_step_forgets_shapes_that_do_not_come_back() -> None:
    """But for a few; and what it remembers of one keeps no batch alive, and follows kappa."""
    case = make_case((37, 35, 41, 5, 7), {**TABLE[0], **SMOOTH, "normalization": None,
                                          "kind": "diagonal", "context": None, "rule": "sgd"},
                     8, *FULL).on(DEVICE)  # fmt: skip
    state, _ = bind(case)
    rule = state.tensors(slots(case.layer()))
    step = BACKEND.bind_step(case.layer(), case.config, case.synthesizer(), 0.0, rule)
    for rows in (16, 17, 18, 19, 20, 21):
        step(case.inputs["x"][:rows], None, float(rows), False, False)
    assert [key[0] for key in step.rooms] == [18, 19, 20, 21]
    for room in step.rooms.values():
        for launch in (launch for plan in room.plans.values() for launch in plan):
            assert launch.arguments.keys() == {"s", "C", "FIRST", "LAST"}
    moved = []
    for scale in (21.0, 42.0):
        before = [p.detach().clone() for p in slots(case.layer()) if p is not None]
        step(case.inputs["x"][:21], None, scale, False, False)
        after = [p for p in slots(case.layer()) if p is not None]
        moved.append(after[0].detach() - before[0])
        with torch.no_grad():
            for p, q in zip(after, before, strict=True):
                p.copy_(q)
    torch.testing.assert_close(2 * moved[1], moved[0], rtol=1e-4, atol=1e-5)


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


def test_compiled_step() -> None:
    """Through the registered op, in one graph."""
    options = {**TABLE[0], **SMOOTH, "kind": "lowrank", "context": "label", "rule": "adam"}
    case = make_case((19, 16, 24, 5, 7), options, 9, *FULL).on(DEVICE)
    twin = replace(case).to(*FULL).on(DEVICE)
    results = []
    for c, compiled in ((case, True), (twin, False)):
        state, _ = bind(c)
        layer, tensors = c.layer(), c.synthesizer()
        detached = layer._replace(**{
            k: None if t is None else t.detach() for k, t in layer._asdict().items()
        })  # fmt: skip
        rule = state.tensors(slots(layer))

        def step(x, labels, layer=detached, c=c, tensors=tensors, rule=rule):  # type: ignore[no-untyped-def]
            return linear_step_(x, layer, c.config, tensors, rule, context=labels,
                                backend="triton")  # fmt: skip

        run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
        with torch.no_grad():
            made = run(c.inputs["x"], c.inputs["context"])
        results.append((made.h, made.prediction.scaled, *[p for p in layer if p is not None]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------------------------------------
# On a GPU

gpu = pytest.mark.gpu
LARGE = (300, 200, 328, 16, 10)
FAST = {
    "one": linear.Tiles("one", 128, 16, 128, 16, 64, 32, 32, 64, 64, 8, 3),
    "one, rows divided": linear.Tiles("one", 64, 32, 64, 32, 64, 32, 64, 64, 64, 4, 3),
    "several": linear.Tiles("several", 128, 128, 128, 32, 128, 128, 64, 128, 32, 8, 3),
    "several, descriptors": linear.Tiles(
        "several", 128, 128, 128, 32, 128, 128, 64, 128, 32, 8, 3, True
    ),
}


@contextlib.contextmanager
def fast(way: str) -> Iterator[None]:
    launches = FAST[way].launches
    with divided((FAST[way], synthesizer.Tiles(launches, 64, 32, 32, 64, 32, 4, 3))):
        yield


@gpu
@pytest.mark.parametrize("way", FAST)
@pytest.mark.parametrize("options", TABLE[::4], ids=named)
def test_gpu_step(options: dict[str, Any], way: str) -> None:
    with fast(way):
        check(make_case(LARGE, options, 1, *FULL), FULL, run_step)


@gpu
@pytest.mark.parametrize("way", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gpu_low_precision(dtype: torch.dtype, way: str) -> None:
    options = {**TABLE[0], **SMOOTH, "normalization": "batch", "kind": "lowrank",
               "context": "label", "rule": "momentum"}  # fmt: skip
    with fast(way):
        check(make_case(LARGE, options, 2, dtype, torch.float32), (dtype, torch.float32), run_step)


@gpu
@pytest.mark.parametrize("shape", [(128, 1024, 1024, 16, 10), (64, 256, 256, 16, 10)], ids=str)
def test_gpu_default_tiles(shape: tuple[int, int, int, int, int]) -> None:
    options = {**TABLE[0], **SMOOTH, "normalization": "batch", "kind": "lowrank",
               "context": "label", "rule": "adam"}  # fmt: skip
    check(make_case(shape, options, 3, *FULL), FULL, run_step)


@gpu
@pytest.mark.parametrize("way", FAST)
def test_gpu_same_input_same_bits(way: str) -> None:
    case = make_case(LARGE, {**TABLE[0], **SMOOTH, "normalization": "batch", "kind": "lowrank",
                             "context": "label", "rule": "adam"}, 4, *FULL)  # fmt: skip
    with fast(way):
        once = run_step(BACKEND, case.to(*FULL).on(DEVICE))
        for _ in range(20):
            again = run_step(BACKEND, case.to(*FULL).on(DEVICE))
            for name, t in once.items():
                assert torch.equal(t, again[name]), name


@gpu
@pytest.mark.parametrize("way", FAST)
def test_gpu_graph_and_stream(way: str) -> None:
    """Replayed steps are steps, the rule's counters too; nothing needs the default stream."""
    options = {**TABLE[0], **SMOOTH, "normalization": "batch", "kind": "lowrank",
               "context": "label", "rule": "adam"}  # fmt: skip
    results = []
    for captured in (True, False):
        case = make_case(LARGE, options, 5, *FULL).on(DEVICE)
        state, _ = bind(case)
        with fast(way):
            step = BACKEND.bind_step(
                case.layer(), case.config, case.synthesizer(), 0.0,
                state.tensors(slots(case.layer())),
            )  # fmt: skip

            def run(step=step, case=case):  # type: ignore[no-untyped-def]
                return step(case.inputs["x"], case.inputs["context"], 300.0, True, True)

            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                made = run()
            torch.cuda.current_stream().wait_stream(side)
            if captured:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    made = run()
                for _ in range(5):
                    graph.replay()
            else:
                for _ in range(5):
                    made = run()
        torch.cuda.synchronize()
        assert state.steps == 6
        results.append((made.h, made.dx, *[p for p in case.layer() if p is not None]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@gpu
@pytest.mark.parametrize("way", FAST)
def test_gpu_captured_first_then_run_eagerly(way: str) -> None:
    """A layer's first step is a captured one, its second an eager one, the third a replay."""
    options = {**TABLE[0], **SMOOTH, "normalization": "batch", "kind": "lowrank",
               "context": "label", "rule": "adam"}  # fmt: skip
    results = []
    for captured in (False, True):  # the first compiles
        case = make_case(LARGE, options, 5, *FULL).on(DEVICE)
        state, _ = bind(case)
        with fast(way):
            step = BACKEND.bind_step(
                case.layer(), case.config, case.synthesizer(), 0.0,
                state.tensors(slots(case.layer())),
            )  # fmt: skip

            def run(step=step, case=case):  # type: ignore[no-untyped-def]
                return step(case.inputs["x"], case.inputs["context"], 300.0, True, True)

            if captured:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    made = run()
            run()
            if captured:
                graph.replay()
            else:
                made = run()
        torch.cuda.synchronize()
        assert state.steps == 2
        results.append((made.h, made.dx, *[p for p in case.layer() if p is not None]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@gpu
def test_gpu_streams_side_by_side() -> None:
    """Forwards of one layer on two streams and in a graph, at a time: the same bits as alone."""
    options = {**TABLE[0], **SMOOTH, "normalization": "layer", "kind": "lowrank", "context": None}
    case = make_case((64, 64, 328, 16, 10), options, 5, *FULL).on(DEVICE)

    def run() -> torch.Tensor:
        h, _ = BACKEND.linear_forward(case.inputs["x"], case.layer(), case.config, True, True)
        return h

    with fast("one, rows divided"):
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
