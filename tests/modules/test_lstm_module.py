"""``FusedDNILSTM`` and its cell against ``nn.LSTM`` and ``nn.LSTMCell``, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from lstm_twins import (
    BACKENDS,
    cell,
    close,
    double,
    local_gradients,
    lstm,
    plain_of,
    random_state,
)
from strategies import pairwise
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fused_dni as fd
from fused_dni.ops import registry

pytestmark = [pytest.mark.slow(40), pytest.mark.usefixtures("one_thread")]
backends = pytest.mark.parametrize("backend", BACKENDS)
STEPS, BATCH, INPUTS, HIDDEN = 5, 3, 4, 6
LENGTHS = torch.tensor([3, 5, 1])

# Ways to be nn.LSTM: without a synthesizer in training, with any in eval.
MODES = {
    "exact": ({"synthesizer": None}, True),
    "exact eval": ({"synthesizer": None}, False),
    "default eval": ({}, False),
    "auxiliary eval": ({"auxiliary": True}, False),
    "mlp eval": ({"synthesizer": "mlp"}, False),
    "rule eval": ({"update": fd.Adam(0.1)}, False),
}
OPTIONS = {
    "mode": tuple(MODES),
    "layers": (1, 2, 3),
    "bias": (True, False),
    "batch_first": (True, False),
    "form": ("batched", "unbatched", "packed", "sorted", "lengths"),
    "state": (True, False),
    "losses": ("output state", "output", "h", "c"),
}


def made(mode, layers=1, **options):
    given, training = MODES[mode]
    if given.get("synthesizer") == "mlp":
        given = {"synthesizer": fd.MLPSynthesizer(2 * layers * HIDDEN, 4, dtype=torch.float64)}
    return lstm(INPUTS, HIDDEN, layers, **given, **options).train(training)


def feed(form, x, batch_first):
    """x [T, B, I] as both modules take it: the input, and the lengths if they are apart."""
    if form == "unbatched":
        return x[:, 0], None
    if form in ("packed", "sorted"):
        lengths = LENGTHS.sort(descending=True).values if form == "sorted" else LENGTHS
        given = x.transpose(0, 1) if batch_first else x
        return pack_padded_sequence(given, lengths, batch_first, form == "sorted"), None
    return (x.transpose(0, 1) if batch_first else x), LENGTHS if form == "lengths" else None


def run_plain(module, given, state, lengths, batch_first):
    if lengths is None:
        return module(given, state)
    packed = pack_padded_sequence(given, lengths, batch_first, enforce_sorted=False)
    output, state = module(packed, state)
    return pad_packed_sequence(output, batch_first, total_length=STEPS)[0], state


@backends
@pytest.mark.parametrize(
    "row", pairwise(OPTIONS), ids=lambda row: "-".join(str(v) for v in row.values())
)
def test_equals_nn_lstm(backend, row):
    """Outputs, states and all gradients; losses on any of them."""
    options = {name: row[name] for name in ("bias", "batch_first")}
    module = made(row["mode"], row["layers"], backend=backend, **options)
    plain = plain_of(module)
    x = double(STEPS, BATCH, INPUTS)
    state = random_state(row["layers"], BATCH, HIDDEN) if row["state"] else None
    if state is not None and row["form"] == "unbatched":
        state = tuple(t[:, 0].contiguous() for t in state)
    found = []
    for net in (module, plain):
        mine = x.clone().requires_grad_()
        start = None if state is None else tuple(t.clone().requires_grad_() for t in state)
        given, lengths = feed(row["form"], mine, row["batch_first"])
        if net is plain:
            output, end = run_plain(net, given, start, lengths, row["batch_first"])
        else:
            output, end = net(given, start, lengths=lengths)
        if isinstance(output, PackedSequence):
            close(output.batch_sizes, given.batch_sizes)
            assert (output.sorted_indices is None) == (row["form"] == "sorted")
            output = output.data
        torch.manual_seed(1)
        loss = 0.0
        if "output" in row["losses"]:
            loss = loss + (output * double(*output.shape)).sum()
        for name, t in (("h", end[0]), ("c", end[1])):
            weight = double(*t.shape)
            if name in row["losses"].split() or "state" in row["losses"]:
                loss = loss + (t * weight).sum()
        loss.backward()
        found.append(
            {
                "output": output.detach(),
                "h": end[0].detach(),
                "c": end[1].detach(),
                "dx": mine.grad,
                "state": None if start is None else [t.grad for t in start],
                **local_gradients(net),
            }
        )
    mine, theirs = found
    assert mine.keys() == theirs.keys()
    for name in theirs:
        if mine[name] is None or theirs[name] is None:  # nothing arrived there
            there = theirs[name] if mine[name] is None else mine[name]
            assert there is None or not any(
                t is not None and t.any() for t in (there if isinstance(there, list) else [there])
            ), name
        else:
            close(mine[name], theirs[name])


@backends
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("unbatched", [True, False])
@pytest.mark.parametrize("state", [True, False])
def test_cell_equals_nn_lstm_cell(backend, grad, bias, unbatched, state):
    module = cell(INPUTS, HIDDEN, bias, synthesizer=None if grad else "default", backend=backend)
    plain = plain_of(module)
    lead = () if unbatched else (BATCH,)
    x = double(STEPS, *lead, INPUTS)
    start = (double(*lead, HIDDEN), double(*lead, HIDDEN)) if state else None
    found = []
    for net in (module, plain):
        mine = x.clone().requires_grad_()
        first = None if start is None else tuple(t.clone().requires_grad_() for t in start)
        hx, loss = first, 0.0
        torch.manual_seed(1)
        with torch.set_grad_enabled(grad):
            for step in mine:
                hx = net(step, hx)
                loss = loss + (hx[0] * double(*hx[0].shape)).sum()
            loss = loss + (hx[1] * double(*hx[1].shape)).sum()
        if grad:
            loss.backward()
        found.append(
            [*(t.detach() for t in hx), mine.grad, [t.grad for t in first or ()],
             local_gradients(net)]
        )  # fmt: skip
    close(*found)


@backends
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(backend, layers, lengths, bias):
    """By differences, to input, state and parameters."""
    module = lstm(2, 3, layers, bias, synthesizer=None, backend=backend)
    names = list(dict(module.named_parameters()))
    x, state = double(3, 3, 2, grad=True), random_state(layers, 3, 3, grad=True)
    lengths = None if lengths is None else lengths.clamp(max=3)

    def f(x, h, c, *parameters):
        given = dict(zip(names, parameters, strict=True))
        output, (h, c) = torch.func.functional_call(
            module, given, (x, (h, c)), {"lengths": lengths}
        )
        return output, h, c

    assert torch.autograd.gradcheck(f, (x, *state, *module.parameters()))


@backends
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_of_the_cell(backend, bias):
    module = cell(2, 3, bias, synthesizer=None, backend=backend)
    names = list(dict(module.named_parameters()))

    def f(x, h, c, *parameters):
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(module, given, (x, (h, c)))

    given = (double(4, 2, grad=True), double(4, 3, grad=True), double(4, 3, grad=True))
    assert torch.autograd.gradcheck(f, (*given, *module.parameters()))


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(backend, dtype):
    """Against float64 from the same bits: a few roundings of each of the window's operations."""
    module = fd.FusedDNILSTM(INPUTS, HIDDEN, synthesizer=None, backend=backend, dtype=dtype)
    wide = copy.deepcopy(module).double()
    wide.backend = "reference"
    x = torch.randn(STEPS, BATCH, INPUTS, dtype=dtype)
    if registry.get(backend).why_not(x[0], module.weight_ih_l0) is not None:
        with pytest.raises(RuntimeError, match="cannot serve this call"):
            module(x)
        return
    output, _ = module(x)
    expected, _ = wide(x.double())
    assert output.dtype == dtype
    output.sum().backward()
    expected.sum().backward()
    eps = torch.finfo(dtype).eps
    # |h| <= 1; each step rounds z (a sum of I + H + 2 terms), four gates, c and h.
    room = 4 * STEPS * (INPUTS + HIDDEN) ** 0.5 * eps
    torch.testing.assert_close(output.double(), expected, rtol=room, atol=room)
    for p, q in zip(module.parameters(), wide.parameters(), strict=True):
        room = 16 * STEPS * (INPUTS + HIDDEN) ** 0.5 * eps * float(q.grad.abs().max())
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=0, atol=room)


@backends
@pytest.mark.parametrize("batch_first", [True, False])
def test_dropout_draws_as_nn_lstm(backend, batch_first):
    """The same masks from the same seed; none in eval."""
    module = lstm(INPUTS, HIDDEN, 3, True, batch_first, 0.5, synthesizer=None, backend=backend)
    plain = plain_of(module)
    x = double(STEPS, BATCH, INPUTS)
    outputs = []
    for net in (module, plain):
        torch.manual_seed(2)
        outputs.append(net(x)[0])
        outputs[-1].square().sum().backward()
    if not batch_first:
        close(*outputs)
        close(local_gradients(module), local_gradients(plain))
    assert not torch.equal(module(x)[0], module(x)[0])
    module.eval(), plain.eval()
    close(module(x)[0], plain(x)[0])


@backends
def test_dropout_is_applied_between_layers(backend):
    """Everything dropped: the second layer sees zeros, the first is not drowned."""
    module = lstm(INPUTS, HIDDEN, 2, dropout=1.0, synthesizer=None, backend=backend)
    above = nn.LSTM(HIDDEN, HIDDEN, dtype=torch.float64)
    for name, p in above.named_parameters():
        p.data.copy_(getattr(module, name.replace("l0", "l1")))
    output, (h, _) = module(double(STEPS, BATCH, INPUTS))
    expected, _ = above(torch.zeros(STEPS, BATCH, HIDDEN, dtype=torch.float64))
    close(output, expected)
    assert h[0].any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("proj_size", [0, 2])
@pytest.mark.parametrize("form", ["batched", "unbatched", "packed"])
def test_bidirectional_and_projections(training, bidirectional, proj_size, form):
    """Without a synthesizer: nn.LSTM itself."""
    if not bidirectional and not proj_size:
        return
    options = {"bidirectional": bidirectional, "proj_size": proj_size}
    module = lstm(INPUTS, HIDDEN, 2, synthesizer=None, **options).train(training)
    plain = plain_of(module)
    assert list(module.state_dict()) == list(plain.state_dict())
    given, _ = feed(form, double(STEPS, BATCH, INPUTS), False)
    results = []
    for net in (module, plain):
        output, (h, c) = net(given)
        output = output.data if form == "packed" else output
        (output.square().sum() + (h * 2).sum() + c.sum()).backward()
        results.append([output, h, c, local_gradients(net)])
    close(*results, 0)
    assert [len(w) for w in module.all_weights] == [len(w) for w in plain.all_weights]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"bidirectional": True},
            "needs synthesizer=None: a truncated stream has no right-to-left",
        ),
        ({"proj_size": 2}, "proj_size=2 needs synthesizer=None"),
        ({"bidirectional": True, "synthesizer": None, "update": fd.SGD(0.1)}, "update and backend"),
        ({"proj_size": 2, "synthesizer": None, "backend": "reference"}, "update and backend"),
    ],
)
def test_no_decoupled_form(options, message):
    with pytest.raises(ValueError, match=message):
        fd.FusedDNILSTM(INPUTS, HIDDEN, **options)


@pytest.mark.parametrize(
    "arguments",
    [{"end_of_sequence": torch.tensor([True] * 3)}, {"lengths": LENGTHS}, {"context": LENGTHS}],
)
def test_no_decoupled_arguments(arguments):
    module = fd.FusedDNILSTM(INPUTS, HIDDEN, bidirectional=True, synthesizer=None)
    with pytest.raises(ValueError, match="have no meaning with bidirectional=True"):
        module(torch.randn(STEPS, BATCH, INPUTS), **arguments)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_parameters_as_nn_lstm(layers, bias):
    """Names, order, shapes and initialisation; the heads come behind."""
    torch.manual_seed(3)
    plain = nn.LSTM(INPUTS, HIDDEN, layers, bias)
    torch.manual_seed(3)
    module = fd.FusedDNILSTM(INPUTS, HIDDEN, layers, bias, auxiliary=True, update=fd.SGD(0.1))
    own = [n for n in module.state_dict() if "." not in n]
    assert own == list(plain.state_dict())
    close({n: module.state_dict()[n] for n in own}, dict(plain.state_dict()), 0)
    heads = [n.split(".")[0] for n in module.state_dict()][len(own) :]
    assert list(dict.fromkeys(heads)) == ["synthesizer", "auxiliary_head"]
    torch.manual_seed(3)
    single = fd.FusedDNILSTMCell(INPUTS, HIDDEN, bias, auxiliary=True)
    torch.manual_seed(3)
    stock = nn.LSTMCell(INPUTS, HIDDEN, bias)
    own = [n for n in single.state_dict() if "." not in n]
    close({n: single.state_dict()[n] for n in own}, dict(stock.state_dict()), 0)


def test_other_methods_of_nn_lstm():
    module = lstm(INPUTS, HIDDEN, 2)
    plain = plain_of(module)
    module.flatten_parameters()
    assert [[id(p) for p in w] for w in module.all_weights] == [
        [id(getattr(module, f"{n}_l{k}")) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        for k in range(2)
    ]
    assert [len(w) for w in module.all_weights] == [len(w) for w in plain.all_weights]
    assert repr(fd.FusedDNILSTM(3, 4, 2, batch_first=True, update=fd.SGD(0.1))).startswith(
        "FusedDNILSTM(\n  3, 4, num_layers=2, batch_first=True, update=SGD("
    )
    assert repr(fd.FusedDNILSTMCell(3, 4, False, synthesizer=None, update=fd.SGD(0.1))).startswith(
        "FusedDNILSTMCell(\n  3, 4, bias=False, update=SGD("
    )


@backends
@pytest.mark.parametrize("rule", [None, fd.Adam(0.1)])
def test_nothing_changes_in_eval_and_without_gradients(backend, rule):
    """Not the heads, the statistics, nor the state that is handed on."""
    module = lstm(INPUTS, HIDDEN, 2, auxiliary=True, update=rule, backend=backend)
    plain, x = plain_of(module), double(STEPS, BATCH, INPUTS)
    before = copy.deepcopy(module.state_dict())
    for training, grad in ((False, True), (False, False), (True, False)):
        module.train(training)
        with torch.set_grad_enabled(grad):
            state = theirs = None
            for _ in range(3):
                output, state = module(x, state)
                expected, theirs = plain(x, theirs)
            close([output, *state], [expected, *theirs])
        if grad:
            output.sum().backward()
            expected.sum().backward()
            close(local_gradients(module), local_gradients(plain))
    close(dict(module.state_dict()), dict(before), 0)
    assert not module.statistics.any()


@backends
def test_exact_windows_are_not_cut(backend):
    """Without a synthesizer the graph goes on through the state, as with nn.LSTM, and a graph that
    was kept may be used again."""
    module = lstm(INPUTS, HIDDEN, 2, synthesizer=None, backend=backend)
    plain, x = plain_of(module), double(3, STEPS, BATCH, INPUTS)
    losses = []
    for net in (module, plain):
        state, loss = None, 0.0
        for window in x:
            output, state = net(window, state)
            loss = loss + output.square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        losses.append(loss)
    close(*losses)
    close(local_gradients(module), local_gradients(plain))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        losses[0].backward()


@backends
@pytest.mark.parametrize("hidden", [1, 2])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("batch", [1, 2])
def test_smallest_sizes(backend, hidden, steps, batch):
    module = lstm(1, hidden, backend=backend)
    assert module.synthesizer.down.shape[0] <= 2 * hidden
    module.eval()
    plain, x = plain_of(module), double(steps, batch, 1)
    close([*module(x)[1]], [*plain(x)[1]])
    module.train()
    state = None
    for _ in range(3):
        output, state = module(x, state)
        output.mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


@backends
def test_inputs_that_are_not_contiguous(backend):
    module = lstm(INPUTS, HIDDEN, 2, synthesizer=None, backend=backend)
    plain = plain_of(module)
    x = double(BATCH, INPUTS, STEPS).permute(2, 0, 1)
    state = tuple(double(BATCH, 2, HIDDEN).transpose(0, 1) for _ in "hc")
    results = []
    for net in (module, plain):
        output, end = net(x, state)
        output.backward(torch.ones(1, 1, 1, dtype=torch.float64).expand_as(output))
        results.append([output, *end, local_gradients(net)])
    close(*results)


@backends
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("packed", [True, False])
def test_padding_has_no_influence(backend, value, packed):
    """Whatever lies behind a row's length, nothing of it is seen in a result or a gradient."""
    module = lstm(INPUTS, HIDDEN, 2, backend=backend)
    x = double(STEPS, BATCH, INPUTS)
    behind = torch.arange(STEPS)[:, None] >= LENGTHS
    results = []
    for fill in (0.0, value):
        module.zero_grad()
        mine = x.masked_fill(behind[:, :, None], fill).requires_grad_()
        output, state = module(mine, lengths=LENGTHS)
        output.square().sum().backward()
        assert not mine.grad[behind].any() and not output[behind].any()
        results.append([output, *state, mine.grad.clone(), local_gradients(module)])
        results[-1] = copy.deepcopy(
            [t.detach() if isinstance(t, torch.Tensor) else t for t in results[-1]]
        )
    close(*results, 0)


@backends
def test_bits_repeat(backend):
    module = lstm(INPUTS, HIDDEN, 2, auxiliary=True, backend=backend)
    x = double(4, STEPS, BATCH, INPUTS)
    results = []
    for net in (copy.deepcopy(module), copy.deepcopy(module)):
        state = None
        for window in x:
            output, state = net(window, state)
            output.square().mean().backward()
        results.append({n: p.grad for n, p in net.named_parameters()})
    close(*results, 0)
