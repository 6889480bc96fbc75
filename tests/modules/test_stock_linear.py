"""What code out there does to ``nn.Linear``, ``nn.BatchNorm1d`` and their like after construction,
done to the layers here: it works, or it is refused by name and nothing has changed."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import update_bn

import fused_dni as fd

pytestmark = pytest.mark.usefixtures("one_thread")


def twins(**options):
    layer = fd.FusedDNILinear(6, 5, synthesizer=None, dtype=torch.float64, **options)
    return layer, copy.deepcopy(layer.to_linear())


@pytest.mark.parametrize("momentum", [0.3, 0.0, 1.0, None])
def test_momentum_and_eps_are_those_of_the_norm_now(momentum):
    layer, plain = twins(normalization="batch")
    for step in range(4):
        for norm in (layer.norm, plain[1]):
            norm.momentum, norm.eps = (momentum, 1e-3) if step % 2 else (0.2, 1e-5)
        x = torch.randn(8, 6, dtype=torch.float64)
        torch.testing.assert_close(layer(x), plain(x))
        for name, buffer in plain[1].named_buffers():
            torch.testing.assert_close(layer.norm.get_buffer(name), buffer)


def test_eps_of_a_layer_norm_counts():
    layer, plain = twins(normalization="layer")
    for eps in (1e-5, 0.1):
        layer.norm.eps = plain[1].eps = eps
        x = torch.randn(8, 6, dtype=torch.float64)
        torch.testing.assert_close(layer(x), plain(x))


def test_update_bn():
    layer, plain = twins(normalization="batch", activation="relu")
    batches = [torch.randn(8, 6, dtype=torch.float64) for _ in range(3)]
    for module in (layer, plain):
        module(batches[0])
        update_bn(batches, module)
    torch.testing.assert_close(layer.norm.running_var, plain[1].running_var)
    assert layer.norm.momentum == 0.1
    torch.testing.assert_close(layer(batches[0]), plain(batches[0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: setattr(layer, "norm", nn.GroupNorm(1, 5)), "GroupNorm"),
        (lambda layer: setattr(layer, "norm", nn.InstanceNorm1d(5)), "InstanceNorm1d"),
        (lambda layer: setattr(layer.norm, "track_running_stats", False), "track_running_stats"),
        (lambda layer: nn.SyncBatchNorm.convert_sync_batchnorm(layer), "SyncBatchNorm"),
    ],
    ids=["group", "instance", "no statistics", "synchronised"],
)
def test_a_norm_of_another_kind_is_refused(change, message):
    layer = fd.FusedDNILinear(6, 5, normalization="batch", update=fd.SGD(0.1))
    x = torch.randn(8, 6)
    layer(x)
    change(layer)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=message):
        layer(x)
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


def test_a_synchronised_norm_evaluates():
    layer = fd.FusedDNILinear(6, 5, normalization="batch")
    layer(torch.randn(8, 6))
    x = torch.randn(4, 6)
    want = layer.eval()(x)
    assert torch.equal(nn.SyncBatchNorm.convert_sync_batchnorm(layer)(x), want)


# ---------------------------------------------------------------------------------------------
# Made anew


SYNTHESIZERS = {
    "rank": lambda: fd.LinearSynthesizer(6, 2),
    "dense": lambda: fd.LinearSynthesizer(6),
    "diagonal": lambda: fd.DiagonalSynthesizer(6),
    "mlp": lambda: fd.MLPSynthesizer(6, 8),
}


@pytest.mark.parametrize("synthesizer", SYNTHESIZERS.values(), ids=SYNTHESIZERS)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "loop"])
@pytest.mark.parametrize("kind", ["linear", "decoupled"])
def test_reset_parameters(kind, whole, synthesizer):
    rule = fd.Adam(0.1)
    if kind == "linear":
        layer = fd.FusedDNILinear(
            6, 6, normalization="batch", activation="relu", synthesizer=synthesizer(), update=rule
        )
    else:
        layer = fd.Decoupled(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), synthesizer(), update=rule)
    for _ in range(3):
        layer(torch.randn(8, 6)).square().sum().backward()
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(7.0)
    # The loop that everybody writes goes through the parts, too.
    for module in [layer] if whole else list(layer.modules()):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert not [name for name, p in layer.named_parameters() if bool((p == 7.0).all())]
    assert not layer.synthesizer(torch.randn(8, 6)).any()  # no prediction before the first lesson
    assert layer.update.steps == 0 and not layer.statistics.any()
    assert not any(t is not None and t.any() for part in layer.update.moments() for t in part)
    layer(torch.randn(8, 6)).square().sum().backward()
    assert layer.update.steps == 1


def test_reset_parameters_draws_as_a_linear_layer():
    layer, plain = fd.FusedDNILinear(6, 5), nn.Linear(6, 5)
    for module in (layer, plain):
        torch.manual_seed(3)
        module.reset_parameters()
    assert torch.equal(layer.weight, plain.weight) and torch.equal(layer.bias, plain.bias)


@pytest.mark.parametrize("update", [None, fd.Adam(0.01)], ids=["returned", "fused"])
def test_from_the_meta_device(update):
    layer = fd.FusedDNILinear(6, 5, normalization="batch", update=update, device="meta")
    assert copy.deepcopy(layer).eval()(torch.randn(3, 6, device="meta")).shape == (3, 5)
    if update is None:
        layer(torch.randn(3, 6, device="meta")).sum().backward()
    else:
        with pytest.raises(RuntimeError, match="meta device"):
            layer(torch.randn(3, 6, device="meta"))
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    h = layer(torch.randn(8, 6))
    h.sum().backward()
    assert torch.isfinite(h).all()


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: fd.FusedDNILinear(4, 5, update=fd.Adam(0.1)), (6, 4)),
        (
            lambda: fd.Decoupled(nn.Linear(4, 5), fd.LinearSynthesizer(5), update=fd.Adam(0.1)),
            (6, 4),
        ),
        (lambda: fd.FusedDNILSTM(4, 5, auxiliary=True, update=fd.Adam(0.1)), (3, 6, 4)),
    ],
    ids=["linear", "segment", "window"],
)
def test_made_under_the_meta_device(make, shape):
    """Rules and statistics are beside the parameters and have to be somewhere."""
    with torch.device("meta"):
        module = make()
    module.to_empty(device="cpu").reset_parameters()
    before = [p.detach().clone() for p in module.parameters()]
    for _ in range(2):
        made = module(torch.randn(shape))
        (made if isinstance(made, torch.Tensor) else made[0]).square().sum().backward()
    assert module.update.steps == 2 and module.update.hyper.device.type == "cpu"
    assert not torch.equal(before[0], next(module.parameters()))


def test_skip_init():
    layer = nn.utils.skip_init(fd.FusedDNILinear, 6, 5, activation="relu")
    layer.reset_parameters()
    assert torch.isfinite(layer(torch.randn(8, 6))).all()


class Doubled(nn.Module):
    def forward(self, w):
        return 2.0 * w


def test_parametrizations():
    layer, plain = twins()
    for module in (layer, plain):
        parametrize.register_parametrization(module, "weight", Doubled())
    x = torch.randn(8, 6, dtype=torch.float64)
    outs = []
    for module in (layer, plain):
        out = module(x)
        out.square().sum().backward()
        outs += [(out, module.parametrizations.weight.original.grad)]
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b)
    parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(layer(x), outs[1][0])


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_pytorchs_own_parametrizations(wrap):
    layer, plain = twins()
    torch.manual_seed(1)
    wrap(layer)
    torch.manual_seed(1)
    wrap(plain)
    x = torch.randn(8, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x))


# ---------------------------------------------------------------------------------------------
# PyTorch's own samples


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pytorchs_samples(dtype, training):
    # Here: it takes seconds to import, in each process that collects this file.
    from torch.testing._internal.common_modules import module_db

    (linear,) = [info for info in module_db if info.module_cls is nn.Linear]
    seen = 0
    for sample in linear.module_inputs_func(
        linear, device="cpu", dtype=dtype, requires_grad=True, training=training
    ):
        made, given = sample.constructor_input, sample.forward_input
        (data,) = [*given.args, *given.kwargs.values()]
        torch.manual_seed(0)
        layer = fd.FusedDNILinear(*made.args, **made.kwargs, synthesizer=None, dtype=dtype).train(
            training
        )
        plain = nn.Linear(*made.args, **made.kwargs, dtype=dtype).train(training)
        plain.load_state_dict(layer.state_dict())
        found = []
        for module in (layer, plain):
            x = data.detach().clone().requires_grad_()
            out = module(x)
            out.square().sum().backward()
            found.append([out, x.grad, *(p.grad for p in module.parameters())])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
        seen += 1
    assert seen >= 3


# ---------------------------------------------------------------------------------------------
# What lies between two layers


class Block(nn.Module):
    """A skip branch around a decoupled layer, whose mark "no target" is for its own output."""

    def __init__(self, way, make):
        super().__init__()
        torch.manual_seed(0)
        self.way, self.skip, self.head = way, nn.Linear(6, 6), nn.Linear(6, 2)
        self.a, self.b = make(), make()
        for name, p in self.named_parameters():
            if name.endswith("synthesizer.bias"):
                nn.init.normal_(p)

    def forward(self, x):
        h = self.a(x)
        if self.way == "added":
            h = h + self.skip(x)
        elif self.way == "in place":
            h += self.skip(x)
        elif self.way == "view":
            h[:, :] += self.skip(x)
        else:
            h.add_(self.skip(x))
        return self.head(self.b(h))


MAKE = {
    "returned": lambda: fd.FusedDNILinear(6, 6),
    "fused": lambda: fd.FusedDNILinear(6, 6, update=fd.SGD(0.01)),
    "segment": lambda: fd.Decoupled(nn.Linear(6, 6), fd.LinearSynthesizer(6)),
    "container": lambda: fd.DecoupledSequential(fd.FusedDNILinear(6, 6, update=fd.SGD(0.01))),
}


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("way", ["in place", "view", "method"])
def test_a_skip_branch_in_place_gets_its_gradient_or_is_an_error(way, kind):
    torch.manual_seed(1)
    x, found = torch.randn(8, 6), []
    for how in ("added", way):
        net = Block(how, MAKE[kind])
        fd.Schedule(net, target_every=None)
        out = net(x)
        if how == way and kind in ("returned", "segment"):
            # Their backward reads h; with a rule it has been read when the forward returns.
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.square().mean().backward()
            return
        out.square().mean().backward()
        found.append(net.skip.weight.grad)
    assert found[0] is not None and found[1] is not None
    torch.testing.assert_close(*found)


# ---------------------------------------------------------------------------------------------
# Arguments of a segment


class Mix(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 4)

    def forward(self, *parts, scale=1.0, more=None, **named):
        flat = []
        for part in (*parts, *named.values(), *([] if more is None else [more])):
            if isinstance(part, dict):
                flat += part.values()
            elif isinstance(part, (list, tuple)):
                flat += [t for p in part for t in (p if isinstance(p, (list, tuple)) else [p])]
            else:
                flat.append(part)
        return F.relu(self.lin(torch.cat(flat, 1))) * scale


CALLS = {
    "list": lambda d, a, b: d([a, b]),
    "tuple": lambda d, a, b: d((a, b)),
    "nested": lambda d, a, b: d((a, (b,))),
    "dict": lambda d, a, b: d({"a": a, "b": b}),
    "keyword": lambda d, a, b: d(a, more=b),
    "all keywords": lambda d, a, b: d(first=a, second=b),
    "dict by keyword": lambda d, a, b: d(named={"a": a, "b": b}, scale=1.0),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("rule", [None, fd.SGD(0.1)], ids=["returned", "fused"])
@pytest.mark.parametrize("warm", [False, True], ids=["synthetic", "true"])
def test_a_segment_takes_nested_inputs(rule, call, warm):
    def below(call):
        torch.manual_seed(0)
        stem = nn.Linear(3, 4)
        layer = fd.Decoupled(Mix(), fd.LinearSynthesizer(4), update=rule)
        nn.init.normal_(layer.synthesizer.weight)
        if warm:
            fd.Schedule(layer, warmup_steps=5)
        call(layer, stem(torch.randn(6, 3)), torch.randn(6, 4)).square().mean().backward()
        return [stem.weight.grad, *layer.parameters(), *(p.grad for p in layer.parameters())]

    for got, want in zip(below(call), below(lambda d, a, b: d(a, b)), strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want)


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, packed):
        return self.lin(packed.data)


def test_a_segment_takes_a_packed_sequence():
    layer = fd.Decoupled(Packed(), fd.LinearSynthesizer(4))
    nn.init.normal_(layer.synthesizer.weight)
    x = torch.randn(5, 4, requires_grad=True)
    layer(nn.utils.rnn.pack_sequence([x[:3], x[3:]])).sum().backward()
    assert x.grad is not None and x.grad.any()


class Box:
    def __init__(self, data):
        self.data = data


@pytest.mark.parametrize("rule", [None, fd.SGD(0.1)], ids=["returned", "fused"])
def test_a_tensor_that_cannot_be_seen_is_refused(rule):
    layer = fd.Decoupled(Packed(), fd.LinearSynthesizer(4), update=rule)
    before = [p.detach().clone() for p in layer.parameters()]
    x = torch.randn(5, 4, requires_grad=True)
    with pytest.raises(TypeError, match="Box, whose data asks for a gradient"):
        layer(Box(x))
    assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), before, strict=True))
    layer(Box(x.detach())).sum().backward()


@pytest.mark.parametrize("normalization", [None, "batch", "layer"])
@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)])
def test_no_rows_in_eval(normalization, shape):
    """As the plain layer: connected, with gradients of zero."""
    layer = fd.FusedDNILinear(4, 5, normalization=normalization, activation="relu").eval()
    x = torch.randn(shape, requires_grad=True)
    h = layer(x)
    h.sum().backward()
    assert h.shape == (*shape[:-1], 5) and x.grad.shape == shape
    assert not layer.weight.grad.any()


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", ["linear", "rule", "segment", "container", "head"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script")
def test_script(kind, inside):
    """Of what computes as PyTorch's module does: its script; in training it is refused."""
    layer = fd.FusedDNILinear(4, 5, activation="relu", update=fd.SGD(0.1))
    model = {
        "linear": lambda: fd.FusedDNILinear(4, 5, normalization="layer"),
        "rule": lambda: layer,
        "segment": lambda: fd.Decoupled(nn.Linear(4, 5), fd.LinearSynthesizer(5)),
        "container": lambda: fd.DecoupledSequential(layer, nn.Tanh()),
        "head": lambda: fd.DecoupledSequential(layer, fd.FusedDNILinearCrossEntropyLoss(5, 3)),
    }[kind]()
    model, x = nn.Sequential(model) if inside else model, torch.randn(6, 4)
    with pytest.raises(RuntimeError, match="in training is refused.*call eval"):
        torch.jit.script(copy.deepcopy(model))
    want = model.eval()(x)
    if inside or kind in ("container", "head"):
        with pytest.warns(UserWarning, match="which is then not decoupled any more"):
            script = torch.jit.script(copy.deepcopy(model))
    else:
        script = torch.jit.script(model)
    torch.testing.assert_close(script(x), want)


@pytest.mark.filterwarnings("ignore:`torch.jit.script", "ignore:torch.jit.script puts")
def test_a_script_leaves_modules_in_the_mode_that_they_are_in():
    model = fd.DecoupledSequential(fd.FusedDNILinear(4, 5, synthesizer=None), nn.BatchNorm1d(5))
    model[1].eval()
    torch.jit.script(model)
    assert model.training and not model[1].training
