"""The grid barrier of kernels/common.py: a model of it, every interleaving of which is looked at.

The model is of programs that meet in some rounds. In each, a program writes a cell of its own,
goes through the barrier, and reads all other programs' cells, which have to be of this round or of
a later one. Every step of one program (its write reaching the others, one atomic operation, the
start of a program on a free slot) is a transition of its own; polls that fail change nothing and
are left out. :func:`explore` visits every state that can be reached and reports

* programs that leave a round before all have arrived, or read a cell of an earlier round;
* dead ends: states that no program can leave, though not all have ended;
* lost wake-ups: a poll that would have let its program go, and after somebody else's step does not;
* where programs lose patience: rounds that some pass and some give up.

A program that has lost patience may do so at any of its polls: how long it waits is not modelled.
Every transition moves one program on through its finitely many steps, so no run is infinite but
for failing polls. Without dead ends the end can therefore be reached from every state, and without
lost wake-ups it *is* reached, as long as every program gets its turn now and then.

The model has one thread a program. That the one thread whose atomic it is speaks for its block (the
block's barriers around it) is looked at in the machine code: test_triton_compiled.py.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from fused_dni.kernels import common
from fused_dni.kernels.barrier import RECORD, GridBarrier, wait_for_all
from fused_dni.kernels.common import grid_barrier

TOP = 1 << 31
OVER = ("ended", "gave up")
WORD = (1 << 32) - 1  # sums wrap around as an int32's do


class Program(NamedTuple):
    """Where a program is: its round, its next step, and what its arrival found in the word."""

    round: int = 0
    step: str = "start"  # write, arrive, poll and what a barrier adds, left, ended, gave up
    before: int = 0

    def written(self) -> int:
        """How many rounds it has written its cell for."""
        return self.round + (self.step not in ("start", "write", "ended"))

    def arrived(self) -> int:
        """How many rounds it has arrived in."""
        return self.round + (self.step not in ("start", "write", "arrive", "ended"))

    def passed(self) -> int:
        """How many rounds it has left."""
        return self.round + (self.step == "left")


class State(NamedTuple):
    """All that there is: the word, for each program the rounds of its cell that others can see, and
    the programs."""

    word: int
    visible: tuple[int, ...]
    programs: tuple[Program, ...]


# A program's step in the barrier: of (step, before, word, index, programs) it makes (step, before,
# word), what comes next and what there is then. A poll that fails is followed by a poll.
Step = tuple[str, int, int]
Barrier = Callable[[str, int, int, int, int], Step]


def arrival(index: int, programs: int) -> int:
    """What program ``index`` adds to the word."""
    return (TOP - 2 * (programs - 1) if index == 0 else 2) & WORD


def generations(step: str, before: int, word: int, index: int, programs: int) -> Step:
    """The barrier of kernels/common.py."""
    if step == "arrive":
        return ("gave up" if word & 1 else "poll"), word, (word + arrival(index, programs)) & WORD
    if step == "give up":  # as if the word were looked at and changed at a time: else it fails
        return "poll", before, (word & TOP) | 1
    if (word ^ before) & TOP:
        return "left", before, word
    return ("gave up" if word & 1 else "poll"), before, word


@dataclass
class Report:
    """What :func:`explore` found."""

    states: int = 0
    words: set[int] = field(default_factory=set)  # the word in states where all have ended
    early: list[State] = field(default_factory=list)
    stale: list[State] = field(default_factory=list)
    dead_ends: list[State] = field(default_factory=list)
    lost_wakeups: list[State] = field(default_factory=list)
    disagreements: list[State] = field(default_factory=list)

    def clean(self) -> bool:
        found = (self.early, self.stale, self.dead_ends, self.lost_wakeups, self.disagreements)
        return not any(found)


def explore(
    barrier: Barrier,
    programs: int,
    rounds: int,
    *,
    word: int = 0,
    slots: int | None = None,
    release: bool = True,
    acquire: bool = True,
    patient: bool = True,
) -> Report:
    """Visit all states of ``programs`` that meet ``rounds`` times.

    Args:
        barrier: its steps.
        word: what the launch before left in it.
        slots: how many programs can be resident at a time; all by default. A program that starts
            keeps its slot until it ends.
        release: an arrival makes the program's write visible before the word changes. Otherwise the
            write becomes visible at some time or other.
        acquire: cells are read behind the wait. Otherwise reads may be carried out in front of it.
        patient: programs wait for ever. Otherwise each may lose patience whenever it has to wait.
    """
    slots = programs if slots is None else slots
    report = Report()

    def steps(s: State) -> Iterator[tuple[int, State]]:
        """All that can happen next, and in which program."""
        free = slots - sum(p.step not in ("start", *OVER) for p in s.programs)
        for i, p in enumerate(s.programs):
            visible, word = s.visible, s.word
            if visible[i] < p.written():
                yield i, s._replace(visible=publish(visible, i, p.written()))
            if p.step == "start":
                if not free:
                    continue
                p = p._replace(step="write")
            elif p.step == "write":
                p = p._replace(step="arrive")
            elif p.step == "left":
                p = Program(p.round + 1, "write" if p.round + 1 < rounds else "ended")
            elif p.step not in OVER:
                step, before, word = barrier(p.step, p.before, word, i, programs)
                if step == p.step:  # a poll that failed
                    if patient:
                        continue
                    step, before, word = barrier("give up", before, word, i, programs)
                if p.step == "arrive" and release:
                    visible = publish(visible, i, p.written())
                p = p._replace(step=step, before=before)
            else:
                continue
            moved = (*s.programs[:i], p, *s.programs[i + 1 :])
            yield i, State(word, visible, moved)

    def check(s: State, i: int, t: State) -> None:
        """What program ``i`` may not have done between states s and t."""
        p, q = s.programs[i], t.programs[i]
        leaves = p.step != "left" and q.step == "left"
        if leaves and min(o.arrived() for o in t.programs) <= q.round:
            report.early.append(t)
        reads = leaves if acquire else p.step == "arrive" and q.step == "poll"
        if reads and min((*t.visible[:i], *t.visible[i + 1 :], rounds)) <= q.round:
            report.stale.append(t)
        for j, o in enumerate(s.programs):
            if j != i and o.step == "poll":
                was, now = (barrier("poll", o.before, x.word, j, programs)[0] for x in (s, t))
                if was != "poll" and now == "poll":
                    report.lost_wakeups.append(t)

    first = State(word, (0,) * programs, (Program(),) * programs)
    seen, todo = {first}, [first]
    while todo:
        state = todo.pop()
        following = list(steps(state))
        for i, t in following:
            check(state, i, t)
            if t not in seen:
                seen.add(t)
                todo.append(t)
        lost = [p.round for p in state.programs if p.step == "gave up"]
        if lost and max(p.passed() for p in state.programs) > min(lost):
            report.disagreements.append(state)
        if all(p.step in OVER for p in state.programs):
            report.words.add(state.word)
        elif not following:
            report.dead_ends.append(state)
    report.states = len(seen)
    return report


def publish(visible: tuple[int, ...], index: int, round: int) -> tuple[int, ...]:
    return (*visible[:index], round, *visible[index + 1 :])


# ---------------------------------------------------------------------------------------------
# The barrier as it is


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("programs", [1, 2, 3, 4])
def test_all_pass_and_none_too_early(programs: int, rounds: int) -> None:
    report = explore(generations, programs, rounds)
    assert report.clean(), report
    assert report.words == {TOP * (rounds % 2)}
    # At least the states in which one program is somewhere and the others have not begun.
    assert report.states > 4 * programs * rounds


def test_next_launch_starts_where_the_last_one_ended() -> None:
    word = 0
    for programs, rounds in ((3, 1), (2, 3), (4, 1), (1, 2), (3, 3)):
        report = explore(generations, programs, rounds, word=word)
        assert report.clean(), report
        (word,) = report.words
        assert word & (TOP - 1) == 0
    assert word == 0  # ten rounds


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_more_programs_than_slots_hang(slots: int) -> None:
    """Why launches are cooperative, and grids no larger than what is resident at a time."""
    report = explore(generations, 3, 2, slots=slots)
    assert report.clean() == (slots >= 3)
    assert bool(report.words) == (slots >= 3)  # too few never come to an end
    for state in report.dead_ends:
        assert sorted(p.step for p in state.programs) == ["poll"] * slots + ["start"] * (3 - slots)


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("programs", [1, 2, 3, 4])
def test_a_barrier_is_passed_by_all_or_given_up_by_all(programs: int, rounds: int) -> None:
    """Whenever who loses patience, also where somebody is late or never comes."""
    for slots in range(1, programs + 1):
        report = explore(generations, programs, rounds, slots=slots, patient=False)
        assert report.clean(), report
        given_up = {word for word in report.words if word & 1}
        assert bool(given_up) == (programs > 1)
        # What was given up stays so: the next launch does not wait, and passes nothing.
        for word in given_up:
            after = explore(generations, programs, 1, word=word, slots=1)
            assert after.clean() and all(w & 1 for w in after.words)


# ---------------------------------------------------------------------------------------------
# Barriers that are not: each is caught, and for what it is


def counts_and_resets(step: str, before: int, word: int, index: int, programs: int) -> Step:
    """Wait until the counter shows all programs; the last one sets it back to zero."""
    if step == "arrive":
        return ("reset" if word + 1 == programs else "poll"), before, word + 1
    if step == "reset":
        return "left", before, 0
    return ("left" if word == programs else "poll"), before, word


def waits_for_zero(step: str, before: int, word: int, index: int, programs: int) -> Step:
    """The last one sets the counter back as it arrives, and the others wait for that zero."""
    if step == "arrive":
        return ("left", before, 0) if word + 1 == programs else ("poll", before, word + 1)
    return ("left" if word == 0 else "poll"), before, word


def nobody_completes(step: str, before: int, word: int, index: int, programs: int) -> Step:
    """Program 0 arrives like any other."""
    if step == "arrive":
        return "poll", word, word + 2
    return generations(step, before, word, index, programs)


def forgets_generation(step: str, before: int, word: int, index: int, programs: int) -> Step:
    """Wait for the top bit, whatever it was on arrival."""
    if step == "arrive":
        return generations(step, before, word, index, programs)
    return ("left" if word & TOP else "poll"), before, word


def keeps_the_count(step: str, before: int, word: int, index: int, programs: int) -> Step:
    """Only set the bit: who is still to come completes the generation."""
    if step == "give up":
        return "poll", before, word | 1
    return generations(step, before, word, index, programs)


def looks_before(step: str, before: int, word: int, index: int, programs: int) -> Step:
    """Give up by what was seen before: whoever arrived meanwhile is not noticed."""
    if step == "give up":
        return "set", before, word
    if step == "set":
        return "gave up", before, (word & TOP) | 1
    return generations(step, before, word, index, programs)


def goes_silently(step: str, before: int, word: int, index: int, programs: int) -> Step:
    """Stop waiting, and tell nobody."""
    return ("gave up", before, word) if step == "give up" else generations(
        step, before, word, index, programs
    )  # fmt: skip


@pytest.mark.parametrize("barrier", [keeps_the_count, looks_before, goes_silently])
@pytest.mark.parametrize("programs", [2, 3])
def test_giving_up_alone_is_seen(barrier: Barrier, programs: int) -> None:
    assert explore(barrier, programs, 2).clean()
    assert explore(barrier, programs, 2, patient=False).disagreements


@pytest.mark.parametrize("programs", [2, 3])
def test_counter_without_generation_loses_wakeups(programs: int) -> None:
    report = explore(counts_and_resets, programs, 1)
    assert report.lost_wakeups and report.dead_ends
    assert not report.early and not report.stale
    assert explore(waits_for_zero, programs, 1).clean()  # until it is used again
    report = explore(waits_for_zero, programs, 2)
    assert report.lost_wakeups and report.dead_ends


@pytest.mark.parametrize("programs", [1, 2, 3])
def test_missing_completion_hangs(programs: int) -> None:
    report = explore(nobody_completes, programs, 1)
    assert report.dead_ends and not report.words


@pytest.mark.parametrize("programs", [2, 3])
def test_forgotten_generation_passes_too_early(programs: int) -> None:
    assert explore(forgets_generation, programs, 1).clean()
    assert explore(forgets_generation, programs, 2).early


@pytest.mark.parametrize("order", ["release", "acquire"])
def test_missing_order_reads_stale_data(order: str) -> None:
    report = explore(generations, 2, 2, **{order: False})
    assert report.stale
    assert not report.early and not report.dead_ends and not report.lost_wakeups


# ---------------------------------------------------------------------------------------------
# The model against the device function


@pytest.mark.parametrize("programs", [1, 2, 3, 4, 5, 132, 2**16, 2**30 - 1])
def test_only_the_last_arrival_changes_the_generation(programs: int) -> None:
    """For grids that are too large to explore: no sum of some arrivals reaches the top bit."""
    others = programs - 1  # all alike
    for generation in (0, TOP):
        for here in sorted({0, min(1, others), max(others - 1, 0), others}):  # of the others
            word = generation + here * arrival(1, programs)
            assert (word ^ generation) & TOP == 0
            word = (word + arrival(0, programs)) & WORD
            assert ((word ^ generation) & TOP != 0) == (here == others)
        assert word == generation ^ TOP
        # Nor does it where the count was set back to zero by a program that had come.
        for late in range(2):  # program 0 among those to come, or not
            word = (generation | 1) + max(others - late, 0) * arrival(1, programs)
            word = (word + late * arrival(0, programs)) & WORD
            assert (word ^ generation) & TOP == 0 or others == 0
            assert word & 1


def apart(*calls: Callable[[], object]) -> None:
    """Run all at a time, each in a process of its own: one that hangs is a failure."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=call, daemon=True) for call in calls]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(60)
            assert process.exitcode is not None, "a program waits for ever"
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()


def as_int32(word: int) -> int:
    return word - (1 << 32) if word & TOP else word


@triton.jit
def _arrive_kernel(state, programs, INDEX: tl.constexpr):
    """One program of many goes through the barrier."""
    if tl.program_id(0) == INDEX:
        grid_barrier(state, programs)


@triton.jit
def _meet_kernel(state, cells, stale, programs, ROUNDS: tl.constexpr, INDEX: tl.constexpr):
    """One program of the model: write, meet, read; counts the cells that were not up to date."""
    if tl.program_id(0) == INDEX:
        for done in range(ROUNDS):
            tl.store(cells + INDEX, done + 1)
            grid_barrier(state, programs)
            for other in range(programs):
                late = (tl.load(cells + other) <= done).to(tl.int32)
                tl.store(stale + INDEX, tl.load(stale + INDEX) + late)


interpreted = pytest.mark.skipif(
    not common.INTERPRETED, reason="runs in Triton's interpreter, TRITON_INTERPRET is not set"
)
may_fork = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@interpreted
@may_fork
def test_device_function_adds_what_the_model_adds() -> None:
    """As the last one to arrive, in both generations: the word then says what was added."""
    grids = (1, 2, 3, 132, 2**16, 2**30 - 1)
    cases = [(index, programs) for programs in grids for index in {0, 1, 5} if index < programs]
    words = [[as_int32((g - arrival(*case)) & WORD) for g in (TOP, 0)] for case in cases]
    state = torch.tensor(words, dtype=torch.int32).share_memory_()

    def arrive() -> None:
        for row, (index, programs) in zip(state, cases, strict=True):
            for word in row:
                _arrive_kernel[(index + 1,)](word, programs, index)

    apart(arrive)
    assert state.tolist() == [[as_int32(TOP), 0]] * len(cases)


@interpreted
@may_fork
def test_device_function_in_processes_that_meet() -> None:
    """The same function under real concurrency: a process a program, on shared memory."""
    programs, rounds = 3, 15
    state = torch.zeros((), dtype=torch.int32).share_memory_()
    cells = torch.zeros(programs, dtype=torch.int32).share_memory_()
    stale = torch.zeros(programs, dtype=torch.int32).share_memory_()

    def program(index: int) -> Callable[[], object]:
        return lambda: _meet_kernel[(index + 1,)](state, cells, stale, programs, rounds, index)

    apart(*[program(index) for index in range(programs)])
    assert cells.tolist() == [rounds] * programs
    assert stale.tolist() == [0] * programs
    assert state.item() == as_int32(TOP)  # an odd number of rounds


@triton.jit
def _patience_kernel(state, met, programs, bound, INDEX: tl.constexpr):
    """One program of many goes through the barrier, and says whether it passed."""
    if tl.program_id(0) == INDEX:
        tl.store(met + INDEX, grid_barrier(state, programs, bound).to(tl.int32))


@interpreted
def test_device_function_gives_up() -> None:
    """Where a program is missing; who comes late does not pass either, nor does a later launch."""
    for waiting, late in (((0, 1), 2), ((2, 1), 0)):
        for generation in (0, TOP):
            state = torch.tensor(as_int32(generation), dtype=torch.int32)
            met = torch.full((3,), -1, dtype=torch.int32)
            for index in waiting:
                _patience_kernel[(index + 1,)](state, met, 3, 5, index)
            assert state.item() & 1 and (state.item() ^ as_int32(generation)) & TOP == 0
            _patience_kernel[(late + 1,)](state, met, 3, 5, late)
            assert met.tolist() == [0, 0, 0]
            _patience_kernel[(1,)](state, met, 1, 0, 0)
            assert met.tolist() == [0, 0, 0]


@interpreted
@may_fork
def test_processes_agree_on_what_they_give_up() -> None:
    """Under real concurrency, with hardly any patience: all pass a round, or none does."""
    programs, rounds = 3, 40
    state = torch.zeros(rounds, dtype=torch.int32).share_memory_()
    met = torch.full((rounds, programs), -1, dtype=torch.int32).share_memory_()

    def program(index: int) -> Callable[[], object]:
        def run() -> None:
            for word, said in zip(state, met, strict=True):
                _patience_kernel[(index + 1,)](word, said, programs, 4, index)

        return run

    apart(*[program(index) for index in range(programs)])
    for said in met.tolist():
        assert said in ([0] * programs, [1] * programs)


@triton.jit
def _crowd_kernel(state, cells, stale, programs, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    """All programs of a grid: each writes BLOCK cells, meets, and reads those of its neighbour."""
    here = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = (tl.program_id(0) + 1) % programs * BLOCK + tl.arange(0, BLOCK)
    late = tl.zeros((BLOCK,), tl.int32)
    for done in range(ROUNDS):
        tl.store(cells + here, tl.full((BLOCK,), done + 1, tl.int32))
        grid_barrier(state, programs)
        late += (tl.load(cells + there) != done + 1).to(tl.int32)
        grid_barrier(state, programs)
    tl.store(stale + here, late)


@pytest.mark.gpu
def test_programs_of_a_gpu_meet() -> None:
    """A grid as large as the device, and the same word again for grids of other sizes."""
    programs = torch.cuda.get_device_properties(0).multi_processor_count
    block, rounds = 512, 1000
    state = torch.zeros((), dtype=torch.int32, device="cuda")
    for grid in (programs, 3, 1, programs // 2):
        cells = torch.zeros(grid * block, dtype=torch.int32, device="cuda")
        stale = torch.full_like(cells, -1)
        _crowd_kernel[(grid,)](
            state, cells, stale, grid, rounds, block, launch_cooperative_grid=True
        )
        assert not stale.any()
        assert (cells == rounds).all()
        assert state.item() & (TOP - 1) == 0


@triton.jit
def _waiting_kernel(where, met, programs):
    """All programs of a grid wait for as many, and say whether they came."""
    came = wait_for_all(where, 0, programs, 7, programs, 2, 3, 4)
    tl.store(met + tl.program_id(0), came.to(tl.int32))


def test_programs_give_up_and_leave_a_record() -> None:
    """Also on a GPU: in memory that the host reads, of the first launch that waited in vain."""
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    grid = torch.cuda.get_device_properties(0).multi_processor_count if on_gpu else 2
    options = {"launch_cooperative_grid": True} if on_gpu else {}
    record = torch.zeros(RECORD, dtype=torch.int32, pin_memory=on_gpu)
    state = torch.zeros(8, dtype=torch.int32, device=device)
    for expected in (grid + 1, grid):
        met = torch.full((grid,), -1, dtype=torch.int32, device=device)
        _waiting_kernel[(grid,)](GridBarrier(state, record, 100), met, expected, **options)
        assert met.tolist() == [0] * grid
        assert record.tolist() == [4, 7, grid + 1, 2, 3]
    assert state[0].item() & 1 and not state[1:].any()
