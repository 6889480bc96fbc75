"""``train pipeline``: its report, and bad input in a line."""

from __future__ import annotations

import json

import pytest

from fused_dni.cli import main

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
