"""Races: clocks, marks, what is concluded, and the command."""

from __future__ import annotations

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fused_dni import cli
from fused_dni.measure.errors import Interrupted
from fused_dni.measure.race import Arms, race
from fused_dni.measure.waiting import Stopwatch
from fused_dni.report import as_text, blocks_of, load
from fused_dni.report.kinds import race as said
from fused_dni.report.schema import save


class Falling:
    """Comes down by a share at each step, which takes so long on a clock that steps alone turn."""

    now = 0.0

    def __init__(self, share: float, takes: float = 1e-3, breaks: int | None = None) -> None:
        self.share, self.takes, self.breaks = share, takes, breaks
        self.at, self.steps, self.looks = 100.0, 0, 0

    def step(self) -> None:
        Falling.now += self.takes
        self.steps += 1
        self.at *= self.share
        if self.steps == self.breaks:
            self.at = math.nan

    def loss(self) -> float:
        self.looks += 1
        return self.at


class Turned(Stopwatch):
    def __init__(self) -> None:
        super().__init__(lambda: Falling.now)

    def _waits(self) -> float:
        return 0.0


@pytest.fixture(autouse=True)
def _no_clock_of_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step takes is said, and no machine that stalls makes it longer."""
    monkeypatch.setattr("fused_dni.measure.race.Stopwatch", Turned)


def arms_of(**racers: tuple[float, float]) -> Arms:
    return {name: lambda seed, one=one: Falling(*one) for name, one in racers.items()}  # type: ignore[misc]


#: The second takes steps of a tenth of the time, the third learns more slowly and never gets there.
ARMS = {"first": (0.97, 1e-3), "quick": (0.97, 1e-4), "slow": (0.9999, 1e-3)}


def test_all_have_the_same_time_and_marks() -> None:
    report = race(arms_of(**ARMS), seconds=0.1, seeds=(1, 2), marks=5)
    assert report["finished"] and len(report["runs"]) == 6
    for run in report["runs"]:
        history, (share, takes) = run["history"], ARMS[run["name"]]
        assert len(history) == 6 and history[0] == {"seconds": 0.0, "steps": 0, "loss": 100.0}
        for i, point in enumerate(history):
            assert point["seconds"] == pytest.approx(0.1 * i / 5, abs=1.01 * takes)
            assert point["seconds"] == pytest.approx(takes * point["steps"])
            assert point["loss"] == pytest.approx(100 * share ** point["steps"])


def test_who_was_sooner_is_said() -> None:
    report = race(arms_of(**ARMS), seconds=0.1, seeds=(1, 2, 3), marks=5)
    text = as_text(blocks_of(report))
    sentence = said.sentence(report)
    assert sentence in " ".join(text.split())
    assert "quick 0." in sentence and "Never there in that time: slow." in sentence
    for share in said.shares(report, "quick"):
        assert share is not None and share < 0.5
    assert said.shares(report, "slow") == [None] * 3
    assert [share for share in said.shares(report, "first") if share is not None] == [1.0] * 3


@pytest.mark.parametrize(
    ("losses", "target", "expected"),
    [
        ([10.0, 6.0, 2.0], 4.0, 1.5),
        ([10.0, 6.0, 2.0], 6.0, 1.0),
        ([10.0, 6.0, 2.0], 1.0, None),
        ([10.0, 6.0, 2.0], 11.0, 0.0),
        ([10.0, 12.0, 2.0], 7.0, 1.5),
        ([10.0, math.inf, 2.0], 7.0, 2.0),
    ],
)
def test_when_a_loss_was_reached(
    losses: list[float], target: float, expected: float | None
) -> None:
    history = [{"seconds": float(i), "loss": loss} for i, loss in enumerate(losses)]
    assert said.reached(history, target) == expected


def test_an_arm_that_diverges_stops_and_the_others_go_on() -> None:
    arms: Arms = {
        "first": lambda seed: Falling(0.97),
        "broken": lambda seed: Falling(0.97, breaks=20),
    }
    report = race(arms, seconds=0.1, seeds=(1,), marks=10)
    first, broken = report["runs"]
    assert not first["diverged"] and len(first["history"]) == 11
    assert broken["diverged"] and len(broken["history"]) < 5
    assert "(1 diverged)" in as_text(blocks_of(report))


def test_an_unfinished_race_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def stopping(seed: int) -> Falling:
        seeds.append(seed)
        if seed == 2 and len(seeds) == 2:
            raise KeyboardInterrupt
        return Falling(0.97)

    arms: Arms = {"first": lambda seed: Falling(0.97), "other": stopping}
    options: dict[str, Any] = {"seconds": 0.02, "seeds": (1, 2), "marks": 2}
    with pytest.raises(Interrupted, match="1 of 2 seeds were finished"):
        race(arms, **options, keep=partial(save, tmp_path / "race.json"))
    before = load(tmp_path / "race.json")
    assert not before["finished"] and "Unfinished: 1 of 2 seeds" in as_text(blocks_of(before))
    before.facts["commit"] = "a"
    monkeypatch.setattr("fused_dni.measure.race.facts", lambda *_: {"commit": "b"})
    report = race(arms, **options, previous=before)
    assert report["finished"] and seeds == [1, 2, 2] and report.facts["commit"] == "a, b"
    with pytest.raises(ValueError, match="of other settings"):
        race(arms, **{**options, "marks": 3}, previous=before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 0.0}, "seconds must be positive"),
        ({"marks": 0}, "marks at least 1"),
        ({"seeds": ()}, "seeds not empty"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        race(arms_of(**ARMS), **options)
    with pytest.raises(ValueError, match="two arms or more"):
        race(arms_of(alone=(0.9, 1e-3)))


# ------------------------------------------------------------------------------------- the command

FACTORY = """
from test_race import ARMS, arms_of
def arms():
    return arms_of(**ARMS)
def module():
    return 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_arms.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return tmp_path


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--seconds", "0.05", "--marks", "3", "--seeds", "4", "--quiet"]
    assert cli.main(["race", "my_arms:arms", *options]) == 0
    assert "time to first's end" in capsys.readouterr().out
    report = load(folder / "race.json", "race")
    assert report["settings"]["seeds"] == [4] and report["finished"]
    assert cli.main(["race", "my_arms:arms", *options, "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == report["runs"]
    assert cli.main(["report", "race.json", "-o", "race.html"]) == 0
    some = ["--arms", "first", "slow", "--out", "some.json"]
    assert cli.main(["race", "my_arms:arms", *options, *some]) == 0
    assert load(folder / "some.json", "race")["settings"]["arms"] == ["first", "slow"]
    page = (folder / "race.html").read_text()
    assert "<svg" in page and "Loss against an arm&#x27;s own clock" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["my_arms"], "FACTORY must be package.module:factory"),
        (["my_arms:module"], "must return a dictionary of functions of a seed, got int"),
        (["my_arms:nothing"], "unknown factory in my_arms 'nothing'"),
        (["my_arms:arms", "--seconds", "0"], "seconds"),
        (["my_arms:arms", "--arms", "first", "frist"], "my_arms:arms has first, "),
        (["my_arms:arms", "--arms", "first"], "a race takes two arms or more, got ['first']"),
        (["my_arms:arms", "--out", "."], "--out must be a file"),
    ],
)
def test_bad_input_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert cli.main(["race", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not re.search("Traceback", error)
