"""Ranges for profilers: absent when off, named and nested when on, gone again afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fused_dni as fd
from fused_dni.annotate import VARIABLE, from_environment
from fused_dni.modules.base import DecoupledModule
from fused_dni.modules.nodes import Stepped
from fused_dni.modules.steps import LinearSteps, SegmentSteps
from fused_dni.schedule import Schedule

pytestmark = pytest.mark.usefixtures("one_thread")


def _methods() -> dict[tuple[type, str], object]:
    classes = [DecoupledModule, LinearSteps, SegmentSteps, Schedule, Stepped, fd.FusedDNILinear]
    classes += [fd.Decoupled, fd.FusedDNILSTM, fd.FusedDNILSTMCell, fd.DecoupledSequential]
    return {(c, n): m for c in classes for n, m in vars(c).items() if callable(m)}


def _model() -> nn.Module:
    inner = nn.Sequential(
        fd.FusedDNILinear(4, 4), fd.Decoupled(nn.Linear(4, 4), fd.DiagonalSynthesizer(4))
    )
    return nn.Sequential(fd.FusedDNILinear(4, 4, update=fd.SGD(lr=0.1)), inner)


def _recorded(run) -> list[tuple[str, str | None]]:
    """Our ranges in order of their start, and the range that each lies in."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        run()
    ours = [e for e in recorded.events() if e.is_user_annotation and ": " in e.name]

    def around(event):
        event = event.cpu_parent
        while event is not None and event not in ours:
            event = event.cpu_parent
        return event and event.name

    ours.sort(key=lambda e: (e.time_range.start, -e.time_range.end))
    return [(e.name, around(e)) for e in ours]


def _train(model, x):
    model(x).sum().backward()


def test_off_no_method_is_touched_and_no_range_appears():
    before = _methods()
    with fd.annotate():
        changed = [key for key, method in _methods().items() if method is not before[key]]
    assert (LinearSteps, "step_locally") in changed and (Schedule, "step") in changed
    after = _methods()
    assert all(after[key] is method for key, method in before.items())
    assert _recorded(lambda: _train(_model(), torch.ones(2, 4))) == []


def test_ranges_are_named_after_layer_and_phase_and_nested():
    model = _model()
    with fd.annotate(model):
        found = _recorded(lambda: _train(model, torch.ones(2, 4)))
    assert found == [
        ("0: forward", None),
        ("0: step", "0: forward"),
        ("1.0: forward", None),
        ("1.1: forward", None),
        ("1.1: backward", None),
        ("1.1: predict", "1.1: backward"),
        ("1.1: learn", "1.1: backward"),
        ("1.1: local backward", "1.1: backward"),
        ("1.0: backward", None),
        ("0: backward", None),
        ("0: learn", None),
    ]


def test_without_a_model_names_come_from_the_outermost_module_called():
    model = nn.ModuleDict({"body": _model()})
    with fd.annotate():
        assert _recorded(lambda: _train(model["body"], torch.ones(2, 4)))[1][0] == "0: step"
    alone = fd.FusedDNILinear(4, 4, update=fd.SGD())
    with fd.annotate():
        assert _recorded(lambda: alone(torch.ones(2, 4)))[0][0] == "FusedDNILinear: forward"
    with fd.annotate(model):
        assert _recorded(lambda: model["body"](torch.ones(2, 4)))[0][0] == "body.0: forward"


def test_the_schedules_phases_are_told():
    model = _model()
    schedule = fd.Schedule(model, warmup_steps=1, target_every=2)

    def steps():
        for _ in range(3):
            _train(model, torch.ones(2, 4))
            schedule.step()

    with fd.annotate(model):
        names = [name for name, _ in _recorded(steps)]
    of_interest = [n for n in names if n.startswith(("0: forward", "0: up", "schedule"))]
    assert of_interest == [
        "0: forward [warm-up]",
        "0: update",
        "schedule: with targets",
        "0: forward",
        "schedule: no targets",
        "0: forward [no targets]",
        "schedule: with targets",
    ]


@pytest.mark.parametrize("update", [None, fd.SGD(lr=0.1)], ids=["no rule", "rule"])
def test_lstm_and_cell(update):
    model = nn.ModuleDict(
        {
            "lstm": fd.FusedDNILSTM(3, 4, update=update, auxiliary=True),
            "cell": fd.FusedDNILSTMCell(4, 4, update=update),
        }
    )

    def windows():
        state = inner = None
        for _ in range(2):
            out, state = model["lstm"](torch.ones(2, 2, 3), state)
            inner = model["cell"](out[-1], inner)
            after = model["cell"].boundary(inner)
            inner[0].sum().backward()
            inner = after

    with fd.annotate(model):
        found = _recorded(windows)
    names = {name for name, _ in found}
    phases = {"forward", "backward", "predict", "learn"} | ({"update"} if update else set())
    assert names == {f"{layer}: {phase}" for layer in ("lstm", "cell") for phase in phases}
    assert ("cell: predict", "cell: backward") in found


def test_immediate_delivery():
    rule = fd.SGD(lr=0.1)
    layers = [fd.FusedDNILinear(4, 4, update=rule) for _ in range(2)]
    model = nn.Sequential(fd.DecoupledSequential(*layers))
    with fd.annotate(model):
        found = _recorded(lambda: _train(model, torch.ones(2, 4)))
    assert ("0.1: step", "0.1: forward") in found and ("0.1: forward", "0: forward") in found
    assert found[-2:] == [("0: backward", None), ("0.1: learn", None)]


def test_what_is_computed_stays_the_same():
    outcomes = []
    for on in (False, True):
        torch.manual_seed(1)
        model, x = _model(), torch.randn(3, 4)
        with fd.annotate(model) if on else torch.enable_grad():
            _train(model, x)
        outcomes.append([model(x), *model.parameters(), *(p.grad for p in model[1].parameters())])
    for plain, annotated in zip(*outcomes, strict=True):
        assert torch.equal(plain, annotated)


def test_an_error_inside_closes_the_ranges_and_removes_them():
    before = _methods()
    model = _model()
    with pytest.raises(RuntimeError, match="input"), fd.annotate(model):
        model(torch.ones(2, 3))
    assert all(_methods()[key] is method for key, method in before.items())
    x = torch.ones(2, 4)
    with fd.annotate(model):
        h = model(x)
        h.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="second"):
            h.sum().backward()
        assert _recorded(lambda: _train(model, x))[0] == ("0: forward", None)


def test_uses_may_be_nested():
    model = _model()
    with fd.annotate(model):
        with fd.annotate():
            pass
        assert _recorded(lambda: model(torch.ones(2, 4)))[0] == ("0: forward", None)
    assert _recorded(lambda: model(torch.ones(2, 4))) == []


class _Doubled(fd.FusedDNILinear):
    def step_locally(self, *args):
        return super().step_locally(*args)


def test_a_method_that_calls_the_one_it_overrides_is_one_range():
    model = _Doubled(4, 4, update=fd.SGD())
    with fd.annotate():
        found = _recorded(lambda: model(torch.ones(2, 4)))
    assert [name for name, _ in found] == ["_Doubled: forward", "_Doubled: step"]


def test_on_cuda_ranges_are_nvtx(monkeypatch):
    said = []

    @contextmanager
    def nvtx(label):
        said.append(label)
        yield
        said.append("end")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range", nvtx)
    model = fd.FusedDNILinear(4, 4, update=fd.SGD(), backend="reference")
    with fd.annotate():
        model(torch.ones(2, 4))
    assert said == ["FusedDNILinear: forward", "FusedDNILinear: step", "end", "end"]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_code_is_left_alone():
    """Off it is, too: nothing is there to be traced, as tests/test_compile.py sees."""
    model = fd.FusedDNILinear(4, 4)
    x = torch.randn(3, 4)
    expected = model(x)
    with fd.annotate(model):
        h = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
        h.sum().backward()
    assert torch.equal(h, expected)
    torch.compiler.reset()


def test_the_environment_turns_it_on_for_a_process():
    code = "import fused_dni as fd; print(hasattr(fd.FusedDNILinear.forward, '__wrapped__'))"
    environment = {**os.environ, "FUSED_DNI_ANNOTATE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize("value", ["", "0"])
def test_the_environment_may_say_no(monkeypatch, value):
    before = _methods()
    monkeypatch.setenv(VARIABLE, value)
    from_environment()
    assert all(_methods()[key] is method for key, method in before.items())


def test_bad_input():
    with pytest.raises(TypeError, match="model must be an nn.Module or None, got list"):
        fd.annotate([1]).__enter__()
    with pytest.raises(ValueError, match="no decoupled layers"):
        fd.annotate(nn.Linear(2, 2)).__enter__()
