"""``compare`` and ``report`` of whatever a file may hold: a report, or one line that names it."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tops
from hypothesis import given
from hypothesis import strategies as st

from fused_dni import cli
from fused_dni.experiments.literature_settings import Settings as Literature
from fused_dni.measure.simulate import Failures, Settings, compare, sweep
from fused_dni.report import as_text, blocks_of, load
from fused_dni.report.files import as_json
from fused_dni.report.schema import KINDS, Result, save

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


def _committed(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found


def _map() -> dict[str, Any]:
    found = _committed("verdict/amd-epyc-avx2-map.json")
    for series in found["series"].values():
        series["points"] = dict(list(series["points"].items())[:4])
    return found


def _top() -> dict[str, Any]:
    raced = load(RESULTS / "verdict/amd-epyc-avx2-race-words.json")
    found: dict[str, Any] = json.loads(tops.planted(1.0, 10.0, race=raced).to_json())
    return found


def _simulation() -> dict[str, Any]:
    rows = [
        {"mode": mode, "stages": 2, "latency_s": 0.01, "steps_per_second": 1.0}
        for mode in ("1f1b", "dni")
    ]
    given = Settings(steps=9, failures=Failures(every=60.0))
    found = sweep(given, latencies=(0.0, 0.01), chains=(1, 2), modes=("1f1b", "dni"))
    return {**json.loads(as_json(found)), "checked": compare(rows, given)}


def _link() -> dict[str, Any]:
    run = {"rows": 90.0, "age": 2.0, "late": 0.0, "steps": 9}
    row = {"rows": 100.0, "near": 200.0, "rows_an_update": 256, "age": 3.0, "forward_bytes": 9.0,
           "backward_bytes": 9.0, "run": run}  # fmt: skip
    modes = ("exact", "1f1b", "stale", "decoupled", "local", "data-parallel", "diloco")
    found = Result(
        "verdict link",
        facts=_committed("amd-epyc-avx512-delay-4-stages.json")["facts"],
        settings={**Settings().to_json(), "stages": 2, "run": 2.0},
        body={
            "measured": {"what": "a:b", "rows": 256, "frozen_top": False},
            "alone": 50.0,
            "rows": [{"mode": mode, **row} for mode in modes],
        },
    )
    return dict(json.loads(as_json(found)))


def _literature() -> dict[str, Any]:
    few = Literature(depths=(3,), windows=(2,), digits=4, seeds=(1,), more_seeds=())
    last = {"steps": 9, "digits": 4, "updates": 2, "odd_error": 0.5, "error": 0.25}
    end = {"error": 0.25, "diverged": False, "history": [last], "every": 4, "exact": 0.25}
    found = Result(
        "literature",
        facts=_committed("amd-epyc-avx512-delay-4-stages.json")["facts"],
        settings=asdict(few),
        body={
            "dataset": "mnist",
            "evaluated_on": "test set",
            "runs": [{**run._asdict(), **end} for run in few.runs()],
            "finished": True,
        },
    )
    return dict(json.loads(as_json(found)))


def by_pytest(**rounds: Any) -> dict[str, Any]:
    """As ``pytest --benchmark-json`` writes it."""
    return {
        "machine_info": {"cpu": {"brand_raw": "a CPU"}, "python_version": "3.12.0"},
        "benchmarks": [
            {"group": "g", "name": name, "fullname": f"b.py::{name}", "stats": {"data": data}}
            for name, data in rounds.items()
        ],
    }


def _comparison(tmp: Path) -> dict[str, Any]:
    for name, second in (("old", 1e-3), ("new", 2e-3)):
        data = by_pytest(a=[second] * 9, floor=[1e-3] * 9)
        (tmp / f"{name}.json").write_text(json.dumps(data), encoding="utf-8")
    out = tmp / "comparison.json"
    with contextlib.redirect_stdout(io.StringIO()):
        old, new = str(tmp / "old.json"), str(tmp / "new.json")
        assert cli.main(["compare", old, new, "--out", str(out)]) == 0
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


ROW = {"calls": 2, "total": 0.2, "own": 0.1, "device": 0.0, "memory": 64}
KERNEL = {
    "kernel": "k", "launches": 2, "time": 1e-5, "bandwidth": 1e9, "bandwidth_share": 0.5,
    "memory_share": 0.5, "tensor_share": None, "occupancy": 0.5, "stalls": {"a_b": 0.2},
    "registers": 32, "shared_memory": 64, "programs": 8,
}  # fmt: skip
COMMON = {
    "title": "t", "sentence": "s", "facts": {}, "settings": {}, "timings": {}, "memory": {},
    "memory_is": "", "notes": [],
}  # fmt: skip
PROFILE = {**COMMON, "kind": "profile", "version": 2, "profiled": ["a", "b"], "status": 1}
SOUND = {
    "verdict": _committed("verdict/amd-epyc-avx2-segment-conv.json"),
    "verdict lstm": _committed("verdict/amd-epyc-avx2-lstm-window.json"),
    "verdict top": _top(),
    "train": _committed("amd-epyc-mnist-rank-1.json"),
    "train charlm": _committed("amd-epyc-8m-charlm.json"),
    "advice": _committed("verdict/amd-epyc-avx2-advice-lstm_lm.json"),
    "map": _map(),
    "delay": _committed("amd-epyc-avx512-delay-4-stages.json"),
    "recipes": _committed("amd-epyc-avx512-recipes.json"),
    "rivals": _committed("verdict/amd-epyc-avx512-rivals.json"),
    "interfaces": _committed("verdict/amd-epyc-avx2-interfaces.json"),
    "literature": _literature(),
    "simulation": _simulation(),
    "verdict link": _link(),
    "planted": _committed("verdict/amd-epyc-avx2-planted.json"),
    "pytest-benchmark": by_pytest(a=[1e-3] * 9, b=[0.0] * 9, floor=[1e-5] * 8),
    "profile torch": {
        **PROFILE, "tool": "torch", "seconds": 0.5, "trace": "t", "ranges": [{"range": "a", **ROW}],
        "ops": [{"range": "a", "op": "mm", **ROW}],
    },
    "profile ncu": {**PROFILE, "tool": "ncu", "kernels": [KERNEL]},
    "profile nsys": {**PROFILE, "tool": "nsys", "timeline": "t", "line": ["nsys"]},
}  # fmt: skip

NUMBERS = st.one_of(
    st.floats(), st.integers(), st.sampled_from([0, 0.0, -1.0, 5e-324, 1e308, 10**400, 10**9])
)
NAMES = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["", "$", "a$b$\\frac{", "\x1b[2J", "\udce9", "a\nb", "|", "µ", "{", "%s", "漢"]
    ),
)
WORDS = st.sampled_from([*KINDS, "faster", "dense", "never", "fused", "dni k=4"])
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, NAMES, WORDS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(NAMES | WORDS, inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def spoiled(draw: st.DrawFn) -> dict[str, Any]:
    """A sound report of any kind, of which something is another thing or missing."""
    report = copy.deepcopy(SOUND[draw(st.sampled_from(sorted(SOUND)))])
    for _ in range(draw(st.integers(1, 2))):
        place: Any = report
        while True:
            keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], (dict, list)) and draw(st.integers(0, 3)):
                place = place[key]
                continue
            if draw(st.booleans()):
                del place[key]
            else:
                place[key] = draw(VALUES)
            break
    return report


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("any")


def _of(kind: str, **parts: Any) -> bytes:
    """A file of this kind that has these parts and nothing of its own."""
    return json.dumps({"kind": kind, "version": 2, **COMMON, **parts}).encode()


def _run(*argv: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(list(argv))
    return code, out.getvalue(), err.getvalue()


def _said(*argv: str) -> str:
    """The line on stderr; it is one, if anything went wrong, and no exception's name."""
    code, out, err = _run(*argv)
    assert code in (0, 2), err
    assert bool(err) == bool(code) and err.count("\n") <= 1
    assert not any(word in err for word in ("Traceback", "KeyError", "FUSED_DNI_DEBUG"))
    assert bool(out) != bool(code)
    return err


def _write(path: Path, found: Any) -> str:
    path.write_text(json.dumps(found), encoding="utf-8")
    return str(path)


@given(spoiled())
def test_a_spoiled_report_is_told_or_named(folder, found):
    path = _write(folder / "given.json", found)
    said = _said("report", path)
    assert not said or path in said


@given(spoiled(), st.booleans())
def test_a_spoiled_report_is_compared_or_named(folder, found, first):
    path = _write(folder / "spoiled.json", found)
    whole = _write(folder / "whole.json", by_pytest(a=[1e-3] * 9, b=[0.0] * 9, floor=[1e-5] * 8))
    _said("compare", *((path, whole) if first else (whole, path)), "--force")
    _said("compare", path, path)


@given(VALUES)
def test_any_json_is_one_line(folder, found):
    path = _write(folder / "foreign.json", found)
    for argv in (["report", path], ["compare", path, path], ["map", "--merge", path]):
        said = _said(*argv, *["--out", str(folder / "map.json")] * (argv[0] == "map"))
        assert path in said


@given(st.dictionaries(NAMES, st.lists(NUMBERS, max_size=9) | VALUES, max_size=4))
def test_any_names_and_times_are_compared_or_named(folder, rounds):
    old, new = (folder / "a.json", folder / "b.json")
    _write(old, by_pytest(**rounds, floor=[1e-3] * 9))
    _write(new, by_pytest(floor=[2e-3] * 9, **rounds))
    _said("report", str(old))
    _said("compare", str(old), str(new))


@pytest.mark.parametrize("kind", SOUND)
def test_what_is_missing_at_the_top_is_named(tmp_path, kind):
    """Every part that the report needs, by the name that it has in the file."""
    for key in set(SOUND[kind]) - {"kind", "version", "machine_info", "benchmarks"}:
        path = _write(tmp_path / "a.json", {k: v for k, v in SOUND[kind].items() if k != key})
        said = _said("report", path)
        assert not said or f"{path} is incomplete: it lacks {key!r}" in said
    path = _write(tmp_path / "whole.json", SOUND[kind])
    assert _said("report", path) == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no JSON"),
        (b"\xff\xfe{}", "is no JSON"),
        (b'{"kind": "map", "series": ' + b"9" * 5000 + b"}", "is no JSON"),
        (b'{"kind": ["map"]}', "is no report of fused_dni: its kind is ['map']"),
        (b'{"kind": {"a": 1}}', "its kind is {'a': 1}"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"kind": "map", "facts": 3, "version": 9}', "in format 9"),
        (b'{"kind": "map"}', "in format 1"),
        (_of("map"), "is incomplete: it lacks 'series'"),
        (_of("map", series={"a": {}}), "it lacks 'series/a/facts'"),
        (_of("map", series=3), "at 'series' or near it"),
        (_of("map", series={}, notes=3), "at 'notes' or near it: not '3'"),
        (_of("map", series={}, facts=3), "at 'facts' or near it: not '3'"),
        (_of("map", series={}, timings={"a": 3}), "something is no Timing"),
        (_of("map", series={}, notes=[3]), "something is no str"),
        (_of("train", settings={"seeds": [1]}), "lacks"),
        (b'{"benchmarks": 3, "machine_info": 4}', "a 'pytest-benchmark' report"),
        (b'{"benchmarks": [{}], "machine_info": {}}', "it lacks 'benchmarks/0/stats'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_line_says_what_is_wrong(tmp_path, content, message):
    path = tmp_path / "given.json"
    path.write_bytes(content)
    for command in (["report", str(path)], ["compare", str(path), str(path)]):
        said = _said(*command)
        assert f"{path} " in said
    assert message in _said("report", str(path))


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(SOUND["planted"]).encode())
    assert _said("report", str(path)) == ""


def test_a_number_of_layers_is_no_number_of_columns(tmp_path):
    report = load(_write(tmp_path / "a.json", SOUND["interfaces"]))
    report["networks"][-1]["depth"] = 10**12
    report["networks"].append({**report["networks"][0], "depth": 10**12})
    assert len(as_text(blocks_of(report))) < 10_000


@pytest.mark.parametrize("suffix", ["html", "md"])
def test_names_that_no_page_or_plot_can_show(tmp_path, suffix):
    names = ["a$b$\\frac{", "$", "\x1b[2J\0", "\udce9", "漢字", "<b>", "a|b"]
    path = _write(tmp_path / "a.json", by_pytest(**dict.fromkeys(names, [1e-3] * 9)))
    page = tmp_path / f"page.{suffix}"
    code, _, err = _run("report", path, "-o", str(page))
    assert (code, err) == (0, "")
    made = page.read_text(encoding="utf-8")
    assert "a$b$\\frac{" in made and "漢字" in made and "\x1b" not in made and "\0" not in made


@pytest.mark.parametrize(
    ("key", "value"), [("median", "fast"), ("p90", None), ("median", [1]), ("p10", {})]
)
def test_a_figure_that_cannot_be_drawn_is_one_line(tmp_path, key, value):
    report = copy.deepcopy(SOUND["verdict"])
    report["timings"]["fused"][key] = value
    path = _write(tmp_path / "a.json", report)
    page = tmp_path / "page.html"
    code, out, err = _run("report", path, "-o", str(page))
    assert (code, out) == (2, "") if code else page.exists()
    assert code == 0 or (path in err and err.count("\n") == 1 and "Traceback" not in err)


def test_a_loaded_report_is_the_same_as_its_json(tmp_path):
    for kind, report in SOUND.items():
        if kind != "pytest-benchmark":
            found = load(_write(tmp_path / "a.json", report))
            assert json.loads(as_json(found)) == report
            again = load(save(tmp_path / "b.json", found))
            assert again == found, kind
