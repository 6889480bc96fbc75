"""The grid of rivals: runs of equal steps, times at the end, and what is read off both."""

import copy
import math
import signal
from dataclasses import replace

import pytest
import torch
from clusters import clusters

from fused_dni.cli import main
from fused_dni.experiments import data, rival_grid, rivals
from fused_dni.experiments.characters import WINDOW, windows
from fused_dni.experiments.rival_arms import Grid
from fused_dni.experiments.run import Interrupted
from fused_dni.measure.verdict.errors import GateError
from fused_dni.report import blocks_of, load
from fused_dni.report.blocks import as_text
from fused_dni.report.kinds import rival_grid as said
from fused_dni.report.progress import Progress
from fused_dni.report.schema import Result, save
from fused_dni.report.timings import Timing

TINY = Grid(
    dataset="digits",
    arms=("backprop", "fused", "stale-2", "cdni-2"),
    widths=(6,),
    depths=(1, 2),
    budgets=(1, 2),
    steps=3,
    rates=(1e-3, 1e-2),
    batch_size=16,
    rank=2,
    seeds=(1, 2),
    backend="reference",
)
DATA = clusters()
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def report() -> Result:
    torch.set_num_threads(1)
    return rival_grid.compare(TINY, DATA, seconds=0.02, command="here")


def _places(report):
    names = ("width", "depth", "budget", "seed", "name")
    return [tuple(run[name] for name in names) for run in report["runs"]]


def test_every_arm_is_trained_everywhere_and_backprop_once(report):
    places = _places(report)
    assert report["finished"] and len(set(places)) == len(places) == 2 * 2 * (3 * 2 + 1)
    assert report["trained"] == "fused" and report["exact"] == ["backprop", "fused"]
    assert not any(place[4] == "backprop" for place in places)
    assert [place for place in places if place[2] == 3] == [
        (6, depth, 3, seed, "fused") for depth in (1, 2) for seed in (1, 2)
    ]
    for run in report["runs"]:
        repeats = 2 if run["name"] == "stale-2" else 1
        assert run["steps"] == run["history"][-1]["steps"] == 3 * run["budget"] * repeats
    assert [(n["width"], n["depth"], len(n["arms"])) for n in report["networks"]] == [
        (6, 1, 4),
        (6, 2, 4),
    ]


def test_rates_are_tried_by_each_arm_alike(report):
    assert [(row["name"], row["rate"]) for row in report["tuning"]] == [
        (name, rate) for name in ("fused", "stale-2", "cdni-2") for rate in TINY.rates
    ]
    for name in ("fused", "stale-2", "cdni-2"):
        best = min(
            (row for row in report["tuning"] if row["name"] == name), key=lambda row: row["error"]
        )
        assert {run["rate"] for run in report["runs"] if run["name"] == name} == {best["rate"]}


def test_a_stopped_grid_goes_on_where_it_was(report):
    part = copy.deepcopy(report)
    part.body.update(runs=part["runs"][:5], networks=[], finished=False)
    assert "Unfinished: 5 runs so far" in as_text(said.blocks(part))

    class Impatient(Progress):
        def update(self, name: str, fraction: float, note: str = "") -> None:
            if name.startswith("timing 6 x 2"):
                signal.raise_signal(signal.SIGINT)

    kept = []
    with pytest.raises(Interrupted, match="29 of 30 runs were finished"):
        rival_grid.compare(
            TINY, DATA, seconds=0.02, previous=part, keep=lambda r: kept.append(len(r["runs"])),
            progress=Impatient(enabled=False),
        )  # fmt: skip
    assert kept[0] == 5 and kept[-1] == 28 and len(part["networks"]) == 1
    whole = rival_grid.compare(TINY, DATA, seconds=0.02, previous=part)
    assert whole["finished"] and _places(whole) == _places(report)
    assert [run["history"] for run in whole["runs"]] == [run["history"] for run in report["runs"]]
    with pytest.raises(ValueError, match="is of other settings"):
        rival_grid.compare(replace(TINY, steps=4), DATA, previous=part)


def test_what_is_wrong_with_an_arm_shows_before_anything_is_trained(monkeypatch):
    def check(trainer, *_):
        raise GateError(f"{trainer.name} deviates")

    kept = []
    monkeypatch.setattr(rivals.rival_gate, "check", check)
    with pytest.raises(GateError, match="backprop deviates"):
        rival_grid.compare(TINY, DATA, seconds=0.02, keep=kept.append)
    assert kept == []


def test_a_report_is_read_and_shown(report, tmp_path):
    save(tmp_path / "r.json", report)
    shown = as_text(blocks_of(load(tmp_path / "r.json", "rivals grid")))
    for words in ("After as many batches", "In as much time", "Time to backprop", "6 x 2, 2x"):
        assert words in shown
    assert "Unfinished" not in shown


# ------------------------------------------------------------------- what is read off, by hand


def test_between_runs_errors_are_straight_in_the_logarithm():
    curve = [(10.0, 0.4), (40.0, 0.2)]
    assert said.at(curve, 20.0) == pytest.approx(0.3)
    assert said.at(curve, 10.0) == 0.4 and said.at(curve, 40.0) == pytest.approx(0.2)
    assert said.at(curve, 9.0) is None and said.at(curve, 41.0) is None
    assert said.when(curve, 0.3) == pytest.approx(20.0)
    assert said.when(curve, 0.5) == 10.0 and said.when(curve, 0.1) is None
    assert said.when([], 0.5) is None


def test_an_interval_is_students():
    low, high = said.interval([1.0, 2.0, 3.0])
    # The mean is 2, the deviation 1, and t with two degrees of freedom 4.303.
    assert (low, high) == pytest.approx((2 - 4.303 / math.sqrt(3), 2 + 4.303 / math.sqrt(3)))
    assert said.interval([1.0]) == (-math.inf, math.inf)


def _planted(ours: dict[int, float], step: float) -> Result:
    """Backprop at 1 second a step with errors 0.4, 0.3, 0.25 at the budgets 1, 2 and 3; cDNI."""
    theirs = {1: 0.4, 2: 0.3, 3: 0.25}
    runs = [
        {
            "name": name, "width": 6, "depth": 1, "budget": budget, "seed": seed,
            "steps": 3 * budget, "history": [{"error": error + 0.001 * seed}],
        }
        for seed in (1, 2)
        for name, errors in (("fused", theirs), ("cdni-2", ours))
        for budget, error in errors.items()
    ]  # fmt: skip
    times = {"backprop": 1.5, "fused": 1.0, "cdni-2": step}
    arms = [
        {"name": name, "time": Timing.of(name, [t] * 6, [t] * 6, 1), "memory": 1}
        for name, t in times.items()
    ]
    body = {
        "dataset": "digits", "trained": "fused", "exact": ["backprop", "fused"], "tuning": [],
        "runs": runs, "networks": [{"width": 6, "depth": 1, "arms": arms}], "finished": True,
    }  # fmt: skip
    settings = {**vars(TINY), "arms": ["backprop", "fused", "cdni-2"], "depths": [1]}
    return Result("rivals grid", settings=settings, body=body)


def test_who_is_ahead_in_as_much_time():
    found = _planted({1: 0.41, 2: 0.31}, step=0.5)
    cell = said.Cell(6, 1, 2)
    assert said.fastest(found, cell) == "fused"
    assert said.by_batches(found, cell, "cdni-2") == pytest.approx([0.01, 0.01])
    # Six steps of half a second: what backprop has after three.
    assert said.by_time(found, cell, "cdni-2") == pytest.approx([0.31 - 0.4] * 2)
    assert said.by_time(found, said.Cell(6, 1, 1), "cdni-2") == []
    # It ends with 0.31 and is never at 0.3; at 0.4 a tenth of the way from 3 to 6 steps.
    assert said.parts(found, cell, "cdni-2") == [None, None]
    wanted = 2**0.1 * 0.5
    assert said.parts(found, said.Cell(6, 1, 1), "cdni-2") == pytest.approx([wanted] * 2)
    shown = said.sentence(found)
    assert "cdni-2 0/2 of 2 after as many batches, 1/0 of 1 in as much time, sooner in 1." in shown
    assert said.sooner(found, "cdni-2") == pytest.approx([wanted])
    assert "never" in as_text(said.blocks(found))


def test_without_a_shorter_step_nothing_is_ahead():
    found = _planted({1: 0.41, 2: 0.31}, step=1.5)
    assert said.by_time(found, said.Cell(6, 1, 2), "cdni-2") == pytest.approx([0.31 - 0.25] * 2)
    assert "0/2 of 2 in as much time, sooner in 0" in said.sentence(found)


# --------------------------------------------------------------------------------------- a text


def test_a_text_is_windows_and_the_characters_behind_them(tmp_path):
    text = "".join(chr(97 + (i * i) % 23) for i in range(400))
    (tmp_path / "t.txt").write_text(text)
    found = windows(tmp_path / "t.txt")
    assert found.features == WINDOW * found.classes and found.name == "characters"
    assert len(found.train.labels) == 360 - WINDOW and len(found.test.labels) == 40 - WINDOW
    symbols = sorted(set(text[:360]))
    for split, part in ((found.train, text[:360]), (found.test, text[360:])):
        read = split.images.view(len(split.labels), WINDOW, found.classes).argmax(2)
        rows = torch.cat([read, split.labels[:, None]], 1)
        there = {"".join(symbols[i] for i in row) for row in rows.tolist()}
        assert there == {part[i : i + WINDOW + 1] for i in range(len(part) - WINDOW)}
    # derived: one of so many is one, and the two values have mean 0 and deviation 1 by it
    assert abs(float(found.train.images.mean())) < 1e-5
    assert abs(float(found.train.images.std()) - 1.0) < 1e-4
    assert torch.equal(windows(tmp_path / "t.txt").train.images, found.train.images)
    (tmp_path / "short.txt").write_text("too short for a window")
    with pytest.raises(data.DataError, match="too short: 2 characters in one of its parts"):
        windows(tmp_path / "short.txt")


# ------------------------------------------------------------------------------------ command line


def test_the_command_on_a_text(tmp_path, capsys, monkeypatch):
    (tmp_path / "t.txt").write_text("to be or not to be, that is the question. " * 20)
    argv = ["rivals", "grid", "--quick", "--dataset", "characters", "--batch-size", "32"]
    argv += ["--data", str(tmp_path / "t.txt"), "--steps", "2", "--depths", "1", "--quiet"]
    argv += ["--seconds", "0.02", "--backend", "reference", "--out", str(tmp_path / "g.json")]
    assert main(argv) == 0
    assert "16 x 1, 4x" in capsys.readouterr().out
    made = load(tmp_path / "g.json", "rivals grid")
    assert made["dataset"] == "characters" and made.facts["command"].count("DIR") == 2
    of_folder = [str(tmp_path) if word.endswith("t.txt") else word for word in argv]
    assert main([*of_folder, "--resume"]) == 0  # the same text
    assert main([*argv, "--resume", "--seeds", "3"]) == 2
    assert "of other settings" in capsys.readouterr().err
    (tmp_path / "t.txt").write_text("whether 'tis nobler in the mind to suffer. " * 20)
    assert main([*argv, "--resume"]) == 2
    assert "of other data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--arms", "cdni-4"], "arms must have one of backprop, compiled,"),
        (["--arms", "fused", "stael-4"], "unknown arm 'stael-4', did you mean"),
        (["--quick", "--full"], "--quick and --full ask for different grids"),
        (["--dataset", "characters"], "--dataset characters needs --data PATH, a text"),
        (["--dataset", "characters", "--data", "nowhere"], "nowhere does not exist"),
        (["--dataset", "characters", "--data", "."], "has no file that ends in .txt"),
        (["--data", "nowhere"], "data folder nowhere does not exist"),
        (["--data", ""], "data must be a path, got ''"),
        (["--budgets", "0"], "budgets must be a whole number from 1 on"),
        (["--mix", "2"], "mix must be a finite number from 0 to 1"),
    ],
)
def test_the_command_refuses_in_one_line(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["rivals", "grid", *argv]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert captured.out == "" and len(lines) == 1 and message in lines[0]
