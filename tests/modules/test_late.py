"""``step_local`` and ``learn_late``: a step whose target comes later."""

from __future__ import annotations

import copy
import gc
import io
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_dni as fd

N, I, O, K = 6, 5, 4, 3  # noqa: E741 rows, inputs, outputs, classes
RULES = {
    "none": None,
    "sgd": fd.SGD(0.1),
    "momentum": fd.SGD(0.1, momentum=0.9),
    "adam": fd.Adam(0.01),
    "adamw": fd.AdamW(0.01, weight_decay=0.1),
}


def linear(rule: Any, synthesizer: nn.Module | None = None, **options: Any) -> fd.FusedDNILinear:
    made = fd.LinearSynthesizer(O, context_features=K) if synthesizer is None else synthesizer
    return fd.FusedDNILinear(
        I, O, normalization="batch", activation="relu", synthesizer=made, update=rule, **options
    )


def inside(rule: Any) -> fd.FusedDNILinear:
    return linear(rule, interface="preactivation")


def low_rank(rule: Any) -> fd.FusedDNILinear:
    return linear(rule, fd.LinearSynthesizer(O, rank=2, context_features=K))


def diagonal(rule: Any) -> fd.FusedDNILinear:
    return linear(rule, fd.DiagonalSynthesizer(O, context_features=K))


def deep(rule: Any) -> fd.FusedDNILinear:
    return linear(rule, fd.MLPSynthesizer(O, hidden=7, context_features=K))


def segment(rule: Any) -> fd.Decoupled:
    module = nn.Sequential(nn.Linear(I, O, bias=False), nn.BatchNorm1d(O), nn.Tanh())
    return fd.Decoupled(module, fd.LinearSynthesizer(O, context_features=K), update=rule)


def sequence(rule: Any) -> fd.Decoupled:
    return fd.Decoupled(nn.Linear(I, O), fd.LinearSynthesizer(O, context_features=K), update=rule)


def convolution(rule: Any) -> fd.Decoupled:
    synthesizer = fd.ConvSynthesizer(O, context_features=K)
    return fd.Decoupled(nn.Conv2d(I, O, 3, padding=1), synthesizer, update=rule)


def softmax(rule: Any) -> fd.FusedDNILinear:
    return linear(rule, fd.SoftmaxSynthesizer(nn.Linear(O, K)))


def difference(rule: Any) -> fd.FusedDNILinear:
    return linear(rule, fd.DifferenceSynthesizer(O, rank=2))


def surrogate(rule: Any) -> fd.FusedDNILinear:
    return linear(rule, fd.SurrogateSynthesizer(O, lambda h, c: (h - c).square().sum(-1), None))


class Own(nn.Module):
    """A synthesizer of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(O + K, O)

    def forward(self, h: Tensor, context: Tensor) -> Tensor:
        return self.linear(torch.cat([h, nn.functional.one_hot(context, K)], -1))


def own(rule: Any) -> fd.FusedDNILinear:
    return linear(rule, Own())


KINDS: dict[str, Callable[[Any], Any]] = {
    made.__name__: made
    for made in (
        linear,
        inside,
        low_rank,
        diagonal,
        deep,
        softmax,
        difference,
        surrogate,
        own,
        segment,
        sequence,
        convolution,
    )
}
VECTORS = ("difference", "surrogate")  # whose context is as h
SHAPES = {"sequence": (N, 2), "convolution": (N,)}


def data(kind: str, step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x, labels, and the gradient at h that comes later."""
    generator = torch.Generator().manual_seed(step)
    shape = SHAPES.get(kind, (N,))
    tail = (3, 3) if kind == "convolution" else ()
    x = torch.randn(*shape, I, *tail, generator=generator, dtype=dtype)
    y = torch.randint(0, K, shape, generator=generator)
    if kind in VECTORS:
        y = torch.randn(N, O, generator=generator, dtype=dtype)
    gradient = torch.randn(*shape, O, *tail, generator=generator, dtype=dtype) / N
    return x, y, gradient


def made(kind: str, rule: str) -> Any:
    torch.manual_seed(1)
    module = KINDS[kind](RULES[rule])
    with torch.no_grad():  # a synthesizer that begins at zero would hide what it does
        for p in module.synthesizer.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return module


def state(module: nn.Module) -> dict[str, Any]:
    """Everything that a step may change."""
    found: dict[str, Any] = dict(module.state_dict())
    found |= {f"{n}.grad": p.grad for n, p in module.named_parameters() if p.grad is not None}
    found["statistics"] = module.statistics
    found["unit"] = torch.tensor(module.unit)
    for name, rule, _ in module.rules():
        moments = (t for group in rule.moments() for t in group)
        found |= {f"{name}.{i}": t for i, t in enumerate(moments)}
        found[f"{name}.counts"] = torch.tensor([rule.steps, rule.skipped])
    return copy.deepcopy({k: v for k, v in found.items() if isinstance(v, Tensor)})


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name, t in a.items():
        assert torch.equal(t, b[name]), name


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_at_once_is_the_forward_and_the_backward(kind, rule, one_thread):
    """To the bit, dx, buffers, rules and statistics too, over several steps."""
    late, usual = made(kind, rule), made(kind, rule)
    for step in range(5):
        x, y, gradient = data(kind, step)
        x.requires_grad_()
        h, (dx,), ticket = fd.step_local(late, x, context=y)
        assert not h.requires_grad and not dx.requires_grad
        fd.learn_late(late, ticket, gradient)
        other = x.detach().clone().requires_grad_()
        out = usual(other, context=y)
        out.backward(gradient)
        assert torch.equal(h, out) and torch.equal(dx, other.grad)
        same(state(late), state(usual))
        assert x.grad is None
    assert float(late.statistics.sum()) != 0.0


@pytest.mark.parametrize("kind", ["linear", "segment", "diagonal"])
def test_late_is_the_formula_at_the_old_pair(kind):
    """Three steps late: the synthesizer as it is now, on the h and the labels of the step, by SGD
    in float64; bounds of some hundred roundings."""
    rate = 0.05
    torch.manual_seed(2)
    fresh = KINDS[kind](fd.SGD(rate)).double()
    fresh.target_scale = float(N)  # a unit that does not move
    waiting = []
    for step in range(6):
        x, y, gradient = data(kind, step, torch.float64)
        h, _, ticket = fd.step_local(fresh, x, context=y)
        waiting.append((h.clone(), y, gradient, ticket))
        if step < 3:
            continue
        h, y, gradient, ticket = waiting[step - 3]
        named = {n: p.detach().clone() for n, p in fresh.synthesizer.named_parameters()}
        for p in named.values():
            p.requires_grad_()
        predicted = torch.func.functional_call(fresh.synthesizer, named, (h, y))
        error = predicted - N * gradient
        (error.square().sum() / N).backward()
        fd.learn_late(fresh, ticket, gradient)
        for n, p in fresh.synthesizer.named_parameters():
            wanted = named[n] - rate * named[n].grad
            assert float((p - wanted).detach().abs().max()) < 1e-13, n
            assert float((p - named[n]).detach().abs().max()) > 1e-6, n


@pytest.mark.parametrize("rule", ["none", "momentum"])
def test_late_at_the_preactivation_goes_back_as_the_step_went(rule):
    """Scale and shift learn what they would have: the derivative is the one of their step."""
    module, steady = (made("inside", rule).double() for _ in range(2))
    x, y, gradient = data("inside", 0, torch.float64)
    *_, ticket = fd.step_local(module, x, context=y)
    *_, same_ticket = fd.step_local(steady, x, context=y)
    before = [p.detach().clone() for p in steady.norm.parameters()]
    with torch.no_grad():
        module.norm.weight.mul_(-3.0)  # moved since
        module.norm.bias.add_(2.0)
        module.weight.mul_(-1.0)
    moved = [p.detach().clone() for p in module.norm.parameters()]
    for m, t in ((module, ticket), (steady, same_ticket)):
        m.zero_grad()
        fd.learn_late(m, t, gradient)
    for a, b, was, then in zip(
        module.norm.parameters(), steady.norm.parameters(), moved, before, strict=True
    ):
        found, wanted = (a.grad, b.grad) if rule == "none" else (a - was, b - then)
        assert float((found - wanted).detach().abs().max()) < 1e-12
        assert float(wanted.detach().abs().max()) > 1e-6


@pytest.mark.parametrize("activation", ["relu", "gelu", "identity"])
@pytest.mark.parametrize("normalization", [None, "layer"])
def test_late_without_norm_reads_no_weights_of_today(activation, normalization):
    def layer() -> fd.FusedDNILinear:
        torch.manual_seed(4)
        return fd.FusedDNILinear(
            I, O, normalization=normalization, activation=activation, interface="preactivation",
            synthesizer=fd.LinearSynthesizer(O),
        ).double()  # fmt: skip

    found = []
    for move in (False, True):
        module = layer()
        x, _, gradient = data("inside", 0, torch.float64)
        *_, ticket = fd.step_local(module, x)
        if move:
            with torch.no_grad():
                module.weight.mul_(-2.0)
                module.bias.add_(1.0)
        module.zero_grad()
        fd.learn_late(module, ticket, gradient)
        found.append([p.grad for p in module.synthesizer.parameters()])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b) and bool(a.any())


def test_hooks_see_what_a_backward_shows_them():
    seen: dict[str, list[Tensor]] = {"late": [], "usual": []}
    modules = {name: made("segment", "none") for name in seen}
    for name, module in modules.items():
        for p in module.parameters():
            p.register_hook(lambda g, name=name: seen[name].append(g.clone()))
            p.register_post_accumulate_grad_hook(
                lambda p, name=name: seen[name].append(p.grad.clone())
            )
    x, y, gradient = data("segment", 0)
    *_, ticket = fd.step_local(modules["late"], x, context=y)
    fd.learn_late(modules["late"], ticket, gradient)
    modules["usual"](x, context=y).backward(gradient)
    key = lambda t: (tuple(t.shape), float(t.sum()))  # noqa: E731 order is autograd's
    late, usual = (sorted(seen[name], key=key) for name in ("late", "usual"))
    assert len(late) == len(usual) == 2 * len(list(modules["late"].parameters()))
    assert all(torch.equal(a, b) for a, b in zip(late, usual, strict=True))


def test_gradients_of_arguments_go_through_a_hook_on_the_way_in() -> None:
    """Whether they are given by place or by name."""
    module = made("segment", "none")
    x, y, _ = data("segment", 0)
    x = x.requires_grad_()
    want = fd.step_local(module, 3.0 * x, context=y).dx[0]
    module.register_forward_pre_hook(
        lambda module, given, named: (tuple(3.0 * t for t in given), named), with_kwargs=True
    )
    assert want.any() and torch.equal(fd.step_local(module, x, context=y).dx[0], 3.0 * want)
    layer = linear(None)
    twice = copy.deepcopy(layer)
    twice.register_forward_pre_hook(
        lambda module, given, named: (given, named | {"input": 3.0 * named["input"]}),
        with_kwargs=True,
    )
    with torch.no_grad():
        layer.synthesizer.weight.fill_(0.1)
        twice.synthesizer.weight.fill_(0.1)
    want = fd.step_local(layer, input=3.0 * x, context=y).dx[0]
    assert want.any() and torch.equal(fd.step_local(twice, input=x, context=y).dx[0], 3.0 * want)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(I, O)

    def forward(self, given: dict[str, Tensor], scale: float) -> Tensor:
        return self.linear(given["a"] + given["b"]) * scale


def test_arguments_of_any_structure():
    module = fd.Decoupled(Named(), fd.LinearSynthesizer(O))
    with torch.no_grad():
        module.synthesizer.weight.normal_()
    a, b = torch.randn(N, I), torch.randn(N, I, requires_grad=True)
    h, dx, _ = fd.step_local(module, {"a": a, "b": b}, scale=2.0)
    assert dx[0] is None and bool(dx[1].any()) and len(dx) == 2
    assert torch.equal(h, module.module({"a": a, "b": b}, 2.0))


def test_vectors_as_context():
    late, usual = made("linear", "adam"), made("linear", "adam")
    x, _, gradient = data("linear", 0)
    context = torch.randn(N, K)
    with fd.condition_on(context):
        *_, ticket = fd.step_local(late, x)
        usual(x).backward(gradient)
    fd.learn_late(late, ticket, gradient)  # out of the context
    same(state(late), state(usual))


def test_the_ticket():
    module = made("inside", "adam")
    x, y, gradient = data("inside", 0)
    *_, ticket = fd.step_local(module, x, context=y)
    assert ticket.nbytes == sum(t.nbytes for t in ticket.state_dict().values()) > 0
    assert not ticket.spent and "bytes" in repr(ticket)
    file = io.BytesIO()
    torch.save(ticket.state_dict(), file)
    file.seek(0)
    again = fd.Ticket.from_state_dict(torch.load(file, weights_only=True))
    twin = copy.deepcopy(module)
    fd.learn_late(module, ticket, gradient)
    fd.learn_late(twin, again, gradient)
    same(state(module), state(twin))
    assert ticket.spent and ticket.nbytes == 0 and repr(ticket) == "Ticket(spent)"
    with pytest.raises(RuntimeError, match="spent"):
        fd.learn_late(module, ticket, gradient)
    with pytest.raises(ValueError, match="must hold h, shape"):
        fd.Ticket.from_state_dict(ticket.state_dict())
    with pytest.raises(ValueError, match="must hold h, shape"):
        fd.Ticket.from_state_dict({"h": x, "shape": y, "more": y})


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(I, O)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)[:, -1]


def test_a_ticket_keeps_no_more_than_it_says():
    """h is the last of a hundred in time."""
    module = fd.Decoupled(Last(), fd.LinearSynthesizer(O))
    *_, ticket = fd.step_local(module, torch.randn(N, 100, I))
    kept = sum(t.untyped_storage().nbytes() for t in ticket.state_dict().values())
    assert kept == ticket.nbytes


@pytest.mark.parametrize("rule", ["none", "adam"])
@pytest.mark.parametrize("kind", ["linear", "inside", "segment", "deep"])
def test_bad_gradients_change_nothing(kind, rule):
    module = made(kind, rule)
    x, y, gradient = data(kind, 0)
    *_, ticket = fd.step_local(module, x, context=y)
    before = state(module)
    nan = gradient.clone()
    nan[1, 2] = torch.nan
    wrong: list[tuple[Any, type[Exception], str]] = [
        (gradient[1:], RuntimeError, "must be as h was"),
        (gradient.double(), RuntimeError, "float64"),
        (gradient.to("meta"), RuntimeError, "on meta"),
        (nan, ValueError, "not finite"),
        (gradient / 0.0, ValueError, "not finite"),
        (None, TypeError, "must be a torch.Tensor"),
    ]
    for bad, error, text in wrong:
        with pytest.raises(error, match=text):
            fd.learn_late(module, ticket, bad)
        same(state(module), before)
        assert not ticket.spent
    with pytest.raises(TypeError, match="must be of step_local"):
        fd.learn_late(module, ticket.state_dict(), gradient)
    fd.learn_late(module, ticket, gradient)  # as good as ever
    assert not torch.equal(module.statistics, before["statistics"])


@pytest.mark.parametrize("kind", ["linear", "segment", "deep"])
def test_a_gradient_that_no_rule_sees(kind):
    """Refused as in a backward; nothing is changed."""
    module = made(kind, "adam")
    x, y, gradient = data(kind, 0)
    for step in range(2):
        *_, ticket = fd.step_local(module, x, context=y)
        part = next(module.synthesizer.parameters())
        if step:
            part.grad = torch.ones_like(part)
            before = state(module)
            with pytest.raises(RuntimeError, match="came by another way"):
                fd.learn_late(module, ticket, gradient)
            same(state(module), before)
            part.grad = None
        fd.learn_late(module, ticket, gradient)


def test_what_is_refused():
    module = made("linear", "none")
    x, y, _ = data("linear", 0)
    before = state(module)
    module.eval()
    with pytest.raises(RuntimeError, match="call module.train"):
        fd.step_local(module, x, context=y)
    module.train()
    with torch.no_grad(), pytest.raises(RuntimeError, match="no_grad"):
        fd.step_local(module, x, context=y)
    for options in ({"warmup_steps": 2}, {"mix": 0.5}):
        fd.Schedule(module, **options)
        with pytest.raises(RuntimeError, match="asks for the true one"):
            fd.step_local(module, x, context=y)
    fd.Schedule(module, loss_scale=8.0)
    with pytest.raises(RuntimeError, match="no loss scale"):
        fd.step_local(module, x, context=y)
    fd.Schedule(module)
    with pytest.raises(TypeError, match="takes a FusedDNILinear or a Decoupled, got Linear"):
        fd.step_local(nn.Linear(I, O), x)
    with pytest.raises(TypeError, match="got FusedDNILSTM"):
        fd.step_local(fd.FusedDNILSTM(I, O), x)
    with pytest.raises(ValueError, match="synthesizer=None"):
        fd.step_local(fd.FusedDNILinear(I, O, synthesizer=None), x)
    same(state(module), before)


@pytest.mark.parametrize("kind", ["linear", "segment"])
def test_running_statistics_move_once(kind):
    module = made(kind, "sgd")
    norm = module.norm if kind == "linear" else module.module[1]
    x, y, gradient = data(kind, 0)
    *_, ticket = fd.step_local(module, x, context=y)
    once = norm.running_mean.clone()
    assert int(norm.num_batches_tracked) == 1 and bool(once.any())
    fd.learn_late(module, ticket, gradient)
    assert int(norm.num_batches_tracked) == 1 and torch.equal(norm.running_mean, once)


class Watched(torch.autograd.Function):
    alive: list[weakref.ref[Any]]

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        held = x.clone()
        ctx.save_for_backward(held)
        Watched.alive.append(weakref.ref(ctx))
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(I, O)

    def forward(self, x: Tensor) -> Tensor:
        return Watched.apply(self.linear(x))


@pytest.mark.parametrize("rule", ["none", "sgd"])
def test_no_graph_is_kept(rule):
    Watched.alive = []
    module = fd.Decoupled(Doubled(), fd.LinearSynthesizer(O), update=RULES[rule])
    kept = [fd.step_local(module, torch.randn(N, I, requires_grad=True)) for _ in range(3)]
    gc.collect()
    assert [ref() for ref in Watched.alive] == [None] * 3
    fd.learn_late(module, kept[0].ticket, torch.randn(N, O))
    gone = weakref.ref(kept[0].h)
    del kept
    gc.collect()
    assert gone() is None


def test_diagnostics_count_late_lessons():
    module = made("linear", "sgd")
    x, y, gradient = data("linear", 0)
    tickets = [fd.step_local(module, x, context=y).ticket for _ in range(3)]
    for ticket in tickets[:2]:
        fd.learn_late(module, ticket, gradient)
    assert fd.diagnostics(module)[""]["targets"] == 2 * N


@pytest.mark.parametrize("every", [1, 3])
def test_a_late_target_is_no_missed_one(every):
    """40 steps late; where none is to come, the schedule says so as ever."""
    module = made("linear", "sgd")
    schedule = fd.Schedule(module, target_every=every)
    tickets = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(40 * every):
            x, y, _ = data("linear", step)
            tickets.append(fd.step_local(module, x, context=y).ticket)
            schedule.step()
    assert fd.diagnostics(module)[""]["missed_targets"] == 0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(40 * every):
            schedule.step()
    assert len(said) == 1 and "none brought a gradient" in str(said[0].message)


@pytest.mark.parametrize("rule", ["none", "sgd"])
@pytest.mark.parametrize("kind", ["linear", "inside", "diagonal", "deep", "segment"])
def test_the_ticket_of_another_module(kind, rule):
    """Of the same sizes it would be taught for nothing; of others kernels would read past h."""
    module = made(kind, rule)
    x, y, gradient = data(kind, 0)
    *_, ticket = fd.step_local(module, x, context=y)
    wide = fd.FusedDNILinear(I, 64 * O, context_features=K, update=RULES[rule])
    for other in (copy.deepcopy(module), wide):
        before = state(other)
        with pytest.raises(RuntimeError, match="ticket is of another module"):
            fd.learn_late(other, ticket, gradient)
        same(state(other), before)
    unnamed = copy.deepcopy(ticket)  # as one that was pickled
    with pytest.raises(RuntimeError, match=r"must have shape \[\d+, \d+\], got \[256"):
        fd.learn_late(wide, unnamed, gradient)
    same(state(wide), before)
    fd.learn_late(copy.deepcopy(module), unnamed, gradient)
    fd.learn_late(module, ticket, gradient)


@pytest.mark.parametrize("lacks", ["normalized", "rstd", "x"])
def test_a_ticket_whose_tensors_do_not_fit(lacks):
    module = made("inside", "sgd")
    x, y, gradient = data("inside", 0)
    kept = fd.step_local(module, x, context=y).ticket.state_dict()
    before = state(module)
    for name, t in ((lacks, kept[lacks][:-1]), (lacks, None), ("context", y[:-1])):
        if t is None and name == "x":
            continue
        tensors = {k: v for k, v in {**kept, name: t}.items() if v is not None}
        with pytest.raises(RuntimeError, match="must have shape|is missing"):
            fd.learn_late(module, fd.Ticket.from_state_dict(tensors), gradient)
        same(state(module), before)
