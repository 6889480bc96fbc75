"""The simulated chains against closed forms, against another event loop, and at their limits."""

from __future__ import annotations

import heapq
import itertools
import json
import math
from collections import deque
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fused_dni import cli
from fused_dni.measure.simulate import (
    MODES,
    Case,
    Failures,
    Link,
    Settings,
    Stragglers,
    Times,
    check,
    compare,
    draws,
    engine,
    simulate,
    sweep,
)
from fused_dni.report import as_text, blocks_of, load
from fused_dni.report.kinds import simulation as said

F, B = 4e-3, 8e-3
TIMES = Times.of(F, B, optimizer=1e-3)
#: Of a closed form: times are rounded to picoseconds, of milliseconds.
CLOSE = 1e-8
CHAINS = [name for name in MODES if MODES[name].chain is not None]


def settings(latency: float = 0.0, **options: Any) -> Settings:
    link = options.pop("link", Link(latency=latency))
    return Settings(**{"times": TIMES, "link": link, **options})


def one(mode: str, stages: int, given: Settings) -> dict[str, Any]:
    (row,) = simulate(mode, [Case(stages, given)])
    return row


def seconds(mode: str, stages: int, given: Settings) -> float:
    """Of an update."""
    return 1.0 / one(mode, stages, given)["updates"]


# ------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("mode", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "m"), [(1, 1), (2, 1), (2, 8), (4, 4), (7, 13), (16, 64)])
def test_the_bubble_without_latency(mode: str, stages: int, m: int) -> None:
    given = settings(times=Times.of(F, B), microbatches=m)
    row = one(mode, stages, given)
    assert 1.0 / row["updates"] == pytest.approx((m + stages - 1) * (F + B), rel=CLOSE)
    assert 1.0 - row["mean"] == pytest.approx((stages - 1) / (m + stages - 1), abs=CLOSE)


@pytest.mark.parametrize("latency", [0.0, 1e-3, 0.2])
@pytest.mark.parametrize("stages", [1, 2, 5])
@pytest.mark.parametrize("mode", ["gpipe", "1f1b"])
def test_one_microbatch_goes_there_and_back(mode: str, stages: int, latency: float) -> None:
    expected = stages * (F + B) + 2 * (stages - 1) * latency + 1e-3
    given = settings(latency, microbatches=1)
    assert seconds(mode, stages, given) == pytest.approx(expected, rel=CLOSE)


@pytest.mark.parametrize("latency", [0.0, 5e-3, 0.2])
def test_gpipe_pays_latency_once_an_update(latency: float) -> None:
    expected = (12 + 3) * (F + B) + 2 * 3 * latency + 1e-3
    given = settings(latency, microbatches=12)
    assert seconds("gpipe", 4, given) == pytest.approx(expected, rel=CLOSE)


def test_ways_and_bandwidths_differ_by_direction() -> None:
    link = Link(0.01, latency_back=0.03, bandwidth=1e8, bandwidth_back=5e7)
    given = settings(link=link, microbatches=1, forward_bytes=2e5, backward_bytes=3e5)
    ways = 0.01 + 2e5 / 1e8 + 0.03 + 3e5 / 5e7
    assert seconds("1f1b", 3, given) == pytest.approx(3 * (F + B) + 2 * ways + 1e-3, rel=CLOSE)


@pytest.mark.parametrize("latency", [0.02, 0.05])
@pytest.mark.parametrize("m", [1, 2, 6])
def test_late_receives_cost_four_latencies_a_microbatch(m: int, latency: float) -> None:
    """On two stages by GPipe. The first message of a phase was asked for before; each further one
    takes two latencies from the end of the work before it, forward and backward alike."""
    given = settings(latency, microbatches=m, late_receives=True, times=Times.of(F, B))
    early = (m + 1) * (F + B) + 2 * latency
    # In the first of the updates the first question leaves only when all begins.
    start = (latency - F) / math.ceil(given.steps / m)
    expected = early + 4 * latency * (m - 1) + start
    assert seconds("gpipe", 2, given) == pytest.approx(expected, rel=CLOSE)
    in_time = replace(given, late_receives=False)
    assert seconds("gpipe", 2, in_time) == pytest.approx(early, rel=CLOSE)
    assert seconds("1f1b", 2, given) >= seconds("1f1b", 2, in_time)


@pytest.mark.parametrize("mode", ["dni", "local"])
@pytest.mark.parametrize("latency", [0.0, 1e-3, 0.05])
@pytest.mark.parametrize("buffer", [1, 3, 16])
def test_one_way_chains_wait_only_for_room(mode: str, latency: float, buffer: int) -> None:
    step = 5e-3
    times = Times.of(3e-3, 2e-3, dni=step, lesson=1e-3, local=step)
    given = settings(latency, times=times, buffer=buffer, target_every=10**6, steps=64)
    rate = one(mode, 4, given)["rate"]
    # A message goes, is worked on, and its room comes back: two steps and two latencies.
    expected = min(1 / step, buffer / (2 * step + 2 * latency))
    assert rate == pytest.approx(expected, rel=CLOSE)


def test_stale_stages_wait_for_their_window_alone() -> None:
    times = Times.of(F, B)
    around = 4 * (F + B) + 2 * 3 * 0.1
    for window in (2, 8, 24):
        given = settings(0.1, times=times, window=window)
        assert one("stale", 4, given)["rate"] == pytest.approx(window / around, rel=1e-2)
    wide = one("stale", 4, settings(0.1, times=times, window=200, steps=2000))
    assert wide["rate"] == pytest.approx(1 / (F + B), rel=1e-2)


@pytest.mark.parametrize("bandwidth", [math.inf, 1e9])
def test_data_parallel_is_work_and_a_ring(bandwidth: float) -> None:
    n, latency, moved = 8, 3e-3, 4e6
    given = settings(
        link=Link(latency, bandwidth=bandwidth), microbatches=16, parameter_bytes=moved
    )
    ring = 2 * (n - 1) * (latency + n * moved / n / bandwidth)
    work = 2 * n * (F + B) + n * 1e-3
    assert seconds("data-parallel", n, given) == pytest.approx(work + ring, rel=CLOSE)
    given = replace(given, local_steps=50)
    expected = 50 * n * (F + B + 1e-3) + ring
    assert 50 * seconds("diloco", n, given) == pytest.approx(expected, rel=CLOSE)


def test_two_versions_leave_no_bubble() -> None:
    rate = one("2bw", 4, settings(times=Times.of(F, B)))["rate"]
    assert rate == pytest.approx(1 / (F + B), rel=CLOSE)


@pytest.mark.parametrize("latency", [0.0, 1e-3, 5e-3])
@pytest.mark.parametrize("stages", [2, 4, 8])
def test_zero_bubble_is_between_1f1b_and_work_alone(stages: int, latency: float) -> None:
    given = settings(latency, times=Times.of(F, B))
    m = 4 * stages
    found = seconds("zero-bubble", stages, given)
    assert m * (F + B) < found < seconds("1f1b", stages, given)


# ------------------------------------------------------------------------ another event loop


def tick(value: float) -> int:
    return round(value / engine.TICK)


def by_heap(chain: engine.Chain, mode: str) -> tuple[list[float], list[float]]:
    """By stage, when it has done everything, and the mean of the microbatches that were under way
    at its forwards: one event after the other."""
    stages, m, total = chain.stages, chain.every, chain.total
    busy = [False] * stages
    nf, nb, ends, ages = ([0] * stages for _ in range(4))
    came: list[tuple[deque[int], deque[int]]] = [(deque(), deque()) for _ in range(stages)]
    events: list[tuple[int, int, str, int]] = []
    count = itertools.count()

    def begin(now: int, takes: float, what: str, s: int) -> None:
        busy[s] = True
        heapq.heappush(events, (now + tick(takes), next(count), what, s))

    def look(s: int, now: int) -> None:
        if busy[s]:
            return
        limit = total if mode == "stale" else min((nb[s] // m + 1) * m, total)
        gradient = nb[s] < nf[s] and (s == stages - 1 or bool(came[s][1]))
        if mode == "gpipe" and nf[s] < limit:
            gradient = False
        if gradient:
            if s < stages - 1:
                came[s][1].popleft()
            nb[s] += 1
            begin(now, chain.backward[s], "backward", s)
        elif nf[s] < min(limit, nb[s] + chain.windows[s]) and (s == 0 or came[s][0]):
            if s:
                came[s][0].popleft()
            ages[s] += nf[s] - nb[s]
            nf[s] += 1
            begin(now, chain.forward[s], "forward", s)

    look(0, 0)
    while events:
        now = events[0][0]
        # All that happens at one moment is known before anybody looks.
        touched = []
        while events and events[0][0] == now:
            _, _, what, s = heapq.heappop(events)
            touched.append(s)
            if what in ("forward", "backward"):
                busy[s] = False
                to, way = (s + 1, chain.link.latency)
                if what == "backward":
                    to, way = (s - 1, chain.link.back)
                    ends[s] = now
                    if nb[s] % m == 0:
                        begin(now, chain.optimizer[s], "update", s)
                if 0 <= to < stages:
                    heapq.heappush(events, (now + tick(way), next(count), f"{what} came", to))
            elif what == "update":
                busy[s], ends[s] = False, now
            else:
                came[s][what == "backward came"].append(now)
        for s in set(touched):
            look(s, now)
    assert nf == nb == [total] * stages
    return [end * engine.TICK for end in ends], [age / total for age in ages]


@given(
    mode=st.sampled_from(["gpipe", "1f1b", "stale"]),
    takes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6),
    m=st.integers(1, 9),
    updates=st.integers(1, 4),
    there=st.sampled_from([0.0, 1e-4, 4e-3, 7.7e-3, 0.03]),
    back=st.sampled_from([None, 0.0, 2e-3, 0.05]),
    window=st.integers(1, 9),
)
def test_it_is_what_one_event_after_the_other_gives(
    mode: str,
    takes: list[tuple[int, int]],
    m: int,
    updates: int,
    there: float,
    back: float | None,
    window: int,
) -> None:
    """Stages of different times, which grow gaps and queues."""
    times = Times.of(*([1e-3 * t for t in row] for row in zip(*takes, strict=True)), optimizer=2e-3)
    link = Link(there, latency_back=back)
    given = settings(link=link, microbatches=m, window=window, times=times)
    chain = MODES[mode].chain(Case(len(takes), given))  # type: ignore[misc]
    chain = replace(chain, total=m * updates, skip=0)
    (ran,) = engine.run([chain])
    ends, ages = by_heap(chain, mode)
    assert ran.ends == pytest.approx(ends, abs=1e-13)
    assert ran.age == pytest.approx(ages, abs=1e-12)


@pytest.mark.parametrize("mode", CHAINS)
def test_chains_that_run_together_do_what_they_do_alone(mode: str) -> None:
    points = [
        Case(n, settings(link=Link(latency, jitter=2e-3), microbatches=4, steps=30, buffer=4))
        for n, latency in ((1, 0.0), (3, 0.01), (6, 0.0), (2, 0.1))
    ]
    together = simulate(mode, points)
    assert together == [simulate(mode, [point])[0] for point in points]


# ------------------------------------------------------------------------------ what is kept


@pytest.mark.parametrize("mode", CHAINS)
@pytest.mark.parametrize("disturbed", [False, True])
def test_every_stage_does_every_microbatch_once(mode: str, disturbed: bool) -> None:
    """At work is the stage's own work, and nothing else."""
    link = Link(5e-3, jitter=3e-3 * disturbed, shape="lognormal")
    given = settings(link=link, microbatches=6, steps=24, buffer=5, target_every=2)
    chain = MODES[mode].chain(Case(4, given))  # type: ignore[misc]
    (ran,) = engine.run([replace(chain, skip=0)])
    for s in range(4):
        lessons = ran.lessons[s] if mode == "dni" else 0
        if mode == "dni":
            top = s == 3
            step = F + B + 1e-3 if top else TIMES.dni[0]
            assert lessons + ran.dropped[s] <= (0 if top else math.ceil(chain.total / 2))
            work = chain.total * step + lessons * TIMES.lesson[0]
        elif mode == "local":
            work = chain.total * TIMES.local[0]
        else:
            work = chain.total * (F + B) + chain.total // chain.every * 1e-3
        assert ran.busy[s] == pytest.approx(work, rel=1e-9)
        assert ran.busy[s] <= ran.ends[s] + 1e-12


def test_a_failed_stage_does_its_work_again() -> None:
    given = settings(1e-3, buffer=4, steps=40)
    chain = MODES["local"].chain(Case(3, given))  # type: ignore[misc]
    (calm,) = engine.run([chain])
    middle = calm.ends[1] / 2
    (struck,) = engine.run([replace(chain, outage=engine.Outage(1, middle, 10.0))])
    lost = struck.ends[2] - calm.ends[2]
    # The restart and at most the step that it was at, less what lay in the buffers.
    assert 10.0 - 4 * 2 * TIMES.local[0] <= lost <= 10.0 + TIMES.local[0]
    (again,) = engine.run([replace(chain, outage=engine.Outage(1, 1e4, 10.0))])
    assert (again.begins, again.ends, again.busy) == (calm.begins, calm.ends, calm.busy)


def test_ages() -> None:
    quick = settings(0.0)
    for mode in ("gpipe", "1f1b", "zero-bubble", "data-parallel"):
        assert one(mode, 4, quick)["oldest"] == 0
    assert one("2bw", 4, quick)["oldest"] == 1
    assert one("local", 4, quick)["age"] is None
    # The gradient is as old as there are microbatches under way: at least the 600 ms of the lowest
    # stage's way there and back, at most the window, and as good as the window if it is wide.
    for window in (None, 200):
        far = settings(0.1, window=window, steps=2000)
        oldest = one("stale", 4, far)["oldest"]
        assert 0.6 / 13e-3 <= oldest < far.window_of(4)
        assert (oldest > 100) == (window == 200)
    # Targets of DNI come from the next stage alone, whatever lies above it.
    near = [one("dni", n, settings(0.1))["age"] for n in (2, 8)]
    assert near[0] == pytest.approx(0.2 / TIMES.dni[0], rel=0.25)
    assert near[1] == pytest.approx(near[0], rel=0.25)


def test_targets_that_are_too_old_are_dropped() -> None:
    given = settings(0.1, target_every=3)
    fresh = one("dni", 3, replace(given, max_age=200))
    assert fresh["dropped"] == 0.0 and fresh["oldest"] < 200
    old = one("dni", 3, replace(given, max_age=2))
    assert old["dropped"] == 1.0 and old["age"] is None
    # No lessons: a step is all there is to do.
    assert old["rate"] == pytest.approx(1 / max(TIMES.dni[0], F + B + 1e-3), rel=1e-6)
    assert fresh["backward_bytes"] == pytest.approx(given.backward_bytes / 3)


def test_a_slow_way_back_loses_targets_and_holds_up_nothing() -> None:
    slow = Link(1e-3, bandwidth=1e12, bandwidth_back=1e6)  # half a second a target
    row = one("dni", 3, settings(link=slow))
    assert row["dropped"] > 0.9
    assert row["rate"] > 0.95 * one("dni", 3, settings(1e-3))["rate"]
    assert one("1f1b", 3, settings(link=slow))["rate"] < 3.0


def test_one_slow_stage_sets_the_pace() -> None:
    always = Stragglers(3.0, share=1.0, stage=1)
    for mode, step in (("local", F + B + 1e-3), ("stale", F + B + 1e-3)):
        row = one(mode, 3, settings(1e-3, stragglers=always, steps=640))
        assert row["rate"] == pytest.approx(1 / (3 * step), rel=0.02)
        assert row["utilisation"][1] == pytest.approx(1.0, abs=0.02)
        if mode == "local":
            assert row["utilisation"][2] == pytest.approx(1 / 3, abs=0.02)


def test_slow_spells_take_their_share() -> None:
    spells = Stragglers(5.0, share=0.25, spell=0.5)
    row = one("local", 1, settings(stragglers=spells, steps=20_000))
    fast = one("local", 1, settings())["rate"]
    # The steps begun while fast, 3/4 of the time, and while slow, 1/4 at a fifth of the pace.
    assert row["rate"] == pytest.approx(fast * (0.75 + 0.25 / 5), rel=0.1)
    for mode in ("data-parallel", "diloco"):
        calm, slow = (
            one(mode, 4, settings(stragglers=s, steps=2000)) for s in (Stragglers(), spells)
        )
        assert 1 / 5 < slow["rate"] / calm["rate"] < 0.85


def test_failures_cost_the_exact_modes_the_checkpoint_and_others_a_restart() -> None:
    calm = settings(1e-3)
    failing = replace(calm, failures=Failures(every=3600.0, restart=60.0, checkpoint=600.0))
    for mode in ("gpipe", "1f1b", "data-parallel"):
        row = one(mode, 4, failing)
        assert row["failure"] == pytest.approx(360.0) and row["lost"] == pytest.approx(300.0)
        share = 1 / (1 + 4 * 360 / 3600)
        assert row["rate"] == pytest.approx(one(mode, 4, calm)["rate"] * share)
    for mode in ("stale", "dni", "local"):
        row = one(mode, 4, failing)
        assert 55.0 < row["failure"] < 61.0
        assert row["rate"] > 0.9 * one(mode, 4, calm)["rate"]
    assert one("diloco", 4, failing)["failure"] < 20.0


# ------------------------------------------------------------------------------ random numbers


@pytest.mark.parametrize("mode", list(MODES))
def test_a_seed_gives_the_same_run_and_another_does_not(mode: str) -> None:
    link = Link(5e-3, jitter_share=0.5)
    first, again, other = (
        one(mode, 3, settings(link=link, seed=seed, steps=60)) for seed in (1, 1, 2)
    )
    assert first == again
    if mode not in ("dni", "local"):  # whose buffers hide it
        assert first["rate"] != other["rate"]


@pytest.mark.parametrize("shape", ["exponential", "uniform", "lognormal"])
def test_delays_have_mean_one(shape: str) -> None:
    import numpy as np

    key = draws.keys(3, draws.FORWARD, np.arange(4))
    number = np.arange(50_000)
    rows = [draws.delay(shape, key[i : i + 1], number) for i in range(4)]
    for row in rows:
        assert float(row.min()) >= 0.0
        # The variance is 1, 1/3 and e - 1: five standard deviations of the mean.
        assert float(row.mean()) == pytest.approx(1.0, abs=5 * math.sqrt(1.72 / 50_000))
        assert abs(float(np.corrcoef(row[1:], row[:-1])[0, 1])) < 5 / math.sqrt(50_000)
    assert abs(float(np.corrcoef(rows[0], rows[1])[0, 1])) < 5 / math.sqrt(50_000)


@pytest.mark.parametrize("mode", ["gpipe", "1f1b", "zero-bubble", "2bw"])
def test_jitter_never_helps_and_hurts_as_its_mean_at_most(mode: str) -> None:
    calm = one(mode, 4, settings(0.02, steps=100, microbatches=10))["rate"]
    shaky = one(mode, 4, settings(link=Link(0.02, jitter=0.02), steps=100, microbatches=10))["rate"]
    # Waiting for the later of two is longer than their mean: five times it is far off.
    worse = one(mode, 4, settings(0.12, steps=100, microbatches=10))["rate"]
    assert worse * 0.95 < shaky < calm * 1.02


def test_a_thousand_stages() -> None:
    row = one("dni", 1000, settings(0.2, steps=64))
    assert row["rate"] == pytest.approx(1 / (TIMES.dni[0] + TIMES.lesson[0]), rel=1e-3)
    assert row["utilisation"] is None and row["most"] <= 1.0 + 1e-12


# ------------------------------------------------------------------------ sweep and its report


def test_the_report_says_where_each_begins_to_win() -> None:
    report = sweep(settings(0.02, steps=40), latencies=(0.0, 0.01, 0.1), chains=(2, 4))
    assert [row["latency"] for row in report["latency"] if row["mode"] == "dni"] == [0.0, 0.01, 0.1]
    assert {row["stages"] for row in report["chains"]} == {2, 4}
    text = " ".join(as_text(blocks_of(report)).split())
    assert said.sentence(report) in text and "Throughput is not accuracy" in text
    assert "dni carries 5 % more" in text and "ahead of gpipe" in text
    ours = dict(said.curve(report["latency"], "dni", "latency"))
    theirs = dict(said.curve(report["latency"], "1f1b", "latency"))
    for at in (0.0, 0.01, 0.1):
        stretches = said.ahead(report["latency"], "dni", "1f1b")
        inside = any(low <= at <= high for low, high in stretches)
        assert inside == (ours[at] > 1.05 * theirs[at])


def test_a_run_too_short_for_its_stragglers_says_so() -> None:
    def text(**options: Any) -> str:
        given = settings(0.02, stragglers=Stragglers(3.0, share=0.5, spell=0.05), **options)
        report = sweep(given, latencies=(0.0,), chains=(2,), modes=("local",))
        return as_text(blocks_of(report))

    # Twenty spells and as many gaps of 50 ms take 2 s, and a step 13 ms.
    assert "--steps" in text(steps=64) and "--steps" not in text(steps=300)


@pytest.mark.parametrize(
    ("mine", "expected"),
    [
        ([1.0, 1.0, 1.0], []),
        ([2.0, 2.0, 2.0], [(0.0, math.inf)]),
        ([1.0, 1.1, 2.0], [(0.5, math.inf)]),
        ([1.1, 1.0, 1.0], [(0.0, 0.5)]),
        ([1.0, 1.1, 1.0], [(0.5, 1.5)]),
        ([1.1, 1.0, 1.1], [(0.0, 0.5), (1.5, math.inf)]),
    ],
)
def test_stretches_of_being_ahead(mine: list[float], expected: list[tuple[float, float]]) -> None:
    rows = [
        {"mode": mode, "latency": float(i), "rows": value}
        for mode, values in (("a", mine), ("b", [1.0] * 3))
        for i, value in enumerate(values)
    ]
    found = said.ahead(rows, "a", "b")
    assert [pytest.approx(pair) for pair in expected] == found


def test_the_pages(tmp_path) -> None:
    out = tmp_path / "s.json"
    argv = ["simulate", "--latencies", "0", "20ms", "--chains", "2", "--steps", "20", "--quiet"]
    assert cli.main([*argv, "--out", str(out)]) == 0
    report = load(out, "simulation")
    assert report["settings"]["link"]["bandwidth"] is None
    page = tmp_path / "s.html"
    assert cli.main(["report", str(out), "-o", str(page)]) == 0
    assert "<svg" in page.read_text(encoding="utf-8")


def test_json_is_all_of_stdout(capsys) -> None:
    argv = ["simulate", "--forward", "4ms", "--backward", "8ms", "--latencies", "0", "1ms"]
    argv += ["--chains", "2", "--modes", "dni", "1f1b", "--steps", "9", "--json"]
    assert cli.main([*argv, "--jitter", "10%", "--fail-every", "2h"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["settings"]["times"]["forward"] == [0.004]
    assert report["settings"]["link"]["jitter_share"] == 0.1
    assert report["settings"]["failures"]["every"] == 7200.0


# ------------------------------------------------------------------------ held against measured


def test_compare_says_the_deviation(tmp_path, capsys) -> None:
    times = {"forward": F, "backward": B}
    true = 1.0 / (2 * (F + B) + 2 * 0.01)
    rows = [
        {"mode": "1f1b", "stages": 2, "latency_s": 0.01, "steps_per_second": rate,
         "microbatches": 1, "times": times}
        for rate in (true, true / 1.5)
    ]  # fmt: skip
    found = compare(rows)
    assert [row["deviation"] for row in found] == pytest.approx([0.0, 0.5], abs=1e-6)
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({"rows": rows}), encoding="utf-8")
    argv = ["simulate", "--latencies", "0", "--chains", "2", "--modes", "dni", "--steps", "9"]
    assert cli.main([*argv, "--check", str(path), "--quiet"]) == 0
    assert "1 of 2 rows agree within 20 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "1f1"}, "measured row 1: unknown mode '1f1', did you mean '1f1b'"),
        ({"stages": 0}, "stages must be a whole number from 1"),
        ({"steps_per_second": 0}, "steps_per_second must be a positive"),
        ({"latency_s": None}, "measured row 1:"),
        ({"windows": 3}, "unknown name 'windows', did you mean 'window'"),
        ({"times": {"forward": 1.0}}, "times must be an object with forward and backward"),
        ({"times": {"forward": [1.0, 1.0, 1.0], "backward": 1.0}}, "one number or 2, got 3"),
        ({"buffer": 0}, "buffer must be a whole number from 1"),
    ],
)
def test_measured_rows_that_are_none(changes: dict[str, Any], message: str) -> None:
    row = {"mode": "1f1b", "stages": 2, "latency_s": 0.01, "steps_per_second": 1.0, **changes}
    with pytest.raises(ValueError, match="^measured row 1: ") as error:
        compare([row])
    assert message in str(error.value)


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--forward", "4"], "argument --forward: forward must be a number from 0 on and its unit"),
        (["--forward", "4parsec"], "like 4ms; units are ns, us"),
        (["--forward", "4ms"], "--backward is missing"),
        (["--forward", "0", "--backward", "1ms"], "--forward must be from 1e-09"),
        (["--forward", "1ms", "--backward", "1ms", "--weight", "2ms"], "weight is a part of"),
        (["--bandwidth", "10GB"], "like 10Gbit/s"),
        (["--forward-bytes=-3MB"], "got '-3MB'"),
        (["--jitter", "x%"], "a share like 10%"),
        (["--straggler-share", "120%"], "from 0% to 100%"),
        (["--straggler-factor", "0.5"], "straggler-factor must be a finite number from 1 on"),
        (["--straggler-stage", "2", "--straggler-factor", "2", "--stages", "2"], "must be one of"),
        (["--target-every", "never"], "--modes local"),
        (["--modes", "gpip"], "unknown mode 'gpip', did you mean 'gpipe'"),
        (["--stages", "20000"], "stages must be from 1 to 10000"),
        (["--latencies", "40h"], "latencies must be from 0 to 100000 seconds"),
        (["--measure", "linear"], "measure must be package.module:factory"),
        (["--measure", "torch:get_num_threads"], "must return (stages, batch, loss), got int"),
        (["--measure", "a:b", "--lesson", "1ms"], "--lesson does not go with --measure"),
        (["--check", "/no/such/file"], "cannot read /no/such/file"),
    ],
)
def test_bad_input_is_one_line(capsys, argv: list[str], message: str) -> None:
    assert cli.main(["simulate", *argv, "--quiet"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize(
    "make",
    [
        lambda: Times.of(-1.0, 1.0),
        lambda: Times.of(math.nan, 1.0),
        lambda: Times.of([1.0, 1.0], [1.0, 1.0, 1.0]),
        lambda: Times.of(1.0, [1.0, 1.0], lesson=[1.0, 1.0, 1.0]),
        lambda: Link(-1.0),
        lambda: Link(bandwidth=0.0),
        lambda: Link(shape="normal"),
        lambda: Stragglers(0.5),
        lambda: Failures(every=0.0),
        lambda: Settings(buffer=0),
        lambda: Settings(seed=-1),
        lambda: simulate("dnj", []),
        lambda: sweep(Settings(), modes=()),
    ],
)
def test_numbers_out_of_range_are_refused(make: Any) -> None:
    with pytest.raises(ValueError):
        make()


# ---------------------------------------------------------------------------------- calibration


def test_stages_are_measured_one_by_one() -> None:
    from fused_dni.measure.simulate.calibrate import calibrate

    stages = [nn.Sequential(nn.Linear(8, 16), nn.ReLU()), nn.Linear(16, 3)]
    before = [p.clone() for stage in stages for p in stage.parameters()]

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(5, 8), torch.randint(0, 3, (5,))

    found = calibrate((stages, batch, nn.functional.cross_entropy), "here", seconds=0.01)
    assert len(found.times.forward) == 2 and len(found.times.dni) == 2
    assert found.rows == 5 and found.forward_bytes == 5 * 16 * 4
    assert found.parameter_bytes == 4 * (8 * 16 + 16 + 16 * 3 + 3) / 2
    assert min(found.times.forward + found.times.backward + found.times.dni) > 0.0
    assert all(
        torch.equal(p, was)
        for p, was in zip((p for s in stages for p in s.parameters()), before, strict=True)
    )
    rows = simulate("dni", [Case(2, Settings(times=found.times, steps=8))])
    assert rows[0]["rate"] > 0.0
    assert set(found.timings[0]) - set(found.timings[1]) >= {"dni", "lesson", "dni with target"}


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda s, b, lo: s, r"must return \(stages, batch, loss\)"),
        (lambda s, b, lo: ([], b, lo), "must be a list of modules"),
        (lambda s, b, lo: ([nn.ReLU()], b, lo), "stage 0 of here has no trainable parameters"),
        (lambda s, b, lo: (s[::-1], b, lo), "stage 0 of here fails"),
        (lambda s, b, lo: (s, lambda: 3, lo), "batch"),
        (lambda s, b, lo: (s, b, 3), "must be functions"),
    ],
)
def test_factories_that_return_something_else(made: Any, message: str) -> None:
    from fused_dni.measure.simulate.calibrate import calibrate

    stages = [nn.Linear(8, 16), nn.Linear(16, 3)]

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(5, 8), torch.randint(0, 3, (5,))

    with pytest.raises(ValueError, match=message):
        calibrate(made(stages, batch, nn.functional.cross_entropy), "here", seconds=0.01)


def test_report_and_check_mean_the_same_agreement() -> None:
    assert said.AGREEMENT == check.AGREEMENT
