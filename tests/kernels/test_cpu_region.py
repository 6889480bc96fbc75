"""The CPU's parallel region (csrc/cpu/region.cpp): a model of how shares are claimed, every
interleaving of which is looked at, and the region itself under threads that sleep.

In the model threads of the system go through the phases of a region; each step is one atomic
operation. Of memory each thread knows, by logical thread, how many of its shares it has seen the
effects of: what it has run itself, and what it acquired from a word to which somebody released. A
share must know all of the phases before it, its own fiber's stack among them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
Known = tuple[int, ...]


class Thread(NamedTuple):
    """Where a thread of the system is: its next step, the phase it saw, whose share is next."""

    known: Known
    step: str = "look"
    phase: int = 0
    turn: int = 0


class State(NamedTuple):
    phase: int
    through: int
    left: int
    sleepers: int
    begun: tuple[int, ...]
    done: tuple[int, ...]
    at_phase: Known  # what was released to the word of that name
    at_through: Known
    threads: tuple[Thread, ...]


def explore(threads: int, shares: int, phases: int, without: str = "") -> tuple[set[str], int]:
    """Visit all states of a region; return what is wrong, and how many states there are.

    ``without`` leaves out what makes it right: "acquire" at the phase, "release" at a share's end,
    the "exchange" that claims (a look and then a store), the "order" of a wake-up (who sleeps is
    looked at before the phase is changed).
    """
    nothing = (0,) * shares
    start = State(*(0, 0, 0, 0, nothing, nothing, nothing, nothing), (Thread(nothing),) * threads)
    wrong: set[str] = set()

    def both(a: Known, b: Known) -> Known:
        return tuple(map(max, a, b))

    def put(values: tuple[int, ...], at: int, value: int) -> tuple[int, ...]:
        return (*values[:at], value, *values[at + 1 :])

    def steps(s: State, number: int) -> Iterator[State]:
        """All that thread ``number`` may do next."""
        t = s.threads[number]
        own = (number + t.turn) % shares

        def to(step: str, turn: int = t.turn, known: Known = t.known, **changed: object) -> State:
            made = t._replace(step=step, turn=turn, known=known)
            mine = (*s.threads[:number], made, *s.threads[number + 1 :])
            return s._replace(**{"threads": mine, **changed})  # type: ignore[arg-type]

        def woken(made: State, word: str) -> State:
            up = tuple(
                w._replace(step=f"check {word}") if w.step == f"asleep {word}" else w
                for w in made.threads
            )
            return made._replace(threads=up)

        if t.step == "look":
            known = t.known if without == "acquire" else both(t.known, s.at_phase)
            over = s.phase == phases  # the first share says so before it ends, for the last time
            made = to("leave" if over else "claim", 0, known)
            threads_ = put_thread(made.threads, number, phase=s.phase)
            yield made._replace(threads=threads_)
        elif t.step == "claim":
            following = to("claim", t.turn + 1) if t.turn + 1 < shares else to("wait")
            if t.turn == 1 and s.phase != t.phase:  # it looks, for a while, before it helps
                yield to("look")
            if s.begun[own] != t.phase:
                yield following
            elif without == "exchange":
                yield to("store")
            else:
                yield to("run", begun=put(s.begun, own, t.phase + 1))
        elif t.step == "store":
            yield to("run", begun=put(s.begun, own, t.phase + 1))
        elif t.step == "run":
            if min(t.known) < t.phase:
                wrong.add("unseen")
            if s.done[own] != t.phase or min(s.done) < t.phase:
                wrong.add("twice or too early")
            made_known = put(t.known, own, t.phase + 1)
            yield to("arrive", known=made_known, done=put(s.done, own, s.done[own] + 1))
        elif t.step == "arrive":
            known = both(t.known, s.at_through)
            released = s.at_through if without == "release" else known
            last = s.through + 1 == shares
            following = "claim" if t.turn + 1 < shares else "wait"
            yield to(
                "reset" if last else following,
                t.turn if last else t.turn + 1,
                known,
                through=s.through + 1,
                at_through=released,
            )
        elif t.step == "reset":
            step = "count" if without == "order" else "publish"
            yield to(step, through=0, at_through=nothing)
        elif t.step == "publish":
            step = "count" if without != "order" else "look"
            yield to(step, phase=s.phase + 1, at_phase=t.known)
        elif t.step == "count":  # whether anybody sleeps
            after = "publish" if without == "order" else "look"
            yield woken(to(after), "phase") if s.sleepers else to(after)
        elif t.step == "wait":
            yield to("look") if s.phase != t.phase else to("check phase", sleepers=s.sleepers + 1)
        elif t.step == "check phase":
            yield to("up") if s.phase != t.phase else to("futex phase")
        elif t.step == "futex phase":
            yield to("check phase") if s.phase != t.phase else to("asleep phase")
        elif t.step == "up":
            yield to("look", sleepers=s.sleepers - 1)
        elif t.step == "leave":
            if min(s.done) < phases:
                wrong.add("left too early")
            if number:  # the caller waits for the others
                yield to("count left", left=s.left + 1)
            elif s.left == threads - 1:
                yield to("ended")
            else:
                yield to("check left", s.left, sleepers=s.sleepers + 1)
        elif t.step == "count left":
            yield woken(to("ended"), "left") if s.sleepers else to("ended")
        elif t.step == "check left":
            gone = s.left != t.turn
            yield to("leave", sleepers=s.sleepers - 1) if gone else to("futex left")
        elif t.step == "futex left":
            yield to("check left") if s.left != t.turn else to("asleep left")

    def put_thread(all_: tuple[Thread, ...], number: int, phase: int) -> tuple[Thread, ...]:
        return (*all_[:number], all_[number]._replace(phase=phase), *all_[number + 1 :])

    seen, ahead = {start}, [start]
    while ahead:
        state = ahead.pop()
        found = [made for number in range(threads) for made in steps(state, number)]
        if not found and any(t.step != "ended" for t in state.threads):
            wrong.add("for ever")
        for made in found:
            if made not in seen:
                seen.add(made)
                ahead.append(made)
    return wrong, len(seen)


@pytest.mark.parametrize(
    ("threads", "shares", "phases"),
    [(1, 2, 2), (2, 2, 1), (2, 2, 3), (2, 3, 2), (3, 3, 1), (3, 2, 2)],
)
def test_every_share_once_and_in_its_phase(threads: int, shares: int, phases: int) -> None:
    wrong, states = explore(threads, shares, phases)
    assert not wrong
    assert states > 10


@pytest.mark.parametrize(
    ("without", "wrong"),
    [
        ("acquire", "unseen"),
        ("release", "unseen"),
        ("exchange", "twice or too early"),
        ("order", "for ever"),
    ],
)
def test_what_makes_it_right_is_needed(without: str, wrong: str) -> None:
    assert wrong in explore(2, 2, 2, without)[0]


# -------------------------------------------------------------------------------- the region itself


@pytest.fixture(scope="module", params=["", "-DFUSED_DNI_NO_SWITCH"], ids=["fibers", "threads"])
def stress(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = str(tmp_path_factory.mktemp("region") / "stress")
    sources = [ROOT / "csrc/cpu/region.cpp", ROOT / "tests/support/region_stress.cpp"]
    flags = ["-std=c++17", "-O2", "-fopenmp", "-Wall", "-Wextra", "-Werror"]
    flags += [request.param] if request.param else []
    command = [*compiler.split(), *flags, *map(str, sources), "-o", program]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return [program]


def counts(stress: list[str], *words: object) -> dict[str, int]:
    done = subprocess.run([*stress, *map(str, words)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: int(n) for name, n in (pair.split() for pair in done.stdout.split(", "))}


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_shares_that_sleep(stress: list[str], threads: int, request: pytest.FixtureRequest) -> None:
    found = counts(stress, threads, 15, 150, threads)
    assert (found["taken"] > 0) == ("fibers" in request.node.callspec.id)


def test_alone_where_others_cost_more_than_they_do(
    stress: list[str], request: pytest.FixtureRequest
) -> None:
    found = counts(stress, 2, 4, 50, "absent")
    assert (found["alone"] > 10) == ("fibers" in request.node.callspec.id)


def test_no_memory_for_stacks_is_an_exception(
    stress: list[str], request: pytest.FixtureRequest
) -> None:
    if "fibers" not in request.node.callspec.id:
        pytest.skip("there are none")
    assert counts(stress, 3, 15, 1, "memory") == {"said": 1}
