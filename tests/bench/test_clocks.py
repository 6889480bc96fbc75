"""The benchmarks' clock, warm and cold, and what ``pytest bench`` writes. Nothing is timed that
decides a test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import clocks
from clocks import Clock
from fused_dni.measure.compare import compare, read

ROOT = Path(__file__).resolve().parents[2]


class Host:
    """A host on which time passes when a candidate runs or a buffer is written, and then alone; it
    is the stopwatch too."""

    def __init__(self, monkeypatch):
        self.now, self.done = 0.0, []
        monkeypatch.setattr(clocks, "_evict", lambda device: self.do("evict", 5.0))

    def do(self, what, seconds):
        self.now += seconds
        self.done.append(what)

    def time(self, run):
        start = self.now
        run()
        return self.now - start

    def call(self):
        self.do("call", 1.0 if "call" in self.done else 3.0)  # the first is the slowest


def test_a_warm_sample_is_the_mean_of_calls_behind_one_that_does_not_count(monkeypatch):
    host = Host(monkeypatch)
    clock = Clock(host)
    clock.measure(host.call, "cpu", repeats=4)
    assert host.done == ["call"] * 5
    assert clock.now() == 1.0
    host.do("something else", 100.0)
    assert clock.now() == 1.0


def test_a_cold_sample_is_one_call_behind_an_eviction_that_does_not_count(monkeypatch):
    host = Host(monkeypatch)
    clock = Clock(host)
    clock.measure(host.call, "cpu", cold=True)
    assert host.done == ["evict", "call"]
    assert clock.now() == 3.0
    with pytest.raises(ValueError, match="only the first of 2 calls"):
        clock.measure(host.call, "cpu", repeats=2, cold=True)


@pytest.mark.parametrize("cold", [False, True])
def test_on_a_gpu_events_stand_around_the_calls_that_count(monkeypatch, cold):
    """In the order in which the stream sees them, with one wait, at the end."""
    stream = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            stream.append(self)

        def synchronize(self):
            stream.append("wait")

        def elapsed_time(self, end):
            between = stream[stream.index(self) + 1 : stream.index(end)]
            return 2e3 * between.count("call")  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(clocks, "_evict", lambda device: stream.append(f"evict {device}"))
    clock = Clock(watch=None)
    clock.measure(lambda: stream.append("call"), "cuda", 1 if cold else 3, cold)
    kinds = ["event" if isinstance(item, Event) else item for item in stream]
    counted = ["event", *["call"] * (1 if cold else 3), "event", "wait"]
    assert kinds == ["evict cuda" if cold else "call", *counted]
    assert clock.now() == 2.0


def test_short_calls_are_repeated(monkeypatch):
    host = Host(monkeypatch)
    clock = Clock(host)
    assert clock.repeats(lambda: host.do("call", clocks.MIN_SAMPLE / 50), "cpu") == 50
    assert clock.repeats(lambda: host.do("call", 1.0), "cpu") == 1


def test_the_last_cache_is_the_largest(tmp_path, monkeypatch):
    for index, size in enumerate(("32K", "1024K", "3M\n")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size)
    monkeypatch.setattr(clocks, "CACHES", tmp_path)
    assert clocks.last_cache("cpu") == 3 << 20
    monkeypatch.setattr(clocks, "CACHES", tmp_path / "nowhere")
    assert clocks.last_cache("cpu") == clocks.UNTOLD


def test_eviction_writes_twice_the_last_cache(monkeypatch):
    monkeypatch.setattr(clocks, "last_cache", lambda device: 1 << 12)
    clocks._buffer.cache_clear()
    try:
        clocks._evict("cpu")
        clocks._evict("cpu")
        buffer = clocks._buffer("cpu")
        assert buffer.numel() * buffer.element_size() == 1 << 13
        assert bool((buffer == 2).all())
    finally:
        clocks._buffer.cache_clear()


def bench(*given):
    """``pytest bench``, on the floor of one layer's step."""
    # Where processes share the tests, pytest-benchmark would see that and not measure.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    one = ("-k", "bench_layer_floor and 64x256x256 and no_dx", "-q", "-p", "no:cacheprovider")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench/suites/bench_linear.py", *one, *map(str, given)],
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_bench_writes_can_be_compared(tmp_path):
    """Both kinds of caches, groups named by their question, enough rounds, and the machine."""
    path = tmp_path / "bench.json"
    limits = ("--benchmark-max-time", "1e-3", "--caches", "both")
    bench("--benchmark-only", *limits, "--benchmark-json", path)
    question = "Is a layer's step cheaper by DNI? 64x256x256, without dx"
    found = json.loads(path.read_text())
    assert found["machine_info"]["fused_dni"]["torch"] == torch.__version__
    assert {b["extra_info"]["caches"]: b["group"] for b in found["benchmarks"]} == {
        "warm": question,
        "cold": f"{question}, cold caches",
    }
    assert all(len(b["stats"]["data"]) >= 8 for b in found["benchmarks"])
    results = read(path)
    assert [row["verdict"] for row in compare(results, results)["rows"]] == ["inconclusive"] * 2
