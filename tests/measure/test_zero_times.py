"""Times that the clock could not tell from zero: inconclusive, and never a division."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from fused_dni import cli
from fused_dni.measure import timing
from fused_dni.measure.compare import Results, Row, compare
from fused_dni.report.errors import ReportError
from fused_dni.report.files import as_json
from fused_dni.report.schema import Result, save
from fused_dni.report.times import read, results_of
from fused_dni.report.timings import Timing
from fused_dni.report.words import versus

FACTS = {"device": "a CPU"}


def _results(**rows: Row) -> Results:
    return Results("pytest-benchmark", FACTS, rows)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (Row("g", 0.0, 0.0, 0.0), Row("g", 0.0, 0.0, 0.0)),
        (Row("g", 0.0, 0.0, 0.0), Row("g", 1.0, 0.9, 1.1)),
        (Row("g", 1.0, 0.9, 1.1), Row("g", 0.0, 0.0, 0.0)),
        (Row("g", 0.0), Row("g", 1.0)),
        (Row("g", 1.0, 0.0, 2.0), Row("g", 1.0, 0.0, 2.0)),
    ],
    ids=str,
)
def test_a_comparison_with_zero_is_inconclusive(old, new):
    made = compare(_results(a=old, floor=old), _results(a=new, floor=new))
    assert {row["verdict"] for row in made["rows"]} == {"inconclusive"}
    assert "NaN" not in as_json(made) and "Infinity" not in as_json(made)


def _file(path, **rounds) -> str:
    rows = [
        {"group": "g", "name": name, "fullname": f"b.py::{name}", "stats": {"data": data}}
        for name, data in rounds.items()
    ]
    path.write_text(json.dumps({"machine_info": {}, "benchmarks": rows}), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("data", [[0.0] * 20, [0.0] * 10 + [1e-6] * 10, [0.0], [0, 0]], ids=str)
def test_files_with_zeros_are_compared_and_reported(tmp_path, capsys, data):
    floor = [1e-3 + 1e-6 * k for k in range(20)]
    old = _file(tmp_path / "old.json", tiny=[0.0] * 20, floor=floor)
    new = _file(tmp_path / "new.json", tiny=data, floor=floor)
    page = str(tmp_path / "page.html")
    for argv in (["compare", old, new], ["compare", new, old], ["compare", new, new, "--json"]):
        assert cli.main(argv) == 0
    for argv in (["report", new], ["report", old, "-o", page]):
        assert cli.main(argv) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and "too short to be timed" in captured.out


@pytest.mark.parametrize(
    ("rounds", "message"),
    [
        ([], "no rounds of 'b.py::a'"),
        ([1.0, None], "no time of 'b.py::a' but 'None'"),
        ([1.0, "fast"], "no time of 'b.py::a' but 'fast'"),
        ([-1.0], "'-1.0'"),
        ([math.nan], "'nan'"),
        ([math.inf], "'inf'"),
        ([True], "'True'"),
        ([10**400], "but '1000"),
        ("abc", "no rounds of"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_time_is_named(tmp_path, capsys, rounds, message):
    path = _file(tmp_path / "a.json", a=rounds)
    for argv in (["compare", path, path], ["report", path]):
        assert cli.main(argv) == 2
        said = capsys.readouterr().err
        assert path in said and message in said and said.count("\n") == 1


def test_reports_with_zeros_are_read():
    timed = Timing("a", 0.0, 0.0, 1e-6, 0.0, (0.0, 1e-6), 9, (), 1, 0.0)
    empty = replace(timed, median=math.nan)
    report = Result("verdict", facts=FACTS, timings={"a": timed, "b": empty})
    assert results_of(report).rows == {"timings/a": Row("timings", 0.0, 0.0, math.inf)}


def test_a_file_with_what_is_no_time_is_named(tmp_path):
    timed = Timing("a", 1.0, 1.0, 1.0, 0.0, (-1.0, 1.0), 9, (), 1, 0.0)
    report = Result("verdict", "t", "s", facts=FACTS, timings={"a": timed})
    path = save(tmp_path / "a.json", report)
    with pytest.raises(ReportError, match="at 'timings/a/interval' or near it: no number .*'-1.0'"):
        read(path)


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ((0.0,) * 9, (0.0,) * 9, "inconclusive"),
        ((0.0,) * 9, (1.0,) * 9, "faster"),
        ((1.0,) * 9, (0.0,) * 9, "slower"),
        ((1.0, 0.0) * 9, (0.0, 1.0) * 9, "inconclusive"),
    ],
    ids=str,
)
def test_ratios_of_rounds_that_are_zero(a, b, verdict):
    found = timing.ratio(timing.Timing.of("a", a, a, 1), timing.Timing.of("b", b, b, 1))
    assert found.verdict() == verdict
    said = {"inconclusive": "not measurably different from"}.get(verdict, f"{verdict} than")
    assert versus(found) == said


def test_a_sample_is_never_zero(monkeypatch):
    """A thread that waited all the time has nothing left on its clock."""
    monkeypatch.setattr(timing.Stopwatch, "time", lambda self, run: (run(), 0.0)[1])
    found = timing.compare({"a": int, "b": int}, rounds=6)
    assert all(0.0 < x < 1e-6 for timed in found.values() for x in timed.rounds)
    assert timing.differs(found["a"], found["b"]) == "inconclusive"
