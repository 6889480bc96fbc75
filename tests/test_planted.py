"""Segments of which it is known whether synthetic gradients pay there: the verdict finds out."""

import json

import pytest
import torch

import planted

EXPECTED = planted.segments(features=32, products=80)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_planted_segment_comes_out_right(name):
    assert EXPECTED[name].measure(64, 32, 0.1, "reference") in EXPECTED[name].allowed


def test_the_heavy_function_is_the_identity():
    heavy = planted.Heavy(8, 6)
    x = torch.randn(5, 8, requires_grad=True)
    given = torch.randn(5, 8)
    (found,) = torch.autograd.grad(heavy(x), x, given)
    torch.testing.assert_close(found, given)
    assert torch.equal(heavy(x), x)


def test_the_script_counts(capsys, tmp_path):
    argv = ["--only", "differences", "--runs", "1", "--seconds", "0.2"]
    assert planted.main([*argv, "--out", str(tmp_path / "planted.json")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["differences"] == {word: {word: 1} for word in planted.PLANTED}
    assert report == json.loads((tmp_path / "planted.json").read_text())
