"""docs/verdict.md is what the committed results say, and every command behind it exists."""

from __future__ import annotations

import json
import re

import pytest

import claims
import stored
from fused_dni.cli.program import _parse
from pages import verdict


def test_the_page_is_what_the_results_say():
    assert verdict.render(check=True) == 0


def test_a_changed_result_changes_the_page(monkeypatch, tmp_path):
    before = verdict.page(tmp_path)
    real = claims.committed

    def changed(patterns):
        found = real(patterns)
        for reports in found.values():
            for report in reports.values():
                if not str(report.get("kind")).startswith("train "):
                    continue
                for run in report.get("runs", ()):
                    for row in run.get("future", ()):
                        row["parameter_ratio"] = 1234.0
        return found

    monkeypatch.setattr(claims, "committed", changed)
    assert verdict.page(tmp_path) != before


def test_every_figure_of_the_page_is_there_and_no_other():
    linked = set(re.findall(r"\(verdict/([^)]+\.svg)\)", verdict.PAGE.read_text()))
    assert linked == {path.name for path in verdict.FIGURES.iterdir()}


def test_every_claim_has_an_answer_or_is_left_open():
    for question in claims.QUESTIONS:
        assert (question.answer is None) == (question.patterns == ())
        for _, answer in claims.answered(question):
            assert answer.sentence.endswith(".") and answer.blocks
            assert len(answer.brief or answer.sentence) < 600  # a row of the README's table


@pytest.mark.parametrize("name", [name for name, _ in claims.commands("DIR")])
def test_a_command_behind_the_page_is_one(name):
    words = dict(claims.commands("DIR"))[name]
    if words[0].endswith(".py"):
        assert (stored.ROOT / words[0]).exists()
    else:
        assert _parse(words).command.split() == words[: len(_parse(words).command.split())]


def test_measuring_writes_one_file_a_name(monkeypatch, tmp_path):
    tiny = ["verdict", "linear", "--in", "8", "--batch", "8", "--seconds", "0.02", "--threads", "1"]
    tiny += ["--no-compile", "--no-parts", "--quiet", "--out", "OUT"]
    made = [("tiny", tiny), ("wrong", ["verdict", "nothing", "--out", "OUT"]), ("other", tiny)]
    monkeypatch.setattr(claims, "commands", lambda data: iter(made))
    monkeypatch.setattr(stored, "VERDICT", tmp_path)
    assert claims.measure("DIR", ["tiny", "wrong"]) == 1
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("-tiny.json")
    assert json.loads(path.read_text())["kind"] == "verdict"
