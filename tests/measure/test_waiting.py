"""The stopwatch: what a busy machine adds to a time is taken off, and nothing else."""

import os
import threading

import pytest

from fused_dni.measure.waiting import Stopwatch


class _Machine:
    """A clock and a counter of waits that a test turns by hand."""

    def __init__(self) -> None:
        self.now = 100.0
        self.waits = 3.0
        self.asked = 0
        self.beside = {}  # waits that fall beside the n-th question

    def clock(self) -> float:
        return self.now

    def run(self, seconds: float, waiting: float = 0.0):
        def call() -> None:
            self.now += seconds + waiting
            self.waits += waiting

        return call

    def count(self) -> float:
        self.asked += 1
        found = self.waits
        waiting = self.beside.get(self.asked, 0.0)
        self.now += waiting
        self.waits += waiting
        return found


@pytest.fixture
def machine(monkeypatch) -> _Machine:
    made = _Machine()
    monkeypatch.setattr(Stopwatch, "_waits", lambda self: made.count())
    return made


def test_waiting_for_a_core_is_taken_off(machine):
    watch = Stopwatch(machine.clock)
    before = watch.waited
    assert watch.time(machine.run(0.5)) == pytest.approx(0.5)
    assert watch.waited == before
    assert watch.time(machine.run(0.5, waiting=0.25)) == pytest.approx(0.5)
    assert watch.waited - before == pytest.approx(0.25)


def test_a_wait_beside_the_call_is_not_taken_off_it(machine):
    watch = Stopwatch(machine.clock)
    machine.beside = {machine.asked + 1: 0.1}  # after the counter was read, before the call
    assert watch.time(machine.run(0.5, waiting=0.25)) == pytest.approx(0.5)
    assert watch.waited == pytest.approx(0.25)


def test_a_time_is_never_negative(machine):
    watch = Stopwatch(machine.clock)
    before = machine.waits
    assert watch.time(lambda: setattr(machine, "waits", before + 9.0)) == 0.0


def test_without_the_systems_counter_it_is_the_clock(monkeypatch):
    def absent(*arguments):
        raise FileNotFoundError(arguments[0])

    monkeypatch.setattr(os, "open", absent)
    machine = _Machine()
    watch = Stopwatch(machine.clock)
    assert watch.time(machine.run(0.5, waiting=0.25)) == pytest.approx(0.75)
    watch.close()


@pytest.mark.skipif(
    not os.path.exists("/proc/thread-self/schedstat"), reason="no schedstat on this system"
)
def test_sleeping_is_not_waiting_for_a_core():
    """What the thread waits for itself is part of its time."""
    watch = Stopwatch()
    assert watch.time(lambda: threading.Event().wait(0.02)) >= 0.01
    watch.close()
