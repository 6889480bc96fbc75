"""``torch.compile(fullgraph=True)``, ``opcheck`` and ``gradcheck``."""

from __future__ import annotations

import copy
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
import twins
from schemas import flat
from strategies import paired
from torch import nn
from torch.library import opcheck
from twins import BACKENDS, close, double, linear

import fused_dni as fd
from fused_dni.ops import registry
from fused_dni.ops.types import (
    HYPER_SIZE,
    STATISTICS_SIZE,
    SYNTHESIZERS,
    LinearConfig,
    LinearGradients,
    LinearTensors,
    Prediction,
    RuleTensors,
    Saved,
    SynthesizerTensors,
)
from fused_dni.rules import RuleState

pytestmark = [
    pytest.mark.slow(75),
    pytest.mark.usefixtures("one_thread", "fresh"),
    # Warnings of the compiler about itself, which "error" would turn into failures of it.
    pytest.mark.filterwarnings("ignore"),
]
backends = pytest.mark.parametrize("backend", BACKENDS)
# What is traced holds the backend's name and nothing else of it; opcheck asks all of them.
one_backend = pytest.mark.parametrize(
    "backend", [BACKENDS[0], *(pytest.param(b, marks=pytest.mark.repeat) for b in BACKENDS[1:])]
)


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A compiler backend that counts the graphs it is given, on top of ``aot_eager``."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


def network(backend=None, **options):
    return nn.Sequential(
        linear(4, 6, normalization="batch", activation="relu", backend=backend, context_features=3),
        linear(6, 6, normalization="layer", activation="gelu", backend=backend,
               synthesizer=fd.DiagonalSynthesizer(6, dtype=torch.float64)),
        linear(6, 5, activation="silu", backend=backend,
               synthesizer=fd.LinearSynthesizer(5, dtype=torch.float64)),
        linear(5, 3, synthesizer=None, backend=backend),
    )  # fmt: skip


@pytest.mark.parametrize(("backend", "grad"), [(BACKENDS[0], True), (BACKENDS[-1], False)])
def test_inference(backend, grad):
    model = network(backend).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        for n in (6, 9):
            x = double(n, 4)
            close(compiled(x), model(x), 0)


def test_training_mode_without_gradients():
    model, twin = (m := network()), copy.deepcopy(m)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = double(6, 4)
    with torch.no_grad():
        close(compiled(x), twin(x), 0)
    close(twins.values(model), twins.values(twin), 0)


def train(model, run, steps, schedule, seed=0):
    """Gradients and losses; one training step of several calls of ``run``."""
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    out = []
    for _ in range(steps):
        x, y = double(8, 4, grad=True), torch.randint(3, (8,))
        optimizer.zero_grad()
        with fd.condition_on(y):
            loss = F.cross_entropy(run(x), y)
        loss.backward()
        optimizer.step()
        schedule.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        out += [loss.detach(), x.grad]
    return out


def test_lessons_of_compiled_steps_are_seen():
    """By the schedule, which counts those that it misses."""
    layer = linear(4, 5)
    schedule = fd.Schedule(layer)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for step in range(4):
        h = run(double(8, 4))
        if step != 2:
            h.square().mean().backward()
        schedule.step()
    assert fd.diagnostics(layer)[""]["missed_targets"] == 1.0


@one_backend
def test_training_without_a_rule(backend):
    """Eager equals compiled; targets and none are two graphs, and nothing else makes a third."""
    model = network(backend)
    twin, graphs = copy.deepcopy(model), Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    a = train(model, compiled, 8, fd.Schedule(model, target_every=3))
    assert graphs.count == 2
    b = train(twin, twin, 8, fd.Schedule(twin, target_every=3))
    close(a, b, 1e-12)
    close(twins.values(model), twins.values(twin), 1e-12)
    for layer, other in zip(model, twin, strict=True):
        close(layer.statistics, other.statistics, 1e-10)


@pytest.mark.parametrize("schedule", [{"warmup_steps": 2}, {"mix": 0.5}, {"loss_scale": 8.0}])
def test_other_phases(schedule):
    model = network()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    a = train(model, compiled, 3, fd.Schedule(model, **schedule))
    b = train(twin, twin, 3, fd.Schedule(twin, **schedule))
    close(a, b, 1e-12)
    close(twins.values(model), twins.values(twin), 1e-12)


def test_whole_step_with_the_loss_inside():
    model = network()
    twin = copy.deepcopy(model)
    x, y = double(8, 4), torch.randint(3, (8,))

    def loss(m, x, y):
        h = m[0](x, context=y)
        for layer in list(m)[1:]:
            h = layer(h)
        return F.cross_entropy(h, y)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    compiled(model, x, y).backward()
    loss(twin, x, y).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        close(p.grad, q.grad, 1e-12)


def test_inductor():
    """The default compiler, once: float32, a training step and inference."""
    model = nn.Sequential(
        fd.FusedDNILinear(4, 6, normalization="batch", activation="relu"),
        fd.FusedDNILinear(6, 3, synthesizer=None),
    )
    twins.disturb(model[0].synthesizer)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    F.cross_entropy(compiled(x), y).backward()
    F.cross_entropy(twin(x), y).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    model.eval(), twin.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), twin(x))


@pytest.mark.parametrize("synthesizer", ["default", None])
def test_a_rule_is_not_traced(synthesizer):
    """A fused rule in a compiled model: refused under fullgraph, eager between graphs without."""
    rule = fd.SGD(0.1)
    layer = linear(4, 5, update=rule, synthesizer=synthesizer)
    model = nn.Sequential(nn.Linear(4, 4).double(), layer)
    twin, x = copy.deepcopy(model), double(6, 4)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    compiled = torch.compile(model, backend="aot_eager")
    for m in (compiled, twin):
        m(x).square().sum().backward()
    close(twins.values(model), twins.values(twin), 1e-12)
    close(model[0].weight.grad, twin[0].weight.grad, 1e-12)


def test_immediate_delivery_is_not_traced():
    model = fd.DecoupledSequential(linear(4, 5), linear(5, 3))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, fullgraph=True, backend="aot_eager")(double(6, 4))


# ---------------------------------------------------------------------------------------------
# The functional step


def skip_unless_it_has(backend, kind):
    if kind not in registry.get(backend).synthesizers:
        pytest.skip(f"{backend} has no synthesizers of kind {kind!r}")


def tensors(backend, kind="lowrank", rule="adam", context=None, normalization="batch"):
    """Detached tensors of a decoupled step; the context "table" is labels and a softmax's head."""
    n, i, o, k, r = 6, 4, 5, 3, 2
    vector = lambda: double(o)  # noqa: E731
    affine = normalization is not None
    stats = (vector(), torch.rand(o, dtype=torch.float64) + 0.5) if normalization == "batch" else ()
    layer = LinearTensors(
        double(o, i), vector(), *(vector() if affine else None for _ in range(2)), *stats
    )
    if kind == "cross_entropy":
        r, context = k, context if context == "vector" else "labels"
    weight = {"dense": (o, o), "diagonal": (o,)}.get(kind, (o, r))
    conditioned = {None: lambda: None, "table": lambda: double(1).sum()}
    synthesizer = SynthesizerTensors(
        kind,
        double(*weight),
        double(r, o) if len(weight) == 2 and kind != "dense" else None,
        double(k) if kind == "cross_entropy" else conditioned.get(context, lambda: double(o, k))(),
        vector(),
        double(k, o) if context == "table" else None,
    )
    labels = torch.randint(k, (n,))
    rows = {None: None, "labels": labels, "table": labels, "vector": double(n, k)}[context]

    def bound(slots):
        state = RuleState({"adam": fd.Adam(0.01), "sgd": fd.SGD(0.1, momentum=0.9)}[rule])
        slots = [None if t is None else nn.Parameter(t) for t in slots]
        return state.tensors(slots)

    return double(n, i), layer, synthesizer, rows, bound


@paired(
    backend=BACKENDS,
    context=(None, "labels", "vector", "table"),
    kind=SYNTHESIZERS,
    interface=("output", "preactivation"),
)
def test_functional_step(backend, context, kind, interface):
    skip_unless_it_has(backend, kind)
    if kind == "cross_entropy" and context != "vector":
        context = "labels"
    x, layer, synthesizer, rows, bound = tensors(backend, kind, context=context)
    config = LinearConfig("batch", "gelu", interface=interface)
    moved = layer[:4] if interface == "output" else (*layer[:2], None, None)
    rules = (bound(moved), bound(synthesizer.parameters()))
    everything = (x, layer, synthesizer, rows, rules, torch.zeros(STATISTICS_SIZE).double())
    other = copy.deepcopy(everything)

    def step(x, layer, synthesizer, rows, rules, statistics):
        made = fd.functional.linear_step_(
            x, layer, config, synthesizer, rules[0], context=rows, need_dx=True, backend=backend
        )
        fd.functional.synthesizer_update_(
            made.h, made.prediction, made.h.sin(), synthesizer, rules[1], context=rows,
            statistics=statistics, backend=backend,
        )  # fmt: skip
        return made.h, made.dx, made.prediction.scaled, made.saved

    graphs = Graphs()
    compiled = torch.compile(step, fullgraph=True, backend=graphs)
    for rate in (0.01, 0.02, 0.03, 0.04):  # the rate is data: no new graph
        for mine in (everything, other):
            mine[4][0].hyper[0] = rate
        close(compiled(*everything), step(*other), 1e-12)
    # PyTorch traces a graph with tensors of no dimension (a table's gain) a second time.
    assert graphs.count == (2 if context == "table" else 1)
    flat = [t for t in torch.utils._pytree.tree_leaves(everything) if isinstance(t, torch.Tensor)]
    flat_other = [t for t in torch.utils._pytree.tree_leaves(other) if isinstance(t, torch.Tensor)]
    close(flat, flat_other, 1e-12)


# ---------------------------------------------------------------------------------------------
# opcheck and gradcheck

OPS = torch.ops.fused_dni


def arguments(name, backend, normalization, kind, context, interface="output"):
    """An op's, as the backend's method takes them."""
    x, layer, synthesizer, rows, bound = tensors(backend, kind, "adam", context, normalization)
    config = LinearConfig(normalization, "gelu", interface=interface)
    h, n, o = double(6, 5), 6, 5
    rstd = {"batch": double(o).abs(), "layer": double(n).abs(), None: None}[normalization]
    slots = layer[:4] if interface == "output" else (*layer[:2], None, None)
    vectors = [double(o) if t is not None else None for t in layer[1:4]]
    down = synthesizer.down
    prediction = Prediction(h.cos(), None if down is None else double(n, len(down)))
    lesson = (h, prediction, h.sin(), synthesizer, rows, 6.0, torch.zeros(STATISTICS_SIZE).double())
    return {
        "linear_forward": (x, layer, config, True, True),
        "linear_backward": (h, x, h, Saved(double(n, o), rstd), layer, config, True, True, True),
        "linear_step_": (
            x, layer, config, synthesizer, rows, 6.0, 0.5, bound(slots), True, True,
        ),
        "linear_update_": (x, LinearGradients(h, None, None, *vectors), layer, bound(layer[:4])),
        "linear_cross_entropy": (x, *layer[:2], torch.randint(o, (n,)), 0.1, -100, True),
        "synthesizer_predict": (h, synthesizer, rows),
        "synthesizer_gradients": lesson,
        "synthesizer_update_": (*lesson, bound(synthesizer.parameters())),
    }[name]  # fmt: skip


NAMES = (
    "linear_forward",
    "linear_backward",
    "linear_step_",
    "linear_update_",
    "linear_cross_entropy",
    "synthesizer_predict",
    "synthesizer_gradients",
    "synthesizer_update_",
)


def test_every_registered_op_is_checked():
    registered = {
        s.name.split("::")[1]
        for s in torch._C._jit_get_all_schemas()
        if s.name.startswith("fused_dni::")
    }
    # the LSTM's: test_lstm_compile.py
    assert {name for name in registered if not name.startswith("lstm_")} == set(NAMES)


@backends
@pytest.mark.parametrize("rank", [0, 2])
def test_a_synthesizer_of_a_cross_entropy(backend, rank):
    """In the graph where a kernel runs it, and without one."""
    synthesizer = fd.CrossEntropySynthesizer(5, 3, rank, dtype=torch.float64)
    twins.disturb(synthesizer)
    layer = linear(4, 5, synthesizer=synthesizer, target_scale=1.0, backend=backend)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=not rank, backend="aot_eager")
    for _ in range(2):
        x, y, g = double(6, 4), torch.randint(3, (6,)), double(6, 5)
        for run in (compiled, twin):
            run(x, context=y).backward(g)
        for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
            close(p.grad, q.grad, 1e-12)


OPTIONS = [
    ("batch", "lowrank", "labels"),
    ("layer", "dense", "vector"),
    (None, "diagonal", None),
    ("batch", "lowrank", "table"),
    (None, "cross_entropy", "labels"),
    ("batch", "cross_entropy", "vector"),
]
CALLS = [*((name, "output") for name in NAMES), ("linear_step_", "preactivation")]
# How many of the options differ in what an op is given: it has no synthesizer, or no normalization.
DIFFERENT = {"linear_cross_entropy": 2, "linear_forward": 3, "linear_backward": 3}
DIFFERENT["linear_update_"] = 3


@pytest.mark.parametrize(
    ("backend", "call", "options"),
    [
        (BACKENDS[(i + j) % len(BACKENDS)], call, options)
        for i, call in enumerate(CALLS)
        for j, options in enumerate(OPTIONS[: DIFFERENT.get(call[0], len(OPTIONS))])
    ],
)
def test_opcheck(backend, call, options):
    name, interface = call
    normalization, kind, context = options
    skip_unless_it_has(backend, kind)
    given = arguments(name, backend, normalization, kind, context, interface)
    opcheck(getattr(OPS, name).default, (*chain.from_iterable(map(flat, given)), backend))


def test_hyper_is_as_long_as_it_is_said_to_be():
    assert RuleState(fd.SGD(0.1)).hyper.shape == (HYPER_SIZE,)
    assert isinstance(tensors("reference")[4]([double(2)]), RuleTensors)


@backends
@pytest.mark.parametrize(
    ("normalization", "training"),
    [(None, True), ("layer", True), ("batch", True), ("batch", False)],
)
@pytest.mark.parametrize("activation", twins.ACTIVATIONS)
def test_gradcheck(backend, activation, normalization, training):
    torch.manual_seed(4)
    x, weight, bias = double(2, 3, 4, grad=True), double(5, 4, grad=True), double(5, grad=True)
    vectors = (double(5, grad=True), double(5, grad=True)) if normalization else (None, None)
    mean, var = double(5), torch.rand(5, dtype=torch.float64) + 0.5

    def f(x, weight, bias, norm_weight, norm_bias):
        return fd.functional.linear(
            x, weight, bias, normalization=normalization, norm_weight=norm_weight,
            norm_bias=norm_bias, running_mean=mean.clone(), running_var=var.clone(),
            training=training, activation=activation, backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(f, (x, weight, bias, *vectors))


# ---------------------------------------------------------------------------------------------
# A linear layer with its cross-entropy


@backends
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ignored", [False, True])
def test_gradcheck_of_the_cross_entropy(backend, smoothing, ignored):
    torch.manual_seed(4)
    x, weight, bias = double(2, 3, 4, grad=True), double(5, 4, grad=True), double(5, grad=True)
    y = torch.randint(5, (2, 3))
    if ignored:
        y[0, 1] = 7

    def f(x, weight, bias):
        return fd.functional.linear_cross_entropy(
            x, weight, y, linear_bias=bias, ignore_index=7, label_smoothing=smoothing,
            backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(f, (x, weight, bias))


@one_backend
def test_the_head_compiled(backend):
    """Without a rule, behind a layer that predicts: one graph; logits in eval()."""
    model = nn.ModuleList(
        [
            linear(4, 6, normalization="batch", activation="relu", backend=backend),
            fd.FusedDNILinearCrossEntropyLoss(6, 3, backend=backend, dtype=torch.float64),
        ]
    )
    twin, graphs = copy.deepcopy(model), Graphs()
    x, y = double(8, 4), torch.randint(3, (8,))

    def loss(modules, x, y):
        return modules[1](modules[0](x), y)

    compiled = torch.compile(loss, fullgraph=True, backend=graphs)
    a, b = compiled(model, x, y), loss(twin, x, y)
    a.backward(), b.backward()
    assert graphs.count == 1
    close(a, b, 1e-12)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        close(p.grad, q.grad, 1e-12)
    model.eval(), twin.eval()
    close(torch.compile(loss, fullgraph=True, backend="aot_eager")(model, x, None),
          twin[1].logits(twin[0](x)), 1e-12)  # fmt: skip


def test_a_head_with_a_rule_is_not_traced():
    head = fd.FusedDNILinearCrossEntropyLoss(4, 3, update=fd.SGD(0.1), dtype=torch.float64)
    twin, x, y = copy.deepcopy(head), double(6, 4), torch.randint(3, (6,))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(head, fullgraph=True, backend="aot_eager")(x, y)
    compiled = torch.compile(head, backend="aot_eager")
    for m in (compiled, twin):
        m(x, y).backward()
    close(head.weight, twin.weight, 1e-12)
