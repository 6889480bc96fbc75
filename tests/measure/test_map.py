"""The break-even map: its points, its file and what is drawn of it. Nothing here takes a time."""

from __future__ import annotations

import copy
import json
import math
import sys

import pytest
import torch

import fused_dni as fd
from fused_dni import cli
from fused_dni.experiments.run import Interrupted
from fused_dni.measure.map import Point, Settings, layer, make_grid, measure, merge, store, sweep
from fused_dni.measure.verdict import GateError
from fused_dni.report import Figure, Table, Text, blocks_of, load
from fused_dni.report.blocks import as_text
from fused_dni.report.layout import own_blocks as blocks
from fused_dni.report.schema import save
from fused_dni.report.timings import BreakEven, Ratio, Timing

pytestmark = pytest.mark.slow(40)

QUICK = Settings(backend="cpu", seconds=0.02, ks=(1, 4, None))
SMALL = Point(8, 16, "rank16")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def result(point, faster=0.8, **failed):
    """A point as it would be measured, at made-up times."""
    if failed:
        return {**point.to_json(), "date": "2026-01-01T00:00:00", **failed}
    ratios = {
        k: Ratio(r, 0.99 * r, 1.01 * r) for k, r in (("1", 1.2), ("4", 1.001), ("never", faster))
    }
    timed = Timing.of("", [1e-3] * 8, [1e-3] * 8, 1)
    return {
        **point.to_json(),
        "date": "2026-01-01T00:00:00",
        "timings": dict.fromkeys(("backprop", "fused"), timed),
        "ratios": {"fused": ratios, "backprop": ratios},
        "break_even": {"fused": BreakEven("from", 9, 3), "backprop": BreakEven("never", None, 64)},
    }


def filled(points, settings=QUICK, **changes):
    report = store.empty("fused-dni map")
    found = store.series_for(report, settings)
    found["points"] = {point.key: result(point, **changes) for point in points}
    return report


# ----------------------------------------------------------------------------------------- points


def test_grid_has_every_point_once_and_cheap_ones_first():
    points = make_grid([32, 8, 8], [64, 16], ["dense", "rank4"])
    assert len(points) == len(set(points)) == 8
    work = [point.batch * point.width**2 for point in points]
    assert work == sorted(work)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([1], [16]), "a batch must have at least 2 rows, got 1"),
        (([2], [0]), "a width must be at least 1, got 0"),
        (([2], [16], ["diagonl"]), "did you mean 'diagonal'"),
        (([2], [16], ["rank0"]), "unknown synthesizer 'rank0'"),
        (([2], [16], ["dense"], ["ouput"]), "did you mean 'output'"),
    ],
)
def test_grid_refuses(given, message):
    with pytest.raises(ValueError, match=message):
        make_grid(*given)


@pytest.mark.parametrize(
    ("synthesizer", "interface"),
    [
        ("dense", "output"),
        ("rank99", "output"),  # of a layer that is not as wide
        ("rank4", "preactivation"),
        ("diagonal", "preactivation"),
    ],
)
def test_a_point_is_measured(synthesizer, interface):
    settings = Settings(backend="reference", seconds=0.02, ks=(1, 4, None))
    found = measure(Point(8, 16, synthesizer, interface), settings)
    assert found.get("reason") is None
    assert set(found["timings"]) == {
        "backprop", "fused", "floor", "dni k=1", "dni k=4", "dni k=never"
    }  # fmt: skip
    for base in ("fused", "backprop"):
        assert list(found["ratios"][base]) == ["1", "4", "never"]
        assert found["break_even"][base].kind in ("from", "never", "inconclusive")
    for ratio in (found["kernels"], *found["ratios"]["fused"].values()):
        assert 0.0 < ratio.low <= ratio.median <= ratio.high < math.inf


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError("no"), "memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: tried 9 bytes"), "memory"),
        (GateError("no verdict: off by 3"), "gate"),
        (RuntimeError("planted"), "error"),
    ],
)
def test_what_fails_at_a_point_is_its_result(monkeypatch, error, kind):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(layer, "verdict", fail)
    found = measure(SMALL, QUICK)
    assert (found["failed"], found["reason"]) == (kind, str(error))
    assert (found["batch"], found["width"], found["synthesizer"]) == (8, 16, "rank16")


def test_a_layer_that_no_memory_holds_is_marked():
    found = measure(Point(2, 10**7, "diagonal"), QUICK)  # its weights are 400 terabytes
    assert found["failed"] == "memory" and found["reason"]


def test_the_gate_is_a_real_one(monkeypatch):
    """Layers that are not the stock layer are not timed."""
    right = fd.FusedDNILinear.from_linear

    def wrong(linear, *rest, **more):
        with torch.no_grad():
            linear.weight.mul_(1.01)
        return right(linear, *rest, **more)

    monkeypatch.setattr(fd.FusedDNILinear, "from_linear", staticmethod(wrong))
    found = measure(SMALL, QUICK)
    assert found["failed"] == "gate" and "disagrees with stock backprop" in found["reason"]


# ------------------------------------------------------------------------------------------- file


def test_a_map_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    path, points = tmp_path / "map.json", make_grid([8], [16, 32], ["dense", "rank4"])
    asked = []

    def stop_at_third(point, *_):
        asked.append(point)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return result(point)

    monkeypatch.setattr(sweep, "measure", stop_at_third)
    with pytest.raises(Interrupted, match="2 of 4 points are in .*the same command"):
        sweep.sweep(points, QUICK, path)
    (series,) = load(path, "map")["series"].values()
    assert list(series["points"]) == [point.key for point in points[:2]]
    report = sweep.sweep(points, QUICK, path)
    assert asked == [*points[:3], *points[2:]]
    assert report == load(path, "map")
    sweep.sweep(points, QUICK, path)
    assert len(asked) == 5
    assert [found.name for found in tmp_path.iterdir()] == ["map.json"]


def test_failed_points_are_tried_again(tmp_path, monkeypatch):
    path = tmp_path / "map.json"
    answers = [result(SMALL, failed="memory", reason="no"), result(SMALL)]
    monkeypatch.setattr(sweep, "measure", lambda *_: answers.pop(0))
    sweep.sweep([SMALL], QUICK, path)
    (series,) = sweep.sweep([SMALL], QUICK, path)["series"].values()
    assert answers == [] and "failed" not in series["points"][SMALL.key]


@pytest.mark.parametrize(
    "other",
    [
        {"settings": Settings(backend="cpu", seconds=0.03, ks=(1, 4, None))},
        {"settings": Settings(dtype=torch.float64, backend="cpu", seconds=0.02, ks=(1, 4, None))},
        {"fact": {"device": "another processor"}},
        {"fact": {"threads": 99}},
        {"fact": {"torch": "9.9"}},
        {"fact": {"commit": "another"}},
    ],
    ids=["seconds", "dtype", "device", "threads", "torch", "commit"],
)
def test_points_of_other_settings_devices_and_versions_are_kept_apart(tmp_path, monkeypatch, other):
    path, real = tmp_path / "map.json", store.facts
    monkeypatch.setattr(sweep, "measure", lambda point, *_: result(point))
    sweep.sweep([SMALL], QUICK, path)
    monkeypatch.setattr(store, "facts", lambda command: {**real(command), **other.get("fact", {})})
    report = sweep.sweep([SMALL], other.get("settings", QUICK), path)
    assert [list(series["points"]) for series in report["series"].values()] == [[SMALL.key]] * 2


def test_merging_prefers_measured_points_and_later_ones(monkeypatch):
    real = store.facts
    points = make_grid([8, 16], [16], ["dense"])
    here = filled(points)
    again = copy.deepcopy(here)
    (old,), (new,) = here["series"].values(), again["series"].values()
    old["points"][points[0].key]["date"] = "2026-02-01T00:00:00"  # the later one
    new["points"][points[1].key] = result(points[1], failed="memory", reason="no")
    new["points"][points[1].key]["date"] = "2026-03-01T00:00:00"
    monkeypatch.setattr(store, "facts", lambda command: {**real(command), "device": "elsewhere"})
    there = filled(points[:1])
    joined = merge([here, again, there])
    first, second = joined["series"].values()
    assert {key: point["date"] for key, point in first["points"].items()} == {
        points[0].key: "2026-02-01T00:00:00",
        points[1].key: "2026-01-01T00:00:00",
    }
    assert "failed" not in first["points"][points[1].key]
    assert second["facts"]["device"] == "elsewhere"
    assert merge([again, here, there])["series"] == joined["series"]


# ----------------------------------------------------------------------------------------- report


def test_a_map_reads_as_tables_and_figures():
    points = make_grid([8, 16], [16, 32], ["diagonal", "dense", "rank16"])
    report = filled(points)
    (series,) = report["series"].values()
    lost = Point(16, 32, "dense")
    series["points"][lost.key] = result(lost, failed="memory", reason="no room")
    made = blocks(report)
    tables = [block for block in made if isinstance(block, Table)]
    assert [table.caption.split(" synth")[0] for table in tables] == [
        "Dense", "Rank 16", "Diagonal"
    ]  # fmt: skip
    assert tables[0].header[:6] == ["batch x width", "stock", "fused", "k 1", "k 4", "k never"]
    assert tables[1].rows[0] == [
        "8 x 16", "1.00 ms", "1.00 ms", "1.20", "~1.00", "0.80", "9", "never"
    ]  # fmt: skip
    assert tables[0].rows[3] == ["16 x 32", "out of memory", *"------"]
    words = [block.text for block in made if isinstance(block, Text)]
    assert any(
        text.startswith("Dense synthesizer: with targets on every step it is faster at 0 of 3")
        for text in words
    )
    assert words[-1] == f"Not measured (out of memory: no room): {lost.key}."
    assert len([block for block in made if isinstance(block, Figure)]) == 4


def test_heat_maps_show_what_is_undecided_and_what_failed():
    report = filled(make_grid([8], [16, 32], ["dense"]))
    (series,) = report["series"].values()
    lost = Point(8, 32, "dense")
    series["points"][lost.key] = result(lost, failed="gate", reason="off")
    figures = {block.name: block for block in blocks(report) if isinstance(block, Figure)}
    assert list(figures) == [f"map-1-output-{what}" for what in ("1", "4", "never", "break-even")]
    drawn = {name: figure.svg() for name, figure in figures.items()}
    assert ">1.20<" in drawn["map-1-output-1"] and ">~1.00<" in drawn["map-1-output-4"]
    assert ">9<" in drawn["map-1-output-break-even"]
    assert all("<pattern" in svg for svg in drawn.values())  # the hatching
    assert figures["map-1-output-1"].svg() == drawn["map-1-output-1"]


# ---------------------------------------------------------------------------------- command line

GRID = ["map", "--batches", "8", "--widths", "16", "--synthesizers", "rank4", "--seconds", "0.02"]


def test_command_measures_prints_and_draws(tmp_path, capsys):
    out = tmp_path / "map.json"
    given = [*GRID, "--backend", "cpu", "--out", str(out), "--figures", str(tmp_path / "figures")]
    assert cli.main(given) == 0
    printed = capsys.readouterr()
    assert "8 x 16" in printed.out and "map: 100 %" in printed.err
    assert {path.suffix for path in (tmp_path / "figures").iterdir()} == {".svg"}
    report = load(out, "map")
    assert str(tmp_path) not in out.read_text()
    both = tmp_path / "both.json"
    assert cli.main(["map", "--merge", str(out), str(out), "--out", str(both), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(both.read_text())
    assert load(both)["series"] == report["series"]
    assert as_text(blocks_of(report)) in printed.out


def test_command_without_matplotlib(tmp_path, capsys, monkeypatch):
    report = filled([SMALL])
    save(tmp_path / "a.json", report)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    merge_alone = ["map", "--merge", str(tmp_path / "a.json"), "--out", str(tmp_path / "b.json")]
    assert cli.main([*merge_alone, "--figures", str(tmp_path / "figures")]) == 0
    printed = capsys.readouterr()
    assert "8 x 16" in printed.out
    assert printed.err == "fused-dni: no figures: pip install matplotlib\n"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batches", "1"], "batches must be a whole number from 2 on, got '1'"),
        (["--synthesizers", "rnak4"], "unknown synthesizer 'rnak4'"),
        (["--interfaces", "input"], "unknown interface 'input'"),
        (["--backend", "cuba"], "unknown backend 'cuba'"),
        (
            ["--target-every", "0"],
            "must be a whole number from 1 on, or 'never', got '0'",
        ),
        (["--merge", "nowhere.json"], "cannot read nowhere.json"),
    ],
)
def test_command_refuses_in_one_line(tmp_path, capsys, more, message):
    out = tmp_path / "map.json"
    assert cli.main([*GRID, "--out", str(out), *more]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1
    assert not out.exists()


def test_ctrl_c_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "measure", stop)
    assert cli.main([*GRID, "--out", str(tmp_path / "map.json"), "--quiet"]) == 130
    err = capsys.readouterr().err
    assert "stopped; 0 of 1 points are in" in err and "the same command measures the others" in err
