"""Several regression steps of a synthesizer on what arrives in one step with a target."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import twins
from torch import Tensor, nn
from twins import close, double, kept, linear

import fused_dni as fd
from fused_dni.modules.base import DecoupledModule

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, CLASSES, ROWS = 5, 3, 6
OF = {"dtype": torch.float64}
SYNTHESIZERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: fd.LinearSynthesizer(SIZE, 2, CLASSES, **OF),
    "diagonal": lambda: fd.DiagonalSynthesizer(SIZE, CLASSES, **OF),
    "cross-entropy": lambda: fd.CrossEntropySynthesizer(SIZE, CLASSES, **OF),
    "cross-entropy and linear": lambda: fd.CrossEntropySynthesizer(SIZE, CLASSES, 2, **OF),
    "batch normalisation": lambda: fd.MLPSynthesizer(SIZE, 4, context_features=CLASSES, **OF),
}


def taught(layer: Any, h: Tensor, y: Tensor, arrived: Tensor, lessons: int) -> list[Tensor]:
    """The synthesizer's parameters after so many steps of torch's Adam on its loss, by autograd."""
    m = copy.deepcopy(layer.synthesizer)
    target = ROWS * arrived / m.unit.size
    optimizer = torch.optim.Adam(m.parameters(), 0.01)
    for _ in range(lessons):
        optimizer.zero_grad()
        (m(h, y) - target).square().sum(1).mean().backward()
        optimizer.step()
    return list(m.parameters())


@pytest.mark.parametrize("name", SYNTHESIZERS)
@pytest.mark.parametrize("interface", ["output", "preactivation"])
@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
def test_lessons_are_steps_of_the_rule(name: str, interface: str, mix: float) -> None:
    layer = linear(
        4, SIZE, synthesizer=SYNTHESIZERS[name](), activation="tanh", interface=interface,
        update=fd.SGD(0.0), synthesizer_update=fd.Adam(0.01), target_scale=float(ROWS),
    )  # fmt: skip
    fd.Schedule(layer, mix=mix, lessons=3)
    x, y, arrived = double(ROWS, 4), torch.randint(CLASSES, (ROWS,)), double(ROWS, SIZE)
    z = F.linear(x, layer.weight, layer.bias).detach()
    at = arrived * (1 - z.tanh().square()) if interface == "preactivation" else arrived
    wanted = taught(layer, z.tanh(), y, at, 3)
    once = taught(layer, z.tanh(), y, at, 1)
    s = layer.synthesizer(z.tanh(), y).detach()
    running = [b.clone() for b in layer.synthesizer.buffers()]
    layer.statistics.zero_()
    layer(x, context=y).backward(arrived)
    got = dict(layer.synthesizer.named_parameters())
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(wanted, once, strict=True))
    for p, expected in zip(got.values(), wanted, strict=True):
        close(p.detach(), expected.detach(), 1e-9)
    # The sums are of the prediction that was made before any of them, once.
    target = ROWS * at
    expected = torch.stack([(s * target).sum(), s.square().sum(), target.square().sum()])
    close(layer.statistics[:3], expected)
    for b, before in zip(layer.synthesizer.buffers(), running, strict=True):
        if b.dtype is torch.int64:
            assert b == before + 1  # the step's own forward moved them, the lessons did not


def test_of_a_segment_and_of_a_late_target() -> None:
    made = []
    for late in (False, True):
        torch.manual_seed(0)
        segment = fd.Decoupled(
            nn.Linear(4, SIZE).double(), SYNTHESIZERS["cross-entropy"](),
            update=fd.SGD(0.0), synthesizer_update=fd.Adam(0.01), target_scale=float(ROWS),
        )  # fmt: skip
        twins.disturb(segment.synthesizer)
        fd.Schedule(segment, lessons=4)
        x, y, arrived = double(ROWS, 4), torch.randint(CLASSES, (ROWS,)), double(ROWS, SIZE)
        wanted = taught(segment, segment.module(x).detach(), y, arrived, 4)
        if late:
            fd.learn_late(segment, fd.step_local(segment, x, context=y).ticket, arrived)
        else:
            segment(x, context=y).backward(arrived)
        for p, expected in zip(segment.synthesizer.parameters(), wanted, strict=True):
            close(p.detach(), expected.detach(), 1e-9)
        made.append(kept(segment.synthesizer.parameters()))
    close(made[0], made[1])


def test_as_many_in_warm_up_and_none_without_a_target() -> None:
    layer = linear(4, SIZE, update=fd.SGD(0.0), synthesizer_update=fd.Adam(0.01))
    schedule = fd.Schedule(layer, warmup_steps=2, target_every=2, lessons=3)
    counts = []
    for _ in range(6):
        layer(double(ROWS, 4, grad=True)).backward(double(ROWS, SIZE))
        schedule.step()
        counts.append(layer.synthesizer_update.steps)
    assert counts == [3, 6, 9, 9, 12, 12]


class Usual(fd.FusedDNILinear):
    """Has no call of its own: see test_quick_stack.py."""


@pytest.mark.parametrize("mix", [0.0, 0.4])
def test_the_bits_of_one_call_are_those_of_the_usual_way(mix: float) -> None:
    pytest.importorskip("fused_dni.backends._cpu")
    seen = []
    for kind in (fd.FusedDNILinear, Usual):
        torch.manual_seed(0)
        layers = [
            kind(SIZE, SIZE, normalization="batch", context_features=CLASSES, backend="cpu",
                 update=fd.Adam(0.01)) for _ in range(2)
        ]  # fmt: skip
        head = fd.FusedDNILinearCrossEntropyLoss(SIZE, CLASSES, backend="cpu", update=fd.Adam(0.01))
        model = fd.DecoupledSequential(*layers, head)
        # From one lesson to three, and back: what was bound for one is not used for three.
        for lessons in (1, 3, 1, 3):
            schedule = fd.Schedule(model, target_every=2, mix=mix, lessons=lessons)
            for _ in range(6):
                x, y = torch.randn(ROWS, SIZE), torch.randint(CLASSES, (ROWS,))
                model(x, context=y, target=y).backward()
                schedule.step()
        steps = [m.synthesizer_update.steps for m in layers]
        assert steps == [3 * (1 + 3 + 1 + 3)] * 2
        state = [*model.state_dict().values(), *[m.statistics for m in layers]]
        seen.append([t.clone() for t in state])
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_bad_input() -> None:
    layer = linear(4, SIZE, update=fd.SGD(0.1))
    for wrong in (0, -1, 1.5, True, "4"):
        with pytest.raises(ValueError, match="lessons must be a whole number of at least 1, got"):
            fd.Schedule(layer, lessons=wrong)  # type: ignore[arg-type]
    for model in (linear(4, SIZE), fd.FusedDNILSTM(3, 2, update=fd.SGD(0.1))):
        before = [m.phase for m in model.modules() if isinstance(m, DecoupledModule)]
        with pytest.raises(
            ValueError, match="lessons=2 needs a layer whose synthesizer has a rule"
        ):
            fd.Schedule(model, lessons=2)
        assert [m.phase for m in model.modules() if isinstance(m, DecoupledModule)] == before
