"""What works and what is refused: the rows of docs/semantics.md.

With ``update=None`` a decoupled layer is an ordinary layer to everything around it. A fused rule
changes parameters inside the forward; where that would silently be wrong it is refused.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
import re
import warnings
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
import twins
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint
from twins import close, double, kept, linear, present

import fused_dni as fd

pytestmark = pytest.mark.usefixtures("one_thread")
RULE = fd.SGD(0.1)


def network(rule=None, **options):
    return nn.Sequential(
        linear(4, 6, normalization="batch", activation="relu", update=rule, **options),
        linear(6, 5, activation="gelu", update=rule, **options),
        linear(5, 3, synthesizer=None, update=rule),
    )


def loss_of(model, x, y):
    return F.cross_entropy(model(x), y)


def data(n=8):
    return double(n, 4), torch.randint(3, (n,))


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------------------------------------
# Works, without a rule


OPTIMIZERS = {
    "SGD": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "Adam": functools.partial(torch.optim.Adam, lr=0.01),
    "AdamW fused": functools.partial(torch.optim.AdamW, lr=0.01, fused=True),
    "RMSprop": functools.partial(torch.optim.RMSprop, lr=0.01),
    "Adagrad": functools.partial(torch.optim.Adagrad, lr=0.05),
    "LBFGS": functools.partial(torch.optim.LBFGS, lr=0.01, max_iter=2),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("zero", ["before", "after"])
def test_any_optimizer(make, zero):
    """``zero_grad`` on either side of the forward; gradients come in the backward alone."""
    model = network()
    optimizer = make(model.parameters())
    x, y = data(32)
    before = model[0].weight.detach().clone()
    losses = []

    def closure():
        if zero == "before":
            optimizer.zero_grad()
        loss = loss_of(model, x, y)
        if zero == "after":
            optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(15):
        optimizer.step(closure)
    if not isinstance(optimizer, torch.optim.LBFGS):  # a model of the loss that ours is not
        assert losses[-1] < losses[0]
    assert not torch.equal(model[0].weight, before)


def test_gradient_accumulation():
    model, twin = network(), None
    twin = copy.deepcopy(model)
    parts = [data() for _ in range(3)]
    sums = {}
    for x, y in parts:
        loss_of(model, x, y).backward()
        twin.zero_grad()
        loss_of(twin, x, y).backward()
        for name, g in gradients(twin).items():
            sums[name] = sums.get(name, 0) + g
    close(gradients(model), sums)


def test_hooks_on_parameters_and_clipping():
    model, (x, y) = network(), data()
    twin = copy.deepcopy(model)
    loss_of(twin, x, y).backward()
    seen = []
    model[0].weight.register_hook(lambda g: 3 * g)
    model[0].synthesizer.weight.register_hook(lambda g: 2 * g)
    model[1].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    loss_of(model, x, y).backward()
    close(model[0].weight.grad, 3 * twin[0].weight.grad)
    close(model[0].synthesizer.weight.grad, 2 * twin[0].synthesizer.weight.grad)
    close(seen, [twin[1].weight.grad])
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    clipped = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
    assert norm > 0.01 and clipped <= 0.0100001


def test_module_hooks():
    layer = linear(4, 5)
    seen = []
    layer.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    layer.register_full_backward_hook(lambda m, gi, go: seen.append((gi[0].shape, go[0].shape)))
    layer(double(6, 4, grad=True)).sum().backward()
    assert seen == [(6, 5), ((6, 4), (6, 5))]


@pytest.mark.parametrize("rule", [None, RULE], ids=["returned", "fused"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_copies_continue_as_the_original(rule, way):
    """Also in the middle of training, with the rules' state (state dicts hold parameters alone)."""
    rule = rule and fd.SGD(0.1, momentum=0.9)
    model, (x, y) = network(rule), data()
    if way != "state_dict":
        loss_of(model, x, y).backward()
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model if way == "torch.save" else model.state_dict(), file)
        file.seek(0)
        if way == "torch.save":
            twin = torch.load(file, weights_only=False)
        else:
            twin = network(rule)
            twin.load_state_dict(torch.load(file))
    for m in (model, twin):
        m.zero_grad()
        for _ in range(2):
            loss_of(m, x, y).backward()
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    close(dict(twin.state_dict()), dict(model.state_dict()), 0)
    close(gradients(twin), gradients(model), 0)


def test_plain_state_dict_loads():
    plain = nn.Linear(4, 5)
    layer = fd.FusedDNILinear(4, 5)
    found = layer.load_state_dict(plain.state_dict(), strict=False)
    assert not found.unexpected_keys
    assert found.missing_keys and all(k.startswith("synthesizer.") for k in found.missing_keys)
    exact = fd.FusedDNILinear(4, 5, synthesizer=None)
    exact.load_state_dict(plain.state_dict())
    assert list(exact.state_dict()) == list(plain.state_dict())
    x = torch.randn(3, 4)
    torch.testing.assert_close(exact.eval()(x), plain(x))


def test_order_of_state_dict_keys():
    layer = fd.FusedDNILinear(4, 5, normalization="batch", context_features=2, update=RULE)
    keys = [k.split(".")[0] for k in layer.state_dict()]
    assert list(dict.fromkeys(keys)) == ["weight", "bias", "norm", "synthesizer"]


@pytest.mark.parametrize("what", ["layer", "bias", "norm", "synthesizer"])
def test_parametrizations(what):
    def model():
        layer = linear(4, 5, normalization="layer", activation="tanh")
        if what == "layer":
            weight_norm(layer)
        elif what == "bias":
            weight_norm(layer, "bias", dim=None)
        elif what == "norm":
            weight_norm(layer.norm, "weight", dim=None)
        else:
            weight_norm(layer.synthesizer, "weight")
        return layer

    layer = model()
    x, arrived = double(6, 4), double(6, 5)
    h = F.linear(x, layer.weight, layer.bias)
    h = torch.tanh(F.layer_norm(h, (5,), layer.norm.weight, layer.norm.bias))
    s = twins.synthetic(layer, h.detach())
    local = [p for n, p in layer.named_parameters() if not n.startswith("synthesizer")]
    expected = torch.autograd.grad(h, local, s)
    out = layer.synthesizer(h.detach())
    loss = (out - layer.scale_of(h) * arrived).square().sum() / 6
    lesson = torch.autograd.grad(loss, list(layer.synthesizer.parameters()))
    layer(x).backward(arrived)
    close([p.grad for p in local], list(expected))
    close([p.grad for p in layer.synthesizer.parameters()], list(lesson))


def test_functional_call():
    layer, x, arrived = linear(4, 5, normalization="batch"), double(6, 4), double(6, 5)
    twin = copy.deepcopy(layer)
    twin(x).backward(arrived)
    parameters = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters()}
    buffers = {n: b.clone() for n, b in layer.named_buffers()}
    before = twins.snapshot(layer)
    h = torch.func.functional_call(layer, {**parameters, **buffers}, (x,))
    made = torch.autograd.grad(h, list(parameters.values()), arrived)
    expected = [p.grad for p in twin.parameters()]
    close(list(made), expected)
    close(buffers["norm.running_mean"], twin.norm.running_mean)
    after = twins.snapshot(layer)
    assert twins.differences(before, after) == [".statistics"]


def test_tied_weights():
    model = nn.Sequential(linear(5, 5, activation="tanh"), linear(5, 5, activation="tanh"))
    twin = copy.deepcopy(model)
    model[1].weight = model[0].weight
    twin[1].load_state_dict(model[1].state_dict())
    x, arrived = double(6, 5), double(6, 5)
    for m in (model, twin):
        m(x).backward(arrived)
    close(model[0].weight.grad, twin[0].weight.grad + twin[1].weight.grad)


@pytest.mark.parametrize("rule", [None, RULE], ids=["returned", "fused"])
@pytest.mark.parametrize("what", ["weight", "bias", "norm.weight", "synthesizer", "everything"])
@pytest.mark.parametrize("synthesizer", ["default", "mlp"])
def test_frozen(rule, what, synthesizer):
    layer = linear(4, 5, normalization="layer", update=rule,
                   synthesizer=synthesizer if synthesizer == "default" else
                   fd.MLPSynthesizer(5, hidden=4, dtype=torch.float64))  # fmt: skip
    for name, p in layer.named_parameters():
        p.requires_grad_(not (what == "everything" or name.startswith(what)))
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    x = double(6, 4, grad=True)
    layer(x).square().sum().backward()
    assert x.grad is not None
    for name, p in layer.named_parameters():
        moved = p.grad is not None if rule is None else not torch.equal(p, before[name])
        if name == "synthesizer.down" or name.startswith("synthesizer.layers.1"):
            continue  # where the gradient may be zero
        assert moved == p.requires_grad, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", [None, RULE], ids=["returned", "fused"])
@pytest.mark.parametrize("synthesizer", ["default", "mlp", None])
def test_autocast(dtype, rule, synthesizer):
    """Masters in float32, activations in low precision; float16 needs a loss scale, told."""
    if synthesizer == "mlp":
        synthesizer = fd.MLPSynthesizer(6, hidden=4)
        twins.disturb(synthesizer)
    layer = fd.FusedDNILinear(
        4, 6, normalization="batch", activation="relu", synthesizer=synthesizer, update=rule
    )
    x = torch.randn(16, 4, requires_grad=True)
    scale = 64.0
    if dtype == torch.float16:
        fd.Schedule(layer, loss_scale=scale)
    wide = copy.deepcopy(layer)
    before = kept(layer.parameters())
    y = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        h = layer(x)
    assert h.dtype == dtype
    factor = scale if dtype == torch.float16 else 1.0
    (h.float().square().mean() * factor).backward()
    (wide(y).square().mean() * factor).backward()
    assert all(p.dtype == torch.float32 for p in layer.parameters())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        x.grad, y.grad, rtol=8 * eps, atol=8 * eps * float(y.grad.abs().max())
    )
    for p, q, b in zip(layer.parameters(), wide.parameters(), before, strict=True):
        got, expected = (p.grad, q.grad) if rule is None else (p.detach() - b, q.detach() - b)
        room = 16 * eps * float(expected.abs().max())
        torch.testing.assert_close(got, expected, rtol=16 * eps, atol=room + 1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalization", twins.NORMALIZATIONS)
def test_parameters_in_low_precision(dtype, normalization):
    layer = fd.FusedDNILinear(4, 5, normalization=normalization, activation="gelu", dtype=dtype)
    twins.disturb(layer.synthesizer)
    wide = copy.deepcopy(layer).float()
    x, g = torch.randn(8, 4, dtype=dtype), torch.randn(8, 5, dtype=dtype)
    layer(x).backward(g)
    wide(x.float()).backward(g.float())
    for p, q in zip(layer.parameters(), wide.parameters(), strict=True):
        assert p.grad.dtype == dtype
        room = 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            p.grad.float(), q.grad, rtol=room, atol=room * float(q.grad.abs().max()) + 1e-6
        )


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("synthesizer", ["default", "mlp"])
def test_checkpointing_without_a_rule(reentrant, synthesizer):
    made = synthesizer if synthesizer == "default" else fd.MLPSynthesizer(5, 4, dtype=torch.float64)
    layer, x, arrived = (
        linear(4, 5, activation="gelu", synthesizer=made),
        double(6, 4),
        double(6, 5),
    )
    twin = copy.deepcopy(layer)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    checkpoint(layer, a, use_reentrant=reentrant).backward(arrived)
    twin(b).backward(arrived)
    close(a.grad, b.grad)
    close(gradients(layer), gradients(twin))


# ---------------------------------------------------------------------------------------------
# Refused, with a rule


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("synthesizer", ["default", None])
@pytest.mark.parametrize("kind", ["linear", "decoupled"])
def test_checkpointing_with_a_rule_is_refused(reentrant, synthesizer, kind):
    layer = linear(4, 5, update=RULE, synthesizer=synthesizer)
    if kind == "decoupled":
        made = fd.LinearSynthesizer(5, dtype=torch.float64) if synthesizer else None
        layer = fd.Decoupled(nn.Linear(4, 5, dtype=torch.float64), made, update=RULE)
    x = double(6, 4, grad=True)
    before = twins.snapshot(layer)
    with pytest.raises(RuntimeError, match="activation checkpointing is refused"):
        checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    twins.unchanged(before, twins.snapshot(layer))


@pytest.mark.parametrize("synthesizer", ["default", None])
def test_untold_float16_scale_is_refused(synthesizer):
    layer = fd.FusedDNILinear(4, 5, synthesizer=synthesizer, update=RULE)
    with torch.autocast("cpu", dtype=torch.float16):
        with pytest.raises(RuntimeError, match="loss_scale=scaler"):
            layer(torch.randn(6, 4))


def test_float16_without_prediction_needs_no_telling():
    layer = fd.FusedDNILinear(4, 5, synthesizer=None)
    with torch.autocast("cpu", dtype=torch.float16):
        layer(torch.randn(6, 4)).sum().backward()
    assert layer.weight.grad is not None


def test_tied_weights_with_a_rule_are_refused():
    model = nn.Sequential(linear(5, 5, update=RULE), linear(5, 5, update=RULE))
    model[1].weight = model[0].weight
    with pytest.raises(RuntimeError, match="tied between two layers with fused rules"):
        model(double(6, 5))


def test_tied_weights_in_exact_layers_are_refused_before_anything_changes():
    model = nn.Sequential(*(linear(5, 5, synthesizer=None, update=RULE) for _ in range(2)))
    model[1].weight = model[0].weight
    before = twins.snapshot(model)
    with pytest.raises(RuntimeError, match="tied between two layers with fused rules"):
        model(double(6, 5))
    twins.unchanged(before, twins.snapshot(model))


@pytest.mark.parametrize("synthesizer", ["default", None])
@pytest.mark.parametrize("asks", [True, False])
def test_functional_call_with_a_rule_is_refused(synthesizer, asks):
    layer = linear(4, 5, update=RULE, synthesizer=synthesizer)
    given = {n: p.detach().clone().requires_grad_(asks) for n, p in layer.named_parameters()}
    before = twins.snapshot(layer)
    with pytest.raises(RuntimeError, match="no plain nn.Parameter"):
        torch.func.functional_call(layer, given, (double(6, 4),))
    twins.unchanged(before, twins.snapshot(layer))


@pytest.mark.parametrize("synthesizer", ["default", None])
def test_parametrization_with_a_rule_is_refused(synthesizer):
    layer = weight_norm(linear(4, 5, update=RULE, synthesizer=synthesizer))
    with pytest.raises(RuntimeError, match="a parametrization, functional_call or sharding"):
        layer(double(6, 4))


def test_torch_func_transforms_are_refused_by_torch():
    layer, x = linear(4, 5), double(6, 4)
    parameters = {n: p.detach() for n, p in layer.named_parameters()}
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).sum())(parameters)


def test_gradient_accumulation_with_a_rule_is_several_updates():
    """Not refused: each forward is a step of its own."""
    layer = linear(4, 5, update=fd.Adam(0.1))
    for _ in range(3):
        layer(double(6, 4)).sum().backward()
    assert layer.update.steps == 3 and layer.synthesizer_update.steps == 3


# ---------------------------------------------------------------------------------------------
# Distributed: two processes on gloo


def _ddp(rank, file, out):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    found = {}
    try:
        torch.manual_seed(0)
        model = network()
        x, y = data(16)
        parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        schedule = fd.Schedule(parallel, target_every=2)
        optimizer = torch.optim.SGD(parallel.parameters(), 0.1)
        half = slice(8 * rank, 8 * rank + 8)
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(parallel, x[half], y[half]).backward()
            optimizer.step()
            schedule.step()
        found["ddp"] = {n: p.detach().clone() for n, p in parallel.module.named_parameters()}
        ruled = nn.parallel.DistributedDataParallel(network(RULE))
        for name, wrapped in (("rule", ruled), ("exact rule", network(RULE)[2])):
            if name == "exact rule":
                wrapped = nn.parallel.DistributedDataParallel(wrapped)
            inputs = x[half] if name == "rule" else double(8, 5)
            try:
                wrapped(inputs)
            except RuntimeError as error:
                found[name] = str(error)
        from torch.distributed.fsdp import fully_shard

        torch.manual_seed(0)
        sharded = network()
        for layer in sharded:
            fully_shard(layer)
        fully_shard(sharded)
        schedule = fd.Schedule(sharded, target_every=2)
        optimizer = torch.optim.SGD(sharded.parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(sharded, x[half], y[half]).backward()
            optimizer.step()
            schedule.step()
        found["fsdp"] = {n: p.full_tensor().detach() for n, p in sharded.named_parameters()}
        for name, each in (("fsdp rule", True), ("fsdp root rule", False)):
            ruled = network(RULE)
            if each:
                for layer in ruled:
                    fully_shard(layer)
            fully_shard(ruled)
            try:
                ruled(x[half])
            except RuntimeError as error:
                found[name] = str(error)
        torch.save(found, f"{out}.{rank}")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    ranks.replicas(_ddp, folder / "init", folder / "out")
    return [torch.load(f"{folder / 'out'}.{rank}") for rank in range(2)]


def expected_of_two_replicas():
    """What averaging two replicas' gradients gives, in one process."""
    torch.manual_seed(0)
    model = network()
    x, y = data(16)
    replicas = [copy.deepcopy(model) for _ in range(2)]
    schedules = [fd.Schedule(replica, target_every=2) for replica in replicas]
    for _ in range(2):
        for r, replica in enumerate(replicas):
            replica.zero_grad()
            half = slice(8 * r, 8 * r + 8)
            loss_of(replica, x[half], y[half]).backward()
            schedules[r].step()
        for a, b in zip(*(r.parameters() for r in replicas), strict=True):
            if a.grad is None:  # synthesizers, on the step without targets
                continue
            step = 0.1 * (a.grad + b.grad) / 2
            with torch.no_grad():
                a -= step
                b -= step
    return dict(replicas[0].named_parameters())


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_data_parallel_without_a_rule(distributed, way):
    expected = expected_of_two_replicas()
    for found in distributed:
        assert found[way].keys() == expected.keys()
        for name, p in expected.items():
            close(found[way][name], p.detach(), 1e-12)


@pytest.mark.parametrize("what", ["rule", "exact rule"])
def test_ddp_with_a_rule_is_refused(distributed, what):
    for found in distributed:
        assert "under DistributedDataParallel is refused" in found[what]


@pytest.mark.parametrize("what", ["fsdp rule", "fsdp root rule"])
def test_fsdp_with_a_rule_is_refused(distributed, what):
    for found in distributed:
        assert "update=None" in found[what]


# ---------------------------------------------------------------------------------------------
# In front of an in-place activation


@pytest.mark.parametrize("normalization", twins.NORMALIZATIONS)
def test_inplace_activation_behind_an_exact_layer(normalization):
    exact = linear(4, 5, synthesizer=None, normalization=normalization)
    twin = twins.Plain(exact)
    x = double(6, 4)
    F.relu(exact(x), inplace=True).sum().backward()
    F.relu(twin(x), inplace=True).sum().backward()
    close([p.grad for p in present(exact.local_parameters())], [p.grad for p in twin.slots()])


def test_inplace_activation_behind_a_prediction_is_an_error():
    """The synthesizer needs the output that it predicted from."""
    h = F.relu(linear(4, 5)(double(6, 4)), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


# ---------------------------------------------------------------------------------------------
# The documentation


def test_every_test_that_the_documentation_names_exists():
    tests = Path(__file__).resolve().parents[1]
    files = {path.name: path for path in tests.rglob("test_*.py")}
    text = (tests.parent / "docs" / "semantics.md").read_text()
    named, where, default = 0, "", ""
    for line in text.splitlines():
        said = re.search(r"`(test_\w+\.py)` unless", line)  # of the table that follows
        default = said[1] if said else default
        file = default if line.startswith("|") else ""
        if line.startswith("```"):
            continue
        for name in re.findall(r"`((?:test_\w+\.py)?(?:::)?(?:test_\w+)?)`", line):
            path, _, test = name.partition("::") if "." in name or ":" in name else ("", "", name)
            where = path or (where if "::" in name else file)
            assert where in files, name
            if test:
                assert f"def {test}(" in files[where].read_text(), f"{where}::{test}"
            named += 1
    assert named > 60
