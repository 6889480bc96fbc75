"""What code out there does to ``nn.LSTM`` and ``nn.LSTMCell`` after construction works here, or is
refused by name. From PyTorch's torch/nn/modules/rnn.py, name by name."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from lstm_twins import cell, close, double, grads, lstm
from torch import nn
from torch.nn.utils import parametrize, prune

import fused_dni as fd

pytestmark = [pytest.mark.slow(20), pytest.mark.usefixtures("one_thread")]
STEPS, BATCH, INPUTS, HIDDEN = 4, 3, 2, 5
kinds = pytest.mark.parametrize("kind", ["window", "cell"])
FORMS = [
    {},
    {"bias": False},
    {"num_layers": 3, "dropout": 0.5, "batch_first": True},
    {"bidirectional": True, "num_layers": 2},
    {"proj_size": 2},
    {"bidirectional": True, "proj_size": 3, "bias": False},
]
forms = pytest.mark.parametrize("form", FORMS, ids=str)


def pair(kind, **options):
    """Ours without a synthesizer, and PyTorch's, with the same parameters."""
    if kind == "cell":
        stock = nn.LSTMCell(INPUTS, HIDDEN, **options)
        return fd.FusedDNILSTMCell.from_lstm_cell(copy.deepcopy(stock), synthesizer=None), stock
    stock = nn.LSTM(INPUTS, HIDDEN, **options)
    return fd.FusedDNILSTM.from_lstm(copy.deepcopy(stock), synthesizer=None), stock


def trained(kind, **options):
    """In the middle of training: with moments, statistics, and a state that is known."""
    options = {"auxiliary": True, "update": fd.Adam(0.01), **options}
    module = (cell if kind == "cell" else lstm)(INPUTS, HIDDEN, **options)
    advance(module, double(3, STEPS, BATCH, INPUTS))
    return module


def advance(module, x, state=None):
    for window in x:
        if isinstance(module, fd.FusedDNILSTMCell):
            for step in window:
                state = module(step, state)
            output, state = state[0], module.boundary(state)
        else:
            output, state = module(window, state)
        output.square().mean().backward()
    return state


# ---------------------------------------------------------------------------------------------
# PyTorch's own samples


def samples(name):
    pytest.importorskip("expecttest", reason="PyTorch's samples import it")
    from torch.testing._internal.common_modules import module_db

    (info,) = (m for m in module_db if m.module_cls.__name__ == name)
    for training in (True, False):
        yield from info.module_inputs_func(
            info, device="cpu", dtype=torch.float64, requires_grad=True, training=training
        )


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
@pytest.mark.filterwarnings("ignore")
def test_module_info(name):
    """Every sample of ``ModuleInfo``: outputs, and all gradients."""
    made = 0
    for sample in samples(name):
        given = sample.constructor_input
        stock = getattr(nn, name)(*given.args, **given.kwargs, dtype=torch.float64)
        take = fd.FusedDNILSTM.from_lstm if name == "LSTM" else fd.FusedDNILSTMCell.from_lstm_cell
        ours = take(copy.deepcopy(stock), synthesizer=None)
        ours_too = getattr(fd, f"FusedDNI{name}")(
            *given.args, **given.kwargs, dtype=torch.float64, synthesizer=None
        )
        assert list(ours_too.state_dict()) == list(stock.state_dict())
        results = []
        for net in (ours, stock):
            inputs = copy.deepcopy(sample.forward_input)
            out = net(*inputs.args, **inputs.kwargs)
            flat, _ = torch.utils._pytree.tree_flatten(out)
            sum(t.square().sum() for t in flat).backward()
            leaves, _ = torch.utils._pytree.tree_flatten((inputs.args, inputs.kwargs))
            results.append([*flat, *(t.grad for t in leaves), *grads(net)])
        close(*results)
        made += 1
    assert made >= 4


# ---------------------------------------------------------------------------------------------
# Parameters and their beginning


@forms
def test_reset_parameters_draws_as_nn_lstm(form):
    ours, stock = pair("window", **form)
    for net in (ours, stock):
        torch.manual_seed(5)
        net.reset_parameters()
    close(dict(ours.state_dict()), dict(stock.state_dict()), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(5)
        close(dict(nn.LSTM(INPUTS, HIDDEN, **form).state_dict()), dict(ours.state_dict()), 0)


class Own(nn.Module):
    """A synthesizer without a method of its own."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2 * HIDDEN, 2 * HIDDEN, dtype=torch.float64)

    def forward(self, rows, context):
        return self.inner(rows)


SYNTHESIZERS = {
    "default": lambda: "default",
    "mlp": lambda: fd.MLPSynthesizer(2 * HIDDEN, 4, dtype=torch.float64),
    "dense": lambda: fd.LinearSynthesizer(2 * HIDDEN, dtype=torch.float64),
    "own": Own,
}


@kinds
@pytest.mark.parametrize("synthesizer", SYNTHESIZERS)
@pytest.mark.parametrize("rule", [None, fd.Adam(0.01)])
def test_reset_parameters_is_a_new_module(kind, synthesizer, rule):
    """The same bits as a module made from that seed; what it learned and what it knew is gone."""
    cls = fd.FusedDNILSTMCell if kind == "cell" else fd.FusedDNILSTM

    def new():
        return cls(
            INPUTS, HIDDEN, synthesizer=SYNTHESIZERS[synthesizer](), auxiliary=True, update=rule,
            dtype=torch.float64,
        )  # fmt: skip

    module = new()
    state = advance(module, double(4, STEPS, BATCH, INPUTS))
    assert module.statistics.any() and module.auxiliary_statistics.any()
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(7.0)
    torch.manual_seed(5)
    module.reset_parameters()
    assert not any(bool((p == 7.0).all()) for p in module.parameters())
    assert not module.statistics.any() and not module.auxiliary_statistics.any()
    assert all(r.steps == 0 and r.skipped == 0 for _, r, _ in module.rules())
    if synthesizer == "default":
        torch.manual_seed(5)
        close(dict(module.state_dict()), dict(new().state_dict()), 0)
    if synthesizer != "own":
        assert not module.synthesizer(double(3, 2 * HIDDEN), None).any(), "it predicts nothing"
    module.zero_grad()
    x = double(1, STEPS, BATCH, INPUTS)
    advance(module, x, tuple(t.detach() for t in state))
    assert not module.statistics.any(), "the old state is one from elsewhere"


@kinds
def test_meta_device_and_to_empty(kind):
    cls = fd.FusedDNILSTMCell if kind == "cell" else fd.FusedDNILSTM
    module = cls(INPUTS, HIDDEN, auxiliary=True, device="meta")
    assert all(p.is_meta for p in module.parameters())
    module = module.to_empty(device="cpu")
    module.reset_parameters()
    assert torch.isfinite(advance(module, torch.randn(3, STEPS, BATCH, INPUTS))[0]).all()
    assert module.statistics[-1] == 2 * BATCH
    with torch.device("meta"):
        module = cls(INPUTS, HIDDEN)
    source = cls(INPUTS, HIDDEN)
    module.load_state_dict(source.state_dict(), assign=True)
    close(dict(module.state_dict()), dict(source.state_dict()), 0)


@kinds
def test_skip_init(kind):
    cls = fd.FusedDNILSTMCell if kind == "cell" else fd.FusedDNILSTM
    module = nn.utils.skip_init(cls, INPUTS, HIDDEN)
    assert not any(p.is_meta for p in module.parameters())
    module.load_state_dict(cls(INPUTS, HIDDEN).state_dict())
    advance(module, torch.randn(2, STEPS, BATCH, INPUTS))


@forms
def test_all_weights_and_flatten_parameters(form):
    ours, stock = pair("window", **form)
    ours.flatten_parameters()
    close(ours.all_weights, stock.all_weights, 0)
    assert [len(w) for w in ours.all_weights] == [len(w) for w in stock.all_weights]


def test_a_parameter_that_is_assigned():
    """Sorting forget biases, tying, replacing: as with ``nn.LSTM``."""
    ours, stock = pair("window")
    new = nn.Parameter(torch.randn(4 * HIDDEN, HIDDEN))
    for net in (ours, stock):
        net.weight_hh_l0 = new if net is ours else nn.Parameter(new.detach().clone())
        with torch.no_grad():
            for name, bias in net.named_parameters():
                if "bias" in name:
                    bias[HIDDEN : 2 * HIDDEN].fill_(1.0)
    x = torch.randn(STEPS, BATCH, INPUTS)
    torch.testing.assert_close(ours(x)[0], stock(x)[0])
    assert ours.all_weights[0][1] is new


# ---------------------------------------------------------------------------------------------
# Attributes


@forms
def test_attributes_and_repr(form):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, stock = pair("window", **form)
    for name in ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout",
                 "bidirectional", "proj_size", "mode"):  # fmt: skip
        assert getattr(ours, name) == getattr(stock, name), name
    assert ours.extra_repr() == stock.extra_repr()


@pytest.mark.parametrize("bias", [True, False])
def test_attributes_and_repr_of_a_cell(bias):
    ours, stock = pair("cell", bias=bias)
    for name in ("input_size", "hidden_size", "bias"):
        assert getattr(ours, name) == getattr(stock, name), name
    assert ours.extra_repr() == stock.extra_repr()


def test_attributes_set_behind_construction():
    """``dropout`` and ``batch_first`` are read in every call."""
    ours, stock = pair("window", num_layers=2)
    x = torch.randn(BATCH, STEPS, INPUTS)
    for net in (ours, stock):
        net.batch_first = True
    torch.testing.assert_close(ours(x)[0], stock(x)[0])
    ours.dropout = 0.5
    assert not torch.equal(ours(x)[0], ours(x)[0])
    ours.eval()
    torch.testing.assert_close(ours(x)[0], stock(x)[0])


@pytest.mark.parametrize("bad", [{"dropout": 1.5}, {"dropout": True}, {"proj_size": 5},
                                 {"proj_size": -1}, {"num_layers": 0}])  # fmt: skip
def test_bad_arguments(bad):
    with pytest.raises(ValueError):
        nn.LSTM(INPUTS, HIDDEN, **bad)
    with pytest.raises(ValueError):
        fd.FusedDNILSTM(INPUTS, HIDDEN, synthesizer=None, **bad)


def test_dropout_of_one_layer_warns():
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        fd.FusedDNILSTM(INPUTS, HIDDEN, dropout=0.5)


@pytest.mark.parametrize(
    "name", ["check_input", "get_expected_hidden_size", "permute_hidden", "_flat_weights"]
)
def test_inner_methods_are_not_there(name):
    """Of ``nn.RNNBase``, undocumented: an error that names them."""
    assert hasattr(nn.LSTM(INPUTS, HIDDEN), name)
    with pytest.raises(AttributeError, match=name):
        getattr(fd.FusedDNILSTM(INPUTS, HIDDEN), name)


def test_they_are_no_nn_lstm():
    """What asks for the type passes them by: ``to_lstm()`` is one."""
    ours = fd.FusedDNILSTM(INPUTS, HIDDEN)
    assert not isinstance(ours, nn.LSTM) and isinstance(ours.to_lstm(), nn.LSTM)
    single = fd.FusedDNILSTMCell(INPUTS, HIDDEN)
    assert not isinstance(single, nn.LSTMCell) and isinstance(single.to_lstm_cell(), nn.LSTMCell)


# ---------------------------------------------------------------------------------------------
# Moves, copies, pickles


@kinds
def test_dtypes_and_memory(kind):
    module = trained(kind, update=None)
    assert all(p.dtype is torch.float32 for p in module.float().parameters())
    advance(module, torch.randn(2, STEPS, BATCH, INPUTS))
    module.double().share_memory()
    assert all(p.is_shared() for p in module.parameters())
    advance(module, double(2, STEPS, BATCH, INPUTS))
    vector = nn.utils.parameters_to_vector(module.parameters())
    nn.utils.vector_to_parameters(vector * 0.5, module.parameters())
    advance(module, double(2, STEPS, BATCH, INPUTS))


@kinds
def test_pickles_of_before(kind):
    """What an earlier version did not have starts fresh."""
    module = trained(kind, update=None)
    made = module.__reduce_ex__(2)
    state = {k: v for k, v in made[2].items() if k not in ("_windows", "_returned")}
    old = type(module).__new__(type(module))
    old.__setstate__(copy.deepcopy(state))
    x = double(2, STEPS, BATCH, INPUTS)
    for net in (old, module):
        net.zero_grad()
        advance(net, x)
    close([p.grad for p in old.parameters()], [p.grad for p in module.parameters()], 0)
    assert old.windows()["windows"] == 2


@kinds
def test_pickles_do_not_grow(kind):
    """The last state alone goes along, whatever was returned."""
    module = trained(kind, update=None)
    small = len(pickle.dumps(module))
    for _ in range(5):
        advance(module, double(3, STEPS, BATCH, INPUTS))
        module.zero_grad()
    small = len(pickle.dumps(module)) - small
    assert small < 2000
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    torch.load(file, weights_only=False)


@kinds
def test_copy(kind):
    """``copy.copy`` shares everything, as of any module."""
    module = trained(kind, update=None)
    shallow = copy.copy(module)
    assert shallow.synthesizer is module.synthesizer
    advance(shallow, double(2, STEPS, BATCH, INPUTS))


# ---------------------------------------------------------------------------------------------
# torch.nn.utils


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, weight):
        return weight * self.factor


@kinds
def test_parametrize(kind):
    """Registered and removed again; states are known all the while."""
    name = "weight_hh" if kind == "cell" else "weight_hh_l0"
    module = (cell if kind == "cell" else lstm)(INPUTS, HIDDEN)
    parametrize.register_parametrization(module, name, Scale())
    x = double(3, STEPS, BATCH, INPUTS)
    advance(module, x)
    assert module.parametrizations[name][0].factor.grad is not None
    assert module.statistics[-1] == 2 * BATCH
    module.reset_parameters()
    bound = HIDDEN**-0.5
    assert float(module.parametrizations[name].original.detach().abs().max()) <= bound
    parametrize.remove_parametrizations(module, name)
    advance(module, x)
    assert module.statistics[-1] == 2 * BATCH


@kinds
def test_prune(kind):
    """A mask on a weight, and the weight without it again."""
    name = "weight_hh" if kind == "cell" else "weight_hh_l0"
    ours, stock = pair(kind)
    x = torch.randn(BATCH, INPUTS) if kind == "cell" else torch.randn(STEPS, BATCH, INPUTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for change in (
            lambda m: prune.l1_unstructured(m, name, 0.5),
            lambda m: prune.remove(m, name),
        ):
            change(ours), change(stock)
            torch.testing.assert_close(ours(x)[0], stock(x)[0])
            ours(x)[0].sum().backward(), stock(x)[0].sum().backward()
    found, expected = (dict(net.named_parameters())[name] for net in (ours, stock))
    torch.testing.assert_close(found.grad, expected.grad)


def test_a_weight_that_is_dropped():
    """As AWD-LSTM does: the weight is computed before each call and set as a plain tensor."""
    ours, stock = pair("window")
    x = torch.randn(STEPS, BATCH, INPUTS)
    results = []
    for net in (ours, stock):
        raw = nn.Parameter(net.weight_hh_l0.detach().clone())
        del net._parameters["weight_hh_l0"]
        net.register_parameter("weight_hh_l0_raw", raw)
        torch.manual_seed(2)
        net.weight_hh_l0 = nn.functional.dropout(raw, 0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = net(x)[0]
        output.sum().backward()
        results.append([output, raw.grad])
    torch.testing.assert_close(*results)


@kinds
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.filterwarnings("ignore:`torch.jit.script", "ignore:torch.jit.script puts")
def test_script(kind, inside):
    """Of what computes as PyTorch's module does: its script. In training it is refused by name."""
    module = (cell if kind == "cell" else lstm)(INPUTS, HIDDEN)
    x = double(BATCH, INPUTS) if kind == "cell" else double(STEPS, BATCH, INPUTS)
    model = nn.Sequential(module) if inside else module
    with pytest.raises(RuntimeError, match="in training is refused.*call eval"):
        torch.jit.script(model)
    model.eval()
    script = torch.jit.script(model)
    if inside or kind == "cell":  # of nn.LSTM alone PyTorch makes a script that cannot be called
        with torch.no_grad():
            close(script(x)[0], model(x)[0])


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"num_layers": 2}])
def test_no_rows_in_eval(options):
    """As nn.LSTM and nn.LSTMCell: connected, with gradients of zero."""
    ours, stock = pair("window", **options)
    x = torch.randn((0, 3, INPUTS) if options.get("batch_first") else (3, 0, INPUTS))
    cell = fd.FusedDNILSTMCell(INPUTS, HIDDEN).eval()
    for module, given in ((ours.eval(), x), (cell, x.reshape(-1, INPUTS)[:0])):
        made, (h, _) = module(given) if module is ours else (module(given)[0], module(given))
        (made.sum() + h.sum()).backward()
        assert not any(p.grad.any() for p in module.parameters() if p.grad is not None)
    with torch.no_grad():
        for a, b in zip(ours(x)[1], stock.eval()(x)[1], strict=True):
            assert a.shape == b.shape
