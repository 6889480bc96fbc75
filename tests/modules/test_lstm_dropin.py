"""Recurrent modules among everything else: rules, optimizers, checkpoints, distribution.

As ``test_dropin.py``: what works, and what is refused where a rule would silently be wrong.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import ranks
import torch
import torch.distributed as dist
import twins
from lstm_twins import BACKENDS, cell, close, double, grads, lstm, plain_of
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint

import fused_dni as fd

pytestmark = [pytest.mark.slow(50), pytest.mark.usefixtures("one_thread")]
backends = pytest.mark.parametrize("backend", BACKENDS)
kinds = pytest.mark.parametrize("kind", ["window", "cell"])
STEPS, BATCH, INPUTS, HIDDEN = 4, 3, 2, 5
RULES = {
    "sgd": (fd.SGD(0.1, weight_decay=0.01), torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.01}),
    "momentum": (fd.SGD(0.1, 0.9), torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "nesterov": (
        fd.SGD(0.1, 0.9, nesterov=True), torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    ),
    "adam": (fd.Adam(0.01), torch.optim.Adam, {"lr": 0.01}),
    "adamw": (fd.AdamW(0.01), torch.optim.AdamW, {"lr": 0.01}),
}  # fmt: skip
ENDS = torch.tensor([[False, True, False], [False] * 3, [True, False, False]])


def module_of(kind, rule=None, **options):
    options = {"auxiliary": True, "update": rule, **options}
    if kind == "cell":
        return cell(INPUTS, HIDDEN, **options)
    return lstm(INPUTS, HIDDEN, 2, **options)


def window(module, x, state, ended=None):
    """One window; output and the state to go on with."""
    if isinstance(module, fd.FusedDNILSTM):
        return module(x, state, end_of_sequence=ended)
    steps = []
    for step in x:
        state = module(step, state)
        steps.append(state[0])
    return torch.stack(steps), module.boundary(state, ended)


def train(module, x, optimizer=None, state=None, schedule=None):
    """A window an optimizer step; the state behind the last."""
    for k, inputs in enumerate(x):
        output, state = window(module, inputs, state, ENDS[k % 3])
        (output - k).square().mean().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
    return tuple(t.detach() for t in state)


def values(module):
    return {n: p.detach().clone() for n, p in module.named_parameters()}


# ---------------------------------------------------------------------------------------------
# Rules


@backends
@kinds
@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_torch_optim(backend, kind, name):
    """What a rule does to layers, synthesizer and auxiliary head is what the optimizer of that name
    does with the gradients that the module without a rule hands out."""
    rule, optimizer, rates = RULES[name]
    ruled = module_of(kind, rule, backend=backend)
    returned = module_of(kind, None, backend=backend)
    returned.load_state_dict(ruled.state_dict())
    x = double(5, STEPS, BATCH, INPUTS)
    train(ruled, x)
    train(returned, x, optimizer(returned.parameters(), **rates))
    # Adam divides by the root of what it is given: a rounding in a gradient of nearly nothing shows
    close(values(ruled), values(returned), 1e-12 if "adam" not in name else 1e-8)
    assert all(p.grad is None for p in ruled.parameters()), "never handed out"
    assert ruled.update.steps == 5 and ruled.synthesizer_update.steps == 5
    assert ruled.auxiliary_update.steps == 4, "one for each entrance"


@backends
@kinds
@pytest.mark.parametrize("synthesizer", ["default", None])
def test_a_rule_is_applied_once_at_the_end_of_the_backward(backend, kind, synthesizer):
    """Windows of one backward add up; until its end everything is as it was."""
    options = {"synthesizer": synthesizer, "auxiliary": synthesizer is not None}
    module = module_of(kind, fd.SGD(0.1), backend=backend, **options)
    returned = module_of(kind, None, backend=backend, **options)
    returned.load_state_dict(module.state_dict())
    before, seen = values(module), []
    x = double(2, STEPS, BATCH, INPUTS)
    for net in (module, returned):
        first = x[0].clone().requires_grad_()
        if net is module:
            first.register_hook(lambda g: seen.append(values(module)))
        a, state = window(net, first, None)
        b, _ = window(net, x[1], state)
        (a.square().sum() + b.square().sum()).backward()
    close(seen, [before], 0)
    assert module.update.steps == 1
    expected = {n: before[n] - 0.1 * p.grad for n, p in returned.named_parameters()}
    close(values(module), expected, 1e-11)


class _Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise ArithmeticError("below")


@backends
@kinds
@pytest.mark.parametrize("synthesizer", ["default", None])
def test_a_backward_that_raises_changes_nothing(backend, kind, synthesizer):
    module = module_of(
        kind, fd.Adam(0.1), backend=backend, synthesizer=synthesizer,
        auxiliary=synthesizer is not None,
    )  # fmt: skip
    x = double(3, STEPS, BATCH, INPUTS, grad=True)
    output, state = window(module, x[0], None)
    output.sum().backward()
    if synthesizer is None:
        state = tuple(t.detach() for t in state)
    before = twins.snapshot(module)
    statistics = [module.statistics.clone(), module.auxiliary_statistics.clone()]
    output, _ = window(module, _Broken.apply(x[1]), state)
    with pytest.raises(ArithmeticError, match="below"):
        output.sum().backward()
    close([module.statistics, module.auxiliary_statistics], statistics, 0)
    twins.unchanged(before, twins.snapshot(module))
    output, _ = window(module, x[2], None)
    output.sum().backward()
    assert module.update.steps == 2


@backends
@kinds
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["arriving", "input", "prediction"])
def test_gradients_that_are_not_finite_are_skipped_and_counted(backend, kind, value, where):
    module = module_of(kind, fd.Adam(0.1), backend=backend)
    x = double(4, STEPS, BATCH, INPUTS)
    state = train(module, x[:2])
    if where == "input":
        x[2, 1, 1, 0] = value
    if where == "prediction":
        with torch.no_grad():
            module.synthesizer.bias[1] = value
    before = values(module)
    output, _ = window(module, x[2], state)
    loss = output.square().mean()
    (loss * value if where == "arriving" else loss).backward()
    if where == "input" and value == float("inf"):  # the gates saturate: their slopes are zero
        assert module.skipped_updates in (0, 1)
        return
    assert module.skipped_updates == 1 and module.update.steps == 2
    found = fd.diagnostics(module)[""]
    assert found["skipped_updates"] == found["skipped_synthesizer_updates"] == 1
    assert all(torch.isfinite(s).all() for s in (module.statistics, module.auxiliary_statistics))
    for name, value in values(module).items():  # what the head learns from is M's, and finite
        if where != "arriving" or not name.startswith("auxiliary_head."):
            torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    if where != "prediction":
        train(module, x[3:])
        assert module.update.steps == 3


@kinds
def test_optimizer_state_goes_round(kind):
    """Through a file, the auxiliary head's among it; training goes on as if nothing had been."""
    x = double(6, STEPS, BATCH, INPUTS)
    one = module_of(kind, fd.Adam(0.01), synthesizer_update=fd.SGD(0.05, momentum=0.9))
    optimizer = fd.FusedOptimizer(one)
    names = [g["name"] for g in optimizer.param_groups]
    assert names == ["", ".synthesizer", ".auxiliary_head"]
    state = train(one, x[:3], optimizer)
    file = io.BytesIO()
    torch.save({"model": one.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    two = module_of(kind, fd.Adam(0.5), synthesizer_update=fd.SGD(0.5, momentum=0.1))
    two.load_state_dict(saved["model"])
    other = fd.FusedOptimizer(two)
    other.load_state_dict(saved["optimizer"])
    # A state from a file is in new memory: rows that ended are zeroed by hand, and it is told
    state = tuple(t * ~ENDS[2][:, None] for t in state)
    one.remember(state), two.remember(state)
    for module, o in ((one, optimizer), (two, other)):
        train(module, x[3:], o, state)
    close(values(one), values(two), 0)
    for (_, a, _), (_, b, _) in zip(one.rules(), two.rules(), strict=True):
        assert a.steps == b.steps and twins.same(
            twins._tensors(a.moments()), twins._tensors(b.moments())
        )


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.StepLR(o, 1, 0.5),
        lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=8),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    ],
    ids=["StepLR", "OneCycleLR", "CosineAnnealingLR"],
)
def test_learning_rate_schedulers_are_obeyed(make):
    module = module_of("window", fd.SGD(0.1, momentum=0.9), synthesizer=None, auxiliary=False)
    plain = plain_of(module)
    optimizers = [
        fd.FusedOptimizer(module),
        torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9),
    ]
    schedulers = [make(o) for o in optimizers]
    for x in double(5, STEPS, BATCH, INPUTS):
        for net, optimizer, scheduler in zip((module, plain), optimizers, schedulers, strict=True):
            optimizer.zero_grad()
            net(x)[0].square().sum().backward()
            optimizer.step()
            scheduler.step()
        close(values(module), values(plain))


def test_ordinary_parameters():
    model = nn.ModuleDict({"embed": nn.Embedding(3, INPUTS), "lstm": module_of("window", fd.SGD(1)),
                           "cell": module_of("cell"), "head": nn.Linear(3, 3)})  # fmt: skip
    mine = {id(p) for p in model["lstm"].parameters()}
    ordinary = {id(p) for p in fd.ordinary_parameters(model)}
    assert ordinary == {id(p) for p in model.parameters()} - mine


@backends
@pytest.mark.parametrize("rule", [None, fd.SGD(0.1)])
@pytest.mark.parametrize("what", ["weight_hh_l1", "bias_ih_l0", "synthesizer", "auxiliary_head"])
def test_frozen(backend, rule, what):
    module = module_of("window", rule, backend=backend)
    for name, p in module.named_parameters():
        p.requires_grad_(not name.startswith(what))
    before = values(module)
    train(module, double(3, STEPS, BATCH, INPUTS))
    for name, p in module.named_parameters():
        moved = p.grad is not None if rule is None else not torch.equal(p, before[name])
        assert moved == p.requires_grad, name


# ---------------------------------------------------------------------------------------------
# Phases


def test_a_schedule_leads_through_warmup_targets_and_none():
    module = module_of("window", auxiliary=False, target_scale=1.0)
    plain = plain_of(module)
    schedule = fd.Schedule(module, warmup_steps=2, target_every=2)
    learned, injected, state = [], [], None
    for x in double(7, STEPS, BATCH, INPUTS):
        module.zero_grad(), plain.zero_grad()
        start = None if state is None else tuple(t.detach() for t in state)
        output, state = module(x, state)
        output.square().sum().backward()
        plain(x, start)[0].square().sum().backward()
        learned.append(module.synthesizer.weight.grad is not None)
        gap = module.weight_hh_l1.grad - plain.weight_hh_l1.grad
        injected.append(bool(gap.abs().max() > 1e-9))
        schedule.step()
    assert learned == [False, True, True, False, True, False, True]  # the first continues nothing
    assert injected == [False, False, True, True, True, True, True]


@kinds
def test_a_loss_scaler(kind):
    """float16's scale, told through the schedule: nothing but rounding differs."""
    x = double(4, STEPS, BATCH, INPUTS)
    found = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(1)
        module = module_of(kind, fd.SGD(0.1))
        fd.Schedule(module, loss_scale=scale)
        state = None
        for inputs in x:
            output, state = window(module, inputs, state)
            (output.square().mean() * scale).backward()
        found.append(values(module))
    close(*found)


def test_untold_float16_scale_is_refused():
    module = fd.FusedDNILSTM(INPUTS, HIDDEN)
    x = torch.randn(STEPS, BATCH, INPUTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x.bfloat16())[0].dtype == torch.float32
    with pytest.raises(ValueError, match="input has dtype torch.bfloat16, the weights"):
        module(x.bfloat16())


# ---------------------------------------------------------------------------------------------
# Copies and state dicts


@kinds
@pytest.mark.parametrize("rule", [None, fd.SGD(0.1, momentum=0.9)])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_continue_as_the_original(kind, rule, way):
    """In the middle of a stream, behind a window in which a row ended."""
    model, x = module_of(kind, rule), double(6, STEPS, BATCH, INPUTS)
    state = train(model, x[:3])
    state = tuple(t * ~ENDS[2][:, None] for t in state)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    for m in (model, twin):
        m.zero_grad()
        train(m, x[3:], state=state)
    close(values(twin), values(model), 0)
    close([p.grad for p in twin.parameters()], [p.grad for p in model.parameters()], 0)


@kinds
def test_state_dicts_of_nn_lstm(kind):
    """As of the linear layer: strictly both ways without a synthesizer, else but for its keys."""
    plain = nn.LSTMCell(INPUTS, HIDDEN) if kind == "cell" else nn.LSTM(INPUTS, HIDDEN, 2)
    make = fd.FusedDNILSTMCell if kind == "cell" else fd.FusedDNILSTM
    sizes = (INPUTS, HIDDEN) if kind == "cell" else (INPUTS, HIDDEN, 2)
    x = torch.randn(BATCH, INPUTS) if kind == "cell" else torch.randn(STEPS, BATCH, INPUTS)
    for options in ({}, {"auxiliary": True}, {"update": fd.SGD(0.1)}):
        module = make(*sizes, **options)
        found = module.load_state_dict(plain.state_dict(), strict=False)
        assert not found.unexpected_keys
        heads = ("synthesizer.", "auxiliary_head.")
        assert found.missing_keys and all(k.startswith(heads) for k in found.missing_keys)
        torch.testing.assert_close(module.eval()(x)[0], plain(x)[0])
        fresh = type(plain)(*sizes)
        found = fresh.load_state_dict(module.state_dict(), strict=False)
        assert not found.missing_keys and all(k.startswith(heads) for k in found.unexpected_keys)
        close(dict(fresh.state_dict()), dict(plain.state_dict()), 0)
    exact = make(*sizes, synthesizer=None)
    exact.load_state_dict(plain.state_dict())
    type(plain)(*sizes).load_state_dict(exact.state_dict())


# ---------------------------------------------------------------------------------------------
# Works without a rule


@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop", "Adagrad"])
@kinds
def test_any_optimizer_learns(name, kind):
    model = nn.ModuleDict(
        {"core": fd.FusedDNILSTM(INPUTS, 16) if kind == "window" else
         fd.FusedDNILSTMCell(INPUTS, 16), "head": nn.Linear(16, INPUTS)}
    )  # fmt: skip
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.05)
    x = torch.randn(3, STEPS, BATCH, INPUTS)
    losses = []
    for _ in range(40):
        state = None
        for inputs in x:
            optimizer.zero_grad()
            output, state = window(model["core"], inputs, state)
            loss = (model["head"](output) - inputs).square().mean()
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_hooks_and_clipping():
    x = double(2, STEPS, BATCH, INPUTS)
    model = module_of("window")
    twin = copy.deepcopy(model)
    train(twin, x)
    seen = []
    model.weight_hh_l0.register_hook(lambda g: 3 * g)
    model.synthesizer.bias.register_hook(lambda g: 2 * g)
    model.weight_ih_l1.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    model.register_forward_hook(lambda m, i, o: seen.append(o[0].shape))
    train(model, x)
    close(model.weight_hh_l0.grad, 3 * twin.weight_hh_l0.grad)
    close(model.synthesizer.bias.grad, 2 * twin.synthesizer.bias.grad)
    close(seen[-1], twin.weight_ih_l1.grad)
    assert seen[0] == (STEPS, BATCH, HIDDEN)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    assert norm > 0.01
    assert torch.cat([p.grad.flatten() for p in model.parameters()]).norm() <= 0.0100001


def test_max_norm_bounds_the_injection():
    """Of the synthetic gradient, before ``sg_scale``."""
    x = double(STEPS, BATCH, INPUTS)
    found = []
    for limit in (None, 1e-3, 1e9):
        torch.manual_seed(1)
        module = module_of("window", auxiliary=False, max_norm=limit, sg_scale=0.5)
        module.zero_grad()
        _, state = module(x)
        fd.backward_boundary(state)
        found.append(
            torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        )
    close(found[0], found[2], 0)
    assert found[1].norm() < 0.1 * found[0].norm() and found[1].any()


@pytest.mark.parametrize("what", ["weight_hh_l1", "weight_ih_l0", "bias_ih_l0"])
def test_parametrizations(what):
    """A weight that is computed: gradients go to what it is computed from."""
    x = double(2, STEPS, BATCH, INPUTS)
    found = []
    for computed in (True, False):
        torch.manual_seed(1)
        module = lstm(INPUTS, HIDDEN, 2)
        if computed:
            weight_norm(module, what, dim=None)
        state = None
        for inputs in x:
            output, state = module(inputs, state)
            output.square().mean().backward()
        if computed:
            original = module.parametrizations[what]
            pieces = [p.detach().clone().requires_grad_() for p in original.parameters()]
            found.append([p.grad for p in original.parameters()])
        else:
            with torch.no_grad():
                close(torch._weight_norm(pieces[1], pieces[0], -1), getattr(module, what))
            made = torch._weight_norm(pieces[1], pieces[0], -1)
            found.append(list(torch.autograd.grad(made, pieces, getattr(module, what).grad)))
    close(*found)


@kinds
def test_functional_call(kind):
    module = module_of(kind)
    twin = copy.deepcopy(module)
    x = double(STEPS, BATCH, INPUTS)[0] if kind == "cell" else double(STEPS, BATCH, INPUTS)
    given = {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}
    before = twins.snapshot(module)
    output = torch.func.functional_call(module, given, (x,))[0]
    made = torch.autograd.grad(output.sum(), list(given.values()), allow_unused=True)
    twin(x)[0].sum().backward()
    close(list(made), [p.grad for p in twin.parameters()])
    twins.unchanged(before, twins.snapshot(module))


def test_tied_weights():
    a, b = (lstm(HIDDEN, HIDDEN, synthesizer=None) for _ in "ab")
    twin = copy.deepcopy(a)
    x = double(STEPS, BATCH, HIDDEN)
    b.load_state_dict(a.state_dict())
    for name, p in a.named_parameters():
        setattr(b, name, p)
    b(a(x)[0])[0].sum().backward()
    second = copy.deepcopy(twin)
    second(twin(x)[0])[0].sum().backward()
    for p, q, r in zip(a.parameters(), twin.parameters(), second.parameters(), strict=True):
        close(p.grad, q.grad + r.grad)


def test_checkpointing():
    """Recomputed windows: the same gradients; reentrant ones need a detached state."""
    x = double(2, STEPS, BATCH, INPUTS)
    found = []
    for way in (None, False, True):
        torch.manual_seed(1)
        module = module_of("window")
        state, first = None, x.clone().requires_grad_()
        for inputs in first:
            if way is None:
                output, state = module(inputs, state)
            else:
                output, state = checkpoint(module, inputs, state, use_reentrant=way)
            output.square().mean().backward(retain_graph=True)
            if way is True:
                state = tuple(t.detach() for t in state)
        found.append([first.grad, *(p.grad for p in module.parameters())])
    close(found[0], found[1])
    close(found[0], found[2])


# ---------------------------------------------------------------------------------------------
# Refused with a rule


@kinds
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("synthesizer", ["default", None])
def test_checkpointing_with_a_rule_is_refused(kind, reentrant, synthesizer):
    module = module_of(kind, fd.SGD(0.1), synthesizer=synthesizer, auxiliary=False)
    x = double(BATCH, INPUTS) if kind == "cell" else double(STEPS, BATCH, INPUTS)
    x.requires_grad_()
    before = twins.snapshot(module)
    with pytest.raises(RuntimeError, match="activation checkpointing is refused"):
        checkpoint(module, x, use_reentrant=reentrant)[0].sum().backward()
    twins.unchanged(before, twins.snapshot(module))


@kinds
@pytest.mark.parametrize("how", ["parametrization", "functional_call", "tied"])
def test_parameters_that_are_not_its_own_are_refused(kind, how):
    module = module_of(kind, fd.SGD(0.1))
    x = double(BATCH, INPUTS) if kind == "cell" else double(STEPS, BATCH, INPUTS)
    name = "weight_hh" if kind == "cell" else "weight_hh_l1"
    before = twins.snapshot(module)
    if how == "functional_call":
        given = {n: p.detach().clone() for n, p in module.named_parameters()}
        with pytest.raises(RuntimeError, match="no plain nn.Parameter"):
            torch.func.functional_call(module, given, (x,))
        twins.unchanged(before, twins.snapshot(module))
    elif how == "parametrization":
        weight_norm(module, name)
        with pytest.raises(RuntimeError, match="a parametrization, functional_call or sharding"):
            module(x)
    else:
        other = module_of(kind, fd.SGD(0.1))
        setattr(other, name, getattr(module, name))
        module(x)[0].sum().backward()
        with pytest.raises(RuntimeError, match="tied between two layers with fused rules"):
            other(x)


def _ddp(rank, file, out):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    found = {}
    try:
        torch.manual_seed(0)
        module, x = module_of("window"), double(3, STEPS, 2 * BATCH, INPUTS)
        parallel = nn.parallel.DistributedDataParallel(module)
        optimizer = torch.optim.SGD(parallel.parameters(), 0.1)
        half, state = slice(BATCH * rank, BATCH * rank + BATCH), None
        for inputs in x:
            optimizer.zero_grad()
            output, state = parallel(inputs[:, half], state)
            output.square().mean().backward()
            optimizer.step()
        found["ddp"] = values(module)
        ruled = nn.parallel.DistributedDataParallel(module_of("window", fd.SGD(0.1)))
        try:
            ruled(x[0])
        except RuntimeError as error:
            found["rule"] = str(error)
        torch.save(found, f"{out}.{rank}")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    ranks.replicas(_ddp, folder / "init", folder / "out")
    return [torch.load(f"{folder / 'out'}.{rank}") for rank in range(2)]


def test_data_parallel_without_a_rule(distributed):
    """The states stay on their replicas; the gradients are averaged."""
    torch.manual_seed(0)
    module, x = module_of("window"), double(3, STEPS, 2 * BATCH, INPUTS)
    replicas, states = [module, copy.deepcopy(module)], [None, None]
    for inputs in x:
        for r, replica in enumerate(replicas):
            replica.zero_grad()
            output, states[r] = replica(inputs[:, BATCH * r : BATCH * r + BATCH], states[r])
            output.square().mean().backward()
        for a, b in zip(*(r.parameters() for r in replicas), strict=True):
            if a.grad is not None:
                step = 0.1 * (a.grad + b.grad) / 2
                with torch.no_grad():
                    a -= step
                    b -= step
    for found in distributed:
        close(found["ddp"], values(module))


def test_data_parallel_with_a_rule_is_refused(distributed):
    for found in distributed:
        assert "under DistributedDataParallel is refused" in found["rule"]


def test_gradients_of_heads_are_there_in_every_window_but_the_first():
    """What stateful optimizers see: None where nothing was continued, else a gradient."""
    module = module_of("window")
    state = None
    for k, x in enumerate(double(3, STEPS, BATCH, INPUTS)):
        module.zero_grad()
        output, state = module(x, state)
        output.sum().backward()
        there = [g is not None for g in grads(module.synthesizer) + grads(module.auxiliary_head)]
        assert there == [k > 0] * 6
