"""Segments of which it is known whether synthetic gradients pay there: the verdict finds out."""

import contextlib
import json
import math
import random

import pytest
import torch
from flops import install

import planted
from fused_dni.measure import timing
from fused_dni.report import as_text, blocks_of, load
from fused_dni.report.timings import Ratio

EXPECTED = planted.segments(features=32, products=80)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _spread(compare):
    """A comparison whose rounds differ by 3 %, each candidate's on their own."""

    def compared(candidates, **options):
        found = {}
        for name, made in compare(candidates, **options).items():
            draw = random.Random(name)
            rounds = tuple(made.median * (1 + 0.03 * draw.gauss(0, 1)) for _ in range(32))
            found[name] = timing.Timing.of(name, rounds, rounds, 1)
        return found

    return compared


@pytest.mark.parametrize("name", EXPECTED)
def test_a_planted_segment_comes_out_right(name, monkeypatch):
    """By operations instead of time, with a spread as times have it: one product more or less among
    a hundred and sixty is not to be called a difference."""
    install(monkeypatch)
    monkeypatch.setattr(timing, "compare", _spread(timing.compare))
    assert EXPECTED[name].measure(64, 32, 0.1, "reference") in EXPECTED[name].allowed


def test_the_heavy_function_is_the_identity():
    heavy = planted.Heavy(8, 6)
    x = torch.randn(5, 8, requires_grad=True)
    given = torch.randn(5, 8)
    (found,) = torch.autograd.grad(heavy(x), x, given)
    torch.testing.assert_close(found, given)
    assert torch.equal(heavy(x), x)


def test_the_script_counts_what_was_called_rightly(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(planted, "planted_difference", lambda word, seconds, seed: word)
    argv = ["--only", "differences", "--runs", "10"]
    assert planted.main([*argv, "--out", str(tmp_path / "planted.json")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["differences"] == {word: {word: 10} for word in planted.PLANTED}
    assert report["failures"] == []
    assert report == json.loads((tmp_path / "planted.json").read_text())


@pytest.mark.parametrize(
    ("doubtful", "said", "failures"),
    [(1, "inconclusive", 0), (2, "inconclusive", 2), (1, "opposite", 2)],
)
def test_the_script_fails_where_a_bound_is_broken(capsys, monkeypatch, doubtful, said, failures):
    def called(word, seconds, seed):
        if seed >= doubtful or word == "inconclusive":
            return word
        return planted.OPPOSITE[word] if said == "opposite" else said

    monkeypatch.setattr(planted, "planted_difference", called)
    assert planted.main(["--only", "differences"]) == (1 if failures else 0)
    assert len(json.loads(capsys.readouterr().out)["failures"]) == failures


def test_a_comparison_is_of_the_work_that_was_planted(monkeypatch):
    """By operations instead of time: 15 % more, 15 % less, the same."""
    install(monkeypatch)
    for word in planted.PLANTED:
        assert planted.planted_difference(word, 1.0, 0) == word


def test_mean_steps_under_planted_tops_are_the_formula(monkeypatch):
    """By operations, as many as were planted: to the last one."""
    install(monkeypatch)
    found = planted.tops(1.0, rows=8, features=16)
    assert list(found) == ["2", "10", "50"]
    for times, row in found.items():
        assert row["top over bottom"].median == pytest.approx(int(times), rel=1e-3)
        for ratio in row["measured over predicted"].values():
            assert ratio.median == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize(("off", "failures"), [(1.09, 0), (0.91, 0), (1.11, 1), (0.89, 1)])
def test_the_script_fails_where_the_formula_is_off(tmp_path, capsys, monkeypatch, off, failures):
    def tops(seconds):
        sound, wrong = (Ratio(median, 0.0, math.inf) for median in (1.0, off))
        return {
            "10": {
                "top over bottom": Ratio(9.8, 0.0, math.inf),
                "measured over predicted": {"2": sound, "8": wrong},
            }
        }

    monkeypatch.setattr(planted, "tops", tops)
    assert planted.main(["--only", "tops"]) == failures
    (path := tmp_path / "planted.json").write_text(capsys.readouterr().out)
    report = load(path)
    assert len(report["failures"]) == failures
    assert all("a top of 10 times, k = 8: off by" in line for line in report["failures"])
    said = as_text(blocks_of(report))
    assert "within 9 %" in said or "within 11 %" in said
    assert f"{100 * (off - 1):+.0f} %" in said


@pytest.mark.parametrize(("ours", "failures"), [(1.6, 0), (1.7, 1)])
def test_contention_is_held_against_stock(ours, failures, monkeypatch, capsys):
    stock, fused = (m.name for m in (planted.step.STOCK, planted.step.OURS))
    found = {
        name: {"idle": 1.0, "contended": slowdown, "slowdown": slowdown}
        for name, slowdown in ((stock, 1.5), (fused, ours))
    }
    monkeypatch.setattr(planted, "contention", lambda seconds: found)
    assert planted.main(["--only", "contention"]) == failures
    assert json.loads(capsys.readouterr().out)["contention"] == found


def test_contention_counts_both_ways(monkeypatch):
    """Every method, alone and contended: no figure is asked for."""
    monkeypatch.setattr(planted, "TURNS", 1)
    monkeypatch.setattr(planted.step, "CASES", (planted.step.Case(16, 32),))
    monkeypatch.setattr(planted, "busy", lambda processes: contextlib.nullcontext())
    found = planted.contention(0.05)
    assert len(found) == 3
    assert all(row["idle"] > 0 and row["contended"] > 0 for row in found.values())
