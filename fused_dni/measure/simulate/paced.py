"""Real pipelines whose stages sleep: what the model is held against, whatever the machine does.

Processes, messages, threads and waiting are those of :mod:`fused_dni.distributed` over loopback;
each stage's work is stretched to the settings' times by sleeping, so that few or busy cores stand
for one a stage, and the links' delay is a clock's
(:func:`fused_dni.distributed.delayed.delay_links`).
"""

from __future__ import annotations

import math
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fused_dni.distributed import Pipeline, Stage
from fused_dni.distributed.delayed import delay_links
from fused_dni.measure.simulate.modes import Case, simulate
from fused_dni.schedule import Schedule
from fused_dni.synthesizers import LinearSynthesizer

#: The simulation's name of each mode that there is a runtime for, and the runtime's. gpipe is of
#: one microbatch.
RUNTIME = {"gpipe": "exact", "stale": "stale", "dni": "decoupled", "local": "local"}
#: Processes at most.
MOST = 16
#: Steps at least, and at most.
STEPS = (6, 400)
#: Seconds until processes are there, and for which one may be silent in a step.
PATIENCE = 120.0


class Asked(NamedTuple):
    """A run: a mode of the simulation, its case, and how many steps of it count.

    Attributes:
        mode: of :data:`RUNTIME`.
        case: stages and settings.
        window: messages under way over a link.
        oldest: of mode stale, steps after which it waits.
        uncounted, steps: of the run.
    """

    mode: str
    case: Case
    window: int
    oldest: int
    uncounted: int
    steps: int


def asked(mode: str, case: Case, seconds: float) -> Asked:
    """Choose windows that do not bind, and as many steps as take about so long.

    Raises:
        ValueError: a mode without a runtime, or more stages than :data:`MOST`.
    """
    if mode not in RUNTIME:
        raise ValueError(f"mode must be one of {list(RUNTIME)}, got {mode!r}")
    if not 2 <= case.stages <= MOST:
        raise ValueError(f"stages must be from 2 to {MOST}, got {case.stages!r}")
    case = _as_run(mode, case)
    (row,) = simulate(mode, [case])
    step, settings = 1.0 / row["rate"], case.settings
    around = settings.link.around(settings.forward_bytes, settings.backward_bytes)
    steps = max(STEPS[0], min(STEPS[1], round(seconds / step)))
    oldest = settings.window_of(case.stages)
    # Until the first gradient is back at the lowest stage; of stale, until it waits for them.
    filling = {"gpipe": 0, "stale": 2 * oldest}.get(
        mode, math.ceil((case.stages - 1) * around / step)
    )
    return Asked(mode, case, settings.buffer // 2, oldest, 2 + filling, steps)


def _as_run(mode: str, case: Case) -> Case:
    """Return the case with the windows that a run has."""
    s = case.settings
    times = s.times.at(case.stages)
    pace = max(times["local" if mode == "local" else "forward"])
    one_way = max(
        s.link.latency + s.forward_bytes / s.link.bandwidth,
        s.link.back + s.backward_bytes / s.link.wide_back,
    )
    window = 3 + math.ceil(2.0 * one_way / pace)
    # A process makes its steps in order of its input, and so is not always at the next backward.
    stale = s.window_of(case.stages) + 2 * case.stages if s.window is None else s.window
    changed: dict[str, Any] = {
        "buffer": 2 * window,
        "window": stale,
        "microbatches": 1,
        "late_receives": False,
    }
    return Case(case.stages, replace(s, **changed))


def measure(
    runs: Sequence[Asked], progress: Callable[[float], None] = lambda fraction: None
) -> list[dict[str, Any]]:
    """Run pipelines one after the other, in processes that sleep.

    Args:
        runs: of one number of stages.
        progress: called with the fraction done.

    Returns:
        A row a run: ``mode``, ``stages``, ``latency``; ``measured`` steps a second, of the slowest
        process; ``age``, mean of the gradients used (of dni: of the targets learned), in steps, or
        None; ``late``, by which share work took longer than it was to take: far from zero, the
        figure is of a machine that was too busy. ``simulated`` steps a second and ``deviation``,
        simulated over measured, less one.

    Raises:
        ValueError: no runs, or of several numbers of stages.
        RuntimeError: a process failed, with what it said.
    """
    if len({one.case.stages for one in runs}) != 1:
        raise ValueError("runs must be one at least, and all of one number of stages")
    seconds = [
        10.0 * (one.steps + one.uncounted) / simulate(one.mode, [one.case])[0]["rate"]
        for one in runs
    ]
    found = processes(runs[0].case.stages, _run, runs, seconds, progress)
    rows = []
    for one, answers in zip(runs, found, strict=True):
        (made,) = simulate(one.mode, [one.case])
        rate = one.steps / max(answer["seconds"] for answer in answers)
        ages = [answer["age"] for answer in answers if answer["age"] is not None]
        rows.append(
            {
                "mode": one.mode,
                "stages": one.case.stages,
                "latency": one.case.settings.link.latency,
                "steps": one.steps,
                "measured": rate,
                "age": max(ages, default=None),
                "late": max(answer["late"] for answer in answers),
                "simulated": made["rate"],
                "deviation": made["rate"] / rate - 1.0,
            }
        )
    return rows


def processes(
    world: int,
    work: Callable[[int, Any], dict[str, Any]],
    runs: Sequence[Any],
    seconds: Sequence[float],
    progress: Callable[[float], None],
) -> list[list[dict[str, Any]]]:
    """Run ``work(rank, run)`` for one run after another in each of ``world`` processes, which are
    the ranks of a process group on gloo, with one thread each.

    Args:
        world: how many.
        work: a function of a module, that returns what can be pickled.
        runs: its second argument.
        seconds: by run, after which it hangs, beyond :data:`PATIENCE`.
        progress: called with the fraction done.

    Returns:
        By run and rank, what was returned.

    Raises:
        RuntimeError: a process failed, ended or is silent.
    """
    context = multiprocessing.get_context("spawn")
    ends, started = [], []
    found: list[list[dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world):
                ours, theirs = context.Pipe(duplex=False)
                store = str(Path(folder) / "store")
                process = context.Process(
                    target=_rank, args=(rank, world, store, work, list(runs), theirs), daemon=True
                )
                process.start()
                theirs.close()
                ends.append(ours)
                started.append(process)
            for i, longest in enumerate(seconds):
                found.append([_answer(end, PATIENCE + longest) for end in ends])
                progress((i + 1) / len(runs))
        finally:
            for process in started:
                process.join(0.0 if len(found) < len(runs) else PATIENCE)
                if process.is_alive():
                    process.kill()
                    process.join()
    return found


def _answer(end: Connection, seconds: float) -> dict[str, Any]:
    try:
        answer = end.recv() if end.poll(seconds) else {"failed": f"silent for {seconds:.0f} s"}
    except EOFError:
        answer = {"failed": "it ended"}
    if "failed" in answer:
        raise RuntimeError(f"a process of a pipeline failed: {answer['failed']}")
    return dict(answer)


def _rank(
    rank: int,
    world: int,
    store: str,
    work: Callable[[int, Any], dict[str, Any]],
    runs: Sequence[Any],
    results: Connection,
) -> None:
    """Be a rank, for one run after another."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=PATIENCE),
    )
    try:
        for one in runs:
            results.send(work(rank, one))
        dist.barrier()  # an exit looks to the others like a death
    except Exception as error:  # to be told, whatever it is
        results.send({"failed": f"stage {rank}: {type(error).__name__}: {error}"})
    finally:
        dist.destroy_process_group()


class _Stand(nn.Module):
    """A module of one parameter, in the place of a stage."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def _mean(h: Tensor, target: Tensor) -> Tensor:
    return h.mean()


def _run(rank: int, one: Asked) -> dict[str, Any]:
    """Train a stage that sleeps; what it took."""
    settings, world = one.case.settings, one.case.stages
    last = rank == world - 1
    rows = settings.rows
    width = max(1, round(settings.forward_bytes / 4 / rows))
    made: dict[str, Any] = {}
    if one.mode == "dni" and not last:
        made["synthesizer"] = LinearSynthesizer(width, rank=1)
    if one.mode == "local" and not last:
        made["local_loss"] = _mean
    stage = Stage(_Stand(), rank, world, **made)
    plan = Schedule(stage, target_every=settings.target_every) if "synthesizer" in made else None
    x, target = torch.zeros(rows, width), torch.zeros(())
    pipeline = Pipeline(
        stage,
        loss=_mean,
        mode=RUNTIME[one.mode],
        window=one.window,
        max_age=one.oldest if one.mode == "stale" else None,
        timeout=PATIENCE,
    )
    delay_links(pipeline, settings.link.latency, settings.link.bandwidth)
    pace = Pace(pipeline, one.mode, one.case)
    dist.barrier()
    given = (x, target) if rank == 0 else ()
    start = 0.0
    for step in range(one.uncounted + one.steps):
        if step == one.uncounted:
            start = time.monotonic()
            pace.wanted = pace.over = 0.0
        pipeline.step(*given)
        stage.zero_grad()
        if plan is not None:
            plan.step()
    taken = time.monotonic() - start
    age = pipeline.report()["age"]["mean"]
    pipeline.close()
    return {"seconds": taken, "age": age, "late": pace.over / max(pace.wanted, 1e-9)}


class Pace:
    """Stretches the work of a pipeline's stage to the settings' times, by sleeping.

    Args:
        pipeline: of this rank (mutated).
        mode: its name in the simulation.
        case: stages and settings, whose stragglers are slow here, too.

    Attributes:
        wanted, over: seconds that work was to take so far, and by which it took longer.
    """

    def __init__(self, pipeline: Pipeline, mode: str, case: Case) -> None:
        rank, worker = pipeline.rank, pipeline.worker
        times = {name: v[rank] for name, v in case.settings.times.at(case.stages).items()}
        exact = times["forward"] + times["backward"] + times["optimizer"]
        self.wanted = self.over = 0.0
        self._slow = _Spells(case.settings, rank)
        begin, settle, ages = worker.begin, worker.settle, worker.ages

        def first(step: int, given: Any) -> Any:
            start = time.monotonic()
            begun = begin(step, given)
            if mode == "local":
                seconds = times["local"]
            elif pipeline.stage.is_last:
                seconds = exact
            elif mode == "dni" and worker._predicts():
                seconds = times["dni"] + (times["target"] if given.wanted else 0.0)
            else:
                seconds = times["forward"]
            self._fill(start, seconds)
            return begun

        def second(step: int) -> Any:
            start, before, flights = time.monotonic(), ages.count, len(worker._flights)
            found = settle(step)
            backwards = flights - len(worker._flights)  # of warm-up, too
            lessons = ages.count - before - backwards
            exact = times["backward"] + times["optimizer"]
            self._fill(start, exact * backwards + times["lesson"] * lessons)
            return found

        worker.begin, worker.settle = first, second  # type: ignore[method-assign]

    def _fill(self, start: float, seconds: float) -> None:
        """Sleep until work that began at ``start`` has taken that long."""
        seconds *= self._slow.factor(start)
        left = start + seconds - time.monotonic()
        if left > 0.0:
            time.sleep(left)
        if seconds:
            self.wanted += seconds
            self.over += max(0.0, -left)


class _Spells:
    """When a stage is slow, as the settings' stragglers are: spells of random length, by a seed."""

    def __init__(self, settings: Any, rank: int) -> None:
        slow = settings.stragglers
        self._slow = slow
        self._mine = slow.factor > 1.0 and slow.share > 0.0 and slow.stage in (None, rank)
        self._draw = random.Random(f"{settings.seed} {rank}")
        self._is_slow, self._until = False, 0.0

    def factor(self, now: float) -> float:
        """Return how many times as long work takes that begins now."""
        slow = self._slow
        if not self._mine:
            return 1.0
        if slow.share >= 1.0:
            return float(slow.factor)
        if not self._until:
            self._is_slow, self._until = True, now  # it begins with a pause
        while self._until <= now:
            self._is_slow = not self._is_slow
            mean = slow.spell if self._is_slow else slow.spell * (1.0 / slow.share - 1.0)
            self._until += self._draw.expovariate(1.0 / mean)
        return float(slow.factor) if self._is_slow else 1.0
