"""The linear layer and its synthesizer in both GPU backends, each as it divides a step: what they
owe alike beyond what the reference computes (test_linear_backends.py).

Updates that are all or nothing, labels that there are not, what a bound step keeps, one graph of
``torch.compile``; and, on a GPU, many programs, low precision, the same bits, CUDA graphs, streams.
Without a GPU Triton's kernels are interpreted, and CUDA's run in the emulation. What each has for
itself is in test_triton_linear.py and test_cuda_linear.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from divided import FULL, SMOOTH, TABLE, Way, ways
from strategies import (
    Case,
    Run,
    bind,
    make_case,
    named,
    run_parts,
    run_step,
    slots,
    slots_of_step,
)
from torch import Tensor

from fused_dni.backends.common import gpu
from fused_dni.functional import linear_step_
from fused_dni.ops.types import SKIPPED, STATISTICS_SIZE, STEP, BoundStep, LinearGradients


@pytest.fixture
def way(request: pytest.FixtureRequest, one_thread: None) -> Iterator[Way]:
    made: Way = request.param.made()
    yield made
    made.on(0)


def bound(way: Way, case: Case) -> tuple[BoundStep, Any]:
    """A step of the layer, and its rule's state."""
    state, _ = bind(case)
    rule = state.tensors(slots_of_step(case))
    step = way.backend.bind_step(case.layer(), case.config, case.synthesizer(), 0.0, rule)
    return step, state


def own(case: Case) -> list[Tensor]:
    """The layer's parameters."""
    return [p for p in slots(case.layer()) if p is not None]


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def unchanged(tensors: list[Tensor], before: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@ways(shapes=True)
@pytest.mark.parametrize("normalization", [None, "batch", "layer"])
def test_a_step_at_the_preactivation_saves_what_a_forward_would(
    way: Way, normalization: str | None, poisoned: None
) -> None:
    """On demand, and whoever does not ask gets the same of everything else."""
    options = {**TABLE[0], **SMOOTH, "normalization": normalization, "activation": "gelu",
               "kind": "dense", "context": None, "interface": "preactivation"}  # fmt: skip
    case = make_case(way.shape, options, 1, *FULL).on(way.device)
    x, parameters = case.inputs["x"], own(case)
    with way.divided():
        h, saved = way.backend.linear_forward(x, case.layer(), case.config, True, True)
        step, _ = bound(way, case)
        before = copies(parameters)
        asked = step(x, None, case.target_scale, True, True)
        with torch.no_grad():
            for p, old in zip(parameters, before, strict=True):
                p.copy_(old)
        unasked = step(x, None, case.target_scale, True, False)
    assert unasked.prediction is None and unasked.saved is None
    assert asked.saved is not None and asked.dx is not None and unasked.dx is not None
    assert torch.equal(asked.h, h) and torch.equal(unasked.h, h)
    assert torch.equal(asked.dx, unasked.dx)
    for made, expected in zip(asked.saved, saved, strict=True):
        assert (made is None) == (expected is None)
        assert made is None or (expected is not None and torch.equal(made, expected))


# ---------------------------------------------------------------------------------------------
# All or nothing


@ways()
@pytest.mark.parametrize("rule", ["momentum", "adamw"])
def test_products_are_looked_at_where_bounds_do_not_tell(way: Way, rule: str) -> None:
    """Rows of 1e30 in delta and x that meet only zeros are applied; those that meet, skipped."""
    options = {**TABLE[0], **SMOOTH, "normalization": None, "rule": rule}
    case = make_case((40, 35, 41, 5, 7), options, 6, *FULL).on(way.device)
    state, _ = bind(case)
    x, layer = torch.zeros_like(case.inputs["x"]), case.layer()
    delta = torch.zeros_like(case.inputs["grad_h"])
    delta[0], x[39] = 1e30, 1e30
    made = LinearGradients(delta, bias=torch.zeros(41, device=way.device))
    with way.divided():
        way.backend.linear_update_(x, made, layer, state.tensors(slots(layer)))
        assert (state.steps, state.skipped) == (1, 0)
        before = copies(own(case))
        x[0] = 1e30
        way.backend.linear_update_(x, made, layer, state.tensors(slots(layer)))
    assert (state.steps, state.skipped) == (1, 1)
    assert unchanged(own(case), before)


@ways()
@pytest.mark.parametrize("kind", ["dense", "lowrank", "diagonal"])
def test_a_synthesizers_products_are_looked_at(way: Way, kind: str) -> None:
    options = {**TABLE[0], **SMOOTH, "normalization": None, "kind": kind, "context": "label",
               "rule": "sgd"}  # fmt: skip
    case = make_case((40, 35, 41, 5, 7), options, 6, *FULL).on(way.device)
    _, state = bind(case)
    tensors, context = case.synthesizer(), case.inputs["context"]
    learned = [p for p in tensors.parameters() if p is not None]
    statistics = torch.zeros(STATISTICS_SIZE, dtype=torch.float64, device=way.device)
    h = torch.zeros_like(case.inputs["grad_h"])
    h[39] = 1e25
    grad = torch.zeros_like(h)
    with way.divided():
        prediction = way.backend.synthesizer_predict(h, tensors, context)
        zero = prediction._replace(scaled=torch.zeros_like(prediction.scaled))
        if kind == "lowrank":  # what goes back through V is larger than e
            assert prediction.reduced is not None
            zero = zero._replace(reduced=torch.zeros_like(prediction.reduced))
        for row, steps, skipped in ((0, 1, 0), (39, 1, 1)):
            grad[row] = 1e25
            before = copies(learned)
            rule = state.tensors(tensors.parameters())
            way.backend.synthesizer_update_(h, zero, grad, tensors, context, 1.0, statistics, rule)
            assert (state.steps, state.skipped) == (steps, skipped)
    assert unchanged(learned, before)
    assert float(statistics[4]) == 40.0


@ways()
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
    way: Way, label: int, interface: str, context: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing waits for the data there: its row is NaN, and the update does not happen."""
    monkeypatch.setattr(gpu, "check_context", lambda *_: None)
    options = {**TABLE[0], **SMOOTH, "normalization": "batch", "context": context, "rule": "adam",
               "interface": interface}  # fmt: skip
    case = make_case((37, 35, 41, 5, 7), options, 7, *FULL).on(way.device)
    state, other = bind(case)
    layer, tensors = case.layer(), case.synthesizer()
    rule, its = state.tensors(slots_of_step(case)), other.tensors(tensors.parameters())
    everything = [t for t in (*layer, *tensors.parameters()) if t is not None]
    before = copies(everything)
    bad = case.inputs["context"].clone()
    bad[30] = label
    statistics = torch.zeros(STATISTICS_SIZE, dtype=torch.float64, device=way.device)
    with way.divided():
        step = way.backend.linear_step_(
            case.inputs["x"], layer, case.config, tensors, bad, 37.0, 0.0, rule, False, True
        )
        assert step.prediction is not None
        known = torch.arange(37) != 30
        assert torch.isfinite(step.prediction.scaled[known.to(way.device)]).all()
        assert torch.isnan(step.prediction.scaled[30]).all()
        good = way.backend.synthesizer_predict(step.h, tensors, case.inputs["context"])
        way.backend.synthesizer_update_(
            step.h, good, case.inputs["grad_h"], tensors, bad, 37.0, statistics, its
        )
    assert unchanged(everything, before)
    for hyper in (rule.hyper, its.hyper):
        assert hyper[SKIPPED] == 1 and hyper[STEP] == 0


# ---------------------------------------------------------------------------------------------
# What a bound step keeps


@ways()
def test_a_step_keeps_its_workspace(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a bound step allocates from call to call are its results."""
    options = {**TABLE[0], **SMOOTH, "kind": "lowrank", "context": None}
    case = make_case((37, 35, 41, 5, 7), options, 8, *FULL).on(way.device)
    step, _ = bound(way, case)
    made = []
    real = torch.Tensor.new_empty

    def new_empty(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made.append(args)
        return real(self, *args, **kwargs)

    with way.divided():
        step(case.inputs["x"], None, 37.0, False, True)
        monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
        step(case.inputs["x"], None, 37.0, False, True)
    made = [args for args in made if args != (0,)]  # Triton's interpreter's own
    assert len(made) == len(("h", "scaled", "reduced"))


@ways()
def test_a_step_forgets_shapes_that_do_not_come_back(way: Way) -> None:
    """But for a few; and it follows kappa."""
    options = {**TABLE[0], **SMOOTH, "normalization": None, "kind": "diagonal", "context": None,
               "rule": "sgd"}  # fmt: skip
    case = make_case((37, 35, 41, 5, 7), options, 8, *FULL).on(way.device)
    step: Any = bound(way, case)[0]
    moved = []
    with way.divided():
        for rows in (16, 17, 18, 19, 20, 21):
            step(case.inputs["x"][:rows], None, float(rows), False, False)
        kept = [n for key in step.workspaces for n in key if type(n) is int and 16 <= n <= 21]
        assert kept == [18, 19, 20, 21]
        for scale in (21.0, 42.0):
            before = copies(own(case))
            step(case.inputs["x"][:21], None, scale, False, False)
            moved.append(own(case)[0].detach() - before[0])
            with torch.no_grad():
                for p, q in zip(own(case), before, strict=True):
                    p.copy_(q)
    torch.testing.assert_close(2 * moved[1], moved[0], rtol=1e-4, atol=1e-5)


@ways()
def test_compiled_step(way: Way) -> None:
    """Through the registered op, in one graph."""
    options = {**TABLE[0], **SMOOTH, "kind": "lowrank", "context": "label", "rule": "adam"}
    case = make_case((19, 16, 24, 5, 7), options, 9, *FULL).on(way.device)
    twin = replace(case).to(*FULL).on(way.device)
    results = []
    for c, compiled in ((case, True), (twin, False)):
        state, _ = bind(c)
        layer, tensors = c.layer(), c.synthesizer()
        detached = layer._replace(**{
            k: None if t is None else t.detach() for k, t in layer._asdict().items()
        })  # fmt: skip
        rule = state.tensors(slots(layer))

        def step(x, labels, layer=detached, c=c, tensors=tensors, rule=rule):  # type: ignore[no-untyped-def]
            return linear_step_(
                x, layer, c.config, tensors, rule, context=labels, backend=way.backend.name
            )

        run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
        with torch.no_grad(), way.divided():
            made = run(c.inputs["x"], c.inputs["context"])
        results.append((made.h, made.prediction.scaled, *own(c)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------------------------------------
# On a GPU

TRAINED = {**TABLE[0], **SMOOTH, "normalization": "batch", "kind": "lowrank", "context": "label",
           "rule": "adam"}  # fmt: skip


@ways(large=True)
@pytest.mark.parametrize("options", TABLE[::4], ids=named)
def test_gpu_step(way: Way, options: dict[str, Any]) -> None:
    way.check(make_case(way.shape, options, 1, *FULL), FULL, run_step)


@ways(large=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gpu_low_precision(way: Way, dtype: torch.dtype) -> None:
    dtypes = (dtype, torch.float32)
    options = {**TRAINED, "rule": "momentum"}
    way.check(make_case(way.shape, options, 2, *dtypes), dtypes, run_step)


@ways(large=True)
@pytest.mark.parametrize("run", [run_step, run_parts])
def test_gpu_same_input_same_bits(way: Way, run: Run) -> None:
    """Twenty times, on each of several grids where they can be chosen."""
    case = make_case(way.shape, {**TRAINED, "max_norm": 0.05}, 4, *FULL)
    for resident in way.grids():
        way.on(resident)
        once = way.check(case, FULL, run)
        for _ in range(20):
            for name, t in way.results(case, FULL, run).items():
                assert torch.equal(t, once[name]), name


@ways(large=True)
@pytest.mark.parametrize("first", ["eager", "captured"])
def test_gpu_graph_and_stream(way: Way, first: str) -> None:
    """Replayed steps are steps, the rule's counters too; nothing needs the default stream, and
    nothing has to have run before it is captured."""
    results = []
    for captured in (False, True):  # the first compiles
        case = make_case(way.shape, TRAINED, 5, *FULL).on(way.device)
        step, state = bound(way, case)

        def run(step=step, case=case):  # type: ignore[no-untyped-def]
            return step(case.inputs["x"], case.inputs["context"], 300.0, True, True)

        with way.divided():
            if first == "eager":
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    made = run()
                torch.cuda.current_stream().wait_stream(side)
            if captured:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    made = run()
            if first == "captured":
                run()
            for _ in range(5):
                if captured:
                    graph.replay()
                else:
                    made = run()
        torch.cuda.synchronize()
        assert state.steps == 6
        results.append((made.h, made.dx, *own(case)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
