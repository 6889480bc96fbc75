"""What advice is made of: a model's blocks, how they run, sums of their times, the choice."""

import pytest
import torch
from torch import nn

import fused_dni as fd
from fused_dni.measure.advise.advise import make_subject
from fused_dni.measure.advise.blocks import survey
from fused_dni.measure.advise.choose import best_by_k, choose, everywhere
from fused_dni.measure.advise.forms import Interface, Making, converted, interfaces
from fused_dni.measure.advise.measure import possible
from fused_dni.measure.advise.predict import BACKWARD, OPTIMIZER, Blocks, Form, Plan, memory, runs
from fused_dni.measure.advise.top import expensive_top
from fused_dni.measure.timing import Timing
from fused_dni.rules import SGD
from models import convnet, lstm_lm, mlp

LOW, DIAGONAL = Interface("rank 16"), Interface("diagonal")

TINY = {
    "mlp": lambda: mlp(width=16, depth=2, batch=8),
    "convnet": lambda: convnet(channels=4, size=8, batch=4),
    "lstm_lm": lambda: lstm_lm(symbols=11, features=4, hidden=8, window=3, batch=2),
}


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


def _found(*modules: nn.Module, sample=None, loss=None):
    sample = torch.randn(4, 8) if sample is None else sample
    return survey(nn.Sequential(*modules), sample, loss)


def _steady(seconds: float) -> Timing:
    """The same time in each of so many rounds that an interval is known."""
    return Timing.of("steady", (seconds,) * 12, (seconds,) * 12, 1)


def _blocks(parts, time) -> Blocks:
    """As if ``time(index, form)`` had been measured, and nothing for what is paid once."""
    names = {(i, form): f"{i} {form}" for i, form in possible(parts)}
    times = {name: _steady(time(*key)) for key, name in names.items()}
    return Blocks(parts, {**times, BACKWARD: _steady(0.0), OPTIMIZER: _steady(0.0)}, names)


# ------------------------------------------------------------------------------------------ blocks


def test_blocks_of_an_mlp():
    found = survey(*TINY["mlp"]())
    assert [b.what for b in found] == ["Linear + BatchNorm1d + ReLU"] * 2 + ["Linear", "loss"]
    assert [b.kind for b in found] == ["linear"] * 3 + ["loss"]
    assert [b.asks for b in found] == [False, True, True, True]
    assert [b.producer for b in found] == [None, 0, 1, 2]
    assert [b.flops for b in found[:3]] == [
        2 * 8 * i * o for i, o in ((784, 16), (16, 16), (16, 10))
    ]
    assert "true gradient" in found[2].why and not found[0].why
    assert set(interfaces(found[0])) == {
        Interface(name, place)
        for name in ("rank 16", "diagonal")
        for place in ("output", "preactivation")
    }


def test_blocks_of_a_convnet_take_along_what_keeps_the_dimensions():
    found = survey(*TINY["convnet"]())
    conv = "Conv2d + BatchNorm2d + ReLU + MaxPool2d"
    assert [b.what for b in found] == [conv] * 3 + ["Flatten", "Linear + ReLU", "Linear", "loss"]
    assert [b.maps for b in found[:4]] == [2, 2, 2, 0]
    assert {one.synthesizer for one in interfaces(found[1])} == {"conv", "conv 1x1"}
    assert found[3].kind == "plain" and not interfaces(found[3])


def test_blocks_of_a_language_model_keep_its_state():
    found = survey(*TINY["lstm_lm"]())
    assert [b.name for b in found] == ["embedding", "lstm", "head", "loss"]
    assert found[0].kind == "plain" and "look-up" in found[0].why
    assert found[1].kind == "lstm" and found[1].args[1][0].shape == (1, 2, 8)
    assert found[1].asks, "the embedding below is trained"
    assert found[2].producer == 1


def test_modules_of_its_own_are_segments_and_what_cannot_be_cut_says_why():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.inner = nn.Linear(8, 8), nn.Bilinear(8, 8, 8)
            self.own, self.head = nn.Sequential(nn.Flatten()), nn.Linear(8, 2)

        def forward(self, x):
            h = self.shared(self.shared(x))
            return self.head(self.own(self.inner(h, x)))

    found = {b.name: b for b in survey(Twice(), torch.randn(4, 8), None)}
    assert found["shared"].calls == 2 and "runs 2 times" in found["shared"].why
    assert found["inner"].kind == "segment" and interfaces(found["inner"]) == (LOW, DIAGONAL)
    assert found["own.0"].why == "nothing in it is trained"
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    assert "shares parameters" in _found(first, second, nn.Linear(8, 2))[0].why


def test_equal_blocks_are_alike_and_others_are_not():
    found = _found(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    assert found[0].signature() == found[1].signature() != found[2].signature()


# ------------------------------------------------------------------------------------ how they run


def test_without_targets_nothing_above_an_interface_makes_a_gradient_for_it():
    found = survey(*TINY["mlp"]())
    plan = Plan(interfaces={0: LOW, 1: LOW}, k=4)
    with_targets = [run.form.asks for run in runs(found, plan, True)]
    assert with_targets == [False, True, True, True]
    without = runs(found, plan, False)
    assert [run.form.asks for run in without] == [False, False, False, True]
    # What is not asked for anything runs no backward; the head does, for the loss.
    assert [run.backward for run in without] == [False, False, True, True]


def test_an_ordinary_module_hides_the_interface_from_the_layer_above():
    """Where something below is trained by the interface, its output asks for a gradient."""
    found = _found(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 2))
    assert [b.what for b in found] == ["Linear + ReLU", "Linear", "Dropout", "Linear"]
    hidden = runs(found, Plan(interfaces={1: LOW}, k=4), False)
    assert [run.form.asks for run in hidden] == [False, True, True, True]
    free = runs(found, Plan(interfaces={0: LOW, 1: LOW}, k=4), False)
    assert [run.form.asks for run in free] == [False, False, False, False]


@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("target", [True, False])
def test_how_blocks_run_is_how_they_ran_in_the_converted_model(model, target):
    """Predicted: whose output asks for a gradient. Seen: with hooks, in the model itself."""
    module, sample, loss = TINY[model]()
    subject = make_subject(module, sample, loss, SGD(1e-6), 0, "reference")
    chosen = {i: found[0] for i, b in enumerate(subject.blocks) if (found := interfaces(b))}
    for plan in (Plan(), Plan(interfaces=chosen, k=2)):
        copied = converted(subject.model, subject.blocks, plan.interfaces, subject.how)
        schedule = fd.Schedule(copied, target_every=1 if target else None)
        seen: list[bool] = []

        def watch(module, args, out, seen=seen):
            seen.append((out if isinstance(out, torch.Tensor) else out[0]).requires_grad)

        for block in subject.blocks[:-1]:
            copied.get_submodule(block.paths[-1]).register_forward_hook(watch)
        loss(copied(sample)).backward()
        schedule.step()
        predicted = runs(subject.blocks, plan, target and bool(plan.interfaces))
        assert seen == [run.backward for run in predicted[:-1]]


# -------------------------------------------------------------------------------------------- sums


def test_a_step_is_the_sum_of_its_blocks_and_counts_once_what_is_paid_once():
    found = survey(*TINY["mlp"]())
    names = {(i, form): f"{i} {form}" for i, form in possible(found)}
    times = {name: _steady(10.0) for name in names.values()}
    measured = Blocks(found, {**times, BACKWARD: _steady(1.0), OPTIMIZER: _steady(2.0)}, names)
    # Four blocks with a backward, three with an optimizer.
    assert measured.step("stock", Plan(ours=False)).median == pytest.approx(40 - 3 - 2 * 2)
    assert measured.step("ours", Plan()).median == pytest.approx(40 - 3)
    # Without targets two blocks run no backward.
    plan = Plan(interfaces={0: LOW, 1: LOW}, k=4)
    assert measured.step("dni", plan).median == pytest.approx(40 - (3 + 3 * 1) / 4)


def test_a_block_that_runs_twice_counts_twice():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.layer(self.layer(x)))

    found = survey(Shared(), torch.randn(4, 8), None)
    measured = _blocks(found, lambda i, form: 10.0)
    assert measured.step("stock", Plan(ours=False)).median == pytest.approx(30.0)


def test_memory_is_what_is_held_below_the_peak_alone_and_what_is_left_above():
    found = _found(nn.Linear(8, 4, bias=False), nn.Linear(4, 2, bias=False))
    stock = {(i, Form(False, asks=bool(i))): v for i, v in ((0, 1000), (1, 100))}
    ours = {(i, Form(True, asks=bool(i))): v for i, v in ((0, 1000), (1, 100))}
    held, peak = {**stock, **ours}, {key: 3 * v for key, v in {**stock, **ours}.items()}
    # In the backward of the first one the second one's gradient waits for the optimizer.
    assert memory(found, Plan(ours=False), held, peak) == 3000 + 4 * 4 * 2
    # Of ours its input [4, 4] and the gradient at its output [4, 2], for the update at the end.
    assert memory(found, Plan(), held, peak) == 3000 + 4 * (4 * 4 + 4 * 2)


# ------------------------------------------------------------------------------------------ choice


def _planted(saving: float, price: float):
    """Times where a gradient of the input costs ``saving``, a synthesizer ``price`` on steps with
    targets and nothing on those without."""

    def time(i: int, form: Form) -> float:
        learns = price if form.interface is not None and form.target else 0.0
        return 10.0 + saving * form.asks + learns + 0.01 * (form.interface == DIAGONAL)

    return time


def _choice(measured: Blocks, doubt: float = 0.0) -> Plan | None:
    return choose(measured, best_by_k(measured), doubt)


def test_the_smallest_k_that_pays_is_chosen():
    found = survey(*TINY["mlp"]())
    # Two gradients saved in three steps of four, two synthesizers trained in one: 2 < 3.
    chosen = _choice(_blocks(found, _planted(saving=1.0, price=2.0)))
    assert chosen is not None and chosen.k == 4
    assert dict(chosen.interfaces) == {0: LOW, 1: LOW}
    free = _choice(_blocks(found, _planted(saving=1.0, price=0.0)))
    assert free is not None and free.k == 2


def test_a_gain_within_the_doubt_is_none():
    """k = 2 saves 1 of 42 (two gradients in every other step), 16 saves 1.9 of 42."""
    measured = _blocks(survey(*TINY["mlp"]()), _planted(saving=1.0, price=0.0))
    assert _choice(measured, doubt=0.03).k == 4
    assert _choice(measured, doubt=0.06) is None


def test_where_no_interface_pays_none_is_chosen_and_everywhere_is_everywhere():
    found = survey(*TINY["convnet"]())
    measured = _blocks(found, _planted(saving=1.0, price=1000.0))
    assert _choice(measured) is None
    forced = everywhere(measured)
    assert forced is not None and list(forced.interfaces) == [0, 1, 2, 4] and forced.k == 4
    # A model in which nothing can be cut.
    head = _found(nn.Linear(8, 2))
    assert everywhere(_blocks(head, _planted(1.0, 1.0))) is None


def test_a_block_may_pay_only_above_another_interface():
    """Where a decoupled step that makes a gradient of its input is dear, one that need not is
    free."""
    found = survey(*TINY["mlp"]())

    def time(i: int, form: Form) -> float:
        dear = 20.0 if form.interface is not None and form.asks and not form.target else 0.0
        return 10.0 + form.asks + dear

    chosen = _choice(_blocks(found, time))
    assert chosen is not None and set(chosen.interfaces) == {0, 1}


def test_only_the_block_that_pays_gets_an_interface():
    found = survey(*TINY["mlp"]())

    def time(i: int, form: Form) -> float:
        dear = 5.0 if form.interface is not None and i == 0 else 0.0
        return 10.0 + form.asks + dear

    chosen = _choice(_blocks(found, time))
    assert chosen is not None and set(chosen.interfaces) == {1}


# ------------------------------------------------------------------------------- expensive tops


def _frozen(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(*modules).requires_grad_(False)


def _top(found, *seconds: float):
    """What is found where the blocks take these times."""
    assert len(found) == len(seconds)
    return expensive_top(_blocks(found, lambda i, form: seconds[i]))


def test_a_frozen_tail_is_an_expensive_top():
    critic = _frozen(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    found = _found(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), critic, loss=lambda h: h.mean())
    assert [b.name for b in found] == ["0", "2", "3.0", "3.1", "3.2", "loss"]
    top = _top(found, 1.0, 2.0, 5.0, 0.5, 5.5, 1.0)
    assert top["blocks"] == ["3.0", "3.1", "3.2", "loss"] and not top["trained"]
    assert top["over below"].median == pytest.approx(12 / 3)
    assert top["by k"]["8"].median == pytest.approx((3 + 12 / 8) / 15)
    assert top["most"].median == pytest.approx(3 / 15)
    # As dear as what is below, the last trained layer taken along.
    top = _top(found, 1.0, 2.0, 1.0, 0.0, 1.0, 0.5)
    assert top["blocks"] == ["2", "3.0", "3.1", "3.2", "loss"] and top["trained"]
    assert _top(found, 9.0, 2.0, 1.0, 0.0, 1.0, 0.5) is None


def test_a_large_head_and_a_dear_loss_are_expensive_tops():
    found = survey(*TINY["mlp"]())
    assert _top(found, 1.0, 1.0, 6.0, 1.0)["blocks"] == ["6", "loss"]
    assert _top(found, 1.0, 1.0, 6.0, 1.0)["trained"]
    assert _top(found, 1.0, 1.0, 1.0, 9.0)["blocks"] == ["loss"]
    assert not _top(found, 1.0, 1.0, 1.0, 9.0)["trained"]
    assert _top(found, 1.0, 1.0, 1.0, 0.5) is None


def test_what_reads_from_below_is_no_top():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.critic = nn.Linear(8, 8), nn.Linear(8, 8).requires_grad_(False)

        def forward(self, x):
            return self.critic(self.first(x) + x)

    assert _top(survey(Skips(), torch.randn(4, 8), None), 1.0, 9.0) is None
    # Nothing below it, or nothing in it, learns.
    assert _top(_found(nn.Linear(8, 8)), 9.0) is None


# ------------------------------------------------------------------------------------------- forms


@pytest.mark.parametrize("model", TINY)
def test_our_form_of_a_model_makes_the_step_of_stock_backprop(model):
    module, sample, loss = TINY[model]()
    found = survey(module, sample, loss)
    rule = SGD(0.5)
    ours = converted(module, found, {}, Making(rule, backend="reference"))
    ordinary = torch.optim.SGD(fd.ordinary_parameters(ours), lr=0.5) if model != "mlp" else None
    loss(ours(sample)).backward()
    if ordinary is not None:
        ordinary.step()
    stock = torch.optim.SGD(module.parameters(), lr=0.5)
    loss(module(sample)).backward()
    stock.step()
    pairs = zip(fd.revert(ours).named_parameters(), module.named_parameters(), strict=True)
    for (name, p), (_, wanted) in pairs:
        torch.testing.assert_close(p, wanted, rtol=1e-4, atol=1e-5, msg=name)
