"""Parts of a step: they are what the step does, and their work is what the formulas say."""

import json

import pytest
import torch
from flops import install
from torch import nn

import fused_dni as fd
from fused_dni.measure import timing
from fused_dni.measure.verdict import parts as p
from fused_dni.measure.verdict import phases
from fused_dni.measure.verdict.candidates import at_rate, make_problem
from fused_dni.measure.verdict.forms import decouple
from fused_dni.measure.verdict.work import count
from fused_dni.report.files import as_json

SGD = at_rate(fd.SGD(), 1e-6)


def _linear(features: int = 8) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(features, features, bias=False), nn.BatchNorm1d(features), nn.ReLU()
    )


def _network() -> nn.Sequential:
    return nn.Sequential(*_linear(), nn.Dropout(0.1), *_linear(), nn.Linear(8, 3))


def _convolution() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())


def _followed() -> nn.Sequential:
    """A layer and something without a fused form, with parameters of its own."""
    return nn.Sequential(nn.Linear(8, 8), nn.PReLU())


def _posed(module, sample, target=None, interface="output", synthesizer="rank4"):
    problem, output, plain = make_problem(module, sample, target, 3, SGD)
    ours = decouple(
        plain,
        sample,
        output,
        synthesizer="default" if output.dim() == 4 else synthesizer,
        interface=interface,
        context_features=3,
        update=SGD,
        exact_head=target is not None,
        backend="reference",
    )
    return plain, ours.train(), problem


CASES = {
    "layer": lambda: _posed(_linear(), torch.randn(6, 8)),
    "layer, preactivation": lambda: _posed(_linear(), torch.randn(6, 8), None, "preactivation"),
    "network": lambda: _posed(_network(), torch.randn(6, 8), torch.arange(6) % 3),
    "convolution": lambda: _posed(_convolution(), torch.randn(4, 2, 5, 5)),
    "followed": lambda: _posed(_followed(), torch.randn(6, 8), None, "preactivation"),
}


@pytest.fixture
def by_operations(monkeypatch):
    install(monkeypatch)


@pytest.mark.parametrize("case", CASES)
def test_parts_add_up_to_the_step(by_operations, case):
    torch.manual_seed(0)
    found = p.measure_parts(*CASES[case]())
    steps = [made.step for made in found.sums]
    assert set(steps) == {"stock step", "step with targets", "step without targets"}
    for made in found.sums:
        assert made.ratio.median == pytest.approx(1.0, abs=0.02), made
        assert made.agrees
    for name in ("predict", "train", "fused step, dx"):
        assert found.seconds(name) > 1.0
    assert json.loads(as_json(found))["work"]["predict"]["flops"] > 0


def test_a_step_without_targets_leaves_dx_and_training_out(by_operations):
    torch.manual_seed(0)
    found = p.measure_parts(*CASES["layer"]())
    dx = 2 * 6 * 8 * 8
    assert found.seconds("local backward, dx") - found.seconds("local backward") == dx
    missing = found.seconds("step with targets") - found.seconds("step without targets")
    assert missing == pytest.approx(dx + found.seconds("train"), abs=0.01)


def test_what_lies_behind_a_preactivation_runs_backward_on_steps_with_targets_alone(by_operations):
    class Squared(nn.Module):
        def forward(self, x):
            return x @ x.t() @ x

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), Squared())
    found = p.measure_parts(*_posed(module, torch.randn(6, 8), None, "preactivation"))
    with_targets, without = (s for s in found.sums if s.parts[0] == "forward")
    assert "others backward" in with_targets.parts and "others backward" not in without.parts
    assert with_targets.agrees and without.agrees
    assert found.seconds("others backward") > found.seconds("others forward")


def test_composed_steps_are_told_from_fused_ones(by_operations):
    torch.manual_seed(0)
    for case, fused in (("layer", True), ("convolution", False)):
        found = p.measure_parts(*CASES[case]())
        phases = [made for made in found.sums if made.parts[0] == "forward"]
        assert [made.composed for made in phases] == [not fused] * 2


def test_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    _, ours, problem = CASES["network"]()
    sites, uses = phases.record(ours, problem)
    assert [site.module.synthesizer is None for site in sites] == [False, False, True]
    assert [type(use.module) for use in uses] == [nn.Dropout]
    for module in ours.modules():
        assert not module._forward_pre_hooks


def test_a_disagreeing_sum_is_said():
    def fixed(name: str, value: float) -> timing.Timing:
        return timing.Timing.of(name, (value,) * 8, (value,) * 8, 1)

    times = {"stock forward": 1.0, "stock backward": 2.0, "stock optimizer": 0.5, "stock step": 5.0}
    times |= dict.fromkeys((*phases.CALLS, *phases.CALLS_DX, "forward", "step with targets"), 1.0)
    times["step without targets"] = 1.0
    made = p.sums({name: fixed(name, value) for name, value in times.items()}, nn.Identity())
    assert made[0].ratio.median == pytest.approx(0.7) and not made[0].agrees
    assert made[0].to_json()["agrees"] is False


# -------------------------------------------------------------------------------------------- work


def test_work_of_a_layer():
    n, i, o = 5, 7, 3
    layer = nn.Sequential(nn.Linear(i, o, bias=False), nn.ReLU())
    x = torch.randn(n, i, requires_grad=True)
    forward = count(lambda: layer(x))
    # What goes between product and ReLU lives and dies inside; h is kept, for the backward too.
    assert forward == (2 * n * i * o, 4 * (n * i + i * o + n * o))
    out = layer(x)
    g = torch.randn_like(out)
    backward = count(lambda: torch.autograd.grad(out, [layer[0].weight], g))
    assert backward == (2 * n * i * o, 4 * (n * i + i * o + 2 * n * o))


def test_views_move_nothing_and_writes_in_place_count_twice():
    x = torch.randn(10)
    assert count(lambda: x.view(2, 5).t()) == (0, 0)
    assert count(lambda: x.add_(1.0)) == (0, 2 * 40)
    assert count(lambda: None) == (0, 0)
