"""The two ends of a window: with a perfect synthesizer windows are backprop through the whole
sequence; otherwise every gradient equals what the formulas give, by autograd on ``nn.LSTM``."""

from __future__ import annotations

import copy

import pytest
import torch
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

pytestmark = pytest.mark.usefixtures("one_thread")
backends = pytest.mark.parametrize("backend", BACKENDS)
STEPS, BATCH, INPUTS, HIDDEN = 4, 3, 2, 5
RATE = 0.1
# Rows that end with each window of a stream of four; the last one's end is everybody's.
ENDS = torch.tensor([[False, True, False], [False] * 3, [True, True, False], [True] * 3])
LENGTHS = torch.tensor([[4, 2, 3], [1, 4, 4], [3, 3, 1], [2, 4, 4]])


def loss_of(k, output, state):
    """Different for every window, on the output and on the state."""
    generator = torch.Generator().manual_seed(k)

    def weight(t):
        return torch.randn(t.shape, dtype=t.dtype, generator=generator)

    return (
        output.square().sum()
        + (output * weight(output)).sum()
        + (state[0] * weight(state[0])).sum()
        + state[1].square().sum()
    )


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
        or (row["form"] == "cell" and row["state"] != "as returned")
    )


def exact_rows():
    """Every two options that go together meet: a table for each form."""
    out = []
    for form in EXACT["form"]:
        narrowed = {**EXACT, "form": (form,)}
        narrowed["layers"] = (1,) if form == "cell" else EXACT["layers"]
        narrowed["state"] = EXACT["state"][:1] if form == "cell" else EXACT["state"]
        narrowed["lengths"] = {"cell": (False,), "unbatched": (False,), "packed": (True,)}.get(
            form, EXACT["lengths"]
        )
        out += pairwise(narrowed)
    assert all(map(fitting, out))
    return out


def through_nn_lstm(plain, x, ends, lengths, state):
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
        loss = loss + loss_of(k, output, state)
        state = recorded(state)
        handed.append(state)
        if ends is not None:
            state = tuple(t * ~ends[k][None, :, None] for t in state)
    return loss, handed


def through_windows(module, form, x, ends, lengths, state, future, treat):
    """The same window by window, with the future's gradient as context; losses."""
    losses = []
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
        losses.append(loss_of(k, output, end))
        if form != "cell":
            state = treat(state)
        yield losses[-1]


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
    options = {n: row[n] for n in ("auxiliary", "target_scale", "sg_scale", "max_norm")}
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
        if k == 0 and start is not None and row["form"] == "window" and context is None:
            before = False  # a state from elsewhere that is no graph's: M is asked there too
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
