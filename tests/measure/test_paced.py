"""Pipelines of processes that sleep: they run in every mode, and never faster than they may."""

from __future__ import annotations

import pytest

from fused_dni import cli
from fused_dni.measure.simulate import Case, Link, Settings, Stragglers, Times, paced

TIMES = Times.of(4e-3, 8e-3, dni=13e-3, target=1e-3, lesson=1e-3)
SMALL = Settings(times=TIMES, link=Link(latency=0.01), rows=4, forward_bytes=4096.0, steps=40)


@pytest.mark.slow(15)
def test_every_mode_runs_and_sleeps_as_long_as_it_should():
    runs = [paced.asked(mode, Case(2, SMALL), 0.3) for mode in paced.RUNTIME]
    runs.append(paced.asked("local", Case(2, replace_stragglers(4.0)), 0.3))
    told: list[float] = []
    rows = paced.measure(runs, told.append)
    assert [row["mode"] for row in rows] == [*paced.RUNTIME, "local"]
    assert told[-1] == 1.0 and len(told) == len(rows)
    for row in rows[:-1]:
        # Sleeping is never shorter than asked; what a run may gain is what it had ahead.
        assert row["deviation"] > -0.15, row
        assert (row["age"] is None) == (row["mode"] == "local")
    ages = {row["mode"]: row["age"] for row in rows[:-1]}
    assert ages["gpipe"] == 0.0 and ages["dni"] > 0.0 and ages["stale"] > 0.0
    # A stage that is slow all the time: four times the time of a step.
    assert rows[-1]["measured"] < 1.1 / (4 * 12e-3)


def replace_stragglers(factor: float) -> Settings:
    from dataclasses import replace

    return replace(SMALL, stragglers=Stragglers(factor, share=1.0, stage=1))


def test_spells_are_as_often_as_the_share_says():
    from dataclasses import replace

    settings = replace(SMALL, stragglers=Stragglers(2.0, share=0.25, spell=0.5, stage=1))
    assert {paced._Spells(settings, 0).factor(t) for t in range(100)} == {1.0}
    spells = paced._Spells(settings, 1)
    found = [spells.factor(1e-9 + t / 50) for t in range(200_000)]
    assert set(found) == {1.0, 2.0}
    # 4,000 s of spells of 2 s and 1.5 s pauses' deviation: a standard error below 0.02.
    assert found.count(2.0) / len(found) == pytest.approx(0.25, abs=0.06)
    again = paced._Spells(settings, 1)
    assert found[:5000] == [again.factor(1e-9 + t / 50) for t in range(5000)]


@pytest.mark.parametrize(
    ("mode", "stages", "said"),
    [("1f1b", 2, "mode must be one of"), ("dni", 1, "from 2 to 16"), ("dni", 17, "from 2 to 16")],
)
def test_what_has_no_runtime_is_refused(mode, stages, said):
    with pytest.raises(ValueError, match=said):
        paced.asked(mode, Case(stages, SMALL), 1.0)


def test_runs_are_of_one_number_of_stages():
    runs = [paced.asked("dni", Case(stages, SMALL), 0.1) for stages in (2, 3)]
    for some in (runs, []):
        with pytest.raises(ValueError, match="all of one number of stages"):
            paced.measure(some)


def test_a_process_that_fails_says_what(forked_ranks):
    run = paced.asked("dni", Case(2, SMALL), 0.1)
    with pytest.raises(RuntimeError, match=r"stage \d: ValueError: window must be"):
        paced.measure([run._replace(window=0)])


def test_simulate_runs_what_it_simulates(capsys, monkeypatch, forked_ranks):
    monkeypatch.setattr("fused_dni.cli.simulate.RUN_STAGES", (2,))
    argv = ["simulate", "--forward", "2ms", "--backward", "3ms", "--latencies", "0", "--chains",
            "2", "--modes", "local", "gpipe", "2bw", "--steps", "9", "--forward-bytes", "4kB",
            "--run", "0.1", "--quiet"]  # fmt: skip
    assert cli.main(argv) == 0
    said = capsys.readouterr().out
    assert "of 6 rows agree within 20 %" in said
