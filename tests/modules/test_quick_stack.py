"""A container's step as one call: the bits, errors and gradients of the usual way, whatever is done
to it or around it between two steps."""

from __future__ import annotations

import copy
import gc
import io
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

import fused_dni as fd
from fused_dni.modules.base import DecoupledModule, Phase

pytest.importorskip("fused_dni.backends._cpu")
pytestmark = pytest.mark.usefixtures("one_thread")

#: "taught" is by predictions too, but on steps with a target by the true gradient, which teaches;
#: "mixed" by some of both there.
WAYS = ("prediction", "true gradient", "taught", "mixed")
SHARES = {"taught": 1.0, "mixed": 0.4}
LOSSES = tuple(f"{way}, loss" for way in WAYS)  # with the head and its loss in the call
KINDS = (*WAYS, *LOSSES)
SIZE, CLASSES, ROWS = 6, 5, 8


class Usual(fd.FusedDNILinear):
    """Has no such call: it is bound for the layer itself alone."""


class UsualLoss(fd.FusedDNILinearCrossEntropyLoss):
    """The same of a head."""


def layer(kind: type[fd.FusedDNILinear], by: str, **options: Any) -> fd.FusedDNILinear:
    if by.startswith("true gradient"):
        options |= {"synthesizer": None}
    else:
        options |= {"context_features": CLASSES}
    options = {"normalization": "batch", "activation": "gelu", **options}
    return kind(SIZE, SIZE, backend="cpu", update=fd.Adam(0.01), **options)


class Trained:
    """A container in training, and what came of it: results, errors, the gradients of inputs."""

    def __init__(self, kind: type[fd.FusedDNILinear], by: str) -> None:
        torch.manual_seed(0)
        self.kind, self.by, self.ends = kind, by, by in LOSSES
        self.model: Any = fd.DecoupledSequential(*(layer(kind, by) for _ in range(3)))
        self.head = nn.Linear(SIZE, CLASSES)
        if self.ends:
            head = UsualLoss if kind is Usual else fd.FusedDNILinearCrossEntropyLoss
            self.model.append(
                head(SIZE, CLASSES, label_smoothing=0.1, backend="cpu", update=fd.Adam(0.01))
            )
        self.schedule = None
        self.phases: dict[str, Any] = {"target_every": 2}
        if (share := SHARES.get(by.partition(",")[0])) is not None:
            self.phases |= {"mix": share, "lessons": 2}
        if not by.startswith("true gradient"):
            self.schedule = fd.Schedule(self.model, **self.phases)
        self.seen: list[Any] = []
        self.count = 0

    def behind(self, module: nn.Module) -> None:
        """Put another layer behind the third."""
        self.model.insert(3, module)

    def run(self, x: Tensor, y: Tensor | None) -> Tensor:
        """The container's result: its last layer's, or the loss."""
        made: Tensor = self.model(x, target=y) if self.ends else self.model(x)
        return made

    def step(
        self,
        change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda x, y: (x, y),
        loss: Callable[[Trained, Tensor, Tensor], Tensor] | None = None,
        between: Callable[[Trained, Tensor], object] = lambda trained, h: None,
        aim: Callable[[Tensor], Tensor | None] = lambda y: y % CLASSES,
    ) -> None:
        """One step on a batch of its own; its loss may be more, and something done in front of the
        backward."""
        torch.manual_seed(self.count)
        self.count += 1
        x, y = change(torch.randn(ROWS, SIZE), torch.randint(0, CLASSES, (ROWS,)))
        try:
            with fd.condition_on(y):
                h = self.run(x, aim(y))
                found = h if self.ends else F.cross_entropy(self.head(h), y % CLASSES)
                if loss is not None:
                    found = found + loss(self, x, y)
            between(self, h)
            if found.requires_grad:
                found.backward()
            self.seen += [h.detach(), h.requires_grad, found.detach(), x.grad]
        except Exception as error:
            self.seen.append(f"{type(error).__name__}: {error}"[:80])  # and then a node's name
        self.head.zero_grad()
        if self.schedule is not None:
            self.schedule.step()

    def state(self) -> list[Any]:
        """All that a step may change."""
        layers = [m for m in self.model.modules() if isinstance(m, DecoupledModule)]
        rules = [rule for each in layers for _, rule, _ in each.rules()]
        return [
            *self.model.state_dict().values(),
            *[rule.hyper for rule in rules],
            *[t for rule in rules for moments in rule.moments() for t in moments],
            *[each.statistics for each in layers],
            *[p.grad for p in self.model.parameters()],
            *[each.skipped_updates for each in layers],
        ]


def equal(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, Tensor):
        return isinstance(theirs, Tensor) and torch.equal(
            mine.nan_to_num(7.0), theirs.nan_to_num(7.0)
        )
    return bool(mine == theirs)


def calls(step: Callable[[], object]) -> int:
    """Python functions that a step calls."""
    count = 0

    def note(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event == "call"

    gc.disable()  # whoever listens to the collector (Hypothesis does) would be counted
    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def hook_between(trained: Trained) -> None:
    trained.model[1].register_forward_hook(lambda m, a, out: trained.seen.append(out.detach()))


def hook_in_front(trained: Trained) -> None:
    trained.model[2].register_forward_pre_hook(lambda m, a: trained.seen.append(a[0].detach()))


def another_behind(trained: Trained) -> None:
    torch.manual_seed(5)
    trained.behind(layer(trained.kind, trained.by))
    if trained.schedule is not None:
        steps = trained.schedule.steps
        trained.schedule = fd.Schedule(trained.model, **trained.phases)
        trained.schedule.load_state_dict({"steps": steps})


def ordinary_behind(trained: Trained) -> None:
    torch.manual_seed(5)
    trained.behind(nn.Linear(SIZE, SIZE))


def ordinary_between(trained: Trained) -> None:
    trained.model.insert(1, nn.Tanh())


def swapped(trained: Trained) -> None:
    trained.model[0], trained.model[2] = trained.model[2], trained.model[0]


def one_less(trained: Trained) -> None:
    del trained.model[2]


def frozen(trained: Trained) -> None:
    trained.model[1].requires_grad_(False)


def frozen_last(trained: Trained) -> None:
    trained.model[2].requires_grad_(False)


def frozen_first(trained: Trained) -> None:
    trained.model[0].requires_grad_(False)


def memory_shared(trained: Trained) -> None:
    """Two parameters, each with moments of its own, over one memory."""
    trained.model[2].weight.data = trained.model[1].weight.data


def used_twice(trained: Trained) -> None:
    trained.behind(trained.model[0])


def other_order(trained: Trained) -> None:
    first = trained.model._modules.pop("0")
    trained.model.add_module("0", first)


def own_loss_scale(trained: Trained) -> None:
    each = trained.model[0]
    each.phase = Phase(target=each.phase.target, loss_scale=8.0)


def cumulative_average(trained: Trained) -> None:
    trained.model[1].norm.momentum = None


def statistics_elsewhere(trained: Trained) -> None:
    trained.model[1].statistics.data = torch.zeros_like(trained.model[1].statistics)


def pruned(trained: Trained) -> None:
    """The last rows are gone, where the memory begins is not."""
    trained.model[1].weight.data = trained.model[1].weight.data[:3]


def appended_and_taken_away(trained: Trained) -> None:
    another_behind(trained)
    del trained.model[3]


def weight_replaced(trained: Trained) -> None:
    trained.model[1].weight.data = trained.model[1].weight.data * 2


def rate(trained: Trained) -> None:
    trained.model[1].update.group["lr"] = 0.5


def forward_replaced(trained: Trained) -> None:
    own = trained.model[1]
    own.forward = lambda input, context=None: type(own).forward(own, input * 2, context)


def one_evaluates(trained: Trained) -> None:
    trained.model[1].eval()


def loss_scale(trained: Trained) -> None:
    for each in trained.model:
        each.phase = Phase(target=each.phase.target, loss_scale=4.0)


def watched(trained: Trained) -> None:
    trained.model[1].weight.register_hook(lambda g: trained.seen.append(g.detach()))


CHANGES = [
    hook_between, hook_in_front, another_behind, ordinary_behind, ordinary_between, swapped,
    one_less, frozen, frozen_last, frozen_first, used_twice, other_order, own_loss_scale,
    cumulative_average, statistics_elsewhere, pruned, appended_and_taken_away, weight_replaced,
    rate, forward_replaced, one_evaluates, loss_scale, watched,
]  # fmt: skip


def head_hooked(trained: Trained) -> None:
    trained.model[3].register_forward_hook(lambda m, a, out: trained.seen.append(out.detach()))


def head_frozen(trained: Trained) -> None:
    trained.model[3].requires_grad_(False)


def head_half_frozen(trained: Trained) -> None:
    trained.model[3].weight.requires_grad_(False)


def head_without_bias(trained: Trained) -> None:
    trained.model[3].bias = None


def head_elsewhere(trained: Trained) -> None:
    trained.model[3].weight.data = trained.model[3].weight.data * 2


def head_replaced(trained: Trained) -> None:
    torch.manual_seed(5)
    kind = UsualLoss if trained.kind is Usual else fd.FusedDNILinearCrossEntropyLoss
    trained.model[3] = kind(SIZE, CLASSES, update=fd.SGD(0.1))


def head_of_an_optimizer(trained: Trained) -> None:
    trained.model[3] = fd.FusedDNILinearCrossEntropyLoss.from_linear(trained.model[3].to_linear())


def head_rate(trained: Trained) -> None:
    trained.model[3].update.group["lr"] = 0.5


def head_evaluates(trained: Trained) -> None:
    trained.model[3].eval()


def head_forward_replaced(trained: Trained) -> None:
    own = trained.model[3]
    own.forward = lambda input, target=None: type(own).forward(own, input * 2, target)


def head_own_loss_scale(trained: Trained) -> None:
    trained.model[3].phase = Phase(loss_scale=8.0)


def smoothing(trained: Trained) -> None:
    trained.model[3].label_smoothing = 0.25


def ignoring(trained: Trained) -> None:
    trained.model[3].ignore_index = 2


def everything_evaluates(trained: Trained) -> None:
    trained.model.eval()


CHANGES_OF_HEADS = [
    head_hooked, head_frozen, head_half_frozen, head_without_bias, head_elsewhere, head_replaced,
    head_of_an_optimizer, head_rate, head_evaluates, head_forward_replaced, head_own_loss_scale,
    smoothing, ignoring, everything_evaluates,
]  # fmt: skip


def agree(by: str, run: Callable[[Trained], object]) -> None:
    """The same with layers that have the one call and with layers that have not."""
    mine, theirs = Trained(fd.FusedDNILinear, by), Trained(Usual, by)
    for trained in (mine, theirs):
        run(trained)
    assert theirs.model._stack is None and theirs.model._true is None
    assert len(mine.seen) == len(theirs.seen)
    for a, b in zip(mine.seen, theirs.seen, strict=True):
        assert equal(a, b), (a, b)
    for a, b in zip(mine.state(), theirs.state(), strict=True):
        assert equal(a, b)


@pytest.mark.parametrize("by", KINDS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_change_between_two_steps(change: Callable[[Trained], None], by: str) -> None:
    def run(trained: Trained) -> None:
        for _ in range(7):
            trained.step()
        assert trained.kind is Usual or trained.model._stack is not None
        assert trained.kind is Usual or trained.model._stack.members == tuple(trained.model)
        if trained.kind is not Usual and trained.by.startswith(tuple(SHARES)):
            assert trained.model._true.members == tuple(trained.model)
        change(trained)
        for _ in range(9):
            trained.step()

    agree(by, run)


@pytest.mark.parametrize("by", LOSSES)
@pytest.mark.parametrize("change", CHANGES_OF_HEADS, ids=lambda f: f.__name__)
def test_a_change_of_the_head(change: Callable[[Trained], None], by: str) -> None:
    test_a_change_between_two_steps(change, by)


def _twice(trained: Trained, x: Tensor, y: Tensor) -> Tensor:
    made = trained.run(x.flip(0), y)
    return made.square().mean()


def _elsewhere(trained: Trained, x: Tensor, y: Tensor) -> Tensor:
    made: Tensor = trained.model[1](x)
    return made.square().mean()


def _penalty(trained: Trained, x: Tensor, y: Tensor) -> Tensor:
    found: Tensor = trained.model[1].weight.square().sum()
    return found


def _head_elsewhere(trained: Trained, x: Tensor, y: Tensor) -> Tensor:
    made: Tensor = trained.model[3](x, y)
    return made


def _last_and_head_elsewhere(trained: Trained, x: Tensor, y: Tensor) -> Tensor:
    return _elsewhere(trained, x, y) * 2 + _head_elsewhere(trained, x, y)


def _last_elsewhere(trained: Trained, x: Tensor, y: Tensor) -> Tensor:
    made: Tensor = trained.model[2](x)
    return made.square().mean()


def _logits(trained: Trained, x: Tensor, y: Tensor) -> Tensor:
    made: Tensor = trained.model[3].logits(x)
    return made.square().mean()


def _head_penalty(trained: Trained, x: Tensor, y: Tensor) -> Tensor:
    found: Tensor = trained.model[3].weight.square().sum()
    return found


@pytest.mark.parametrize("by", LOSSES)
@pytest.mark.parametrize(
    "loss",
    [_head_elsewhere, _last_elsewhere, _last_and_head_elsewhere, _logits, _head_penalty],
    ids=lambda f: f.__name__,
)
def test_more_in_the_loss_of_the_head(
    loss: Callable[[Trained, Tensor, Tensor], Tensor], by: str
) -> None:
    test_more_in_the_loss(loss, by)


@pytest.mark.parametrize("by", KINDS)
@pytest.mark.parametrize("loss", [_twice, _elsewhere, _penalty], ids=lambda f: f.__name__)
def test_more_in_the_loss(loss: Callable[[Trained, Tensor, Tensor], Tensor], by: str) -> None:
    """Layers used twice in one backward are updated once; so are those with a penalty."""

    def run(trained: Trained) -> None:
        for step in range(16):
            trained.step(loss=loss if step > 6 else None)

    agree(by, run)


INPUTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "asks for a gradient": lambda x, y: (x.requires_grad_(), y),
    "one row": lambda x, y: (x[:1], y[:1]),
    "other rows": lambda x, y: (x[:5], y[:5]),
    "no rows": lambda x, y: (x[:0], y[:0]),
    "other features": lambda x, y: (x[:, :3], y),
    "a label that there is not": lambda x, y: (x, y.index_fill(0, torch.tensor([3]), CLASSES)),
    "not finite": lambda x, y: (x * float("inf"), y),
    "of another type": lambda x, y: (x.double(), y),
    "more dimensions": lambda x, y: (x[None], y[None]),
    "not contiguous": lambda x, y: (x.t().contiguous().t(), y),
    "no memory": lambda x, y: (torch._efficientzerotensor((2 * ROWS, SIZE))[ROWS:], y),
}


@pytest.mark.parametrize("by", KINDS)
@pytest.mark.parametrize("name", INPUTS)
def test_another_input(name: str, by: str) -> None:
    """An error leaves everything as it was, as the usual way does, and later steps are right."""

    def run(trained: Trained) -> None:
        for step in range(14):
            trained.step(INPUTS[name] if step in (7, 8) else lambda x, y: (x, y))
            trained.seen += [copy.deepcopy(t) for t in trained.state()]

    agree(by, run)


TARGETS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "missing": lambda y: None,
    "too large": lambda y: y.index_fill(0, torch.tensor([3]), CLASSES),
    "negative": lambda y: y.index_fill(0, torch.tensor([3]), -1),
    "some are ignored": lambda y: y.index_fill(0, torch.tensor([3, 5]), -100),
    "all are ignored": lambda y: y * 0 - 100,
    "other rows": lambda y: y[:3],
    "of another type": lambda y: y.int(),
    "probabilities": lambda y: F.one_hot(y, CLASSES).float(),
    "no memory": lambda y: torch._efficientzerotensor(y.shape, dtype=torch.int64),
    "not contiguous": lambda y: torch.stack([y, y], 1)[:, 0],
}


@pytest.mark.parametrize("by", LOSSES)
@pytest.mark.parametrize("name", TARGETS)
def test_another_target(name: str, by: str) -> None:
    """An error is one before anything is changed, of the layers in front of the head too."""

    def run(trained: Trained) -> None:
        for step in range(14):
            before = [copy.deepcopy(t) for t in trained.state()]
            count = len(trained.seen)
            trained.step(aim=TARGETS[name] if step in (7, 8) else lambda y: y)
            if len(trained.seen) == count + 1:  # what was raised alone
                assert all(equal(a, b) for a, b in zip(before, trained.state(), strict=True))
        said = [seen for seen in trained.seen if isinstance(seen, str)]
        good = name in ("some are ignored", "all are ignored", "no memory", "not contiguous")
        assert len(said) == (0 if good else 2)
        assert all("target" in each for each in said)

    agree(by, run)


def _in_place(trained: Trained, h: Tensor) -> None:
    h.detach().add_(1.0)


def _weight_in_place(trained: Trained, h: Tensor) -> None:
    with torch.no_grad():
        trained.model[1].weight.mul_(2.0)


def _divided(trained: Trained, h: Tensor) -> None:
    if trained.ends:  # as in an accumulation of gradients
        h.div_(4.0)


def _head_in_place(trained: Trained, h: Tensor) -> None:
    if trained.ends:
        with torch.no_grad():
            trained.model[3].weight.mul_(2.0)


def _backward_before(trained: Trained, h: Tensor) -> None:
    if h.requires_grad:
        h.sum().backward(retain_graph=True)


def _labels_gone(trained: Trained, h: Tensor) -> None:
    gc.collect()


def _bounded(trained: Trained, h: Tensor) -> None:
    if trained.count % 2:  # of a step with a target, which found it as it was bound
        trained.model[1].max_norm = 1e-3


def _scaled(trained: Trained, h: Tensor) -> None:
    if trained.count % 2:
        trained.model[1].target_scale = 5.0


BETWEEN = (
    *(_in_place, _weight_in_place, _backward_before, _labels_gone, _divided, _head_in_place),
    *(_bounded, _scaled),
)


@pytest.mark.parametrize("by", KINDS)
@pytest.mark.parametrize("between", BETWEEN, ids=lambda f: f.__name__)
def test_between_forward_and_backward(between: Callable[[Trained, Tensor], None], by: str) -> None:
    def run(trained: Trained) -> None:
        for step in range(14):
            nothing = step not in (7, 8)
            trained.step(between=(lambda trained, h: None) if nothing else between)

    agree(by, run)


@contextmanager
def _global_hook() -> Iterator[None]:
    handle = register_module_forward_hook(lambda module, arguments, out: None)
    try:
        yield
    finally:
        handle.remove()


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "a hook on every module": _global_hook,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no gradients": torch.no_grad,
    "saved tensors elsewhere": torch.autograd.graph.save_on_cpu,
    "annotated": fd.annotate,
}


@pytest.mark.parametrize("by", KINDS)
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_surroundings(name: str, by: str) -> None:
    def run(trained: Trained) -> None:
        for step in range(14):
            if step in (7, 8):
                with SURROUNDINGS[name]():
                    trained.step()
            else:
                trained.step()

    agree(by, run)


@pytest.mark.parametrize("by", KINDS)
@pytest.mark.parametrize("steps", [13, 14])
def test_it_is_the_one_call(steps: int, by: str) -> None:
    """A step without a target, and one with: in the usual way hundreds of Python's calls."""
    counts = []
    for kind in (fd.FusedDNILinear, Usual):
        trained = Trained(kind, by)
        for _ in range(steps):
            trained.step()
        with fd.condition_on(torch.zeros(ROWS, dtype=torch.int64)):
            y = torch.zeros(ROWS, dtype=torch.int64)
            counts.append(
                calls(lambda trained=trained, y=y: trained.run(torch.randn(ROWS, SIZE), y))
            )
    assert counts[0] < 30 and counts[1] > 150, counts


@pytest.mark.parametrize("by", KINDS)
@pytest.mark.parametrize("how", ["deepcopy", "pickled"])
def test_a_copy_takes_its_own_steps(how: str, by: str) -> None:
    def run(trained: Trained) -> None:
        for _ in range(7):
            trained.step()
        if how == "deepcopy":
            trained.model, trained.schedule = copy.deepcopy((trained.model, trained.schedule))
        else:
            file = io.BytesIO()
            torch.save((trained.model, trained.schedule), file)
            file.seek(0)
            trained.model, trained.schedule = torch.load(file, weights_only=False)
        assert trained.model._stack is None and trained.model._true is None
        for _ in range(9):
            trained.step()

    agree(by, run)


@pytest.mark.parametrize("by", KINDS)
def test_frozen_and_thawed(by: str) -> None:
    def run(trained: Trained) -> None:
        for step in range(30):
            if step in (9, 16):
                trained.model[0].requires_grad_(step == 16)
            trained.step()

    agree(by, run)


@pytest.mark.parametrize("by", KINDS)
def test_moments_elsewhere(by: str) -> None:
    """Memory that a rule has let go of is not written to: the step goes the usual way."""
    trained = Trained(fd.FusedDNILinear, by)
    for _ in range(9):
        trained.step()
    rule = trained.model[1].synthesizer_update or trained.model[1].update
    kept = []
    for moments in rule.moments():
        for t in filter(lambda t: t is not None, moments):
            kept.append((t, t.data))
            t.data = t.data.clone()
    assert "data_ptr is not as it was" in repr(trained.model[1])
    before = [old.clone() for _, old in kept]
    for _ in range(2):
        trained.step()
    if by.startswith("true gradient"):
        assert all(torch.equal(old, b) for (_, old), b in zip(kept, before, strict=True))


@pytest.mark.parametrize("by", KINDS)
def test_work_is_counted(by: str) -> None:
    """A mode that looks at the ops sees all of them, wherever it begins."""
    found = []
    for kind in (fd.FusedDNILinear, Usual):
        trained = Trained(kind, by)
        for _ in range(8):
            trained.step()
        counter = FlopCounterMode(display=False)
        with counter:
            trained.step()
        behind = FlopCounterMode(display=False)
        trained.step(between=lambda trained, h, mode=behind: mode.__enter__())
        behind.__exit__(None, None, None)
        found.append((counter.get_total_flops(), behind.get_total_flops()))
    assert found[0] == found[1] and min(found[0]) > 0


@pytest.mark.parametrize("by", KINDS)
def test_a_forward_that_is_dropped_goes_at_once(by: str) -> None:
    trained = Trained(fd.FusedDNILinear, by)
    for _ in range(8):
        trained.step()
    gc.collect()
    gc.disable()
    try:
        x = torch.randn(ROWS, SIZE)
        gone = weakref.ref(x)
        with fd.condition_on(torch.zeros(ROWS, dtype=torch.int64)):
            h = trained.run(x, torch.zeros(ROWS, dtype=torch.int64))
        del x, h
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("by", KINDS)
def test_saving_every_epoch_is_no_change(by: str) -> None:
    """Nor are containers that grew: they are bound anew."""
    trained = Trained(fd.FusedDNILinear, by)
    optimizer = fd.FusedOptimizer(trained.model)
    for _ in range(9):
        trained.step()
    for _ in range(5):
        optimizer.state_dict()
        assert "usual way" not in repr(trained.model)
    another_behind(trained)
    for _ in range(14):
        trained.step()
    assert "usual way" not in repr(trained.model), trained.model
    assert trained.model._stack.members == tuple(trained.model)


@pytest.mark.parametrize("by", KINDS)
def test_it_goes_when_nobody_holds_it(by: str) -> None:
    """Though what it is bound by leads back to it."""
    trained = Trained(fd.FusedDNILinear, by)
    for _ in range(9):
        trained.step()
    assert trained.model._stack is not None
    gone = [weakref.ref(each) for each in (trained.model, *trained.model)]
    del trained
    gc.collect()
    assert [reference() for reference in gone] == [None] * len(gone)


SYNTHESIZERS: dict[str, Callable[[], nn.Module]] = {
    "low rank": lambda: fd.LinearSynthesizer(SIZE, 2, CLASSES),
    "diagonal": lambda: fd.DiagonalSynthesizer(SIZE, CLASSES),
    "cross-entropy": lambda: fd.CrossEntropySynthesizer(SIZE, CLASSES),
    "no labels": lambda: fd.LinearSynthesizer(SIZE),
}


@pytest.mark.parametrize("synthesizer", SYNTHESIZERS)
@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("rule", [fd.SGD(0.05, momentum=0.9), fd.Adam(0.01)], ids=["sgd", "adam"])
@pytest.mark.parametrize(("mix", "lessons"), [(1.0, 4), (0.0, 3), (1.0, 1), (0.4, 2)])
def test_several_lessons_and_true_gradients(
    mix: float, lessons: int, rule: Any, ends: bool, synthesizer: str
) -> None:
    """Warm-up, then predictions with targets on every third step: each a call or three, but for
    the first ones and those in which a unit may move."""
    found, regions = [], []
    cpu = pytest.importorskip("fused_dni.backends._cpu")
    for kind in (fd.FusedDNILinear, Usual):
        torch.manual_seed(0)
        layers: list[nn.Module] = [
            kind(SIZE, SIZE, normalization="batch", activation="relu", backend="cpu", update=rule,
                 synthesizer=SYNTHESIZERS[synthesizer]()) for _ in range(3)
        ]  # fmt: skip
        head = UsualLoss if kind is Usual else fd.FusedDNILinearCrossEntropyLoss
        if ends:
            layers.append(head(SIZE, CLASSES, backend="cpu", update=rule))
        model = fd.DecoupledSequential(*layers)
        last = nn.Linear(SIZE, CLASSES)
        schedule = fd.Schedule(model, warmup_steps=6, target_every=3, mix=mix, lessons=lessons)
        seen: list[Tensor] = []
        counts: list[int] = []
        for _ in range(24):
            x, y = torch.randn(ROWS, SIZE), torch.randint(0, CLASSES, (ROWS,))
            before = cpu.met()[0]
            with fd.condition_on(y):
                h = model(x, target=y) if ends else model(x)
            (h if ends else F.cross_entropy(last(h), y)).backward()
            counts.append(cpu.met()[0] - before)
            schedule.step()
            seen.append(h.detach())
        decoupled = [m for m in model.modules() if isinstance(m, DecoupledModule)]
        rules = [each for m in decoupled for _, each, _ in m.rules()]
        seen += [*model.state_dict().values(), *[each.hyper for each in rules]]
        seen += [t for each in rules for held in each.moments() for t in held if t is not None]
        seen += [m.statistics for m in decoupled if m.synthesizer is not None]
        assert [m.synthesizer_update.steps for m in decoupled[:3]] == [lessons * (6 + 6)] * 3
        found.append(seen)
        regions.append(counts)
    for a, b in zip(*found, strict=True):
        assert equal(a, b)
    mine, usual = regions
    if mix:  # forward, backward, lessons with updates
        assert mine[4:6] == [3, 3] and mine[18::3] == [3, 3]
        assert min(usual[18::3]) > 6 * lessons
    elif ends:  # forward with lessons, the last one's lessons with the head's update
        assert mine[18::3] == [2, 2]
    assert max(mine[19:21]) <= 2  # without a target


def test_a_bound_on_predictions_is_not_mixed_in_one_call() -> None:
    found, said = [], []
    for kind in (fd.FusedDNILinear, Usual):
        torch.manual_seed(0)
        model = fd.DecoupledSequential(*(layer(kind, "mixed", max_norm=0.01) for _ in range(3)))
        schedule, outputs = fd.Schedule(model, warmup_steps=4, mix=0.4), []
        for _ in range(8):
            said.append(model.extra_repr())
            with fd.condition_on(torch.arange(ROWS) % CLASSES):
                outputs.append(model(torch.randn(ROWS, SIZE)))
            outputs[-1].square().sum().backward()
            schedule.step()
        found.append([h.detach() for h in outputs])
    assert all(map(torch.equal, *found))
    assert "one call" in said[3] and "max_norm" in said[5]


def test_layers_of_one_kind_alone() -> None:
    """Where some have synthesizers and some have none, each layer's own step is one call."""
    torch.manual_seed(0)
    ways = ("true gradient", "prediction", "true gradient", "taught", "true gradient")
    layers = [layer(fd.FusedDNILinear, by) for by in ways]
    model = fd.DecoupledSequential(*layers)
    fd.Schedule(model, target_every=None)
    for _ in range(4):
        with fd.condition_on(torch.zeros(ROWS, dtype=torch.int64)):
            model(torch.randn(ROWS, SIZE)).sum().backward()
    assert model._stack is None
    assert layers[2]._binding.exact is not None


def test_the_way_is_said() -> None:
    """By ``repr``, with what is in the way of the one call."""
    trained = Trained(fd.FusedDNILinear, "prediction")
    assert "steps by" not in repr(trained.model)
    for _ in range(7):
        trained.step()
    said = repr(trained.model)
    assert said.count("steps by one call") == 4, said
    handle = trained.model[1].register_forward_hook(lambda module, arguments, out: None)
    assert "steps by the usual way (_forward_hooks is not as it was)" in repr(trained.model)
    handle.remove()
    with torch.no_grad():
        assert "(is_grad_enabled is not as it was)" in repr(trained.model)
    trained.model[1].weight.data = trained.model[1].weight.data.clone()
    said = repr(trained.model)
    assert said.count("steps by the usual way (data_ptr is not as it was)") == 2, said
    assert "steps by" not in repr(trained.model.eval())


@pytest.mark.parametrize(
    ("change", "by", "said"),
    [
        (used_twice, "prediction", "layer by layer (a layer stands in it twice and is"),
        (used_twice, "true gradient, loss", "layer by layer (a layer stands in it twice and is"),
        (memory_shared, "prediction", "layer by layer (parameters of two layers share their"),
        (frozen, "true gradient", "layer by layer (a layer is frozen and has no node)"),
        (ordinary_between, "prediction, loss", "layer by layer (it holds a Tanh)"),
        (head_frozen, "prediction, loss", "one call, then the head (the head is frozen and"),
        (head_frozen, "true gradient, loss", "and one back, then the head (the head is frozen"),
        (frozen_last, "prediction, loss", "then the head (the last synthesizer is frozen"),
        (
            head_of_an_optimizer,
            "prediction, loss",
            "then the head (the head has no call of its own)",
        ),
        (hook_between, "prediction, loss", "the usual way (_forward_hooks is not as it was)"),
        (head_hooked, "prediction, loss", "the usual way (_forward_hooks is not as it was)"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_what_is_in_the_way_is_said(change: Callable[[Trained], None], by: str, said: str) -> None:
    trained = Trained(fd.FusedDNILinear, by)
    for _ in range(7):
        trained.step()
    change(trained)
    for _ in range(9):
        trained.step()
    first = repr(trained.model).splitlines()[1]
    assert first.startswith("  steps ") and said in first, first


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"synthesizer": None}, "steps by one call forward and one back"),
        ({"interface": "preactivation"}, "steps by one call, without targets"),
    ],
)
def test_which_steps_are_one_call_is_said(options: dict[str, Any], said: str) -> None:
    each = fd.FusedDNILinear(SIZE, SIZE, backend="cpu", update=fd.SGD(0.01), **options)
    fd.Schedule(each, target_every=None)
    for _ in range(2):
        each(torch.randn(ROWS, SIZE))
    assert said in repr(each)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"backend": "reference"}, "backend 'reference' has none"),
        ({"synthesizer": fd.MLPSynthesizer(SIZE, 4)}, "its synthesizer is a MLPSynthesizer"),
    ],
)
def test_why_there_is_none_is_said(options: dict[str, Any], why: str) -> None:
    layer = fd.FusedDNILinear(SIZE, SIZE, update=fd.SGD(0.01), **options)
    fd.Schedule(layer, target_every=None)
    layer(torch.randn(ROWS, SIZE))
    assert f"steps by the usual way ({why})" in repr(layer)


@pytest.mark.parametrize("by", ["true gradient", "true gradient, loss"])
def test_a_backward_to_some_inputs_updates_all_layers(by: str) -> None:
    """As docs/semantics.md says: the call has one node for all of them, which runs or does not;
    layer by layer those run that are on the way."""
    moved = []
    for kind in (fd.FusedDNILinear, Usual):
        trained = Trained(kind, by)
        for _ in range(3):
            trained.step()
        layers = list(trained.model)
        assert (
            kind is Usual or trained.model.extra_repr() == "steps by one call forward and one back"
        )
        before = [m.weight.detach().clone() for m in layers]
        x, y = torch.randn(ROWS, SIZE), torch.randint(0, CLASSES, (ROWS,))
        h = trained.run(x, y)
        found = h if trained.ends else F.cross_entropy(trained.head(h), y)
        found.backward(inputs=[layers[2].weight])
        moved.append([not torch.equal(m.weight, w) for m, w in zip(layers, before, strict=True)])
    assert moved[0] == [True] * len(moved[0])
    assert moved[1] == [False, False, *[True] * (len(moved[1]) - 2)]
