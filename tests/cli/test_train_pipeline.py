"""``train pipeline``: its report, and bad input in a line."""

from __future__ import annotations

import json

import pytest
from torch.distributed.launcher import api

from fused_dni.cli import main
from fused_dni.distributed import PipelineError
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


def test_a_run_that_failed_is_named_if_it_kept_something(tmp_path, monkeypatch):
    last = {"curve": [[1.0, 0.5]], "stages": [], "resumed_at": 0}
    saves: list[bool] = []

    def fails(settings, mode, folder):
        if saves.pop():
            (tmp_path / mode / "step-00000100" / "stage-0").mkdir(parents=True)
        raise PipelineError("a process died")

    def commit(name, launch):
        monkeypatch.setattr(staged, "facts", lambda command: {"commit": name})
        monkeypatch.setattr(api, "elastic_launch", lambda config, work: launch)
        return staged.train(settings, str(tmp_path)).facts["commit"]

    monkeypatch.setattr(staged, "_error", lambda *given: 0.5)
    settings = staged.Settings(epochs=1, modes=("exact",))
    for name, saved in (("at once", False), ("later", True), ("again at once", False)):
        saves.append(saved)
        with pytest.raises(PipelineError):
            commit(name, fails)
    assert commit("last", lambda *given: {1: last}) == "later, last"


def test_a_report_that_cannot_be_written_is_printed(tmp_path, monkeypatch, capsys):
    """As of every command that does not go on from its file."""
    stage = {
        "steps": 9, "seconds": 1.0, "busy": 0.5, "stage": 0, "learned": 0, "expired": 0,
        "age": {"mean": None}, "bytes": {"sent_up": 0, "sent_down": 0}, "dropped": {},
        "waited": {"input": 0.0, "gradients": 0.0, "room": 0.0},
    }  # fmt: skip
    last = {"curve": [[1.0, 0.5]], "stages": [stage], "resumed_at": 0}
    monkeypatch.setattr(api, "elastic_launch", lambda config, work: lambda *given: {1: last})
    monkeypatch.setattr(staged, "_error", lambda *given: 0.5)
    (tmp_path / "file").touch()
    out = str(tmp_path / "file" / "x.json")
    assert main([*TINY, "--modes", "exact", "--out", out]) == 1
    told = capsys.readouterr()
    first, end = told.err.splitlines()
    assert "steps a second" in told.out and "will be printed all the same" in first
    assert end == f"fused-dni: error: cannot write {out}: Not a directory"
