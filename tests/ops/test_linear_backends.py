"""Every backend against the float64 reference, within derived tolerances (see strategies.py).

The reference itself stands in the list, in the dtypes that it serves: it shows that the tolerances
can be met, and the planted errors show that they can be missed.
"""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    BACKENDS,
    OPTIONS,
    REFERENCE,
    Case,
    Run,
    bind,
    compare,
    device_of,
    is_slow,
    make_case,
    named,
    paired,
    pairwise,
    run_parts,
    run_step,
    same_examples,
    set_threads,
    shapes,
    slots,
    slots_of_step,
    tolerances,
)
from torch import Tensor

from fused_dni.backends.common import synthesizer
from fused_dni.backends.reference import linear, rules
from fused_dni.ops import registry
from fused_dni.ops.types import (
    ACTIVATIONS,
    AFFINE,
    INTERFACES,
    SKIPPED,
    STATISTICS_SIZE,
    STEP,
    SYNTHESIZERS,
    Backend,
    SynthesizerTensors,
)
from fused_dni.rules import RuleState

pytestmark = pytest.mark.slow(150)

SERVED = {
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "bfloat16": (torch.bfloat16, torch.float32),
}
SMOOTH = {"frozen": None, "need_dx": True, "bias": True, "affine": True, "synthesizer_bias": True}
TABLE = pairwise(OPTIONS)
AFFINES = [row for row in TABLE if row["kind"] in AFFINE]  # of every backend
# A kernel is free in how it tiles: these meet its edges.
CORNERS = [
    (2, 1, 1, 1, 1),
    (3, 150, 2, 1, 1),
    (129, 2, 150, 16, 10),
    (64, 64, 64, 16, 10),
    (33, 97, 17, 19, 17),
]


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


def serve(backend: Backend, dtype: str) -> tuple[torch.dtype, torch.dtype]:
    x, parameter = SERVED[dtype]
    one = torch.zeros(1, 1, device=device_of(backend))
    reason = backend.why_not(one.to(x), one.to(parameter))
    if reason is not None:
        pytest.skip(f"{backend.name} {reason}")
    return x, parameter


def spare(backend: Backend, dtype: str, options: dict[str, Any]) -> None:
    """In bfloat16 a slow backend runs every fourth row."""
    if is_slow(backend) and dtype == "bfloat16" and TABLE.index(options) % 4:
        pytest.skip("a part of the rows is enough for a slow backend")


def check(backend: Backend, case: Case, dtypes: tuple[torch.dtype, torch.dtype], run: Run) -> None:
    """One op's results against the reference's. bfloat16 results are rounded to it everywhere."""
    if case.kind not in backend.synthesizers:
        pytest.skip(f"{backend.name} has no synthesizers of kind {case.kind!r}")
    exact, allowed = tolerances(run, case, torch.finfo(dtypes[0]).eps)
    before = {k: t.clone() for k, t in case.inputs.items()}
    fresh = case.to(*dtypes).on(device_of(backend))
    versions = {k: t._version for k, t in fresh.inputs.items()}
    got = run(backend, fresh)
    compare(got, exact, allowed)
    for name, t in fresh.inputs.items():
        assert torch.equal(t.cpu(), before[name]) and t._version == versions[name], name
    for name, t in fresh.parameters.items():
        if name in case.frozen:
            assert torch.equal(t.cpu(), case.parameters[name]), name


def options_of(dtype: str, row: dict[str, Any]) -> dict[str, Any]:
    """relu's corner cannot be kept clear of in bfloat16."""
    smooth = dtype == "bfloat16" and row["activation"] == "relu"
    return {**row, "activation": "tanh"} if smooth else row


@pytest.mark.parametrize("dtype", SERVED)
@pytest.mark.parametrize("options", TABLE, ids=named)
def test_step(backend: Backend, dtype: str, options: dict[str, Any], poisoned: None) -> None:
    dtypes = serve(backend, dtype)
    spare(backend, dtype, options)
    case = make_case((31, 19, 37, 5, 7), options_of(dtype, options), 1, *dtypes)
    check(backend, case, dtypes, run_step)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("normalization", [None, "batch", "layer"])
@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a != "relu"])
def test_step_at_the_preactivation(
    backend: Backend, activation: str, normalization: str | None, dtype: str, poisoned: None
) -> None:
    """Every way back to z; relu's stands in :func:`test_step`."""
    dtypes = serve(backend, dtype)
    if is_slow(backend):
        pytest.skip("the table's rows are enough for a slow backend")
    row = {**AFFINES[0], **SMOOTH, "activation": activation, "normalization": normalization,
           "rule": "adam", "kind": "lowrank", "context": "label",
           "interface": "preactivation"}  # fmt: skip
    check(backend, make_case((31, 19, 37, 5, 7), row, 1, *dtypes), dtypes, run_step)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", SERVED)
@pytest.mark.parametrize("options", TABLE[::3], ids=named)
def test_parts(
    backend: Backend, dtype: str, options: dict[str, Any], training: bool, poisoned: None
) -> None:
    dtypes = serve(backend, dtype)
    spare(backend, dtype, options)
    case = make_case((23, 18, 35, 4, 6), options_of(dtype, options), 2, *dtypes)
    check(backend, case, dtypes, functools.partial(run_parts, training=training))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", CORNERS, ids=str)
@pytest.mark.parametrize("normalization", [None, "batch", "layer"])
def test_corner_shapes(
    backend: Backend,
    shape: tuple[int, int, int, int, int],
    normalization: str | None,
    threads: int,
    poisoned: None,
) -> None:
    dtypes = serve(backend, "float32")
    set_threads(backend, threads)
    row = {**AFFINES[3], **SMOOTH, "activation": "gelu", "kind": "lowrank", "context": "label",
           "normalization": normalization, "rule": "momentum", "max_norm": 0.0}  # fmt: skip
    check(backend, make_case(shape, row, 3, *dtypes), dtypes, run_step)


# Large enough to be worth a team of threads, and thin where it is divided among them.
THIN = [
    (64, 17, 16, 16, 1),
    (97, 150, 13, 19, 10),
    (150, 127, 1, 19, 2),
    (2, 150, 150, 16, 10),
    (3, 129, 150, 19, 17),
    (150, 1, 127, 3, 1),
]


@paired(
    kind=list(SYNTHESIZERS), shape=THIN, threads=[2, 4, 7], what=["step", "preactivation", "parts"]
)
def test_more_threads_than_work(
    backend: Backend,
    kind: str,
    shape: tuple[int, int, int, int, int],
    threads: int,
    what: str,
    poisoned: None,
) -> None:
    """Some thread has nothing to do, and its part of a sum is zero."""
    if backend.name == "reference":
        pytest.skip("the reference's threads are torch's affair")
    dtypes = serve(backend, "float32")
    set_threads(backend, threads)
    row = {**AFFINES[3], **SMOOTH, "activation": "tanh", "kind": kind, "context": "label",
           "normalization": "layer" if shape[2] > 1 else None, "rule": "momentum",
           "max_norm": 0.0}  # fmt: skip
    if what == "preactivation":
        row["interface"] = what
    case = make_case(shape, row, 3, *dtypes)
    # Twice: the first run leaves something other than zeros in whatever memory is used again.
    for _ in range(2):
        check(backend, case, dtypes, run_parts if what == "parts" else run_step)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_from_zero(backend: Backend, activation: str, dtype: str) -> None:
    """Where exponentials overflow and derivatives vanish."""
    dtypes = serve(backend, dtype)
    row = {**AFFINES[0], **SMOOTH, "normalization": None, "activation": activation,
           "kind": "diagonal", "max_norm": 0.0}  # fmt: skip
    case = make_case((24, 17, 33, 3, 4), row, 8, *dtypes)
    case.parameters["weight"] *= 60
    assert (case.inputs["x"] @ case.parameters["weight"].t()).abs().max() > 120
    check(backend, case, dtypes, run_parts)


@pytest.mark.parametrize("parts", [False, True], ids=["step", "parts"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@same_examples
@given(
    shape=shapes(least_rows=2),
    row=st.sampled_from(TABLE),
    interface=st.sampled_from(INTERFACES),
    seed=st.integers(0, 9),
    threads=st.integers(1, 2),
)
def test_any_shape(
    backend: Backend,
    dtype: str,
    parts: bool,
    shape: tuple[int, int, int, int, int],
    row: dict[str, Any],
    interface: str,
    seed: int,
    threads: int,
) -> None:
    dtypes = serve(backend, dtype)
    if (is_slow(backend) and seed > 2) or row["kind"] not in backend.synthesizers:
        return
    case = make_case(shape, {**row, "interface": interface}, seed, *dtypes)
    torch.set_num_threads(threads if backend.name == "cpu" else 1)
    check(backend, case, dtypes, run_parts if parts else run_step)


@pytest.mark.parametrize("normalization", [None, "layer", "batch"])
def test_one_row(backend: Backend, normalization: str | None) -> None:
    """In evaluation batch normalisation too takes one row."""
    dtypes = serve(backend, "float32")
    row = {**AFFINES[0], **SMOOTH, "normalization": normalization, "activation": "silu"}
    case = make_case((1, 17, 33, 3, 4), row, 0, *dtypes)
    check(backend, case, dtypes, functools.partial(run_parts, training=normalization != "batch"))
    if normalization != "batch":
        check(backend, case, dtypes, run_step)


def test_strided_inputs(backend: Backend) -> None:
    """x may be a slice, and the gradient that arrives may be expanded (``h.sum().backward()``)."""
    dtypes = serve(backend, "float32")
    row = {**AFFINES[0], **SMOOTH, "normalization": "layer", "activation": "tanh", "context": None}
    case = make_case((21, 18, 35, 4, 6), row, 0, *dtypes)
    exact, allowed = tolerances(run_parts, case, torch.finfo(torch.float32).eps)
    x = torch.full((21, 40), torch.nan)
    x[:, 2:38:2] = case.inputs["x"]
    grad_h = torch.empty(35, 21)
    grad_h.copy_(case.inputs["grad_h"].t())
    device = device_of(backend)
    strided = case.to(*dtypes).on(device)
    strided.inputs |= {"x": x.to(device)[:, 2:38:2], "grad_h": grad_h.to(device).t()}
    compare(run_parts(backend, strided), exact, allowed)

    case.inputs["grad_h"] = torch.ones(()).expand(21, 35) / 21
    exact, allowed = tolerances(run_parts, case, torch.finfo(torch.float32).eps)
    expanded = case.to(*dtypes).on(device)
    expanded.inputs["grad_h"] = torch.full((), 1 / 21, device=device).expand(21, 35)
    compare(run_parts(backend, expanded), exact, allowed)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", SERVED)
@pytest.mark.parametrize("run", [run_step, run_parts])
def test_same_input_same_bits(backend: Backend, dtype: str, run: Run, threads: int) -> None:
    dtypes = serve(backend, dtype)
    set_threads(backend, threads)
    # The reference's bits are torch's affair; the interpreter's, one program after another, too.
    inside = [row for row in AFFINES if row["interface"] == "preactivation"]
    crossed = [row for row in TABLE if row["kind"] == "cross_entropy"]
    rows = (*TABLE[:6], *inside[:3], *crossed[:2])
    for row in rows if backend.name == "cpu" else (AFFINES[0], inside[0]):
        case = make_case((67, 48, 97, 16, 10), options_of(dtype, row), 4, *dtypes)
        case = case.on(device_of(backend))
        once, twice = run(backend, case.to(*dtypes)), run(backend, case.to(*dtypes))
        for name, t in once.items():
            assert torch.equal(t, twice[name]), name


@pytest.mark.parametrize("normalization", [None, "batch", "layer"])
@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam", "adamw"])
def test_every_mutated_tensor_moves_its_version(
    backend: Backend, normalization: str | None, rule: str
) -> None:
    dtypes = serve(backend, "float32")
    row = {**AFFINES[0], **SMOOTH, "normalization": normalization, "rule": rule,
           "kind": "lowrank", "context": "label", "activation": "tanh"}  # fmt: skip
    case = make_case((9, 8, 7, 3, 4), row, 5, *dtypes).on(device_of(backend))
    state, synthesizer_state = bind(case)
    x, context, layer = case.inputs["x"], case.inputs["context"], case.layer()
    synthesizer = case.synthesizer()
    statistics = case.inputs["x"].new_zeros(STATISTICS_SIZE, dtype=torch.float64)
    own, other = state.tensors(slots(layer)), synthesizer_state.tensors(synthesizer.parameters())

    def watch(*tensors: Tensor | None) -> list[tuple[Tensor, int, Tensor]]:
        return [(t, t._version, t.detach().clone()) for t in tensors if t is not None]

    def moved(watched: list[tuple[Tensor, int, Tensor]], expected: bool) -> None:
        for t, version, value in watched:
            assert (t._version > version) == expected, tuple(t.shape)
            assert torch.equal(t, value) != expected, tuple(t.shape)

    layers = watch(*[t for i, t in enumerate(layer) if i != 1 or normalization != "batch"],
                   *[m for i, m in enumerate(own.first) if i != 1 or normalization != "batch"],
                   *[m for i, m in enumerate(own.second) if i != 1 or normalization != "batch"],
                   own.hyper)  # fmt: skip
    synthesizers = watch(
        *synthesizer.parameters(), *other.first, *other.second, other.hyper, statistics
    )
    step = backend.linear_step_(
        x, layer, case.config, synthesizer, context, case.target_scale, 0.0, own, True, True
    )
    moved(layers, True)
    moved(synthesizers, False)
    layers = watch(*layer, *own.first, *own.second, own.hyper)
    assert step.prediction is not None
    backend.synthesizer_update_(
        step.h, step.prediction, case.inputs["grad_h"], synthesizer, context,
        case.target_scale, statistics, other,
    )  # fmt: skip
    moved(layers, False)
    moved(synthesizers, True)


def snapshot(*tensors: Tensor | None) -> list[Tensor]:
    return [t.detach().clone() for t in tensors if t is not None]


@pytest.mark.parametrize("normalization", ["batch", "layer"])
def test_scale_and_shift_stay_in_a_step_at_the_preactivation(
    backend: Backend, normalization: str
) -> None:
    """No gradient reaches them there; weight and bias move (the bias but for a batch's mean)."""
    dtypes = serve(backend, "float32")
    row = {**AFFINES[0], **SMOOTH, "normalization": normalization, "rule": "sgd",
           "activation": "tanh", "interface": "preactivation"}  # fmt: skip
    case = make_case((9, 8, 7, 3, 4), row, 5, *dtypes).on(device_of(backend))
    state, _ = bind(case)
    layer = case.layer()
    versions = [None if t is None else t._version for t in layer]
    before = snapshot(*layer)
    step = backend.linear_step_(
        case.inputs["x"], layer, case.config, case.synthesizer(), None, case.target_scale, 0.0,
        state.tensors(slots_of_step(case)), True, False,
    )  # fmt: skip
    assert step.prediction is None and step.saved is None
    moved = [not torch.equal(t, old) for t, old in zip(snapshot(*layer), before, strict=True)]
    statistics = [True, True] if normalization == "batch" else []
    assert moved == [True, normalization == "layer", False, False, *statistics]
    for i in (2, 3):
        t = layer[i]
        assert t is not None and t._version == versions[i]


@pytest.mark.parametrize("where", ["x", "synthesizer.bias", "grad"])
@pytest.mark.parametrize("normalization", [None, "batch", "layer"])
def test_what_is_not_finite_at_the_preactivation_is_skipped(
    backend: Backend, where: str, normalization: str | None
) -> None:
    dtypes = serve(backend, "float32")
    row = {**AFFINES[0], **SMOOTH, "normalization": normalization, "rule": "adamw",
           "activation": "gelu", "interface": "preactivation"}  # fmt: skip
    case = make_case((19, 18, 33, 3, 4), row, 6, *dtypes).on(device_of(backend))
    state, _ = bind(case)
    norm = RuleState(case.rule)
    layer, x, grad_h = case.layer(), case.inputs["x"], case.inputs["grad_h"]
    own = state.tensors(slots_of_step(case))
    behind = norm.tensors((None, None, layer.norm_weight, layer.norm_bias))
    with torch.no_grad():
        {"x": x, "grad": grad_h, "synthesizer.bias": case.parameters["synthesizer.bias"]}[
            where
        ].view(-1)[17] = torch.nan
    watched = (*layer, *own.first, *own.second, *behind.first, *behind.second)
    before = snapshot(*watched)
    if where == "grad":
        h, saved = backend.linear_forward(x, layer, case.config, False, True)
        made = backend.linear_backward(grad_h, x, h, saved, layer, case.config, True, False, False)
        backend.linear_update_(x, made, layer, behind)
        assert behind.hyper[SKIPPED] == 1 and behind.hyper[STEP] == 0
    else:
        for max_norm in (0.0, 0.5):
            backend.linear_step_(
                x, layer, case.config, case.synthesizer(), None, case.target_scale, max_norm, own,
                True, True,
            )  # fmt: skip
        assert own.hyper[SKIPPED] == 2 and own.hyper[STEP] == 0
    for t, old in zip(snapshot(*watched), before, strict=True):
        assert torch.equal(t, old)


@pytest.mark.parametrize("where", ["x", "synthesizer.bias", "grad", "target"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("normalization", [None, "batch", "layer"])
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_what_is_not_finite_is_counted_and_skipped(
    backend: Backend, where: str, value: float, normalization: str | None, rule: str
) -> None:
    dtypes = serve(backend, "float32")
    row = {**AFFINES[0], **SMOOTH, "normalization": normalization, "rule": rule,
           "activation": "tanh", "context": "label"}  # fmt: skip
    case = make_case((19, 18, 33, 3, 4), row, 6, *dtypes).on(device_of(backend))
    state, synthesizer_state = bind(case)
    x, context, layer = case.inputs["x"], case.inputs["context"], case.layer()
    grad_h, synthesizer = case.inputs["grad_h"], case.synthesizer()
    statistics = case.inputs["x"].new_zeros(STATISTICS_SIZE, dtype=torch.float64)
    own, other = state.tensors(slots(layer)), synthesizer_state.tensors(synthesizer.parameters())

    def step(max_norm: float = 0.0) -> Any:
        return backend.linear_step_(
            x, layer, case.config, synthesizer, context, case.target_scale, max_norm, own,
            True, True,
        )  # fmt: skip

    step()
    with torch.no_grad():
        if where == "x":
            x[3, 17] = value
        elif where == "grad":
            grad_h[18, 32] = value
        elif where == "synthesizer.bias":
            assert synthesizer.bias is not None
            synthesizer.bias[32] = value
    watched = (*layer, *synthesizer.parameters(), *own.first, *own.second, *other.first,
               *other.second, statistics)  # fmt: skip
    before = snapshot(*watched)
    if where == "target":
        h, _ = backend.linear_forward(x, layer, case.config, False, False)
        prediction = backend.synthesizer_predict(h, synthesizer, context)
        grad_h[18, 32] = value
        backend.synthesizer_update_(
            h, prediction, grad_h, synthesizer, context, case.target_scale, statistics, other
        )
        backend.synthesizer_gradients(
            h, prediction, grad_h, synthesizer, context, case.target_scale, statistics
        )
        assert other.hyper[SKIPPED] == 1 and other.hyper[STEP] == 0
    elif where == "grad":
        h, saved = backend.linear_forward(x, layer, case.config, False, True)
        gradients = backend.linear_backward(
            grad_h, x, h, saved, layer, case.config, False, False, False
        )
        backend.linear_update_(x, gradients, layer, own)
        assert own.hyper[SKIPPED] == 1 and own.hyper[STEP] == 1
    else:
        step()
        step(0.5)
        assert own.hyper[SKIPPED] == 2 and own.hyper[STEP] == 1
    for t, old in zip(snapshot(*watched), before, strict=True):
        assert torch.equal(t.nan_to_num(), old.nan_to_num())


@pytest.mark.parametrize("kind", ["lowrank", "cross_entropy"])
@pytest.mark.parametrize("label", [-1, -100, 4, 2**33])
def test_a_label_out_of_range_changes_nothing(backend: Backend, label: int, kind: str) -> None:
    dtypes = serve(backend, "float32")
    if device_of(backend) != "cpu":
        pytest.skip("on a GPU nothing waits for the data: test_gpu_linear.py")
    if kind not in backend.synthesizers:
        pytest.skip(f"{backend.name} has no synthesizers of kind {kind!r}")
    row = {**AFFINES[0], **SMOOTH, "normalization": "batch", "context": "label",
           "activation": "tanh", "kind": kind}  # fmt: skip
    case = make_case((19, 18, 33, 3, 4), row, 6, *dtypes).on(device_of(backend))
    state, synthesizer_state = bind(case)
    layer, synthesizer = case.layer(), case.synthesizer()
    own, other = state.tensors(slots(layer)), synthesizer_state.tensors(synthesizer.parameters())
    statistics = case.inputs["x"].new_zeros(STATISTICS_SIZE, dtype=torch.float64)
    x, good, grad_h = case.inputs["x"], case.inputs["context"], case.inputs["grad_h"]
    h, _ = backend.linear_forward(x, layer, case.config, False, False)
    prediction = backend.synthesizer_predict(h, synthesizer, good)
    bad = good.clone()
    bad[7] = label
    watched = (*layer, *synthesizer.parameters(), own.hyper, other.hyper, statistics)
    before = snapshot(*watched)
    with pytest.raises(IndexError):
        backend.linear_step_(x, layer, case.config, synthesizer, bad, 1.0, 0.0, own, True, True)
    with pytest.raises(IndexError):
        backend.synthesizer_predict(h, synthesizer, bad)
    with pytest.raises(IndexError):
        backend.synthesizer_gradients(h, prediction, grad_h, synthesizer, bad, 1.0, statistics)
    with pytest.raises(IndexError):
        backend.synthesizer_update_(h, prediction, grad_h, synthesizer, bad, 1.0, statistics, other)
    for t, old in zip(snapshot(*watched), before, strict=True):
        assert torch.equal(t, old)


@pytest.mark.parametrize("interface", INTERFACES)
@pytest.mark.parametrize("normalization", [None, "batch", "layer"])
def test_dx_uses_the_weights_before_the_update(
    backend: Backend, normalization: str | None, interface: str
) -> None:
    dtypes = serve(backend, "float32")
    row = {**AFFINES[0], **SMOOTH, "normalization": normalization, "activation": "tanh",
           "rule": "sgd", "interface": interface}  # fmt: skip
    case = make_case((32, 24, 40, 4, 5), row, 7, *dtypes).on(device_of(backend))
    still = case.to(*dtypes)
    moving, frozen = case, still
    state, _ = bind(moving)
    frozen.frozen = ("weight", "bias", "norm_weight", "norm_bias")
    frozen_state, _ = bind(frozen)
    before = moving.parameters["weight"].detach().clone()
    results = [
        backend.linear_step_(
            c.inputs["x"], c.layer(), c.config, c.synthesizer(), c.inputs.get("context"),
            c.target_scale, 0.0, s.tensors(slots_of_step(c)), True, False,
        )
        for c, s in ((moving, state), (frozen, frozen_state))
    ]  # fmt: skip
    assert not torch.equal(moving.parameters["weight"], before)
    assert results[0].dx is not None and results[1].dx is not None
    assert torch.equal(results[0].dx, results[1].dx)


@pytest.mark.parametrize("normalization", [None, "batch", "layer"])
def test_the_tolerance_catches_one_wrong_element(normalization: str | None) -> None:
    """One element of any result off by 200 eps of the largest, or never written: caught."""
    row = {**AFFINES[0], **SMOOTH, "normalization": normalization, "activation": "mish",
           "rule": "momentum", "kind": "lowrank", "context": "label"}  # fmt: skip
    case = make_case((31, 19, 37, 5, 7), row, 1, torch.float32)
    eps = torch.finfo(torch.float32).eps
    exact, allowed = tolerances(run_step, case, eps)
    compare(exact, exact, allowed)
    for name in exact:
        wrong = {k: t.clone() for k, t in exact.items()}
        flat = wrong[name].view(-1)
        flat[-1] += 200 * eps * exact[name].abs().max() + 1e-30
        with pytest.raises(AssertionError, match=name.replace(".", r"\.")):
            compare(wrong, exact, allowed)
        flat[-1] = torch.nan
        with pytest.raises(AssertionError, match=name.replace(".", r"\.")):
            compare(wrong, exact, allowed)


def _wrong(module: Any, name: str, change: Any) -> Any:
    old = getattr(module, name)
    return lambda: mock.patch.object(module, name, lambda *a, **k: change(old(*a, **k)))


WRONG = {
    "slope": _wrong(linear, "derivative_from_input", lambda d: d * (1 + 2e-5)),
    "activation": _wrong(linear, "activate", lambda h: h + 2e-5),
    "product": _wrong(linear, "weight_gradient", lambda d: d * (1 + 2e-5)),
    "clipping": _wrong(linear, "synthetic_gradient", lambda s: s * (1 + 2e-5)),
    "label": _wrong(synthesizer, "context_term", lambda c: c.roll(1, 0)),
    "softmax": _wrong(synthesizer, "softmax", lambda s: s * (1 + 2e-5)),
    "class": _wrong(synthesizer, "known", lambda y: y.roll(1, 1)),
    "through the softmax": _wrong(synthesizer, "through_softmax", lambda d: d * (1 + 2e-5)),
    "context's gradient": _wrong(synthesizer, "context_gradient", lambda c: c * (1 + 2e-5)),
    "epsilon": _wrong(linear, "normalize", lambda r: (r[0], r[1] * (1 + 2e-5), r[2])),
    "variance": _wrong(linear, "normalize", lambda r: (r[0], r[1], r[2]._replace(rows=32))),
    "gradient at z": _wrong(
        linear, "preactivation_gradients", lambda g: g._replace(delta=g.delta * (1 + 2e-5))
    ),
    "rule": _wrong(rules, "sgd", lambda new: new._replace(parameter=new.parameter + 2e-5)),
}


@pytest.mark.parametrize("what", WRONG)
def test_the_tolerance_catches_a_wrong_formula(what: str) -> None:
    """A backend that errs by 2e-5 in one place does not pass for a float32 one."""
    row = {**AFFINES[0], **SMOOTH, "normalization": "batch", "activation": "mish",
           "rule": "momentum", "kind": "lowrank", "context": "label", "max_norm": 0.05}  # fmt: skip
    if what == "gradient at z":
        row["interface"] = "preactivation"
    if what in ("softmax", "class", "through the softmax"):
        row["kind"] = "cross_entropy"
    case = make_case((31, 19, 37, 5, 7), row, 1, torch.float32)
    exact, allowed = tolerances(run_step, case, torch.finfo(torch.float32).eps)
    compare(run_step(REFERENCE, case.to(torch.float32, torch.float32)), exact, allowed)
    with WRONG[what]():
        got = run_step(REFERENCE, case.to(torch.float32, torch.float32))
    with pytest.raises(AssertionError, match="should be"):
        compare(got, exact, allowed)


# ---------------------------------------------------------------------------------------------
# In front of a softmax: a table that is read where the labels say

TABLED = {**AFFINES[0], **SMOOTH, "normalization": None, "activation": "tanh", "context": "table",
          "max_norm": 0.0, "rule": "momentum"}  # fmt: skip


def run_synthesizer(backend: Backend, case: Case) -> dict[str, Tensor]:
    """A prediction, its gradients, and an update."""
    _, state = bind(case)
    h, context, grad_h = case.inputs["h"], case.inputs["context"], case.inputs["grad_h"]
    synthesizer = case.synthesizer()._replace(**case.extra)
    statistics = h.new_zeros(STATISTICS_SIZE, dtype=torch.float64)
    prediction = backend.synthesizer_predict(h, synthesizer, context)
    lesson = (h, prediction, grad_h, synthesizer, context, case.target_scale, statistics)
    made = backend.synthesizer_gradients(*lesson)
    backend.synthesizer_update_(*lesson, state.tensors(synthesizer.parameters()))
    out = {"scaled": prediction.scaled, "statistics": statistics, "hyper": state.hyper}
    out |= {f"d.{i}": g for i, g in enumerate(made) if g is not None}
    return out | {name: p.detach() for name, p in case.parameters.items()}


@pytest.mark.parametrize("context", ["label", "vector"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("classes", [1, 2, 17, 40])
def test_logits_far_from_zero(
    backend: Backend, classes: int, dtype: str, context: str, poisoned: None
) -> None:
    """Where exponentials overflow without what the largest takes off, and most vanish with it."""
    dtypes = serve(backend, dtype)
    row = {**AFFINES[0], **SMOOTH, "kind": "cross_entropy", "context": context, "rule": "momentum"}
    case = make_case((45, 1, 37, 5, classes), row, 7, *dtypes)
    generator = torch.Generator().manual_seed(1)
    case.inputs["h"] = torch.randn(45, 37, generator=generator).to(dtypes[0])
    case.parameters["synthesizer.context_weight"] *= 100
    check(backend, case, dtypes, run_synthesizer)


def test_a_kind_that_a_backend_has_not_is_refused(backend: Backend) -> None:
    """Layers run such a synthesizer under autograd there."""
    if "cross_entropy" in backend.synthesizers:
        pytest.skip(f"{backend.name} has it")
    dtypes = serve(backend, "float32")
    case = make_case((7, 4, 5, 2, 3), {**AFFINES[0], "kind": "cross_entropy"}, 7, *dtypes)
    case = case.on(device_of(backend))
    state, _ = bind(case)
    x, context, h = case.inputs["x"], case.inputs["context"], case.inputs["grad_h"]
    with pytest.raises(ValueError, match="got 'cross_entropy', which runs under autograd there"):
        backend.synthesizer_predict(h, case.synthesizer(), context)
    with pytest.raises(ValueError, match="got 'cross_entropy', which runs under autograd there"):
        backend.linear_step_(
            x, case.layer(), case.config, case.synthesizer(), context, 1.0, 0.0,
            state.tensors(slots_of_step(case)), False, False,
        )  # fmt: skip


def tabled(
    kind: str, dtypes: tuple[torch.dtype, torch.dtype], shape: tuple[int, int] = (45, 37)
) -> Case:
    rows, outputs = shape
    case = make_case((rows, 1, outputs, 5, 11), {**TABLED, "kind": kind}, 7, *dtypes)
    case.inputs["h"] = torch.randn(rows, outputs, generator=torch.Generator().manual_seed(1)).to(
        dtypes[0]
    )
    return case


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", SERVED)
@pytest.mark.parametrize("ignored", ["some", "all", "none", "a class"])
@pytest.mark.parametrize("kind", AFFINE)
def test_rows_of_a_table(
    backend: Backend, kind: str, ignored: str, dtype: str, threads: int, poisoned: None
) -> None:
    dtypes = serve(backend, dtype)
    set_threads(backend, threads)
    case = tabled(kind, dtypes)
    labels = case.inputs["context"]
    if ignored == "all":
        labels.fill_(-100)
    elif ignored == "none":
        labels.clamp_(min=0)
    elif ignored == "a class":
        labels.clamp_(min=0)
        case.extra["ignore_index"] = int(labels[0])
    check(backend, case, dtypes, run_synthesizer)


@pytest.mark.parametrize("kind", AFFINE)
def test_a_bfloat16_table(backend: Backend, kind: str) -> None:
    """Read as it is, by every backend."""
    dtypes = serve(backend, "float32")
    case = tabled(kind, dtypes)
    rounded = case.parameters["synthesizer.table"].bfloat16()
    case.parameters["synthesizer.table"] = rounded.to(dtypes[1])
    exact, allowed = tolerances(run_synthesizer, case, torch.finfo(dtypes[0]).eps)
    fresh = case.to(*dtypes).on(device_of(backend))
    fresh.extra["table"] = rounded.to(device_of(backend))
    compare(run_synthesizer(backend, fresh), exact, allowed)


def test_a_table_and_strided_rows(backend: Backend) -> None:
    dtypes = serve(backend, "float32")
    case = tabled("lowrank", dtypes)
    exact, allowed = tolerances(run_synthesizer, case, torch.finfo(dtypes[0]).eps)
    fresh = case.to(*dtypes).on(device_of(backend))
    for name in ("h", "grad_h"):
        fresh.inputs[name] = fresh.inputs[name].t().contiguous().t()
    compare(run_synthesizer(backend, fresh), exact, allowed)


@pytest.mark.parametrize("label", [-1, 11])
def test_a_label_outside_of_the_table(backend: Backend, label: int) -> None:
    """On a CPU an error, on a GPU a step that is skipped and counted; nothing changed in either."""
    dtypes = serve(backend, "float32")
    case = tabled("lowrank", dtypes).to(*dtypes).on(device_of(backend))
    _, state = bind(case)
    h, good, grad_h = case.inputs["h"], case.inputs["context"], case.inputs["grad_h"]
    bad = good.clone()
    bad[5] = label
    synthesizer = case.synthesizer()
    statistics = h.new_zeros(STATISTICS_SIZE, dtype=torch.float64)
    rule = state.tensors(synthesizer.parameters())
    prediction = backend.synthesizer_predict(h, synthesizer, good)
    before = snapshot(*synthesizer.parameters(), *rule.first, statistics)
    lesson = (grad_h, synthesizer, bad, case.target_scale, statistics, rule)
    if device_of(backend) == "cpu" or backend.name == "reference":
        with pytest.raises(IndexError, match=str(label)):
            backend.synthesizer_predict(h, synthesizer, bad)
        with pytest.raises(IndexError, match=str(label)):
            backend.synthesizer_update_(h, prediction, *lesson)
    else:
        predicted = backend.synthesizer_predict(h, synthesizer, bad)
        assert predicted.scaled[5].isnan().all() and not predicted.scaled[:5].isnan().any()
        backend.synthesizer_update_(h, prediction, *lesson)
        assert rule.hyper[SKIPPED] == 1
    after = snapshot(*synthesizer.parameters(), *rule.first, statistics)
    for t, old in zip(after, before, strict=True):
        assert torch.equal(t, old)


def test_a_gains_gradient_is_looked_at(backend: Backend) -> None:
    """Of finite factors, larger than float32 has room for: skipped and counted."""
    dtypes = serve(backend, "float32")
    case = tabled("lowrank", dtypes).to(*dtypes).on(device_of(backend))
    _, state = bind(case)
    h, context, grad_h = case.inputs["h"], case.inputs["context"], case.inputs["grad_h"]
    synthesizer = case.synthesizer()
    prediction = backend.synthesizer_predict(h, synthesizer, context)
    huge = synthesizer._replace(table=torch.full_like(case.parameters["synthesizer.table"], 1e38))
    statistics = h.new_zeros(STATISTICS_SIZE, dtype=torch.float64)
    rule = state.tensors(synthesizer.parameters())
    before = snapshot(*synthesizer.parameters(), *rule.first, statistics)
    lesson = (h, prediction, grad_h.abs() * 1e4, huge, context, case.target_scale, statistics, rule)
    backend.synthesizer_update_(*lesson)
    assert rule.hyper[SKIPPED] == 1 and rule.hyper[STEP] == 0
    after = snapshot(*synthesizer.parameters(), *rule.first, statistics)
    for t, old in zip(after, before, strict=True):
        assert torch.equal(t, old)


def test_vectors_are_no_labels_of_a_table(backend: Backend) -> None:
    dtypes = serve(backend, "float32")
    case = tabled("dense", dtypes).to(*dtypes).on(device_of(backend))
    with pytest.raises(RuntimeError, match="context must be labels, int64"):
        backend.synthesizer_predict(
            case.inputs["h"], case.synthesizer(), case.inputs["h"].new_zeros(45, 11)
        )


def test_a_table_of_more_than_two_to_the_31_elements(backend: Backend) -> None:
    """Of which three rows are ever touched."""
    dtypes = serve(backend, "float32")
    classes, outputs = 2**20 + 2, 2048
    try:
        table = torch.empty(classes, outputs, dtype=torch.bfloat16, device=device_of(backend))
    except RuntimeError as error:
        pytest.skip(f"no room for it: {error}")
    labels = torch.tensor([0, classes - 1, 2**20], device=table.device)
    table[labels] = torch.randn(3, outputs, dtype=torch.bfloat16, device=table.device)
    h = torch.randn(3, outputs, dtype=dtypes[0], device=table.device)
    weight = torch.zeros(outputs, dtype=dtypes[1], device=table.device)
    gain = torch.ones((), dtype=dtypes[1], device=table.device)
    synthesizer = SynthesizerTensors("diagonal", weight, None, gain, None, table)
    prediction = backend.synthesizer_predict(h, synthesizer, labels)
    assert torch.equal(prediction.scaled, -table[labels].to(dtypes[1]))
    made = backend.synthesizer_gradients(
        h, prediction, torch.zeros_like(h), synthesizer, labels, 1.0,
        torch.zeros(STATISTICS_SIZE, dtype=torch.float64, device=table.device),
    )  # fmt: skip
    expected = 2 / 3 * table[labels].double().square().sum()
    torch.testing.assert_close(made[2].double(), expected, rtol=1e-5, atol=0.0)
