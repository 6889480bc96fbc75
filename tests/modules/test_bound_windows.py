"""Windows of an LSTM that looked up once what they ask for: the bits of the usual way, and that way
wherever anything is not as it was."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

import fused_dni as fd
from fused_dni.modules import recurrent

pytest.importorskip("fused_dni.backends._cpu")
pytestmark = pytest.mark.usefixtures("one_thread")

RULES = {"none": None, "sgd": fd.SGD(0.05), "adam": fd.Adam(0.01)}
T, B, I, H = 4, 3, 5, 6  # noqa: E741 steps, rows, inputs, units


class Usual(fd.FusedDNILSTM):
    """Looks nothing up: that is for the module itself alone."""


def pair(rule: str, **options: Any) -> tuple[fd.FusedDNILSTM, fd.FusedDNILSTM]:
    torch.manual_seed(0)
    lstm = fd.FusedDNILSTM(I, H, update=RULES[rule], backend="cpu", **options)
    usual = copy.deepcopy(lstm)
    usual.__class__ = Usual
    return lstm, usual


class Stream:
    """Windows that continue each other's state, and what came of them."""

    def __init__(self, lstm: fd.FusedDNILSTM) -> None:
        self.lstm, self.state = lstm, None

    def window(self, seed: int, dtype: torch.dtype = torch.float32) -> list[Any]:
        """Outputs, parameters, gradients, moments and statistics behind a window, or the error."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(T, B, I, generator=generator).to(dtype)
        aim = torch.randn(T, B, H, generator=generator).to(dtype)
        ended = torch.tensor([seed % 3 == 2, False, False])
        try:
            output, self.state = self.lstm(x, self.state, end_of_sequence=ended)
            if output.requires_grad:
                (output - aim).square().mean().backward()
        except Exception as error:
            return [f"{type(error).__name__}: {error}"]
        found: list[Any] = [output, *self.state, self.lstm.statistics]
        found += [t for p in self.lstm.parameters() for t in (p, p.grad)]
        for _, rule, _ in self.lstm.rules():
            found += [rule.hyper, *[t for held in rule.moments() for t in held]]
        if not self.lstm.update:
            self.lstm.zero_grad()
        return [t.detach().clone() if isinstance(t, Tensor) else t for t in found]


def same(mine: list[Any], theirs: list[Any]) -> None:
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, (a, b)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bias": False}, {"synthesizer": None}])
@pytest.mark.parametrize("rule", RULES)
def test_the_bits_are_those_of_the_usual_way(rule: str, options: dict[str, Any]) -> None:
    lstm, usual = pair(rule, **options)
    mine, theirs = Stream(lstm), Stream(usual)
    for seed in range(10):
        same(mine.window(seed), theirs.window(seed))
    assert usual._bound is None
    assert lstm._bound is not None and lstm._bound.hold(True)


def set_rate(lstm: fd.FusedDNILSTM) -> None:
    for _, rule, _ in lstm.rules():
        rule.group["lr"] = 0.02


def set_rate_back(lstm: fd.FusedDNILSTM) -> None:
    """To another and back, with a look at the rule between."""
    for _, rule, slots in lstm.rules():
        before = rule.group["lr"]
        rule.group["lr"] = 0.5
        rule.tensors(slots)
        rule.group["lr"] = before


def set_bad_rate(lstm: fd.FusedDNILSTM) -> None:
    for _, rule, _ in lstm.rules():
        rule.group["lr"] = -1.0


def set_decay(lstm: fd.FusedDNILSTM) -> None:
    for _, rule, _ in lstm.rules():
        rule.group["weight_decay"] = 0.1


def freeze(lstm: fd.FusedDNILSTM) -> None:
    lstm.weight_hh_l0.requires_grad_(False)


def freeze_the_synthesizer(lstm: fd.FusedDNILSTM) -> None:
    assert lstm.synthesizer is not None
    lstm.synthesizer.requires_grad_(False)


def replace_a_parameter(lstm: fd.FusedDNILSTM) -> None:
    lstm.weight_ih_l0 = nn.Parameter(lstm.weight_ih_l0.detach().clone() * 0.5)


def move_a_parameter(lstm: fd.FusedDNILSTM) -> None:
    lstm.weight_ih_l0.data = lstm.weight_ih_l0.detach().clone() * 0.5


def replace_the_synthesizer(lstm: fd.FusedDNILSTM) -> None:
    torch.manual_seed(3)
    lstm.synthesizer = fd.LinearSynthesizer(2 * H, rank=2)


def replace_a_parameter_of_the_synthesizer(lstm: fd.FusedDNILSTM) -> None:
    assert isinstance(lstm.synthesizer, fd.LinearSynthesizer)
    lstm.synthesizer.bias = nn.Parameter(torch.full_like(lstm.synthesizer.bias, 0.5))


def another_form_of_synthesizer(lstm: fd.FusedDNILSTM) -> None:
    torch.manual_seed(3)
    lstm.synthesizer = fd.MLPSynthesizer(2 * H, hidden=4)


def strange_gradient(lstm: fd.FusedDNILSTM) -> None:
    lstm.weight_hh_l0.grad = torch.ones_like(lstm.weight_hh_l0)


def warm_up(lstm: fd.FusedDNILSTM) -> None:
    fd.Schedule(lstm, warmup_steps=100)


def without_targets(lstm: fd.FusedDNILSTM) -> None:
    fd.Schedule(lstm, target_every=None)


def mix(lstm: fd.FusedDNILSTM) -> None:
    fd.Schedule(lstm, mix=0.25)


def bound_predictions(lstm: fd.FusedDNILSTM) -> None:
    lstm.max_norm, lstm.max_target_norm, lstm.sg_scale = 0.01, 0.1, 0.7


def evaluate(lstm: fd.FusedDNILSTM) -> None:
    lstm.eval()


def parametrize(lstm: fd.FusedDNILSTM) -> None:
    parametrizations.weight_norm(lstm, "weight_hh_l0")


def reset(lstm: fd.FusedDNILSTM) -> None:
    torch.manual_seed(4)
    lstm.reset_parameters()


def clear_statistics(lstm: fd.FusedDNILSTM) -> None:
    lstm.statistics = torch.zeros_like(lstm.statistics)


def another_backend(lstm: fd.FusedDNILSTM) -> None:
    lstm.backend = "reference"


CHANGES: list[Callable[[fd.FusedDNILSTM], None]] = [
    set_rate,
    set_rate_back,
    set_bad_rate,
    set_decay,
    freeze,
    freeze_the_synthesizer,
    replace_a_parameter,
    move_a_parameter,
    replace_the_synthesizer,
    replace_a_parameter_of_the_synthesizer,
    another_form_of_synthesizer,
    strange_gradient,
    warm_up,
    without_targets,
    mix,
    bound_predictions,
    evaluate,
    parametrize,
    reset,
    clear_statistics,
    another_backend,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("rule", RULES)
def test_changes_between_windows_are_seen(
    rule: str, change: Callable[[fd.FusedDNILSTM], None]
) -> None:
    lstm, usual = pair(rule)
    mine, theirs = Stream(lstm), Stream(usual)
    for seed in range(6):
        same(mine.window(seed), theirs.window(seed))
    assert lstm._bound is not None
    for each in (lstm, usual):
        change(each)
    if change is parametrize:  # which makes a class of its own
        assert type(lstm).__mro__[1] is fd.FusedDNILSTM
    for seed in range(6, 10):
        same(mine.window(seed), theirs.window(seed))


@pytest.mark.parametrize("rule", RULES)
def test_changes_between_forward_and_backward_are_seen(rule: str) -> None:
    """The update is made by the rule as it is at its end."""
    streams = [Stream(lstm) for lstm in pair(rule)]
    for seed in range(6):
        same(streams[0].window(seed), streams[1].window(seed))
    for stream in streams:
        output, _ = stream.lstm(torch.ones(T, B, I), stream.state)
        set_rate(stream.lstm)
        output.square().mean().backward()
    for seed in range(6, 8):
        same(streams[0].window(seed), streams[1].window(seed))


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize(
    "around", [autocast, torch.no_grad, lambda: FlopCounterMode(display=False)]
)
@pytest.mark.parametrize("rule", RULES)
def test_what_surrounds_a_window_is_seen(rule: str, around: Callable[[], Any]) -> None:
    lstm, usual = pair(rule)
    mine, theirs = Stream(lstm), Stream(usual)
    for seed in range(6):
        same(mine.window(seed), theirs.window(seed))
    with around():
        assert lstm._bound is not None and not lstm._bound.hold(True)
        same(mine.window(6), theirs.window(6))
    for seed in range(7, 10):
        same(mine.window(seed), theirs.window(seed))


def test_copies_and_pickles_look_up_anew() -> None:
    lstm, _ = pair("adam")
    stream = Stream(lstm)
    for seed in range(6):
        stream.window(seed)
    assert lstm._bound is not None
    for made in (copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm))):
        assert made._bound is None
        mine, theirs = Stream(made), Stream(copy.deepcopy(lstm))
        for seed in range(6, 9):
            same(mine.window(seed), theirs.window(seed))
        assert made._bound is not None


def test_what_changes_in_every_window_is_looked_up_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """After twice as many windows each time."""
    tried = []

    def bind(module: Any, backend: Any) -> Any:
        tried.append(module)
        return recurrent_bind(module, backend)

    recurrent_bind = recurrent.bind_windows
    monkeypatch.setattr(recurrent, "bind_windows", bind)
    lstm, _ = pair("none")
    stream = Stream(lstm)
    for seed in range(40):
        lstm.weight_ih_l0 = nn.Parameter(lstm.weight_ih_l0.detach().clone())
        stream.window(seed)
    assert len(tried) == 6  # at the 1st, 2nd, 4th, 8th, 16th and 32nd


def test_it_goes_when_nobody_holds_it() -> None:
    """What was looked up leads back to the module: Python's collector sees through it."""
    lstm, _ = pair("adam")
    stream = Stream(lstm)
    for seed in range(6):
        stream.window(seed)
    assert lstm._bound is not None
    gone = weakref.ref(lstm)
    del lstm, stream, _
    gc.collect()
    assert gone() is None
