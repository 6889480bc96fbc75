"""A verdict on a link: what it measures and runs, and which way it says to take."""

from __future__ import annotations

import copy
import functools
import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from fused_dni import cli
from fused_dni.measure.options import SPEED
from fused_dni.measure.simulate import Link
from fused_dni.measure.verdict.link import MODES, verdict_link
from fused_dni.report import as_text, blocks_of, load
from fused_dni.report.kinds import verdict_link as said
from fused_dni.report.schema import Result

FACTORY = """
import torch
from torch import nn

def factory():
    stages = [nn.Sequential(nn.Linear(8, 16), nn.ReLU()), nn.Linear(16, 3)]
    def batch(): return torch.randn(5, 8), torch.randint(0, 3, (5,))
    return stages, batch, nn.functional.cross_entropy
"""


def split(stages: int = 2) -> tuple[Any, ...]:
    made = [nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(stages)]

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(5, 16), torch.randint(0, 3, (5,))

    return made, batch, nn.functional.cross_entropy


@functools.cache
def simulated() -> Result:
    """A report without runs."""
    return verdict_link(split(), "here:factory", Link(0.1, None, 12.5e6), seconds=0.01, run=None)


def planted(alone: float = 10.0, stale_age: float = 9.0, **rates: float) -> Result:
    """A report of which the rates are given; the others are 1."""
    found = copy.deepcopy(simulated())
    for row in found["rows"]:
        row["rows"] = rates.get(row["mode"].replace("-", "_"), 1.0)
        row["near"] = 100.0
        if row["mode"] == "stale":
            row["age"] = stale_age
    found.body["alone"] = alone
    return found


def ways(**given: float) -> list[str]:
    return [way for _, way in said.choices(planted(**given))]


ALL = {"stale": 100.0, "decoupled": 100.0, "local": 100.0}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"exact": 95.0, **ALL}, ["exact"]),
        (ALL, ["local", "decoupled"]),
        ({**ALL, "stale_age": 3.0}, ["local", "stale"]),
        ({**ALL, "diloco": 90.0}, ["diloco", "local", "decoupled"]),
        ({**ALL, "diloco": 90.0, "data_parallel": 85.0}, ["data-parallel", "local", "decoupled"]),
        ({**ALL, "local": 50.0}, ["decoupled"]),
        ({"exact": 90.0, **ALL, "diloco": 200.0}, ["diloco", "exact"]),
    ],
)
def test_what_is_said_follows_from_the_rates(given, wanted):
    assert ways(**given) == wanted


def test_the_sentence_names_the_way_and_the_loss():
    report = planted(**ALL, exact=20.0)
    text = said.sentence(report)
    assert text.startswith("If labels may go to every stage and say what the top needs, use a ")
    assert "local loss (100 rows/s); otherwise, use synthetic gradients" in text
    assert "takes 80 % of what exact training by exact would carry" in text
    assert "9 steps late" in text and "One device" not in text
    assert "more than exact training" in said.sentence(planted(**ALL, exact=20.0, alone=50.0))
    assert "splitting gains no speed" in said.sentence(planted(**ALL, alone=99.0))
    shown = as_text(blocks_of(report))
    assert "Nothing was run" in shown and "100 ms and 100 Mbit/s" in shown


def test_the_command_measures_and_runs(tmp_path, monkeypatch, capsys, forked_ranks):
    (tmp_path / "linked.py").write_text(FACTORY, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    argv = ["verdict", "link", "linked:factory", "--latency", "5ms", "--bandwidth", "100Mbit"]
    argv += ["--seconds", "0.02", "--run", "0.1", "--out", "link.json", "--json", "--quiet"]
    assert cli.main(argv) == 0
    printed = json.loads(capsys.readouterr().out)
    report = load(tmp_path / "link.json", "verdict link")
    assert printed["rows"] == report["rows"] and printed["sentence"] == report.sentence
    assert [row["mode"] for row in report["rows"]] == list(MODES)
    link = report["settings"]["link"]
    assert (link["latency"], link["bandwidth"]) == (0.005, 12.5e6)
    ran = {row["mode"] for row in report["rows"] if row["run"] is not None}
    assert ran == {"exact", "stale", "decoupled", "local"}
    # A batch there and back takes two latencies, whatever the machine does.
    exact = next(row for row in report["rows"] if row["mode"] == "exact")
    assert exact["run"]["rows"] <= 5 / 0.01 and exact["rows"] <= 5 / 0.01
    assert cli.main(["report", "link.json"]) == 0
    assert "sleep for the times below" in capsys.readouterr().out


def frozen(at: int, stages: int = 2) -> tuple[Any, ...]:
    made, batch, loss = split(stages)
    made[at].requires_grad_(False)
    return made, batch, loss


def test_a_frozen_top_has_no_optimizer_and_no_local_loss_below():
    report = verdict_link(frozen(1), "here:factory", Link(0.1), seconds=0.01, run=None)
    measured, times = report["measured"], report["settings"]["times"]
    assert measured["frozen_top"] and set(measured["timings"][1]) == {"forward", "backward"}
    assert times["optimizer"][1] == 0.0 < times["optimizer"][0]
    assert times["local"][1] == times["forward"][1]
    assert times["backward"][1] > 1000 * times["weight"][1]
    assert measured["parameter_bytes"] == 4 * (16 * 16 + 16) / 2  # of what is exchanged
    for row in report["rows"]:
        row["rows"] = 100.0 if row["mode"] in ALL else 1.0
        row["age"] = 9.0
    assert [way for _, way in said.choices(report)] == ["decoupled"]
    assert "The top is frozen: a local loss" in said.sentence(report)
    del measured["frozen_top"]  # as in a file of before there were such
    assert "local" in [way for _, way in said.choices(report)]
    assert "The top is frozen" not in said.sentence(report)


@pytest.mark.repeat
def test_stages_below_a_frozen_top_are_run():
    report = verdict_link(frozen(1), "here:factory", Link(0.1), seconds=0.01, run=0.05)
    assert all(row["run"]["rows"] > 0.0 for row in report["rows"] if row["run"] is not None)


@pytest.mark.parametrize(("at", "stages"), [(0, 2), (1, 3), (0, 1)])
def test_a_frozen_stage_elsewhere_is_refused(at, stages):
    with pytest.raises(ValueError, match=f"stage {at} of here has no trainable parameters"):
        verdict_link(frozen(at, stages), "here", Link(0.1), seconds=0.01)


def test_one_stage_has_no_link():
    with pytest.raises(ValueError, match="returns one stage: a link is between two"):
        verdict_link(split(1), "here:factory", Link(0.1), seconds=0.01)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["linear", "--latency", "1ms"], "must be package.module:factory, got 'linear'"),
        (["a:b"], "--latency"),
        (["a:b", "--latency", "1"], "must be a number from 0 on and its unit"),
        (["a:b", "--latency", "1ms", "--bandwidth", "100"], "a positive number and its unit"),
        (["a:b", "--latency", "1ms", "--target-every", "never"], "is a local loss"),
        (["math:pi", "--latency", "1ms"], "is not callable"),
        (["torch:get_num_threads", "--latency", "1ms"], "must return (stages, batch, loss)"),
    ],
)
def test_bad_input_is_one_line(capsys, argv, message):
    assert cli.main(["verdict", "link", *argv, "--quiet"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert message in captured.err


def test_rates_may_be_named_as_networks_are():
    parse = functools.partial(SPEED.parse, "bandwidth")
    assert parse("100Mbit") == parse("100Mbit/s") == 12.5e6 and math.isfinite(parse("1Gbit"))
