"""Tensors that are no memory, and those who watch or record a call."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fused_dni as fd

pytestmark = pytest.mark.usefixtures("one_thread")

MODULES = {
    "linear": (lambda: fd.FusedDNILinear(6, 7, activation="relu"), (4, 6)),
    "batch": (lambda: fd.FusedDNILinear(6, 7, normalization="batch"), (4, 6)),
    "three dimensions": (lambda: fd.FusedDNILinear(6, 7), (2, 3, 6)),
    "rule": (lambda: fd.FusedDNILinear(6, 7, update=fd.Adam(1e-3)), (4, 6)),
    "exact": (lambda: fd.FusedDNILinear(6, 7, synthesizer=None), (4, 6)),
    "lstm": (lambda: fd.FusedDNILSTM(6, 7), (3, 4, 6)),
    "cell": (lambda: fd.FusedDNILSTMCell(6, 7), (4, 6)),
}
every = pytest.mark.parametrize(("make", "shape"), MODULES.values(), ids=MODULES)


def first(out):
    return out if isinstance(out, torch.Tensor) else out[0]


@every
@pytest.mark.parametrize("training", [False, True])
def test_fake_tensors_have_the_right_shape(make, shape, training):
    module = make().train(training)
    x = torch.randn(shape)
    want = first(copy.deepcopy(module)(x))
    before = [p.detach().clone() for p in module.parameters()]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        got = first(module(mode.from_tensor(x)))
    assert got.shape == want.shape and got.dtype == want.dtype
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))


@every
def test_a_subclass_is_dispatched(make, shape):
    module = make().eval()
    x, y = torch.randn(shape), torch.randn(shape)
    with torch.no_grad():
        got = first(module(TwoTensor(x, y)))
        assert torch.equal(got.a, first(module(x))) and torch.equal(got.b, first(module(y)))


@every
@pytest.mark.parametrize("training", [False, True])
def test_a_gradient_that_stands_for_zeros(make, shape, training):
    module = make().train(training)
    x = torch.randn(shape, requires_grad=True)
    out = first(module(x))
    out.backward(torch._efficientzerotensor(out.shape))
    assert x.grad is not None and torch.isfinite(x.grad).all()


@every
def test_a_negative_view_is_read_as_what_it_means(make, shape):
    module = make().eval()
    x = torch.randn(shape)
    negative = torch._neg_view(x)
    assert negative.is_neg()
    with torch.no_grad():
        torch.testing.assert_close(first(module(negative)), first(module(-x)))


TRACED = {
    **MODULES,
    "both directions": (
        lambda: fd.FusedDNILSTM(6, 7, bidirectional=True, synthesizer=None),
        (3, 4, 6),
    ),
    "head": (lambda: fd.FusedDNILinearCrossEntropyLoss(6, 7), (4, 6)),
    "container": (
        lambda: fd.DecoupledSequential(fd.FusedDNILinear(6, 6), fd.FusedDNILinear(6, 7)),
        (4, 6),
    ),
}


@pytest.mark.parametrize(("make", "shape"), TRACED.values(), ids=TRACED)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.filterwarnings("ignore")  # the tracer's, about every check of a shape
def test_jit_trace_computes_what_the_module_computes(make, shape, grad):
    """With the checks of its own, and behind torch.jit.save, by ops of PyTorch's alone."""
    module = make().eval()
    new = torch.randn(*shape[:-2], 2 * shape[-2], shape[-1])
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(module, torch.randn(shape))
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        for made in (traced, loaded):
            torch.testing.assert_close(first(made(new)), first(module(new)))
    assert "fused_dni::" not in str(traced.inlined_graph)


@pytest.mark.parametrize("update", [None, fd.SGD(0.1)], ids=["returned", "fused"])
def test_jit_trace_of_a_loss(update):
    """The recording passes the tracer's checks, and reads the targets that it is given."""
    module = fd.FusedDNILinearCrossEntropyLoss(6, 7, label_smoothing=0.1, update=update).eval()
    given = torch.randn(2, 3, 6), torch.randint(7, (2, 3))
    new = torch.randn(5, 4, 6), torch.randint(7, (5, 4)).index_fill(0, torch.tensor(0), -100)
    traced = torch.jit.trace(module, given)
    torch.testing.assert_close(traced(*new), module(*new))
    assert "fused_dni::" not in str(traced.inlined_graph)
    if update is not None:
        with pytest.raises(RuntimeError, match="call eval"):
            torch.jit.trace(module.train(), given, check_trace=False)


@pytest.mark.parametrize("name", ["linear", "batch", "rule", "lstm", "cell"])
@pytest.mark.filterwarnings("ignore")
def test_jit_trace_in_training_is_refused(name):
    make, shape = MODULES[name]
    with pytest.raises(RuntimeError, match="call eval"):
        torch.jit.trace(make(), torch.randn(shape), check_trace=False)


def flops(module, *inputs, backward=False):
    with FlopCounterMode(display=False) as counter:
        out = first(module(*inputs))
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_flop_counter_sees_what_it_sees_of_a_linear_layer(training, backward):
    x = torch.randn(32, 64, requires_grad=True)
    layer = fd.FusedDNILinear(64, 128, synthesizer=None).train(training)
    assert flops(layer, x, backward=backward) == flops(nn.Linear(64, 128), x, backward=backward)


def test_the_flop_counter_sees_synthesizer_and_update():
    n, i, o, r = 32, 64, 128, 16
    x = torch.randn(n, i)
    rank = fd.FusedDNILinear(i, o)
    # The head's gradient arrives: forward and weight gradient, prediction, three products of it.
    prediction = 2 * n * (r * o + o * r)
    lesson = 2 * n * 3 * r * o
    assert flops(rank, x, backward=True) == 2 * 2 * n * i * o + prediction + lesson
    ruled = fd.FusedDNILinear(i, o, update=fd.SGD(0.1))
    assert flops(ruled, x, backward=True) == 2 * 2 * n * i * o + prediction + lesson


@pytest.mark.parametrize("train", [False, True])
def test_the_flop_counter_sees_an_lstm(train):
    t, b, i, h = 3, 4, 6, 7
    lstm = fd.FusedDNILSTM(i, h, synthesizer=None).train(train)
    forward = 2 * t * b * 4 * h * (i + h)
    assert flops(lstm, torch.randn(t, b, i)) == forward
    x = torch.randn(t, b, i, requires_grad=True)
    assert flops(lstm, x, backward=True) == 3 * forward


@pytest.mark.parametrize("layers", [1, 2])
def test_the_flop_counter_sees_an_lstms_update(layers):
    """With a rule the weights' gradients are formed where they are applied."""
    x = torch.randn(3, 4, 6, requires_grad=True)
    counted = [
        flops(fd.FusedDNILSTM(6, 7, layers, synthesizer=None, update=rule), x, backward=True)
        for rule in (None, fd.SGD(0.1))
    ]
    assert counted[0] == counted[1] > 0


def test_under_a_dispatch_mode_a_step_is_the_same_step():
    layer = fd.FusedDNILinear(6, 7, activation="tanh", update=fd.SGD(0.1))
    nn.init.normal_(layer.synthesizer.weight)
    twin, x = copy.deepcopy(layer), torch.randn(4, 6)
    layer(x).square().sum().backward()
    with FlopCounterMode(display=False):
        twin(x).square().sum().backward()
    for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert not torch.equal(layer.weight, copy.deepcopy(layer).weight * 0)


def test_a_sharded_tensor_is_an_error_not_a_crash(tmp_path):
    code = f"""
import torch, torch.distributed as dist, fused_dni as fd
dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
from torch.distributed.tensor import DeviceMesh, Replicate, distribute_tensor
x = distribute_tensor(torch.randn(3, 4), DeviceMesh("cpu", [0]), [Replicate()])
try:
    fd.FusedDNILinear(4, 4)(x)
except RuntimeError as error:
    print("refused:", error)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout.startswith("refused:") and "DTensor" in done.stdout, done.stderr


# ---------------------------------------------------------------------------------------------
# Caches


@pytest.mark.parametrize(
    "make",
    [
        lambda: fd.Decoupled(nn.Linear(8, 8), fd.LinearSynthesizer(8), update=fd.SGD(5.0)),
        lambda: fd.FusedDNILinear(8, 8, synthesizer=fd.LinearSynthesizer(8), update=fd.SGD(5.0)),
        lambda: fd.DecoupledSequential(
            fd.Decoupled(nn.Linear(8, 8), fd.LinearSynthesizer(8), update=fd.SGD(5.0))
        ),
    ],
    ids=["Decoupled", "FusedDNILinear", "container"],
)
@pytest.mark.parametrize("target", [True, False])
def test_a_second_forward_under_autocast_sees_the_update(make, target):
    module = make()
    (weight, bias) = (p for n, p in module.named_parameters() if "synthesizer" not in n)
    for name, p in module.named_parameters():
        if name.endswith("synthesizer.weight"):
            nn.init.normal_(p)
    if not target:
        fd.Schedule(module, target_every=None)
    x = torch.randn(16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        F.linear(x, weight, bias)  # whoever shares the weight fills the cache
        once = module(x)
        want = F.linear(x, weight.detach().bfloat16(), bias.detach().bfloat16())
        twice = module(x)
    assert not torch.equal(once, twice)
    torch.testing.assert_close(twice.float(), want.float(), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("where", ["own backprop", "warm-up"])
def test_a_forward_behind_a_backward_under_autocast_sees_the_update(where):
    synthesizer = None if where == "own backprop" else fd.LinearSynthesizer(8)
    module = fd.Decoupled(nn.Linear(8, 8), synthesizer, update=fd.SGD(5.0))
    if synthesizer is not None:
        fd.Schedule(module, warmup_steps=5)
    x = torch.randn(16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        once = module(x)
        once.float().square().mean().backward()
        assert not torch.equal(once, module(x))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["linear", "decoupled", "stack"])
def test_a_checkpointed_forward_finds_its_context_again(kind, reentrant):
    make = {
        "linear": lambda: fd.FusedDNILinear(5, 5, activation="relu", context_features=3),
        "decoupled": lambda: fd.Decoupled(
            nn.Linear(5, 5), fd.LinearSynthesizer(5, context_features=3)
        ),
        "stack": lambda: nn.Sequential(
            *[fd.FusedDNILinear(5, 5, context_features=3) for _ in range(3)]
        ),
    }[kind]
    layer = make()
    for name, p in layer.named_parameters():
        if "context" in name:
            nn.init.normal_(p)
    batches = [(torch.randn(8, 5), torch.randint(3, (8,))) for _ in range(2)]

    def gradients(run, backward_inside):
        twin = copy.deepcopy(layer)
        losses = []
        for x, y in batches:  # both forwards before both backwards: no last context would do
            with fd.condition_on(y):
                losses.append(run(twin, x.clone().requires_grad_()).square().mean())
        if backward_inside:
            with fd.condition_on(batches[0][1]):  # another's context, which is not theirs
                sum(losses).backward()
        else:
            sum(losses).backward()
        return [p.grad for p in twin.parameters()]

    want = gradients(lambda m, x: m(x), False)
    for inside in (False, True):
        got = gradients(lambda m, x: checkpoint(m, x, use_reentrant=reentrant), inside)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_no_context_is_kept_where_nothing_is_checkpointed():
    from fused_dni import context

    context._spans.clear()
    layer = fd.FusedDNILinear(5, 6, context_features=3)
    with fd.condition_on(torch.randint(3, (8,))):
        layer(torch.randn(8, 5)).sum().backward()
    assert not context._spans


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        *TRACED.values(),
        (lambda: fd.Decoupled(nn.Linear(6, 7), fd.LinearSynthesizer(7)), (4, 6)),
    ],
    ids=[*TRACED, "segment"],
)
@pytest.mark.parametrize("training", [False, True])
def test_fx_calls_a_module_as_a_whole(make, shape, training):
    """As it does those of PyTorch: what was traced trains as the model itself."""
    module = nn.Sequential(nn.Identity(), make()).train(training)
    if training and isinstance(module[1], fd.FusedDNILinearCrossEntropyLoss):
        return  # it takes a target
    traced = torch.fx.symbolic_trace(module)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert called == ["0", "1"] and type(traced.get_submodule("1")) is type(module[1])
    x = torch.randn(shape)
    twin = copy.deepcopy(module)
    made, want = first(traced(x)), first(twin(x))
    torch.testing.assert_close(made, want)
    if made.requires_grad:
        for out in (made, want):
            out.square().sum().backward()
    for a, b in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)
        assert (a.grad is None) is (b.grad is None)


def test_fx_of_a_module_alone_is_refused():
    with pytest.raises(TypeError, match="symbolic_trace of a FusedDNILinear alone is refused"):
        torch.fx.symbolic_trace(fd.FusedDNILinear(6, 7))
