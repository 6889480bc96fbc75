"""The two ends of a window: with a perfect synthesizer windows are backprop through the whole
sequence; otherwise every gradient equals what the formulas give, by autograd on ``nn.LSTM``."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import twins
from lstm_twins import (
    BACKENDS,
    as_rows,
    cell,
    close,
    double,
    grads,
    local_gradients,
    lstm,
    oracle,
    plain_of,
    prediction,
    random_state,
    recorded,
    state_grad,
)
from strategies import pairwise
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fused_dni as fd
from fused_dni.modules.recurrent import AUXILIARY_WEIGHT

pytestmark = [pytest.mark.slow(40), pytest.mark.usefixtures("one_thread")]
backends = pytest.mark.parametrize("backend", BACKENDS)
STEPS, BATCH, INPUTS, HIDDEN = 4, 3, 2, 5
RATE = 0.1
# Rows that end with each window of a stream of four; the last one's end is everybody's.
ENDS = torch.tensor([[False, True, False], [False] * 3, [True, True, False], [True] * 3])
LENGTHS = torch.tensor([[4, 2, 3], [1, 4, 4], [3, 3, 1], [2, 4, 4]])


def loss_of(k, output, state, on_state=True):
    """Different for every window, on the output and, if asked, on the state."""
    generator = torch.Generator().manual_seed(k)

    def weight(t):
        return torch.randn(t.shape, dtype=t.dtype, generator=generator)

    loss = output.square().sum() + (output * weight(output)).sum()
    if on_state:
        loss = loss + (state[0] * weight(state[0])).sum() + state[1].square().sum()
    return loss


# ---------------------------------------------------------------------------------------------
# Exactness

EXACT = {
    "layers": (1, 2, 3),
    "form": ("steps first", "batch first", "unbatched", "packed", "cell"),
    "ends": (True, False),
    "lengths": (True, False),
    "bias": (True, False),
    "delivery": ("window by window", "all at once", "rule"),
    "state": ("as returned", "detached", "cloned", "copied"),
}


def fitting(row):
    return not (
        (row["form"] == "cell" and (row["layers"] > 1 or row["lengths"]))
        or (row["form"] == "unbatched" and row["lengths"])
        or (row["form"] == "packed" and not row["lengths"])
    )


def exact_rows():
    """Every two options that go together meet: a table for each form."""
    out = []
    for form in EXACT["form"]:
        narrowed = {**EXACT, "form": (form,)}
        narrowed["layers"] = (1,) if form == "cell" else EXACT["layers"]
        narrowed["lengths"] = {"cell": (False,), "unbatched": (False,), "packed": (True,)}.get(
            form, EXACT["lengths"]
        )
        out += pairwise(narrowed)
    assert all(map(fitting, out))
    return out


def through_nn_lstm(plain, x, ends, lengths, state, on_state=True):
    """Backprop through the whole stream: losses, and the states that windows hand on, recorded."""
    loss, handed = 0.0, []
    for k, window in enumerate(x):
        if isinstance(plain, nn.LSTMCell):
            state = None if state is None else tuple(t[0] for t in state)
            steps = []
            for step in window:
                state = plain(step, state)
                steps.append(state[0])
            output, state = torch.stack(steps), tuple(t.unsqueeze(0) for t in state)
        elif lengths is None:
            output, state = plain(window, state)
        else:
            packed = pack_padded_sequence(window, lengths[k], enforce_sorted=False)
            output, state = plain(packed, state)
            output, _ = pad_packed_sequence(output, total_length=STEPS)
        loss = loss + loss_of(k, output, state, on_state)
        state = recorded(state)
        handed.append(state)
        if ends is not None:
            state = tuple(t * ~ends[k][None, :, None] for t in state)
    return loss, handed


def through_windows(module, form, x, ends, lengths, state, future, treat, on_state=True):
    """The same window by window, with the future's gradient as context; losses."""
    for k, window in enumerate(x):
        mask = None if ends is None else ends[k]
        if form == "cell":
            state = None if state is None else tuple(t[0] for t in state)
            steps = []
            for step in window:
                state = module(step, state)
                steps.append(state[0])
            output, end = torch.stack(steps), tuple(t.unsqueeze(0) for t in state)
            state = tuple(t.unsqueeze(0) for t in module.boundary(state, mask, future[k]))
        elif form == "unbatched":
            start = None if state is None else tuple(t.squeeze(1) for t in state)
            mask = None if mask is None else mask[0]
            output, end = module(
                window[:, 0], start, end_of_sequence=mask, context=future[k]
            )  # fmt: skip
            output, end = output.unsqueeze(1), tuple(t.unsqueeze(1) for t in end)
            state = end
        elif form == "packed":
            given = pack_padded_sequence(window, lengths[k], enforce_sorted=False)
            output, end = module(given, state, end_of_sequence=mask, context=future[k])
            output, _ = pad_packed_sequence(output, total_length=STEPS)
            state = end
        else:
            given = window.transpose(0, 1) if form == "batch first" else window
            output, end = module(
                given, state, end_of_sequence=mask, context=future[k],
                lengths=None if lengths is None else lengths[k],
            )  # fmt: skip
            output = output.transpose(0, 1) if form == "batch first" else output
            state = end
        loss = loss_of(k, output, end, on_state)
        state = treat(state)
        yield loss


TREATMENTS = {
    "as returned": lambda s: s,
    "detached": lambda s: tuple(t.detach() for t in s),
    "cloned": lambda s: tuple(t.clone() for t in s),
    "copied": lambda s: tuple(t.data.clone() for t in s),
}


@backends
@pytest.mark.parametrize(
    "row", exact_rows(), ids=lambda row: "-".join(str(v) for v in row.values())
)
def test_a_perfect_synthesizer_makes_windows_backprop(backend, row):
    """Gradients to weights, inputs and the first state; M itself has nothing to learn."""
    form, batch = row["form"], 1 if row["form"] == "unbatched" else BATCH
    first = (
        nn.LSTMCell(INPUTS, HIDDEN, row["bias"], dtype=torch.float64)
        if form == "cell"
        else nn.LSTM(
            INPUTS, HIDDEN, row["layers"], row["bias"], form == "batch first", dtype=torch.float64
        )
    )
    plain = copy.deepcopy(first)
    plain.batch_first = False
    rule = fd.SGD(RATE) if row["delivery"] == "rule" else None
    module = oracle(first, update=rule, backend=backend)
    module.synthesizer.requires_grad_(True)
    x = double(len(ENDS), STEPS, batch, INPUTS)
    ends = ENDS[:, :batch] if row["ends"] else None
    lengths = LENGTHS if row["lengths"] else None
    mine, theirs = (x.clone().requires_grad_() for _ in range(2))
    start = random_state(row["layers"], batch, HIDDEN)
    starts = [tuple(t.clone().requires_grad_() for t in start) for _ in range(2)]

    loss, handed = through_nn_lstm(plain, theirs, ends, lengths, starts[1])
    loss.backward()
    future = [state_grad(state) for state in handed]
    assert future[0].abs().max() > 0.01, "there is a future"

    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    losses = through_windows(
        module, form, mine, ends, lengths, starts[0], future, TREATMENTS[row["state"]]
    )
    if row["delivery"] == "window by window":
        for each in losses:
            each.backward()
    else:
        torch.stack(list(losses)).sum().backward()
    close(mine.grad, theirs.grad)
    close([t.grad for t in starts[0]], [t.grad for t in starts[1]])
    expected = {n: p.grad for n, p in plain.named_parameters()}
    if rule is None:
        close(local_gradients(module), expected)
        learned = grads(module.synthesizer)
    else:
        change = {n: (before[n] - p.detach()) / RATE for n, p in module.named_parameters()}
        close({n: change[n] for n in expected}, expected)
        learned = [change[f"synthesizer.{n}"] for n, _ in module.synthesizer.named_parameters()]
    for g in learned:
        close(g, torch.zeros_like(g))
    rows = (len(ENDS) - 1) * batch
    if ends is not None:  # a row that ended is a lesson too, that which follows starts anew
        rows += int(ends[-1].sum())
    assert module.statistics[-1] == rows


def test_truncated_windows_are_not_backprop():
    """What the test above would find: without the future's gradient it fails."""
    plain = nn.LSTM(INPUTS, HIDDEN, dtype=torch.float64)
    module = oracle(copy.deepcopy(plain), backend="reference")
    x = double(4, STEPS, BATCH, INPUTS)
    loss, handed = through_nn_lstm(plain, x, None, None, None)
    loss.backward()
    future = [torch.zeros_like(state_grad(s)) for s in handed]
    for each in through_windows(module, "steps first", x, None, None, None, future, lambda s: s):
        each.backward()
    gap = module.weight_hh_l0.grad - plain.weight_hh_l0.grad
    assert gap.norm() > 0.01 * plain.weight_hh_l0.grad.norm()


# ---------------------------------------------------------------------------------------------
# The formulas

FORMULA = {
    "form": ("window", "cell"),
    "layers": (1, 2),
    "rule": (None, fd.SGD(RATE)),
    "synthesizer": ("default", "dense", "diagonal", "mlp"),
    "auxiliary": (False, True),
    "ends": (True, False),
    "target_scale": (None, 7.0),
    "sg_scale": (1.0, 0.1),
    "max_norm": (None, 0.05),
    "max_target_norm": (None, 0.5),
    "phase": ("targets", "no targets", "warmup", "mix", "loss_scale"),
    "start": ("none", "zero rows", "given"),
    "context": (None, "labels", "vector"),
}
PHASES = {
    "targets": {},
    "no targets": {"target_every": None},
    "warmup": {"warmup_steps": 100},
    "mix": {"mix": 0.25},
    "loss_scale": {"loss_scale": 8.0},
}


class Network(nn.Module):
    """A synthesizer of one's own."""

    def __init__(self, features):
        super().__init__()
        self.inner = nn.Linear(features, 4, dtype=torch.float64)
        self.outer = nn.Linear(4, features, dtype=torch.float64)

    def forward(self, rows, context):
        return self.outer(torch.tanh(self.inner(rows)))


def formula_rows():
    out = []
    for form, layers in (("window", (1, 2)), ("cell", (1,))):
        out += pairwise({**FORMULA, "form": (form,), "layers": layers})
    for row in out:
        if row["synthesizer"] in ("diagonal", "mlp") and row["context"] is not None:
            row["context"] = None
    return out


def module_of(row, backend):
    features, k = 2 * row["layers"] * HIDDEN, 0 if row["context"] is None else 3
    kinds = {
        "default": "default",
        "dense": fd.LinearSynthesizer(features, context_features=k, dtype=torch.float64),
        "diagonal": fd.DiagonalSynthesizer(features, dtype=torch.float64),
        "mlp": Network(features),
    }
    names = ("auxiliary", "target_scale", "sg_scale", "max_norm", "max_target_norm")
    options = {n: row[n] for n in names}
    if row["synthesizer"] == "default":
        options["context_features"] = k
    options |= {"synthesizer": kinds[row["synthesizer"]], "update": row["rule"], "backend": backend}
    module = (
        cell(INPUTS, HIDDEN, **options)
        if row["form"] == "cell"
        else lstm(INPUTS, HIDDEN, row["layers"], **options)
    )
    fd.Schedule(module, **PHASES[row["phase"]])
    return module


def by_hand(module, row, k, x, start, context, before):
    """One window's gradients: parameters, input, state; lessons of M and of the auxiliary head.

    ``start`` is the state, ``before`` the context there (None: it continues nothing)."""
    plain = plain_of(module)
    phase, ended = PHASES[row["phase"]], ENDS[k] if row["ends"] else None
    kappa = float(STEPS * BATCH) if row["target_scale"] is None else row["target_scale"]
    factor = phase.get("loss_scale", 1.0)
    strength = row["sg_scale"] * {"warmup": 0.0, "mix": 0.75}.get(row["phase"], 1.0)
    learns = row["phase"] != "no targets"
    x = x.detach().clone().requires_grad_()
    h, c = (t.detach().clone().requires_grad_() for t in start)
    if row["form"] == "cell":
        steps, state = [], (h[0], c[0])
        for step in x:
            state = plain(step, state)
            steps.append(state[0])
        output, end = torch.stack(steps), tuple(t.unsqueeze(0) for t in state)
    else:
        output, end = plain(x, (h, c))
    last = as_rows(end)
    scaled = prediction(module, [t.detach() for t in end], context)
    if ended is not None:
        scaled = scaled.masked_fill(ended[:, None], 0.0)
    synthetic = scaled / kappa
    if row["max_norm"] is not None:
        synthetic = synthetic * min(1.0, row["max_norm"] / max(float(synthetic.norm()), 1e-30))
    total = loss_of(k, output, end) + strength * (last * synthetic).sum()
    parameters = dict(plain.named_parameters())
    made = torch.autograd.grad(total, [x, h, c, *parameters.values()])
    found = {
        "loss": factor * loss_of(k, output, end).detach(),
        "output": output.detach(),
        "end": [t.detach() for t in end],
        "dx": factor * made[0],
        "state": [factor * g for g in made[1:3]],
        "local": dict(zip(parameters, made[3:], strict=True)),
    }
    rows, targets, contexts = [], [], []
    first, target = as_rows((h, c)).detach(), kappa * as_rows(made[1:3])
    continued = (first != 0).any(1)
    head = None
    if learns and before is not None and bool(continued.any()):
        first, target = first[continued], target[continued]
        given = None if before is False else before[continued]
        if row["auxiliary"]:
            asked = first.clone().requires_grad_()
            error = module.auxiliary_head(asked, given) - scaled[continued]
            (more,) = torch.autograd.grad(0.5 * error.square().sum(), asked)
            target = target + AUXILIARY_WEIGHT * more
            head = twins_lesson(module.auxiliary_head, first, scaled[continued], given)
        if row["max_target_norm"] is not None:
            sizes = target.norm(dim=1, keepdim=True)
            target = target * (row["max_target_norm"] / sizes).clamp(max=1.0)
        rows.append(first), targets.append(target), contexts.append(given)
    if learns and ended is not None and bool(ended.any()):
        rows.append(last.detach()[ended])
        targets.append(torch.zeros_like(rows[-1]))
        contexts.append(None if context is None else context[ended])
    lesson = None
    if rows:
        joint = None if contexts[0] is None else torch.cat(contexts)
        lesson = twins_lesson(module.synthesizer, torch.cat(rows), torch.cat(targets), joint)
    found["synthesizer"], found["auxiliary_head"] = lesson, head
    return found


def twins_lesson(head, rows, target, context):
    """Gradients of the mean over rows of the squared error, by autograd."""
    out = head(rows.detach(), context)
    loss = (out - target.detach()).square().sum() / rows.shape[0]
    return dict(
        zip(
            dict(head.named_parameters()),
            torch.autograd.grad(loss, list(head.parameters()), allow_unused=True),
            strict=True,
        )
    )


def run(module, row, k, x, state, context):
    """One window by the module: output, final state, and the state to go on with."""
    ended = ENDS[k] if row["ends"] else None
    if row["form"] != "cell":
        output, end = module(x, state, end_of_sequence=ended, context=context)
        return output, end, end
    state = None if state is None else tuple(t[0] for t in state)
    steps = []
    for step in x:
        state = module(step, state)
        steps.append(state[0])
    end = tuple(t.unsqueeze(0) for t in state)
    after = module.boundary(state, ended, context)
    return torch.stack(steps), end, tuple(t.unsqueeze(0) for t in after)


@backends
@pytest.mark.parametrize(
    "row", formula_rows(), ids=lambda row: "-".join(str(v) for v in row.values())
)
def test_gradients_by_hand(backend, row):
    module = module_of(row, backend)
    layers, factor = row["layers"], PHASES[row["phase"]].get("loss_scale", 1.0)
    start = {
        "none": None,
        "zero rows": tuple(t * torch.tensor([0.0, 1.0, 0.0])[:, None].double()
                           for t in random_state(layers, BATCH, HIDDEN)),
        "given": random_state(layers, BATCH, HIDDEN),
    }[row["start"]]  # fmt: skip
    state = start
    known = torch.zeros(layers, BATCH, HIDDEN, dtype=torch.float64)
    expected_start = (known, known.clone()) if start is None else start
    before = None
    for k in range(len(ENDS)):
        x = double(STEPS, BATCH, INPUTS, grad=True)
        context = {
            None: None, "labels": torch.randint(3, (BATCH,)), "vector": double(BATCH, 3)
        }[row["context"]]  # fmt: skip
        expected = by_hand(module, row, k, x, expected_start, context, before)
        module.zero_grad()
        old = {n: p.detach().clone() for n, p in module.named_parameters()}
        output, end, state = run(module, row, k, x, state, context)
        close(output, expected["output"])
        close([*end], expected["end"])
        loss = factor * loss_of(k, output, end)
        loss.backward()
        close(x.grad, expected["dx"], 1e-11)
        for name, p in module.named_parameters():
            part, _, inner = name.rpartition(".")
            part, _, rest = name.partition(".") if "." in name else ("", "", name)
            inner = rest
            want = expected["local"][inner] if not part else (expected[part] or {}).get(inner)
            if row["rule"] is None:
                want = None if want is None else factor * want
                got = p.grad
            else:
                assert p.grad is None
                got = (old[name] - p.detach()) / RATE
            if want is None:
                assert got is None or not got.any(), name
            else:
                close(got, want, 1e-11)
        ended = ENDS[k] if row["ends"] else torch.zeros(BATCH, dtype=torch.bool)
        expected_start = tuple(t.masked_fill(ended[:, None], 0.0) for t in expected["end"])
        before = False if context is None else context


# ---------------------------------------------------------------------------------------------
# Which states are cut, and where M learns


def summed(module, *windows):
    """Each window's own loss, one backward each."""
    for k, (output, state) in enumerate(windows):
        loss_of(k, output, state).backward()


@backends
def test_the_entrance_is_cut(backend):
    """Nothing of a later window reaches an earlier one; its loss on its own state does."""
    module = lstm(INPUTS, HIDDEN, 2, backend=backend)
    plain = plain_of(module)
    x = double(STEPS, BATCH, INPUTS, grad=True)
    _, state = module(x)
    assert all(t.requires_grad and t.grad_fn is not None for t in state), "in the window's graph"
    later, _ = module(double(STEPS, BATCH, INPUTS), state)
    later.sum().backward()
    assert x.grad is None
    nn.init.zeros_(module.synthesizer.weight), nn.init.zeros_(module.synthesizer.bias)
    module(x)[1][0].square().sum().backward()
    y = x.detach().requires_grad_()
    plain(y)[1][0].square().sum().backward()
    close(x.grad, y.grad)


@backends
@pytest.mark.parametrize("kind", ["window", "cell"])
@pytest.mark.parametrize("rule", [None, fd.SGD(RATE)])
def test_a_state_that_is_never_continued_is_plain_training(backend, kind, rule):
    """A fresh synthesizer predicts zero, and one that is never asked is never trained."""
    torch.manual_seed(1)
    made = fd.FusedDNILSTMCell if kind == "cell" else fd.FusedDNILSTM
    module = made(INPUTS, HIDDEN, backend=backend, update=rule, dtype=torch.float64)
    plain = plain_of(module)
    optimizer = torch.optim.SGD(plain.parameters(), RATE)
    heads = copy.deepcopy(module.synthesizer.state_dict())
    for k in range(3):
        x = double(STEPS, BATCH, INPUTS)
        for net in (module, plain):
            net.zero_grad()
            if kind == "cell":
                state = None
                for step in x:
                    state = net(step, state)
                output = state[0]
                if net is module:
                    net.boundary(state)
            else:
                output, state = net(x)
            loss_of(k, output, state).backward()
        if rule is None:
            close(local_gradients(module), local_gradients(plain))
        else:
            optimizer.step()
            own = plain.state_dict()
            close({n: module.state_dict()[n] for n in own}, dict(own))
        assert all(g is None for g in grads(module.synthesizer))
    close(dict(module.synthesizer.state_dict()), dict(heads), 0)
    assert not module.statistics.any()


@backends
@pytest.mark.parametrize("kind", ["parameter", "nn.LSTM", "FusedDNILSTM"])
def test_a_state_from_elsewhere_gets_its_gradient(backend, kind):
    """A learned initial state, an encoder through a linear layer, another module's own state."""
    decoder = lstm(INPUTS, HIDDEN, 2, backend=backend)
    nn.init.zeros_(decoder.synthesizer.weight), nn.init.zeros_(decoder.synthesizer.bias)
    x, y = double(STEPS, BATCH, INPUTS), double(STEPS, BATCH, INPUTS)
    encoder = nn.LSTM(INPUTS, HIDDEN, 2, dtype=torch.float64)
    bridge = nn.Linear(HIDDEN, HIDDEN, dtype=torch.float64)
    learned = nn.Parameter(double(2, 1, HIDDEN))
    fused = fd.FusedDNILSTM.from_lstm(copy.deepcopy(encoder), backend=backend)
    found = []
    for net in (decoder, plain_of(decoder)):
        for part in (encoder, bridge, fused):
            part.zero_grad()
        learned.grad = None
        if kind == "parameter":
            state = (learned.expand(-1, BATCH, -1), learned.expand(-1, BATCH, -1))
        elif kind == "nn.LSTM":
            state = tuple(bridge(t) for t in encoder(x)[1])
        else:
            state = (fused if net is decoder else encoder)(x)[1]
        output, state = net(y, state)
        loss_of(0, output, state).backward()
        mine = fused if kind == "FusedDNILSTM" and net is decoder else encoder
        found.append([learned.grad, grads(bridge), local_gradients(mine), local_gradients(net)])
    close(*found)
    assert all(g is None for g in grads(decoder.synthesizer)), "nothing was predicted there"


@backends
@pytest.mark.parametrize("kind", ["window", "cell"])
@pytest.mark.parametrize("rule", [None, fd.SGD(RATE)])
def test_a_second_backward_through_a_window_is_an_error(backend, kind, rule):
    """A state that was used by a later loss too; nothing is updated by it."""
    module = (cell if kind == "cell" else lstm)(INPUTS, HIDDEN, update=rule, backend=backend)
    x = double(STEPS, BATCH, INPUTS)
    if kind == "cell":
        state = None
        for step in x:
            state = module(step, state)
        output = state[0]
    else:
        output, state = module(x)
    output.sum().backward(retain_graph=True)
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(RuntimeError, match="backward was run a second time"):
        state[1].sum().backward()
    close([p.detach() for p in module.parameters()], before, 0)


@backends
@pytest.mark.parametrize("auxiliary", [False, True])
def test_a_state_used_twice_gives_two_lessons(backend, auxiliary):
    """Two windows from one state: with a rule one update by the sum of what each would give."""
    x = double(3, STEPS, BATCH, INPUTS)
    found = []
    for which in ((1,), (2,), (1, 2)):
        for rule in (None, fd.SGD(RATE)):
            torch.manual_seed(1)
            module = lstm(INPUTS, HIDDEN, 2, auxiliary=auxiliary, update=rule, backend=backend)
            before = {n: p.detach().clone() for n, p in module.named_parameters()}
            with torch.no_grad():
                _, state = module(x[0])
            losses = [loss_of(k, *module(x[k], state)) for k in which]
            torch.stack(losses).sum().backward()
            found.append(
                {n: p.grad if rule is None else (before[n] - p.detach()) / RATE
                 for n, p in module.named_parameters()}
            )  # fmt: skip
            if rule is not None:
                assert [r.steps for _, r, _ in module.rules()] == [1, 1, 1][: 2 + auxiliary]
    first, first_rule, second, second_rule, both, both_rule = found
    total = {n: first[n] + second[n] for n in first}
    close(both, total, 1e-11)
    close(both_rule, total, 1e-11)
    close(first_rule, first, 1e-11), close(second_rule, second, 1e-11)


@backends
@pytest.mark.parametrize("kind", ["window", "cell"])
def test_backward_boundary(backend, kind):
    """The backward starts from the prediction alone; several modules' states at once."""
    modules = [(cell if kind == "cell" else lstm)(INPUTS, HIDDEN, backend=backend) for _ in "ab"]
    x, states, expected = double(STEPS, BATCH, INPUTS), [], []
    for module in modules:
        plain = plain_of(module)
        if kind == "cell":
            state = theirs = None
            for step in x:
                state, theirs = module(step, state), plain(step, theirs)
            module.boundary(state)
            theirs = tuple(t.unsqueeze(0) for t in theirs)
        else:
            _, state = module(x)
            _, theirs = plain(x)
        states.append(state)
        synthetic = prediction(module, [t.detach() for t in theirs]) / (STEPS * BATCH)
        (as_rows(theirs) * synthetic).sum().backward()
        expected.append(local_gradients(plain))
    fd.backward_boundary(states)
    close([local_gradients(m) for m in modules], expected)


def test_backward_boundary_without_a_graph():
    module = lstm(INPUTS, HIDDEN)
    _, state = module(double(STEPS, BATCH, INPUTS))
    with pytest.raises(RuntimeError, match="the state carries no graph"):
        fd.backward_boundary(tuple(t.detach() for t in state))
    with pytest.raises(RuntimeError, match="the state carries no graph"):
        fd.backward_boundary([])
    with pytest.raises(TypeError, match="state must be tensors in tuples or lists, got dict"):
        fd.backward_boundary({"state": state})


def test_a_boundary_needs_the_cells_own_state():
    module = cell(INPUTS, HIDDEN)
    h, c = module(double(BATCH, INPUTS))
    for state in ((h.detach(), c), (h * 1, c), (double(BATCH, HIDDEN), c)):
        with pytest.raises(RuntimeError, match="state was not made by this cell's last step"):
            module.boundary(state)
    other = cell(INPUTS, HIDDEN)
    with pytest.raises(RuntimeError, match="state was not made by this cell's last step"):
        other.boundary((h, c))


@backends
def test_a_boundary_changes_nothing_without_decoupling(backend):
    """Eval, no gradients, no synthesizer: the state itself, but for rows that end."""
    ended = torch.tensor([True, False, False])
    for module, grad in (
        (cell(INPUTS, HIDDEN, backend=backend).eval(), True),
        (cell(INPUTS, HIDDEN, backend=backend), False),
        (cell(INPUTS, HIDDEN, synthesizer=None, backend=backend), True),
    ):
        with torch.set_grad_enabled(grad):
            state = module(double(BATCH, INPUTS))
            close([*module.boundary(state)], [*state], 0)
            h, c = module.boundary(state, ended)
        assert not h[0].any() and not c[0].any()
        close([h[1:], c[1:]], [t[1:] for t in state], 0)


def test_cell_and_window_agree():
    """One stream through both: every gradient, M's and the auxiliary head's among them."""
    window = lstm(INPUTS, HIDDEN, auxiliary=True)
    single = cell(INPUTS, HIDDEN, auxiliary=True)
    own = window.state_dict()
    single.load_state_dict({n: own[n if "." in n else f"{n}_l0"] for n in single.state_dict()})
    x = double(len(ENDS), STEPS, BATCH, INPUTS)
    row = {"ends": True, "form": "window"}
    for module in (window, single):
        state = None
        for k, inputs in enumerate(x):
            output, end, state = run(module, row, k, inputs, state, None)
            loss_of(k, output, end).backward()
        row = {**row, "form": "cell"}
    theirs = {n.removesuffix("_l0"): p.grad for n, p in window.named_parameters()}
    close({n: p.grad for n, p in single.named_parameters()}, theirs)
    close(window.statistics, single.statistics)
    close(window.auxiliary_statistics, single.auxiliary_statistics)


@pytest.mark.parametrize("rule", [None, fd.Adam(0.03)])
def test_heads_really_learn(rule):
    """Of frozen layers, on a stream that repeats itself: both errors fall. The auxiliary head's,
    through M, changes what the recurrent weights get."""
    x, y = double(2, STEPS, BATCH, INPUTS), double(2, STEPS, BATCH, HIDDEN)
    gradients = []
    for auxiliary in (True, False):
        torch.manual_seed(1)
        module = fd.FusedDNILSTM(
            INPUTS, HIDDEN, auxiliary=auxiliary, update=rule, dtype=torch.float64
        )
        own = [p for n, p in module.named_parameters() if "." not in n]
        for p in own:
            p.requires_grad_(False)
        heads = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(heads, 0.03)
        errors, state = [], None
        for _ in range(150):
            module.statistics.zero_(), module.auxiliary_statistics.zero_()
            for inputs, target in zip(x, y, strict=True):
                optimizer.zero_grad()
                output, state = module(inputs, state)
                (output - target).square().mean().backward()
                optimizer.step()
            sums = (module.statistics, module.auxiliary_statistics)
            errors.append([float(s[3] / s[2]) for s in sums if s[4]])  # relative to the target
        assert len(errors[-1]) == 1 + auxiliary
        assert errors[0][0] > 0.5 and max(errors[-1]) < 0.3, "an untrained head explains nothing"
        for p in own:
            p.requires_grad_(True)
        module.update = None
        output, _ = module(x[0], state)
        (output - y[0]).square().mean().backward()
        gradients.append(module.weight_hh_l0.grad)
    gap = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert gap > 1e-3


# ---------------------------------------------------------------------------------------------
# Diagnostics


@backends
@pytest.mark.parametrize(("form", "layers"), [("steps first", 1), ("steps first", 2), ("cell", 1)])
@pytest.mark.parametrize("rule", [None, fd.SGD(RATE)])
@pytest.mark.parametrize("ends", [None, ENDS])
def test_true_gradient_of_the_future(backend, form, layers, rule, ends):
    """Against autograd through nn.LSTM; with what it finds as context, a cosine of one. Nothing is
    changed by it."""
    plain = (
        nn.LSTMCell(INPUTS, HIDDEN, dtype=torch.float64)
        if form == "cell"
        else nn.LSTM(INPUTS, HIDDEN, layers, dtype=torch.float64)
    )
    module = oracle(copy.deepcopy(plain), update=rule, backend=backend)
    module.target_scale = None  # by the steps of each window
    x = double(len(ENDS), STEPS, BATCH, INPUTS)
    loss, handed = through_nn_lstm(plain, x, ends, None, None, on_state=False)
    loss.backward()
    future = [state_grad(state) * STEPS * BATCH for state in handed]
    off = double(*future[0].shape)

    def closure(error=0.0):
        context = [g + error * off for g in future]
        return sum(through_windows(module, form, x, ends, None, None, context, lambda s: s, False))

    before = twins.snapshot(module)
    found = fd.diagnostics(module, closure)[""]
    assert found["true_cosine"] == pytest.approx(1.0, abs=1e-12)
    assert found["true_norm_ratio"] == pytest.approx(1.0, abs=1e-12)
    found = fd.diagnostics(module, lambda: closure(10.0))[""]
    s, g = [], []
    for k in range(len(ENDS) - 1):
        alive = torch.ones(BATCH, dtype=torch.bool) if ends is None else ~ends[k]
        s.append(((future[k] + 10.0 * off) * alive[:, None]).flatten())
        g.append(future[k].flatten())
    s, g = torch.cat(s), torch.cat(g)
    cosine = float(s @ g / (s.norm() * g.norm()))
    assert abs(cosine) < 0.99 and found["true_cosine"] == pytest.approx(cosine, abs=1e-12)
    assert found["true_norm_ratio"] == pytest.approx(float(s.norm() / g.norm()))
    twins.unchanged(before, twins.snapshot(module))


@backends
def test_statistics(backend):
    """Cosine, ratio and loss of what M learned from, by hand."""
    module = lstm(INPUTS, HIDDEN, backend=backend)
    plain, x = plain_of(module), double(2, STEPS, BATCH, INPUTS)
    _, state = module(x[0])
    start = tuple(t.detach().clone().requires_grad_() for t in state)
    output, end = plain(x[1], start)
    kappa = STEPS * BATCH
    synthetic = prediction(module, [t.detach() for t in end]) / kappa
    ((as_rows(end) * synthetic).sum() + output.square().sum()).backward()
    target, s = kappa * state_grad(start), prediction(module, [t.detach() for t in start])
    output, _ = module(x[1], state)
    output.square().sum().backward()
    found = fd.diagnostics(module, reset=True)[""]
    assert found["targets"] == BATCH
    assert found["cosine"] == pytest.approx(float((s * target).sum() / s.norm() / target.norm()))
    assert found["norm_ratio"] == pytest.approx(float(s.norm() / target.norm()))
    assert found["synthesizer_loss"] == pytest.approx(float((s - target).square().sum() / BATCH))
    assert fd.diagnostics(module)[""]["targets"] == 0


@backends
def test_statistics_of_the_auxiliary_head(backend):
    """Its cosine and ratio against the synthetic gradient at the exit, by hand."""
    module = lstm(INPUTS, HIDDEN, auxiliary=True, backend=backend)
    with torch.no_grad():
        for p in (*module.synthesizer.parameters(), *module.auxiliary_head.parameters()):
            p.normal_()
    x = double(2, STEPS, BATCH, INPUTS)
    _, start = module(x[0])
    output, end = module(x[1], start)
    made = module.auxiliary_head(as_rows([t.detach() for t in start]), None).detach()
    target = prediction(module, [t.detach() for t in end])
    output.square().sum().backward()
    found = fd.diagnostics(module, reset=True)[""]
    cosine = float((made * target).sum() / made.norm() / target.norm())
    assert found["auxiliary_cosine"] == pytest.approx(cosine)
    assert found["auxiliary_norm_ratio"] == pytest.approx(float(made.norm() / target.norm()))
    assert math.isnan(fd.diagnostics(module)[""]["auxiliary_cosine"])


@backends
def test_context_from_the_surroundings(backend):
    """``condition_on`` reaches the module in training and in a probe; eval needs none."""
    module = lstm(INPUTS, HIDDEN, context_features=3, backend=backend)
    twin = copy.deepcopy(module)
    x, labels = double(2, STEPS, BATCH, INPUTS), torch.tensor([0, 2, 1])

    def closure(m=module):
        state, loss = None, 0.0
        for inputs in x:
            output, state = m(inputs, state)
            loss = loss + output.square().sum()
        return loss

    with fd.condition_on(labels):
        closure().backward()
        found = fd.diagnostics(module, closure)[""]
    state, loss = None, 0.0
    for inputs in x:
        output, state = twin(inputs, state, context=labels)
        loss = loss + output.square().sum()
    loss.backward()
    close(dict(grads_of(module)), dict(grads_of(twin)))
    assert -1.0 <= found["true_cosine"] <= 1.0
    with pytest.raises(ValueError, match="context is missing"):
        module(x[0])
    module.eval()(x[0])


def grads_of(module):
    return {n: p.grad for n, p in module.named_parameters()}
