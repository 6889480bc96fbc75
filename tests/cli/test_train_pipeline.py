"""``train pipeline``: its report, and bad input in a line."""

from __future__ import annotations

import json

import pytest
from torch.distributed.launcher import api

from fused_dni.cli import main
from fused_dni.experiments import staged

TINY = ["train", "pipeline", "--depth", "3", "--hidden", "16", "--epochs", "1", "--quiet"]


@pytest.mark.slow(20)
def test_the_command_trains_over_three_processes_and_reports(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    out = tmp_path / "pipeline.json"
    words = [*TINY, "--stages", "3", "--modes", "decoupled", "--targets", "true"]
    assert main([*words, "--warmup-steps", "3", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    (run,) = json.loads(out.read_text())["runs"]
    assert run["mode"] == "decoupled" and 0.0 < run["error"] < 1.0 and run["curve"]
    for i, stage in enumerate(run["stages"]):
        assert stage["steps"] > 10 and 0.0 < stage["busy"] <= stage["seconds"]
        assert (stage["bytes"]["sent_up"] > 0, stage["bytes"]["sent_down"] > 0) == (i < 2, i > 0)
        assert (stage["age"]["mean"] is not None) == (i < 2)
    for said in ("at work", "up a step", "its age, steps", "synthetic gradient, stage 2"):
        assert said in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--stages", "9"], "too few for 9 stages"),
        (["--stages", "0"], "--stages"),
        (["--targets", "late"], "--targets"),
        (["--modes", "async"], "--modes"),
        (["--restarts", "2"], "--restarts needs --checkpoint DIR"),
        (["--window", "0"], "--window"),
        (["--lag", "soon"], "--lag"),
    ],
)
def test_bad_input_is_one_line(words, said, capsys, tmp_path):
    assert main([*TINY, *words, "--out", str(tmp_path / "pipeline.json")]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1 and said in told.err


def test_a_run_that_is_gone_on_with_names_the_commits_of_all_its_parts(tmp_path, monkeypatch):
    last = {"curve": [[1.0, 0.5]], "stages": [], "resumed_at": 0}
    monkeypatch.setattr(api, "elastic_launch", lambda config, work: lambda *given: {1: last})
    monkeypatch.setattr(staged, "_error", lambda *given: 0.5)
    settings = staged.Settings(epochs=1, modes=("exact",))
    named = []
    for commit in ("one", "two", None, "one"):
        monkeypatch.setattr(staged, "facts", lambda command, commit=commit: {"commit": commit})
        named.append(staged.train(settings, str(tmp_path / "kept")).facts["commit"])
    assert named == ["one", "one, two", "one, two", "one, two"]
