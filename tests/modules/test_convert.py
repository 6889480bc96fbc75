"""``convert`` and ``revert``: whole models there and back, without loss."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import twins
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from twins import close

import fused_dni as fd
from fused_dni.convert import Absorbed

pytestmark = pytest.mark.usefixtures("one_thread")


class Attention(nn.Module):
    """A small transformer block with projections as attributes, not in a Sequential."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.up, self.act, self.down = nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width)
        self.heads = heads

    def forward(self, x):
        n, t, w = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, w))
        return x + self.down(self.act(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, tie=True):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([Attention(8, 2) for _ in range(2)])
        self.head = nn.Linear(8, 11, bias=False)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Language(nn.Module):
    """Embedding, LSTM, cell, head: logits [T, B, 11]."""

    def __init__(self):
        super().__init__()
        self.embed, self.lstm = nn.Embedding(11, 6), nn.LSTM(6, 5, 2, dropout=0.2)
        self.cell, self.head = nn.LSTMCell(5, 4, bias=False), nn.Linear(4, 11)

    def forward(self, tokens):
        out, state = self.lstm(self.embed(tokens))[0], None
        steps = []
        for step in out:
            state = self.cell(step, state)
            steps.append(state[0])
        return self.head(torch.stack(steps))


def mlp():
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.5),
        nn.Linear(8, 7), nn.LayerNorm(7), nn.SiLU(),
        nn.Sequential(nn.Linear(7, 7), nn.Tanh()),
        nn.Linear(7, 7), nn.Softplus(beta=2),
        nn.Linear(7, 5), nn.LeakyReLU(),
        nn.Linear(5, 3),
    )  # fmt: skip


def encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


MODELS = {
    "mlp": (mlp, lambda: torch.randn(5, 2, 3)),
    "transformer": (Transformer, lambda: torch.randint(11, (3, 4))),
    "untied": (lambda: Transformer(tie=False), lambda: torch.randint(11, (3, 4))),
    "language": (Language, lambda: torch.randint(11, (3, 4))),
    "nn.TransformerEncoder": (encoder, lambda: torch.randn(3, 4, 8)),
}


def used(model):
    """Running statistics that are not the initial ones."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2.0)
    return model.eval()


@pytest.mark.parametrize("rule", [None, fd.Adam(1e-3)], ids=["returned", "fused"])
@pytest.mark.parametrize("synthesizer", ["default", None])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name, synthesizer, rule):
    make, sample = MODELS[name]
    plain = used(make())
    model = copy.deepcopy(plain)
    x = sample()
    expected = plain(x)
    held = {id(p) for p in model.parameters()}
    assert fd.convert(model, synthesizer=synthesizer, update=rule) is model
    layers = [m for m in model.modules() if isinstance(m, fd.FusedDNILinear)]
    assert layers and all(not layer.training for layer in layers)
    assert held <= {id(p) for p in model.parameters()}, "the same parameters, not copies"
    torch.testing.assert_close(model(x), expected)
    assert fd.revert(model) is model
    ours = (fd.FusedDNILinear, fd.FusedDNILSTM, fd.FusedDNILSTMCell, Absorbed)
    assert not any(isinstance(m, ours) for m in model.modules())
    assert held == {id(p) for p in model.parameters()}
    state, original = model.state_dict(), plain.state_dict()
    assert list(state) == list(original)
    close(dict(state), dict(original), 0)
    close(model(x), expected, 0)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_each_layer_gets_a_copy_of_a_synthesizer():
    given = fd.DiagonalSynthesizer(4)
    model = fd.convert(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)),
                       synthesizer=given, update=fd.SGD(0.1))  # fmt: skip
    made = [layer.synthesizer for layer in model]
    assert made[2] is None and len({id(m) for m in (given, *made)}) == 4
    with pytest.raises(ValueError, match="synthesizer has features=4, the layer out_features=2"):
        fd.convert(nn.Linear(4, 2), synthesizer=given, head="decoupled")


def test_what_is_taken_along():
    model = fd.convert(mlp())
    fused = [(n, m) for n, m in model.named_modules() if isinstance(m, fd.FusedDNILinear)]
    found = [(n, m.config.normalization, m.config.activation) for n, m in fused]
    assert found == [
        ("1", "batch", "relu"),
        ("5", "layer", "silu"),
        ("8.0", None, "tanh"),
        ("9", None, "identity"),  # softplus with another beta has no fused form
        ("11", None, "identity"),
        ("13", None, "identity"),
    ]
    assert [isinstance(m, Absorbed) for m in model].count(True) == 4


def test_head():
    exact, decoupled = fd.convert(mlp()), fd.convert(mlp(), head="decoupled", context_features=3)
    assert exact[13].synthesizer is None and exact[11].synthesizer is not None
    assert decoupled[13].synthesizer.context_features == 3
    with pytest.raises(ValueError, match="head must be 'exact' or 'decoupled', got 'none'"):
        fd.convert(mlp(), head="none")


def test_tied_weights_are_left_alone_by_a_rule():
    ruled, returned = Transformer(), Transformer()
    fd.convert(ruled, update=fd.SGD(0.1))
    fd.convert(returned)
    assert type(ruled.head) is nn.Linear and isinstance(returned.head, fd.FusedDNILinear)
    assert returned.head.weight is returned.embed.weight
    tokens = torch.randint(11, (3, 4))
    for model in (ruled, returned):
        model(tokens).square().mean().backward()
        assert model.embed.weight.grad is not None


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rule", [None, fd.Adam(1e-2)], ids=["returned", "fused"])
def test_converted_models_train(name, rule):
    make, sample = MODELS[name]
    model = fd.convert(make(), update=rule).train()
    ordinary = list(fd.ordinary_parameters(model))
    optimizer = torch.optim.Adam(ordinary, 1e-2) if ordinary else None
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    x = sample()
    for _ in range(6):
        if optimizer is not None:
            optimizer.zero_grad()
        out = model(x)
        F.mse_loss(out, torch.ones_like(out)).backward()
        if optimizer is not None:
            optimizer.step()
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    for n, m in model.named_modules():
        if isinstance(m, fd.FusedDNILinear):
            assert m.weight is getattr(model, "embed", m).weight or f"{n}.weight" in moved


def test_what_cannot_be_taken_over_is_left():
    hooked, parametrized = nn.Linear(3, 3), weight_norm(nn.Linear(3, 3))
    hooked.register_forward_hook(lambda *a: None)

    class Own(nn.Linear):
        pass

    model = nn.Sequential(hooked, parametrized, Own(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[4].register_forward_hook(lambda *a: None)
    kinds = [type(m) for m in model]
    fd.convert(model, head="decoupled")
    assert [type(m) for m in model] == [*kinds[:3], fd.FusedDNILinear, nn.BatchNorm1d]
    with pytest.raises(ValueError, match=r"no nn.Linear, nn.LSTM or nn.LSTMCell that can be"):
        fd.convert(nn.Sequential(nn.ReLU(), Own(3, 3)))


@pytest.mark.parametrize("shared", ["linear", "norm", "activation"])
def test_shared_modules(shared):
    """One module in two places stays one module."""
    linear, norm, activation = nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh()
    parts = [
        [linear, norm, activation],
        [
            linear if shared == "linear" else nn.Linear(4, 4),
            norm if shared == "norm" else nn.LayerNorm(4),
            activation if shared == "activation" else nn.Tanh(),
        ],
    ]
    model = nn.Sequential(*(nn.Sequential(*p) for p in parts)).eval()
    x = torch.randn(3, 4)
    expected, keys = model(x), list(model.state_dict())
    fd.convert(model, head="decoupled")
    torch.testing.assert_close(model(x), expected)
    fd.revert(model)
    torch.testing.assert_close(model(x), expected)
    assert list(model.state_dict()) == keys


def test_a_linear_layer_itself():
    plain = nn.Linear(3, 4)
    layer = fd.convert(plain, head="decoupled")
    assert isinstance(layer, fd.FusedDNILinear) and layer.weight is plain.weight
    back = fd.revert(layer)
    assert type(back) is nn.Linear and back.weight is plain.weight and back.bias is plain.bias


@pytest.mark.parametrize("norm", [None, nn.BatchNorm1d, nn.LayerNorm])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [None, nn.GELU(approximate="tanh"), nn.Mish(), "relu"])
def test_from_and_to_linear(norm, bias, activation):
    linear = nn.Linear(3, 4, bias).double()
    behind = norm and norm(4, eps=1e-3).double()
    if isinstance(behind, nn.BatchNorm1d):
        behind.momentum = 0.3
    layer = fd.FusedDNILinear.from_linear(linear, behind, activation, update=fd.SGD(0.1))
    named = nn.ReLU() if activation == "relu" else activation
    parts = [m for m in (linear, behind, named) if m is not None]
    plain = nn.Sequential(*copy.deepcopy(parts))
    x = twins.double(6, 3)
    with torch.no_grad():
        close(layer(x), plain(x))  # in training: running statistics move alike
    layer.eval()
    plain.eval()
    close(layer(x), plain(x))
    back = layer.to_linear()
    close(back(x), plain(x))
    if len(parts) == 1:
        assert type(back) is nn.Linear
    else:
        assert [type(m) for m in back] == [type(m) for m in parts]
    assert {id(p) for p in back.parameters()} == {id(p) for m in parts for p in m.parameters()}
    assert not any(m.training for m in back.modules())


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (nn.BatchNorm1d(4, track_running_stats=False), "without running statistics"),
        (nn.BatchNorm1d(4, momentum=None), "momentum=None"),
        (nn.BatchNorm1d(5), "norm has 5 features, the linear layer 4"),
        (nn.LayerNorm((2, 4)), "over 2 dimensions"),
        (nn.GroupNorm(2, 4), "norm must be nn.BatchNorm1d or nn.LayerNorm, got GroupNorm"),
    ],
)
def test_from_linear_refuses(norm, message):
    linear = nn.Linear(3, 4)
    with pytest.raises(ValueError, match=message):
        fd.FusedDNILinear.from_linear(linear, norm)
    model = fd.convert(nn.Sequential(linear, norm))  # left behind the fused layer
    assert model[1] is norm


def test_from_linear_refuses_activations_it_does_not_know():
    with pytest.raises(ValueError, match="has no fused form"):
        fd.FusedDNILinear.from_linear(nn.Linear(3, 4), None, nn.LeakyReLU())


def test_affine_free_norms():
    for norm in (nn.BatchNorm1d(4, affine=False), nn.LayerNorm(4, elementwise_affine=False)):
        linear = nn.Linear(3, 4)
        layer = fd.FusedDNILinear.from_linear(linear, norm, update=fd.SGD(0.1)).eval()
        x = torch.randn(5, 3)
        torch.testing.assert_close(layer(x), norm.eval()(linear(x)))
        layer.train()(x).sum().backward()


def test_batchnorm_over_sequences_is_not_taken_along():
    """On [N, C, L] ``nn.BatchNorm1d`` normalises channels, not the last dimension."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    x = torch.randn(5, 4, 3)
    model[1].running_mean.normal_()
    expected = model(x)
    fd.convert(model, head="decoupled")
    with pytest.raises(RuntimeError, match=r"input must be \[N, I\] in front of a batch norm"):
        model(x)
    fd.revert(model)
    torch.testing.assert_close(model(x), expected)


def test_converted_twice_is_converted_once():
    model = fd.convert(mlp())
    with pytest.raises(ValueError, match="no nn.Linear, nn.LSTM or nn.LSTMCell that can"):
        fd.convert(model)
    assert fd.revert(fd.revert(model)) is model


def test_a_checkpoint_of_the_plain_model_loads():
    plain = mlp()
    model = fd.convert(mlp())
    state = {}
    for key, value in plain.state_dict().items():
        place, _, leaf = key.rpartition(".")
        state[{"2": "1.norm", "6": "5.norm"}.get(place, place) + "." + leaf] = value
    found = model.load_state_dict(state, strict=False)
    assert not found.unexpected_keys
    assert all(".synthesizer." in k for k in found.missing_keys)
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(model.eval()(x), plain.eval()(x))


# ---------------------------------------------------------------------------------------------
# Recurrent modules


def test_recurrent_modules():
    """They take all options; the head behind them stays exact."""
    options = {"update": fd.SGD(0.1), "synthesizer_update": fd.Adam(0.1), "target_scale": 3.0,
               "max_norm": 2.0, "backend": "reference", "context_features": 4, "sg_scale": 0.5,
               "auxiliary": True}  # fmt: skip
    model = fd.convert(Language(), **options)
    assert [type(m) for m in model.children()] == [
        nn.Embedding, fd.FusedDNILSTM, fd.FusedDNILSTMCell, fd.FusedDNILinear
    ]  # fmt: skip
    assert model.head.synthesizer is None and model.head.update is not None
    for module in (model.lstm, model.cell):
        assert module.synthesizer.context_features == module.auxiliary_head.context_features == 4
        assert (module.sg_scale, module.max_norm, module.target_scale) == (0.5, 2.0, 3.0)
        assert module.backend == "reference" and module.synthesizer_update.rule == fd.Adam(0.1)
    assert (model.lstm.num_layers, model.lstm.dropout, model.cell.bias) == (2, 0.2, False)
    exact = fd.convert(Language(), **{**options, "synthesizer": None, "synthesizer_update": None})
    assert exact.lstm.synthesizer is exact.lstm.auxiliary_head is exact.cell.synthesizer is None


def test_a_converted_stream_is_decoupled():
    """The LSTM from the first call on, the cell once its loop calls ``boundary``."""
    model = fd.convert(Language())
    tokens, state, learned = torch.randint(11, (2, 3, 4)), None, []
    for window in tokens:
        out, state = model.lstm(model.embed(window), state)
        out.square().mean().backward()
        learned.append(model.lstm.synthesizer.weight.grad is not None)
    assert learned == [False, True]
    model(tokens[0]).sum().backward()
    assert model.cell.synthesizer.weight.grad is None
    state = None
    for window in tokens:
        for _ in window:
            state = model.cell(torch.randn(4, 5), state)
        after = model.cell.boundary(state)
        state[0].square().mean().backward()
        state = after
    assert model.cell.synthesizer.weight.grad is not None


def test_recurrent_modules_alone():
    for plain, kind in ((nn.LSTM(3, 4, 2), fd.FusedDNILSTM), (nn.LSTMCell(3, 4), None)):
        made = fd.convert(plain)
        assert type(made) is (kind or fd.FusedDNILSTMCell)
        assert list(map(id, plain.parameters())) == [
            id(p) for n, p in made.named_parameters() if "." not in n
        ]
        back = fd.revert(made)
        assert type(back) is type(plain)
        assert list(map(id, back.parameters())) == list(map(id, plain.parameters()))
    model = fd.convert(nn.ModuleDict({"a": nn.LSTM(3, 4), "b": nn.LSTM(4, 4)}))
    assert all(isinstance(m, fd.FusedDNILSTM) for m in model.values())


def test_recurrent_modules_that_are_left():
    class Own(nn.LSTM):
        pass

    def model():
        parts = {
            "both": nn.LSTM(3, 4, bidirectional=True), "projected": nn.LSTM(3, 4, proj_size=2),
            "own": Own(3, 4), "hooked": nn.LSTM(3, 4), "parametrized": nn.LSTMCell(3, 4),
            "gru": nn.GRU(3, 4), "plain": nn.LSTM(3, 4),
        }  # fmt: skip
        parts["hooked"].register_forward_hook(lambda *a: None)
        weight_norm(parts["parametrized"], "weight_hh")
        return nn.ModuleDict(parts)

    def taken(**options):
        made = fd.convert(model(), **options)
        return {n for n, m in made.items() if isinstance(m, fd.FusedDNILSTM)}

    assert taken() == {"plain"}
    assert taken(synthesizer=None) == {"both", "projected", "plain"}
    assert taken(synthesizer=None, update=fd.SGD(0.1)) == {"plain"}
    assert taken(synthesizer=None, backend="reference") == {"plain"}
    with pytest.raises(ValueError, match="or nn.LSTMCell that can be converted"):
        fd.convert(nn.LSTM(3, 4, bidirectional=True))


def test_tied_recurrent_weights_are_left_alone_by_a_rule():
    def model():
        a, b = nn.LSTM(4, 4), nn.LSTM(4, 4)
        b.weight_hh_l0 = a.weight_hh_l0
        return nn.ModuleList([a, b, nn.LSTM(4, 4)])

    kinds = [type(m) for m in fd.convert(model(), update=fd.SGD(0.1))]
    assert kinds == [nn.LSTM, nn.LSTM, fd.FusedDNILSTM]
    tied = fd.convert(model())
    assert tied[0].weight_hh_l0 is tied[1].weight_hh_l0


def test_a_shared_recurrent_module_stays_one():
    shared = nn.LSTM(4, 4)
    model = fd.convert(nn.ModuleList([shared, shared]))
    assert model[0] is model[1] and isinstance(model[0], fd.FusedDNILSTM)
    fd.revert(model)
    assert model[0] is model[1] and type(model[0]) is nn.LSTM


def test_each_recurrent_module_gets_a_copy_of_a_synthesizer():
    given = fd.DiagonalSynthesizer(8)
    model = fd.convert(nn.ModuleList([nn.LSTM(3, 4), nn.LSTMCell(3, 4)]), synthesizer=given)
    assert len({id(m) for m in (given, model[0].synthesizer, model[1].synthesizer)}) == 3
    with pytest.raises(ValueError, match="synthesizer has features=8, the state 16"):
        fd.convert(nn.LSTM(3, 4, 2), synthesizer=given)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("proj_size", [0, 2])
def test_from_and_to_lstm(bidirectional, proj_size):
    plain = nn.LSTM(3, 4, 2, False, True, 0.1, bidirectional, proj_size).double().eval()
    with pytest.raises(ValueError, match="only nn.LSTM itself can be taken over, got GRU"):
        fd.FusedDNILSTM.from_lstm(nn.GRU(3, 4))
    with pytest.raises(ValueError, match="only nn.LSTMCell itself can be taken over, got GRUCell"):
        fd.FusedDNILSTMCell.from_lstm_cell(nn.GRUCell(3, 4))
    module = fd.FusedDNILSTM.from_lstm(plain, synthesizer=None)
    back = module.to_lstm()
    assert repr(back) == repr(plain) and not module.training and not back.training
    assert list(map(id, back.parameters())) == list(map(id, plain.parameters()))
    x = twins.double(2, 5, 3)
    close(back(x)[0], plain(x)[0], 0)
    close(module(x)[0], plain(x)[0])


# ---------------------------------------------------------------------------------------------
# The same function, or left alone


class Gate(nn.Sequential):
    def forward(self, x):
        z = self[0](x)
        return z + self[1](z)


class Held(nn.Module):
    """Parts in a container, used as ``way`` says."""

    def __init__(self, *parts):
        super().__init__()
        self.net = nn.Sequential(*parts)


class Whole(Held):
    def forward(self, x):
        return self.net(x)


class Aliased(Held):
    def forward(self, x):
        net = self.net
        return net(x) if x.dim() else net.forward(x)


class Indexed(Held):
    def forward(self, x):
        z = self.net[0](x)
        return z + self.net[1](z)


class Sliced(Held):
    def forward(self, x):
        return self.net[:1](x) * self.net[1:](x)


class Looped(Held):
    def forward(self, x):
        seen = []
        for part in self.net:
            x = part(x)
            seen.append(x)
        return sum(seen)


class Unpacked(Held):
    def forward(self, x):
        linear, act = self.net
        return act(x) + linear(x)


class ByName(nn.Module):
    def __init__(self, linear, act):
        super().__init__()
        self.net = nn.Sequential()
        self.net.linear, self.net.act = linear, act

    def forward(self, x):
        return self.net.linear(x) - self.net.act(x)


class Helped(Held):
    def forward(self, x):
        return self.through(x)

    def through(self, x):
        return _backwards(self.net, x)


def _backwards(net, x):
    for part in reversed(net):
        x = part(x)
    return x


class Got(Held):
    def forward(self, x):
        return getattr(self, "n" + "et")[0](x)


class Blocks(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(*parts)])


class InBlocks(Blocks):
    def forward(self, x):
        for i, block in enumerate(self.blocks):
            x = block(x) + i
        return x


class BlocksUnpacked(Blocks):
    def forward(self, x):
        for linear, act in self.blocks:
            x = act(x) + linear(x)
        return x


class BlocksIndexed(Blocks):
    def forward(self, x):
        return self.blocks[0][0](x)


class Above(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.inner = Whole(*parts)

    def forward(self, x):
        return self.inner.net[0](x)


def shared(*, act):
    linear = nn.Linear(5, 5)
    return nn.Sequential(linear, act, linear, act)


def beside():
    model = Whole(nn.Linear(5, 5), nn.Tanh())
    model.also = model.net[0]
    return model


def patched():
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh())
    model[0].forward = lambda x: 2 * x
    return model


def subclassed_activation():
    class Own(nn.GELU):
        def forward(self, x):
            return -x

    return nn.Sequential(nn.Linear(5, 5), Own())


def used_twice(last):
    linear = nn.Linear(5, 5)
    return nn.Sequential(linear, nn.ReLU(), linear, *last)


def normalised_and_not():
    linear = nn.Linear(5, 5)
    return nn.Sequential(nn.Sequential(linear, nn.LayerNorm(5)), nn.Tanh(), nn.Sequential(linear))


PARTS = (lambda: nn.Linear(5, 5), nn.Tanh)
TAKEN = {
    "whole": lambda: Whole(*(p() for p in PARTS)),
    "aliased": lambda: Aliased(*(p() for p in PARTS)),
    "in a list": lambda: InBlocks(*(p() for p in PARTS)),
    "one layer twice, alike": lambda: shared(act=nn.Tanh()),
}
APART = {
    **{
        cls.__name__: lambda cls=cls: cls(*(p() for p in PARTS))
        for cls in (Gate, Indexed, Sliced, Looped, Unpacked, ByName, Helped, Got,
                    BlocksUnpacked, BlocksIndexed, Above)
    },
    "one layer twice": lambda: used_twice([]),
    "one layer twice, otherwise": lambda: used_twice([nn.Sigmoid()]),
    "one layer, normalised and not": normalised_and_not,
    "forward of the instance": patched,
    "subclass of an activation": subclassed_activation,
    "a frozen norm": lambda: nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5).eval()),
}  # fmt: skip


@pytest.mark.parametrize("name", [*TAKEN, *APART])
def test_the_same_function(name):
    torch.manual_seed(0)
    plain = {**TAKEN, **APART}[name]()
    model, x = copy.deepcopy(plain), torch.randn(4, 5)
    keys = list(plain.state_dict())
    if name == "forward of the instance":
        with pytest.raises(ValueError, match=r"(?s)can be converted\n.*would be lost"):
            fd.convert(model, head="decoupled")
        return
    fd.convert(model, head="decoupled")
    taken = [m for m in model.modules() if isinstance(m, Absorbed)]
    assert bool(taken) == (name in TAKEN)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
    assert not any(m.training for m in norms), "a norm that is frozen stays so"
    assert torch.allclose(model.eval()(x), plain.eval()(x), atol=1e-6)
    fd.revert(model)
    assert torch.allclose(model(x), plain(x), atol=1e-6)
    assert list(model.state_dict()) == keys


def test_a_class_whose_source_cannot_be_read():
    scope = {"nn": nn}
    exec(
        "class Hidden(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.net = nn.Sequential(nn.Linear(5, 5), nn.Tanh())\n"
        "    def forward(self, x):\n"
        "        return self.net[0](x)\n",
        scope,
    )
    plain = scope["Hidden"]()
    model, report = fd.convert(copy.deepcopy(plain), head="decoupled", report=True)
    x = torch.randn(4, 5)
    assert torch.allclose(model.eval()(x), plain.eval()(x))
    assert "source of Hidden.forward cannot be read" in str(report)


def test_what_was_attached_is_not_lost():
    """Buffers, hooks of state dicts: such a layer is left as it is."""
    with_buffer, with_hook = nn.Linear(3, 3), nn.Linear(3, 3)
    with_buffer.register_buffer("mask", torch.ones(3))
    with_hook.register_state_dict_post_hook(lambda *a: None)
    model = nn.Sequential(with_buffer, with_hook, nn.Linear(3, 3))
    model, report = fd.convert(model, report=True)
    assert model[0] is with_buffer and model[1] is with_hook
    assert "it has 'mask', which would be lost" in report.left()["0"]
    assert "hooks" in report.left()["1"]


def test_the_report_lists_everything():
    model = mlp()
    model.append(nn.LSTM(3, 3, bidirectional=True))
    model.append(weight_norm(nn.Linear(3, 3)))
    model, report = fd.convert(model, report=True)
    assert report.converted() == [
        "1", "2", "3", "5", "6", "7", "8.0", "8.1", "9", "11", "13"
    ]  # fmt: skip
    left = report.left()
    assert "bidirectional" in left["14"] and "parametrization" in left["15"]
    lines = str(report).splitlines()
    assert len(lines) == 13
    assert lines[0] == "1: Linear, FusedDNILinear: decoupled at its output"
    assert lines[1] == "2: BatchNorm1d, Absorbed: part of '1'"
    assert "13: Linear, FusedDNILinear: it is the head, whose gradient is exact" in lines
    with pytest.raises(ValueError, match=r"(?s)can be converted\n.*15.*parametrization"):
        fd.convert(nn.Sequential(*[nn.ReLU()] * 15, weight_norm(nn.Linear(3, 3))))


@pytest.mark.parametrize("synthesizer", ["default", None])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_a_plain_checkpoint_loads_behind_a_conversion(synthesizer, strict, nested, assign):
    def make():
        return nn.Sequential(mlp(), nn.Linear(3, 3)) if nested else mlp()

    plain = used(make())
    for m in plain.modules():
        if isinstance(m, nn.LayerNorm | nn.BatchNorm1d):
            nn.init.uniform_(m.weight)
            nn.init.uniform_(m.bias)
    model = fd.convert(make(), synthesizer=synthesizer)
    if strict and synthesizer is not None:
        with pytest.raises(RuntimeError, match=r"Missing key\(s\).*synthesizer"):
            model.load_state_dict(plain.state_dict())
        return
    found = model.load_state_dict(plain.state_dict(), strict=strict, assign=assign)
    assert not found.unexpected_keys and all(".synthesizer." in k for k in found.missing_keys)
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(model.eval()(x), plain.eval()(x))
    again = fd.convert(make(), synthesizer=synthesizer)
    again.load_state_dict(copy.deepcopy(model).state_dict())  # its own keys are as ever
    torch.testing.assert_close(again.eval()(x), plain(x))


def test_a_rule_begins_without_old_gradients():
    model = mlp()
    model(torch.randn(5, 2, 3)).sum().backward()
    fd.convert(model, update=fd.SGD(0.1))
    assert all(p.grad is None for g in fd.FusedOptimizer(model).param_groups for p in g["params"])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda **k: fd.FusedDNILinear(7, 5, **k), lambda: nn.Linear(7, 5)),
        (lambda **k: fd.FusedDNILinear(7, 5, False, **k), lambda: nn.Linear(7, 5, False)),
        (lambda **k: fd.FusedDNILSTM(4, 3, 2, **k), lambda: nn.LSTM(4, 3, 2)),
        (lambda **k: fd.FusedDNILSTMCell(4, 3, **k), lambda: nn.LSTMCell(4, 3)),
    ],
)
@pytest.mark.parametrize("synthesizer", ["default", None])
def test_a_seed_gives_the_weights_of_the_stock_module(ours, theirs, synthesizer):
    torch.manual_seed(3)
    mine = ours(synthesizer=synthesizer).state_dict()
    torch.manual_seed(3)
    for name, value in theirs().state_dict().items():
        assert torch.equal(value, mine[name]), name


# ---------------------------------------------------------------------------------------------
# Containers


def perceptron():
    return nn.Sequential(
        *(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()),
        *(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU()),
        nn.Linear(5, 3),
    )


class Around(nn.Module):
    """Calls its net as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.net = perceptron()

    def forward(self, x):
        return self.net(x)


class Inside(Around):
    """Uses its net's parts one by one."""

    def forward(self, x):
        for layer in self.net:
            x = layer(x)
        return x


@pytest.mark.parametrize("make", [perceptron, Around])
@pytest.mark.parametrize("synthesizer", ["default", None])
def test_containers_deliver_at_once_and_give_the_same_bits(make, synthesizer, one_thread):
    torch.manual_seed(0)
    plain = make()
    names = list(plain.state_dict())
    options = {"synthesizer": synthesizer, "update": fd.SGD(0.1)}
    if synthesizer is not None:
        options["context_features"] = 3
    apart = fd.convert(copy.deepcopy(plain).train(), **options)
    model, report = fd.convert(plain.train(), delivery="immediate", report=True, **options)
    net = model if make is perceptron else model.net
    assert type(net) is fd.DecoupledSequential and list(net._modules) == [str(i) for i in range(7)]
    said = [entry for entry in report if entry.made == "DecoupledSequential"]
    assert [entry.name for entry in said] == ["" if make is perceptron else "net"]
    ours, theirs = list(model.named_parameters()), list(apart.named_parameters())
    assert [n for n, _ in ours] == [n for n, _ in theirs]
    with torch.no_grad():  # synthesizers were drawn apart
        for (_, p), (_, q) in zip(ours, theirs, strict=True):
            q.copy_(p)
    if synthesizer is not None:
        schedules = [fd.Schedule(m, target_every=2) for m in (model, apart)]
    for step in range(6):
        torch.manual_seed(step)
        x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
        for each in (model, apart):
            with fd.condition_on(y):
                F.cross_entropy(each(x), y).backward()
        if synthesizer is not None:
            for schedule in schedules:
                schedule.step()
        for (n, p), (_, q) in zip(ours, theirs, strict=True):
            assert torch.equal(p, q), (step, n)
    assert net._stack is not None and net._stack.way().startswith("one call"), net
    back = fd.revert(model)
    assert type(back if make is perceptron else back.net) is nn.Sequential
    assert list(back.state_dict()) == names


def test_containers_that_stay(one_thread):
    model, report = fd.convert(Inside(), delivery="immediate", report=True)
    assert type(model.net) is nn.Sequential
    assert report.left()["net"] == "Inside.forward uses its parts one by one"
    hooked = perceptron()
    hooked.register_forward_hook(lambda *_: None)
    model, report = fd.convert(hooked, delivery="immediate", report=True)
    assert type(model) is nn.Sequential and "hooks" in report.left()[""]
    single = fd.convert(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), delivery="immediate")
    assert type(single) is nn.Sequential
    assert type(fd.convert(perceptron())) is nn.Sequential
    with pytest.raises(ValueError, match="delivery must be 'deferred' or 'immediate', got 'now'"):
        fd.convert(perceptron(), delivery="now")


def test_a_container_keeps_which_parts_are_in_eval():
    plain = perceptron()
    plain[0].eval()
    plain[1].eval()
    model = fd.convert(plain, delivery="immediate")
    assert model.training and not model[0].training and model[3].training
