"""Races: several ways of training, each on its own clock, and what they have come to by when.

What a step costs and what it is worth are two questions; a race answers both at once. Arms are
trained in turns of a fraction of a second, the one whose clock shows least being next, so that a
machine that gets slower does so for all. A clock runs during steps alone (less the time in which
the thread waited for a core), and not while the loss is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from fused_dni.measure.baseline import facts, name_commit
from fused_dni.measure.errors import Interrupted
from fused_dni.measure.waiting import Stopwatch
from fused_dni.report.progress import Progress
from fused_dni.report.schema import Keep, Result, resumed

#: Seconds of a turn.
TURN = 0.25


class Racer(Protocol):
    """A network in training."""

    def step(self) -> object:
        """Train by one step."""
        ...

    def loss(self) -> float:
        """Say how good it is now, on data held out; lower is better. Must not train."""
        ...


#: By the arm's name, what makes its racer from a seed. The first is the one to beat.
Arms = Mapping[str, Callable[[int], Racer]]


def race(
    arms: Arms,
    *,
    seconds: float = 20.0,
    seeds: Sequence[int] = (1, 2, 3),
    marks: int = 20,
    device: torch.device | str = "cpu",
    previous: Result | None = None,
    keep: Keep | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> Result:
    """Train every arm for so many seconds with every seed.

    Args:
        arms: what is compared, at least two.
        seconds: on each arm's own clock.
        seeds: one race each, in which all arms start anew.
        marks: how often the loss is looked at, at equal distances of the clock, and at the start.
        device: whose work a step is over with.
        previous, keep, progress, command: see :class:`fused_dni.report.schema.Experiment`; a run is
            a seed with all its arms.

    Returns:
        The report, of kind ``race``: ``settings``, and ``runs``, a row an arm and seed with its
        ``history`` (seconds on its clock, steps, loss), ``diverged`` if the loss was not finite
        (such an arm stops).

    Raises:
        ValueError: fewer than two arms, no seed, or a number out of range.
    """
    if len(arms) < 2:
        raise ValueError(f"a race takes two arms or more, got {list(arms)}")
    if not seconds > 0.0 or marks < 1 or not seeds:
        raise ValueError(
            f"seconds must be positive, marks at least 1, and seeds not empty, got {seconds}, "
            f"{marks}, {list(seeds)}"
        )
    chosen = list(dict.fromkeys(seeds))
    settings: dict[str, Any] = {
        "arms": list(arms),
        "seconds": float(seconds),
        "seeds": chosen,
        "marks": marks,
        "device": str(device),
    }
    report = resumed(previous, Result(
        "race",
        facts=facts(command, device),
        settings=settings,
        body={"runs": [], "finished": False},
    ))  # fmt: skip
    body = report.body
    commit = facts()["commit"]  # of what is loaded now
    done = {run["seed"] for run in body["runs"]}
    progress = progress or Progress(enabled=False)
    with progress:
        for seed in chosen:
            if seed in done:
                continue
            try:
                body["runs"] += _once(arms, seed, seconds, marks, torch.device(device), progress)
            except KeyboardInterrupt:
                kept = len({run["seed"] for run in body["runs"]})
                raise Interrupted(f"{kept} of {len(chosen)} seeds were finished") from None
            name_commit(report.facts, commit)
            body["finished"] = len(body["runs"]) == len(arms) * len(chosen)
            if keep is not None:
                keep(report)
    return report


class _Lane:
    """An arm on its way."""

    def __init__(self, racer: Racer, name: str, seed: int) -> None:
        self.racer = racer
        self.seconds = 0.0
        self.steps = 0
        self.history: list[dict[str, float]] = []
        self.run: dict[str, Any] = {
            "name": name, "seed": seed, "history": self.history, "diverged": False,
        }  # fmt: skip

    def look(self) -> None:
        """Write down where it is."""
        loss = float(self.racer.loss())
        self.history.append({"seconds": self.seconds, "steps": self.steps, "loss": loss})
        if not math.isfinite(loss):
            self.history[-1]["loss"] = math.inf
            self.run["diverged"] = True


def _once(
    arms: Arms, seed: int, seconds: float, marks: int, device: torch.device, progress: Progress
) -> list[dict[str, Any]]:
    """All arms with one seed."""
    lanes = [_Lane(make(seed), name, seed) for name, make in arms.items()]
    for lane in lanes:
        lane.look()
    watch = Stopwatch()
    try:
        while True:
            running = [
                lane for lane in lanes if len(lane.history) <= marks and not lane.run["diverged"]
            ]
            if not running:
                return [lane.run for lane in lanes]
            lane = min(running, key=lambda lane: lane.seconds)
            mark = seconds * len(lane.history) / marks
            until = min(mark, lane.seconds + TURN)
            step = partial(_step, lane.racer, device)
            while lane.seconds < until:
                lane.seconds += watch.time(step)
                lane.steps += 1
            if lane.seconds >= mark:
                lane.look()
            progress.update(f"seed {seed}", min(lane.seconds for lane in running) / seconds)
    finally:
        watch.close()
        progress.update(f"seed {seed}", 1.0)


def _step(racer: Racer, device: torch.device) -> None:
    racer.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
