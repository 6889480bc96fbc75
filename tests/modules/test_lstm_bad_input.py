"""Bad input to recurrent modules: the right result, or a clear error that names the argument, what
was given and what is allowed, and nothing changed by it."""

from __future__ import annotations

import math

import pytest
import torch
import twins
from lstm_twins import BACKENDS, cell, close, double, lstm, plain_of, random_state
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fused_dni as fd

pytestmark = pytest.mark.usefixtures("one_thread")
backends = pytest.mark.parametrize("backend", BACKENDS)
STEPS, BATCH, INPUTS, HIDDEN, LAYERS = 4, 3, 2, 5, 2
KINDS = {
    "returned": {"auxiliary": True},
    "rule": {"auxiliary": True, "update": fd.Adam(0.1)},
    "exact": {"synthesizer": None},
    "exact rule": {"synthesizer": None, "update": fd.Adam(0.1)},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def module_of(kind, backend=None, **options):
    module = lstm(INPUTS, HIDDEN, LAYERS, backend=backend, **KINDS[kind], **options)
    module(double(STEPS, BATCH, INPUTS))[0].sum().backward()  # there is state to be kept
    return module


def cell_of(kind, backend=None):
    module = cell(INPUTS, HIDDEN, backend=backend, **KINDS[kind])
    module(double(BATCH, INPUTS))[0].sum().backward()
    return module


def refused(module, error, message, *inputs, phases=(False, True), **named):
    """In training and in eval, and nothing is changed."""
    before = twins.snapshot(module)
    for training in phases:
        module.train(training)
        with pytest.raises(error, match=message):
            module(*inputs, **named)
    twins.unchanged(before, twins.snapshot(module))


X = double(STEPS, BATCH, INPUTS)
INPUT = {
    "width": (double(STEPS, BATCH, 3), RuntimeError, r"input must have 2 features \(input_size\)"),
    "1 dimension": (double(INPUTS), ValueError, r"input must have 2 or 3 dimensions, got \[2\]"),
    "4 dimensions": (double(1, 1, 1, 2), ValueError, "input must have 2 or 3 dimensions"),
    "dtype": (X.float(), ValueError, "input has dtype torch.float32, the weights torch.float64"),
    "integers": (X.long(), ValueError, "input has dtype torch.int64"),
    "device": (X.to("meta"), RuntimeError, "input is on meta, the weights on cpu"),
    "list": (
        [[[0.0] * 2]],
        TypeError,
        "input must be a torch.Tensor.*, got list",
    ),
    "no steps": (double(0, BATCH, INPUTS), RuntimeError, r"input must not be empty, got \[0, 3, 2"),
    "no rows": (double(STEPS, 0, INPUTS), RuntimeError, r"input must not be empty, got \[4, 0, 2"),
}


@kinds
@pytest.mark.parametrize("case", INPUT)
def test_input(kind, case):
    x, error, message = INPUT[case]
    # In eval nn.LSTM takes no rows, and refuses no steps in words of its own.
    phases = (True,) if case in ("no steps", "no rows") else (False, True)
    refused(module_of(kind), error, message, x, phases=phases)
    if case not in ("4 dimensions", "no steps", "no rows", "1 dimension"):
        x = x[0] if case != "list" else x
        if error is ValueError:  # as of nn.LSTM, and not of nn.LSTMCell
            error = RuntimeError
        refused(cell_of(kind), error, message, x)


@pytest.mark.parametrize("x", [X.float(), X.long()], ids=["float32", "integers"])
def test_autocast_casts_neither_float64_nor_integers(x):
    """As PyTorch's modules under it."""
    wide, narrow = fd.FusedDNILSTM(INPUTS, HIDDEN).double(), fd.FusedDNILSTM(INPUTS, HIDDEN)
    with torch.autocast("cpu", torch.bfloat16):
        assert wide(X)[0].dtype == torch.float64
        for module, given in ((wide, x), (narrow, X), (narrow, x.long())):
            with pytest.raises(ValueError, match=f"input has dtype {given.dtype}, the weights"):
                module(given)


def test_input_of_the_cell():
    module = cell_of("rule")
    refused(module, ValueError, r"input must have 1 or 2 dimensions, got \[4, 3, 2\]", X)
    empty = r"input must not be empty, got \[0, 2\]"
    refused(module, RuntimeError, empty, X[0, :0], phases=(True,))


def state(layers=LAYERS, batch=BATCH, hidden=HIDDEN):
    return random_state(layers, batch, hidden)


H, C = state()
STATES = {
    "batch": (state(batch=2), RuntimeError, r"h in hx must have shape \[2, 3, 5\] for this input"),
    "layers": (state(layers=1), RuntimeError, r"h in hx must have shape .*got \[1, 3, 5\]"),
    "hidden": ((H, C[..., :4]), RuntimeError, r"c in hx must have shape .*got \[2, 3, 4\]"),
    "unbatched": ((H[:, 0], C[:, 0]), RuntimeError, r"h in hx must have shape .*got \[2, 5\]"),
    "dtype": ((H, C.float()), RuntimeError, "c in hx has dtype torch.float32, the input torch.flo"),
    "device": ((H.to("meta"), C), RuntimeError, "h in hx is on meta, the input on cpu"),
    "tensor": (H, TypeError, r"hx must be a tuple \(h, c\) of two tensors"),
    "one": ((H,), TypeError, r"hx must be a tuple \(h, c\) of two tensors"),
    "list": ((H, [0.0]), TypeError, "c in hx must be a torch.Tensor, got list"),
}


@kinds
@pytest.mark.parametrize("case", STATES)
def test_state(kind, case):
    given, error, message = STATES[case]
    refused(module_of(kind), error, message, X, given)


@kinds
def test_state_of_another_form(kind):
    """Of a batch for an unbatched input, and of the cell."""
    module = module_of(kind)
    message = r"h in hx must have shape \[2, 5\] for an unbatched input, got \[2, 3, 5\]"
    refused(module, RuntimeError, message, X[:, 0], (H, C))
    single = cell_of(kind)
    refused(single, RuntimeError, r"h in hx must have shape \[3, 5\]", X[0], (H[0, :2], C[0, :2]))
    refused(single, RuntimeError, r"for an unbatched input, got \[3, 5\]", X[0, 0], (H[0], C[0]))


@backends
@kinds
def test_a_batch_that_changes(backend, kind):
    """Without a mask: the old state does not fit; None and rows of the old one do."""
    module = module_of(kind, backend)
    _, old = module(X)
    refused(
        module, RuntimeError, r"h in hx must have shape \[2, 2, 5\].*got \[2, 3, 5\]", X[:, :2], old
    )
    module.eval()
    picked = tuple(t.detach()[:, :2] for t in old)
    close(module(X[:, :2], picked)[0], plain_of(module)(X[:, :2], picked)[0])
    close(module(X[:, :2])[0], plain_of(module)(X[:, :2])[0])


LENGTHS = {
    "list": ([4, 4, 4], TypeError, "lengths must be an int64 tensor .*got list"),
    "dtype": (torch.ones(3), TypeError, "lengths must be an int64 tensor .*got torch.float32"),
    "shape": (torch.tensor([4, 4]), RuntimeError, r"lengths must have shape \[3\], got \[2\]"),
    "zero": (torch.tensor([4, 0, 1]), RuntimeError, r"lengths must be in \[1, 4\] .*got 0"),
    "beyond": (torch.tensor([4, 5, 1]), RuntimeError, r"lengths must be in \[1, 4\] .*got 5"),
    "negative": (torch.tensor([4, -1, 1]), RuntimeError, r"lengths must be in \[1, 4\] .*got -1"),
}


@kinds
@pytest.mark.parametrize("case", LENGTHS)
def test_lengths(kind, case):
    given, error, message = LENGTHS[case]
    refused(module_of(kind), error, message, X, lengths=given)


@kinds
def test_lengths_of_a_packed_input(kind):
    packed = pack_padded_sequence(X, torch.tensor([4, 2, 1]))
    refused(
        module_of(kind), ValueError, "lengths belongs to the packed input", packed,
        lengths=torch.tensor([4, 2, 1]),
    )  # fmt: skip


MASKS = {
    "list": ([True] * 3, TypeError, "end_of_sequence must be a bool tensor .*got list"),
    "bool": (True, TypeError, "end_of_sequence must be a bool tensor .*got bool"),
    "dtype": (torch.ones(3), TypeError, "end_of_sequence must be a bool tensor .*torch.float32"),
    "shape": (torch.tensor([True]), RuntimeError, r"end_of_sequence must have shape \[3\], got"),
    "scalar": (
        torch.tensor(True),
        RuntimeError,
        r"end_of_sequence must have shape \[3\], got \[\]",
    ),
    "device": (torch.ones(3, dtype=torch.bool, device="meta"), RuntimeError, "is on meta, the inp"),
}


@kinds
@pytest.mark.parametrize("case", MASKS)
def test_masks(kind, case):
    given, error, message = MASKS[case]
    refused(module_of(kind), error, message, X, end_of_sequence=given)
    module = cell_of(kind)
    reached = module(X[0])
    before = twins.snapshot(module)
    with pytest.raises(error, match=message):
        module.boundary(reached, given)
    twins.unchanged(before, twins.snapshot(module))


@pytest.mark.parametrize("given", [True, [True]])
def test_masks_of_an_unbatched_input(given):
    refused(module_of("rule"), TypeError, "end_of_sequence must be a bool", X[:, 0],
            end_of_sequence=given)  # fmt: skip


@pytest.mark.parametrize("given", [(H[0], C[0], C[0]), (H[0],), H[0], None])
def test_states_of_a_boundary(given):
    module = cell_of("rule")
    with pytest.raises(TypeError, match=r"state must be a tuple \(h, c\) of two tensors"):
        module.boundary(given)


CONTEXTS = {
    "missing": (None, ValueError, "context is missing"),
    "class": (torch.tensor([0, 1, 3]), IndexError, "label 3 in context is out of range"),
    "shape": (torch.tensor([0, 1]), RuntimeError, r"context covers rows \[2\]"),
    "width": (double(BATCH, 2), RuntimeError, r"must have shape \[..., 3\]"),
    "dtype": (torch.ones(3, dtype=torch.bool), RuntimeError, "context must be class indices"),
}


@pytest.mark.parametrize("rule", [None, fd.SGD(0.1)])
@pytest.mark.parametrize("case", CONTEXTS)
def test_contexts(case, rule):
    given, error, message = CONTEXTS[case]
    for auxiliary in (False, True):
        module = lstm(INPUTS, HIDDEN, LAYERS, context_features=3, update=rule, auxiliary=auxiliary)
        before = twins.snapshot(module)
        with pytest.raises(error, match=message):
            module(X, context=given)
        twins.unchanged(before, twins.snapshot(module))
        single = cell(INPUTS, HIDDEN, context_features=3, update=rule, auxiliary=auxiliary)
        reached = single(X[0])
        with pytest.raises(error, match=message):
            single.boundary(reached, context=given)


def test_a_context_that_nobody_asked_for():
    refused(module_of("returned").train(), ValueError, "context is unexpected", X,
            context=torch.tensor([0, 1, 2]))  # fmt: skip


@backends
@kinds
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_state_that_is_not_finite(backend, kind, value):
    """As with nn.LSTM in the forward; a rule skips and counts."""
    module = module_of(kind, backend)
    h = H.clone()
    h[0, 1, 2] = value
    output, _ = module(X, (h, C))
    close(output[:, [0, 2]], plain_of(module)(X, (h, C))[0][:, [0, 2]])
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    output.sum().backward()
    if module.update is not None and math.isnan(value):
        assert module.skipped_updates == 1
        own = {n: p.detach() for n, p in module.named_parameters() if "." not in n}
        close(own, {n: before[n] for n in own}, 0)


# ---------------------------------------------------------------------------------------------
# Parameters that do not fit together


def _layer(module):
    module.weight_hh_l1.data = module.weight_hh_l1.data.float()


def _gaps(module):
    module.weight_hh_l1.data = module.weight_hh_l1.data.t().contiguous().t()


def _in_place(module):
    """Its address stays as it was."""
    module.weight_hh_l1.data = module.weight_hh_l1.data.view(HIDDEN, 4 * HIDDEN).t()


def _shape(module):
    module.bias_hh_l0.data = module.bias_hh_l0.data[:-1]


def _synthesizer(module):
    module.synthesizer.float()


def _head(module):
    module.auxiliary_head.float()


@backends
@kinds
@pytest.mark.parametrize("damage", [_layer, _gaps, _in_place, _shape, _synthesizer, _head])
def test_parameters_that_do_not_fit(backend, kind, damage):
    """Raw pointers must never be read as what they are not, behind a call that went well too."""
    module = module_of(kind, backend)
    if damage in (_synthesizer, _head) and module.synthesizer is None:
        return
    damage(module)
    before = twins.snapshot(module)
    with pytest.raises(RuntimeError, match="must be torch.float64 .*contiguous.* got"):
        module(X)
    twins.unchanged(before, twins.snapshot(module))


@backends
@kinds
def test_parameters_of_the_cell_that_do_not_fit(backend, kind):
    module = cell_of(kind, backend)
    module.weight_hh.data = module.weight_hh.data.view(HIDDEN, 4 * HIDDEN).t()
    with pytest.raises(RuntimeError, match="must be torch.float64 .*contiguous, got"):
        module(X[0])


def test_a_rule_needs_masters():
    module = fd.FusedDNILSTM(INPUTS, HIDDEN, update=fd.SGD(0.1), dtype=torch.bfloat16)
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises((TypeError, RuntimeError), match="float32"):
        module(X.bfloat16())[0].sum().backward()
    close([p.detach() for p in module.parameters()], before, 0)


@pytest.mark.parametrize("what", ["weight_ih_l0", "synthesizer.weight", "auxiliary_head.bias"])
def test_a_checkpoint_of_another_shape(what):
    module = module_of("rule")
    before = twins.snapshot(module)
    with pytest.raises(RuntimeError, match=f"size mismatch for {what}"):
        module.load_state_dict({what: double(3, 3)}, strict=False)
    twins.unchanged(before, twins.snapshot(module))


# ---------------------------------------------------------------------------------------------
# Arguments of the constructors


@pytest.mark.parametrize("make", [fd.FusedDNILSTM, fd.FusedDNILSTMCell])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_size": 0}, ValueError, "input_size must be at least 1, got 0"),
        ({"hidden_size": -3}, ValueError, "hidden_size must be at least 1, got -3"),
        ({"sg_scale": -1.0}, ValueError, "sg_scale must be finite and at least 0, got -1.0"),
        ({"sg_scale": math.nan}, ValueError, "sg_scale must be finite"),
        ({"backend": "cuda13"}, ValueError, "backend must be None or one of .*got 'cuda13'"),
        ({"synthesizer": "linear"}, ValueError, "synthesizer must be 'default', None or a module"),
        ({"synthesizer": 3}, TypeError, r"synthesizer must be None or an nn\.Module .*got 3"),
        ({"synthesizer": fd.LinearSynthesizer(7)}, ValueError, "synthesizer has features=7, the"),
        ({"synthesizer": None, "context_features": 3}, ValueError, "context_features belongs to"),
        ({"synthesizer": None, "auxiliary": True}, ValueError, "auxiliary=True predicts synthetic"),
        ({"context_features": -1}, ValueError, "context_features must be at least 0, got -1"),
        ({"update": torch.optim.SGD}, TypeError, "update must be None or a fused_dni rule"),
        ({"synthesizer_update": fd.SGD(0.1)}, ValueError, "synthesizer_update needs update"),
        ({"target_scale": 0.0}, ValueError, "target_scale must be None or positive and finite"),
        ({"max_norm": -1.0}, ValueError, "max_norm must be None or positive and finite"),
        ({"max_target_norm": 0.0}, ValueError, "max_target_norm must be None or positive and"),
    ],
    ids=str,
)
def test_arguments(make, arguments, error, message):
    with pytest.raises(error, match=message):
        make(**{"input_size": 2, "hidden_size": 3, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"dropout": 1.5}, r"dropout must be a number in \[0, 1\], got 1.5"),
        ({"proj_size": 3, "synthesizer": None}, "proj_size has to be smaller than hidden_size"),
        ({"proj_size": -1, "synthesizer": None}, "proj_size must be at least 0, got -1"),
    ],
    ids=str,
)
def test_arguments_of_the_window(arguments, message):
    with pytest.raises(ValueError, match=message):
        fd.FusedDNILSTM(2, 3, **arguments)


def test_a_backend_that_cannot_serve_is_no_silent_fallback():
    module = fd.FusedDNILSTM(2, 3, backend="cpu", dtype=torch.float16)
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot serve this call: it serves float"):
        module(torch.randn(4, 3, 2, dtype=torch.float16))


# ---------------------------------------------------------------------------------------------
# Odd, but right


@backends
@pytest.mark.parametrize("kind", ["returned", "exact"])
def test_a_state_as_the_input_of_another_module_gets_its_gradient(backend, kind):
    """And is the state of the next window all the same."""
    module = lstm(INPUTS, HIDDEN, backend=backend, **KINDS[kind])
    if module.synthesizer is not None:
        nn.init.zeros_(module.synthesizer.weight), nn.init.zeros_(module.synthesizer.bias)
    other = nn.LSTM(HIDDEN, HIDDEN, dtype=torch.float64)
    found = []
    for net in (module, plain_of(module)):
        x = X.clone().requires_grad_()
        _, (h, c) = net(x)
        (other(h)[0].square().sum() + other(c)[0].sum()).backward()
        own = [p.grad for n, p in net.named_parameters() if "." not in n]
        found.append([x.grad, *own, *net(X, (h.detach(), c.detach()))[1]])
    close(*found)


def test_a_state_changed_in_place_before_the_backward_is_an_error():
    """The synthesizer reads it there."""
    module = module_of("returned")
    output, (h, _) = module(X)
    with torch.no_grad():
        h[:, 0] = 0.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@backends
@kinds
def test_one_step_one_row_one_unit(backend, kind):
    module = lstm(1, 1, backend=backend, **KINDS[kind])
    plain = plain_of(module)
    x = double(1, 1, 1)
    output, reached = module(x)
    close(output, plain(x)[0])
    output.sum().backward()
    output, _ = module(x, tuple(t.detach() for t in reached))
    output.sum().backward()
    assert all(torch.isfinite(p).all() for p in module.parameters())


@pytest.mark.parametrize("kind", [fd.FusedDNILSTM, fd.FusedDNILSTMCell])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hidden_size": 4.5}, TypeError, "hidden_size must be a whole number of at least 1"),
        ({"sg_scale": "a"}, TypeError, "sg_scale must be a number, finite .* got 'a'"),
        ({"max_target_norm": "1"}, TypeError, "max_target_norm must be None or a number"),
        ({"bias": "no"}, TypeError, "bias must be True or False"),
        ({"auxiliary": "no"}, TypeError, "auxiliary must be True or False"),
        ({"context_features": -1}, ValueError, "context_features must be at least 0"),
        ({"dtype": torch.complex64}, ValueError, "dtype must be floating point"),
        ({"synthesizer": nn.Identity()}, TypeError, "synthesizer must take two arguments"),
    ],
    ids=str,
)
def test_arguments_of_another_kind(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        kind(**{"input_size": 2, "hidden_size": 3, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"proj_size": "a"}, "proj_size must be a whole number of at least 0, got 'a'"),
        ({"proj_size": True}, "proj_size must be a whole number of at least 0, got True"),
        ({"dropout": "a"}, r"dropout must be a number in \[0, 1\], got 'a'"),
        ({"dropout": True}, r"dropout must be a number in \[0, 1\], got True"),
        ({"dropout": False}, r"dropout must be a number in \[0, 1\], got False"),
        ({"bidirectional": "y"}, "bidirectional must be True or False, got 'y'"),
        ({"sg_scale": True}, "sg_scale must be a number, finite .* got True"),
    ],
    ids=str,
)
@pytest.mark.parametrize("synthesizer", ["default", None])
def test_arguments_of_another_kind_of_the_window(synthesizer, arguments, message):
    with pytest.raises(ValueError if "dropout" in arguments else TypeError, match=message):
        fd.FusedDNILSTM(2, 3, synthesizer=synthesizer, **arguments)


def test_options_that_are_set_later():
    lstm = fd.FusedDNILSTM(2, 3, sg_scale=0.5, max_target_norm=1.0)
    with pytest.raises(ValueError, match="sg_scale must be finite and at least 0, got -1"):
        lstm.sg_scale = -1
    with pytest.raises(ValueError, match="max_target_norm must be None or positive .* got 0"):
        lstm.max_target_norm = 0
    assert (lstm.sg_scale, lstm.max_target_norm) == (0.5, 1.0)


def test_a_sparse_input():
    with pytest.raises(RuntimeError, match="input must be a dense tensor .*sparse_coo"):
        fd.FusedDNILSTM(2, 3)(torch.ones(4, 1, 2).to_sparse())


@pytest.mark.parametrize("name", ["weight_hh_l0", "bias_ih_l0", "synthesizer.down"])
@pytest.mark.parametrize("rule", [None, fd.SGD(0.1)], ids=["returned", "rule"])
def test_a_parameter_that_moves_between_forward_and_backward(rule, name):
    """Kernels would read and write past its end."""
    module = fd.FusedDNILSTM(INPUTS, HIDDEN, update=rule)
    output, state = module(X.float())
    output.sum().backward()
    output, _ = module(X.float(), state)
    p = module.get_parameter(name)
    p.data = p.data.bfloat16()
    with pytest.raises((RuntimeError, TypeError), match="bfloat16"):
        output.sum().backward()


@pytest.mark.parametrize("kind", [fd.FusedDNILSTM, fd.FusedDNILSTMCell])
@pytest.mark.parametrize("training", [True, False])
def test_one_bias_alone_is_refused(kind, training):
    """It has to be said by bias=False."""
    module = kind(INPUTS, HIDDEN).train(training)
    setattr(module, next(n for n in module._parameters if n.startswith("bias_hh")), None)
    with pytest.raises(RuntimeError, match="bias_hh of layer 0 is None"):
        module(X.float()[0] if kind is fd.FusedDNILSTMCell else X.float())
