"""Recurrent modules under ``torch.compile``, and ``opcheck`` of their ops."""

from __future__ import annotations

import copy
from itertools import chain

import pytest
import torch
from lstm_twins import BACKENDS, cell, close, double, lstm, plain_of, random_state
from schemas import flat
from torch import nn
from torch.library import opcheck

import fused_dni as fd
from fused_dni.ops import registry
from fused_dni.ops.types import LSTMRows, layers_of
from fused_dni.rules import RuleState

pytestmark = [
    pytest.mark.slow(200),
    pytest.mark.usefixtures("one_thread", "fresh"),
    # Warnings of the compiler about itself, which "error" would turn into failures of it.
    pytest.mark.filterwarnings("ignore"),
]
backends = pytest.mark.parametrize("backend", BACKENDS)
STEPS, BATCH, INPUTS, HIDDEN = 4, 3, 2, 5
KINDS = {
    "plain": {},
    "auxiliary": {"auxiliary": True},
    "dense": {"synthesizer": "dense"},
    "clipped": {"max_norm": 0.05, "sg_scale": 0.5},
    "exact": {"synthesizer": None},
}


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


class Language(nn.Module):
    """Embedding, LSTM, head."""

    def __init__(self, layers=1, backend=None, **options):
        super().__init__()
        if options.get("synthesizer") == "dense":
            options["synthesizer"] = fd.LinearSynthesizer(2 * layers * HIDDEN, dtype=torch.float64)
        self.embed = nn.Embedding(7, INPUTS, dtype=torch.float64)
        self.lstm = lstm(INPUTS, HIDDEN, layers, backend=backend, **options)
        self.head = nn.Linear(HIDDEN, 7, dtype=torch.float64)

    def forward(self, tokens, state=None, **named):
        output, state = self.lstm(self.embed(tokens), state, **named)
        return self.head(output), state


def train(model, run, state=None, steps=4, schedule=None, **named):
    """Gradients and outputs of a stream of windows; Adam in between."""
    torch.manual_seed(7)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    out = []
    for _ in range(steps):
        tokens = torch.randint(7, (STEPS + 1, BATCH))
        optimizer.zero_grad()
        logits, state = run(tokens[:-1], state, **named)
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[1:].flatten()).backward()
        out += [logits.detach(), *(t.detach() for t in state)]
        out += [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        optimizer.step()
        if schedule is not None:
            schedule.step()
        if getattr(model, "lstm", None) is not None and model.lstm.synthesizer is None:
            state = tuple(t.detach() for t in state)
    return out


def filled(found):
    """Missing gradients as zeros: traced code hands out those."""
    return [torch.zeros(()) if t is None or not t.any() else t for t in found]


@pytest.mark.parametrize(
    ("backend", "layers", "grad"), [(BACKENDS[0], 2, True), (BACKENDS[-1], 1, False)]
)
def test_inference(backend, layers, grad):
    model = Language(layers, backend).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        state = theirs = None
        for _ in range(3):
            tokens = torch.randint(7, (STEPS, BATCH))
            output, state = compiled(tokens, state)
            expected, theirs = model(tokens, theirs)
            close([output, *state], [expected, *theirs], 0)


@pytest.mark.parametrize(
    ("backend", "layers", "kind", "start"),
    [
        (BACKENDS[0], 1, "plain", None),
        (BACKENDS[0], 2, "exact", None),
        (BACKENDS[0], 2, "clipped", "zeros"),
        (BACKENDS[0], 1, "dense", "some zeros"),
        (BACKENDS[-1], 2, "auxiliary", "some zeros"),
    ],
)
def test_training(backend, layers, kind, start):
    """Eager equals compiled, with the state handed on as it is; windows that start and windows that
    go on are two graphs, and nothing else makes a third."""
    model, graphs = Language(layers, backend, **KINDS[kind]), Graphs()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    state = None
    if start is not None:
        state = random_state(layers, BATCH, HIDDEN)
        state = tuple(t * torch.tensor([0.0, start == "some zeros", 0.0])[:, None] for t in state)
        state = tuple(t.double() for t in state)
    a, b = train(model, compiled, state), train(twin, twin, state)
    if start is not None and kind != "exact":  # a gradient of zero, where eager has none
        a, b = a[: len(a) // 4], b[: len(b) // 4]
    close(filled(a), filled(b), 1e-12)
    if start is not None:
        assert model.lstm.statistics[-1] == twin.lstm.statistics[-1]
    assert graphs.count == (1 if kind == "exact" and start is not None else 2)
    if start is None:
        close(model.lstm.statistics, twin.lstm.statistics, 1e-10)
        close(model.lstm.auxiliary_statistics, twin.lstm.auxiliary_statistics, 1e-10)


def test_phases():
    """Warm-up, a mix with targets, none: a graph each."""
    model, graphs = Language(auxiliary=True), Graphs()
    twin = copy.deepcopy(model)
    options = {"warmup_steps": 2, "target_every": 2, "mix": 0.5, "loss_scale": 8.0}
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    a = train(model, compiled, steps=6, schedule=fd.Schedule(model, **options))
    b = train(twin, twin, steps=6, schedule=fd.Schedule(twin, **options))
    close(filled(a), filled(b), 1e-12)
    assert graphs.count == 4, "the first window continues nothing"


def test_state_that_the_user_detached():
    model = Language()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def detached(tokens, state):
        return compiled(tokens, None if state is None else tuple(t.detach() for t in state))

    close(filled(train(model, detached)), filled(train(twin, twin)), 1e-12)


@pytest.mark.parametrize("form", ["several", "unbatched"])
def test_forms(form):
    """Lengths, batch first and dropout; no batch at all."""
    several = form == "several"
    module = lstm(INPUTS, HIDDEN, 2, batch_first=several, dropout=0.5 * several)
    twin = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    shape = (BATCH, STEPS, INPUTS) if several else (STEPS, INPUTS)
    named = {"lengths": torch.tensor([2, 3, 1])} if several else {}
    state = theirs = None
    for seed in range(3):
        x = double(*shape)
        torch.manual_seed(seed)
        output, state = compiled(x, state, **named)
        torch.manual_seed(seed)
        expected, theirs = twin(x, theirs, **named)
        close([output, *state], [expected, *theirs], 1e-12)
        (output.square().mean() + state[1].sum()).backward()
        (expected.square().mean() + theirs[1].sum()).backward()
    close([p.grad for p in module.parameters()], [p.grad for p in twin.parameters()], 1e-12)


def test_inductor():
    """The default compiler, once: float32, a window that goes on."""
    module = fd.FusedDNILSTM(INPUTS, HIDDEN, 2, auxiliary=True)
    nn.init.normal_(module.synthesizer.weight, 0.0, 0.1)
    twin = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True)
    x, state = torch.randn(STEPS, BATCH, INPUTS), tuple(torch.randn(2, 2, BATCH, HIDDEN))
    module.remember(state), twin.remember(state)
    results = []
    for run in (compiled, twin):
        output, end = run(x, state)
        (output.square().mean() + end[0].mean()).backward()
        results.append([output, *end])
    torch.testing.assert_close(*results)
    torch.testing.assert_close(
        [p.grad for p in module.parameters()], [p.grad for p in twin.parameters()]
    )


class Translation(nn.Module):
    """The state of another module, through a layer or as it is; and two windows in one graph."""

    def __init__(self, bridge):
        super().__init__()
        self.encoder, self.decoder = lstm(INPUTS, HIDDEN), lstm(INPUTS, HIDDEN)
        self.bridge = nn.Linear(HIDDEN, HIDDEN, dtype=torch.float64) if bridge else nn.Identity()

    def forward(self, x, y):
        _, state = self.encoder(x)
        first, state = self.decoder(y, tuple(self.bridge(t) for t in state))
        second, _ = self.decoder(y, state)
        return first, second


@pytest.mark.parametrize("bridge", [True, False])
def test_a_state_from_elsewhere_gets_its_gradient(bridge):
    model = Translation(bridge)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, y = double(STEPS, BATCH, INPUTS), double(STEPS, BATCH, INPUTS)
    for run in (compiled, twin):
        first, second = run(x, y)
        (first.square().sum() + second.sum()).backward()
    assert model.encoder.weight_hh_l0.grad.abs().max() > 1e-3
    grads = [[p.grad for p in m.parameters()] for m in (model, twin)]
    close(filled(grads[0]), filled(grads[1]), 1e-12)


@pytest.mark.parametrize(
    ("backend", "bias", "kind"), [(BACKENDS[0], True, "auxiliary"), (BACKENDS[-1], False, "exact")]
)
def test_cell(backend, bias, kind):
    """A compiled step: its windows are those of plain backprop, in eval and in training."""
    module = cell(INPUTS, HIDDEN, bias, backend=backend, **KINDS[kind])
    plain = plain_of(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = double(STEPS, BATCH, INPUTS)
    state = theirs = None
    for step in x:
        state, theirs = compiled(step, state), plain(step, theirs)
    close([*state], [*theirs])
    (state[0].square().sum() + state[1].sum()).backward()
    (theirs[0].square().sum() + theirs[1].sum()).backward()
    own = {n: p.grad for n, p in module.named_parameters() if "." not in n}
    close(own, {n: p.grad for n, p in plain.named_parameters()})
    module.eval(), plain.eval()
    close([*compiled(x[0])], [*plain(x[0])])
    if kind != "exact":
        module.train()
        with pytest.raises(RuntimeError, match="by a cell that is not compiled"):
            module.boundary(compiled(x[0]))


# ---------------------------------------------------------------------------------------------
# What is not traced


class Network(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.inner = nn.Linear(features, features, dtype=torch.float64)

    def forward(self, rows, context):
        return torch.tanh(self.inner(rows))


UNTRACED = {
    "mask": ({}, {"end_of_sequence": torch.tensor([True, False, False])}),
    "rule": ({"update": fd.SGD(0.1)}, {}),
    "exact rule": ({"synthesizer": None, "update": fd.SGD(0.1)}, {}),
    "context": ({"context_features": 3}, {"context": torch.tensor([0, 2, 1])}),
    "module": ({"synthesizer": Network(2 * HIDDEN)}, {}),
}


@pytest.mark.parametrize("what", UNTRACED)
def test_what_is_not_traced(what):
    """Refused under fullgraph, eager between graphs without."""
    options, named = UNTRACED[what]
    model = Language(**copy.deepcopy(options))
    twin = copy.deepcopy(model)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, fullgraph=True, backend="aot_eager")(
            torch.randint(7, (STEPS, BATCH)), **named
        )
    compiled = torch.compile(model, backend="aot_eager")
    ruled = {id(p) for p in model.parameters()} - {id(p) for p in fd.ordinary_parameters(model)}
    a, b = train(model, compiled, **named), train(twin, twin, **named)
    close(filled(a), filled(b), 1e-12)
    close(dict(model.state_dict()), dict(twin.state_dict()), 1e-12)
    assert bool(ruled) == ("rule" in what)


@pytest.mark.parametrize(
    "treat",
    ["as returned", pytest.param("detached", marks=pytest.mark.repeat), "copied"],
)
def test_rows_that_ended_are_reset_in_a_compiled_model(treat):
    """Calls with and without a mask in turn, graphs and eager calls mixed."""
    model = Language()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    ways = {
        "as returned": lambda t: t,
        "detached": torch.Tensor.detach,
        "copied": lambda t: t.detach().clone(),
    }
    found = []
    for run in (compiled, twin):
        torch.manual_seed(3)
        state, out = None, []
        for k in range(6):
            mask = torch.tensor([True, False, k == 4]) if k in (1, 4) else None
            output, state = run(torch.randint(7, (STEPS, BATCH)), state, end_of_sequence=mask)
            output.square().mean().backward()
            out.append(output.detach())
            state = tuple(ways[treat](t) for t in state)
        found.append(out)
    close(*found)
    grads = [[p.grad for p in m.parameters()] for m in (model, twin)]
    close(*grads)


def test_what_ops_made_of_a_state_is_not_the_modules_own():
    """Traced code sees no graph: detached it is fine, attached it is no silent mistake."""
    module = lstm(INPUTS, HIDDEN)
    compiled = torch.compile(module, backend="aot_eager")
    x = double(STEPS, BATCH, INPUTS)
    output, state = compiled(x)
    output.sum().backward()
    output, _ = compiled(x, tuple(t * 0.5 for t in state))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        output.sum().backward()
    compiled(x, tuple(t.detach() * 0.5 for t in state))[0].sum().backward()


# ---------------------------------------------------------------------------------------------
# opcheck

OPS = torch.ops.fused_dni
NAMES = (
    "lstm_forward",
    "lstm_backward",
    "lstm_update_",
    "lstm_cell_forward",
    "lstm_cell_backward",
    "lstm_returned_rows",
)


def test_every_registered_op_is_checked():
    registered = {
        s.name.split("::")[1]
        for s in torch._C._jit_get_all_schemas()
        if s.name.startswith("fused_dni::lstm")
    }
    assert registered == set(NAMES)


@backends
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(backend, full, name):
    """``full``: everything that may be there; otherwise the least."""
    if name == "lstm_returned_rows":
        h, c = random_state(2, BATCH, HIDDEN)
        opcheck(OPS.lstm_returned_rows.default, (h, c, double(4 * HIDDEN, INPUTS), full))
        return
    if "cell" in name:
        stock = nn.LSTMCell(INPUTS, HIDDEN, full, dtype=torch.float64)
        (layer,) = layers_of([p.detach() for p in stock.parameters()], full)
        x, h, c = double(BATCH, INPUTS), double(BATCH, HIDDEN), double(BATCH, HIDDEN)
        trace = registry.get(backend).lstm_cell_forward(x, h, c, layer, True)
        arriving = (h.sin(), c.cos() if full else None)
        given = {
            "lstm_cell_forward": (x, h, c, layer, full),
            "lstm_cell_backward": (*arriving, x, h, c, layer, trace, full, full),
        }
    else:
        stock = nn.LSTM(INPUTS, HIDDEN, 2, full, dtype=torch.float64)
        layers = layers_of([p.detach() for p in stock.parameters()], full)
        x, (h, c) = double(STEPS, BATCH, INPUTS), random_state(2, BATCH, HIDDEN)
        lengths = torch.tensor([4, 2, 1]) if full else None
        rest = (layers, lengths, (double(STEPS, BATCH, HIDDEN),) if full else ())
        trace = registry.get(backend).lstm_forward(x, h, c, *rest, True)
        arriving = (
            x.new_ones(STEPS, BATCH, HIDDEN),
            *((h.sin(), c.cos()) if full else (None,) * 2),
        )
        n = STEPS * BATCH
        below = [
            LSTMRows(double(n, width), double(n, HIDDEN), double(n, 4 * HIDDEN))
            for width in (INPUTS, HIDDEN)
        ]
        slots = [None if p is None else nn.Parameter(p) for layer in layers for p in layer]
        rule = RuleState(fd.Adam(0.01) if full else fd.SGD(0.1))
        given = {
            "lstm_forward": (x, h, c, *rest, full),
            "lstm_backward": (*arriving, x, *rest, trace, full, full),
            "lstm_update_": (tuple(below), layers, rule.tensors(slots)),
        }
    opcheck(getattr(OPS, name).default, (*chain.from_iterable(map(flat, given[name])), backend))
