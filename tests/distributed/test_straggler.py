"""Stages of any pace, in every mode: none waits for ever, and memory stays where it is."""

from __future__ import annotations

import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from ranks import ranks
from stages import batches, stage
from torch import nn

import fused_dni as fd
from fused_dni.distributed import Pipeline

PAGE = 4096


def resident() -> int:
    """This process's memory, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def slowed(rank: int, world: int, steps: int, slow: float) -> dict[str, Any]:
    """Train with a last stage that now and then sleeps; what memory and mailbox did."""
    made = stage(rank, world)
    pace = random.Random(5)
    window, tickets, memory = 2, [], []
    with Pipeline(made, loss=F.cross_entropy, window=window, timeout=60.0) as pipeline:
        for out in pipeline.run(batches(steps)):
            made.zero_grad()
            if rank == world - 1 and pace.random() < slow:
                time.sleep(pace.random() * 0.01)
            if rank < world - 1:
                tickets.append(len(pipeline.worker.mailbox))
            if out.step % (steps // 10) == steps // 20:
                memory.append(resident())
    return {
        "tickets": max(tickets, default=0),
        "memory": memory,
        "report": pipeline.report(),
        "steps": pipeline.steps,
        "max_age": pipeline.max_age,
    }


def hold(found: list[dict[str, Any]], steps: int) -> None:
    """What must be so however the stages went."""
    for one in found:
        assert one["steps"] == steps
        memory = one["memory"]  # the first tenths warm allocators up
        assert max(memory[3:]) - memory[2] < 4 << 20, memory
    for one in found[:-1]:
        report = one["report"]
        dropped = report["dropped"]
        assert one["tickets"] <= one["max_age"] + 1 == 17
        assert report["age"]["oldest"] <= one["max_age"]
        assert report["learned"] > steps // 2
        # Each target that was asked for was learned, or is accounted for.
        told = report["learned"] + dropped["not_finite"] + report["expired"] + report["left"]
        assert told <= steps <= told + dropped["too_old"] + one["max_age"] + 1
    ages = found[-2]["report"]["age"]
    assert ages["oldest"] >= 2 and ages["mean"] > 0.5, ages  # it was late, so this was tested


def test_a_straggler():
    hold(ranks(partial(slowed, steps=600, slow=0.2), 3), 600)


@pytest.mark.repeat
def test_a_straggler_for_ten_thousand_steps():
    hold(ranks(partial(slowed, steps=10_000, slow=0.2), 3, seconds=400.0), 10_000)


class Sleepy(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.pace = random.Random(seed)

    def forward(self, x: Any) -> Any:
        if self.pace.random() < 0.3:
            time.sleep(self.pace.random() * 0.004)
        return x


def anything(rank: int, world: int, seeds: range) -> list[int]:
    """Pipelines of every kind, one after the other."""
    done = []
    for seed in seeds:
        draw = random.Random(seed)
        mode = draw.choice(["decoupled", "decoupled", "decoupled", "stale", "local", "exact"])
        window, lag = draw.randint(1, 4), draw.choice([None, None, 0, 1, 2, 7])
        max_age = draw.choice([None, max(lag or 0, 1), 7])
        made = stage(rank, world, mode)
        inner = made.submodule.module if made.decoupled is not None else made.submodule
        inner.append(Sleepy(seed * 8 + rank))
        plan = None
        own = random.Random(seed * 8 + rank)
        if made.decoupled is not None:
            every: Any = own.choice([1, 3, None, "auto"])
            cost = {"cost_ratio": 1.0} if every == "auto" else {}
            mix, warmup = own.choice([0.0, 0.0, 0.5]), own.choice([0, 0, 3])
            plan = fd.Schedule(made, warmup, every, mix, **cost)
        options = {"mode": mode, "window": window, "lag": lag, "max_age": max_age}
        with Pipeline(made, loss=F.cross_entropy, timeout=20.0, **options) as pipeline:
            for _ in pipeline.run(batches(draw.randint(1, 25))):
                made.zero_grad()
                if plan is not None:
                    plan.step()
        done.append(pipeline.steps)
    return done


@pytest.mark.parametrize("world", [3, 4])
def test_random_configurations(world):
    found = ranks(partial(anything, seeds=range(12)), world)
    assert found == [found[0]] * world and len(found[0]) == 12 and min(found[0]) > 0


@pytest.mark.repeat
@pytest.mark.parametrize("world", [3, 4])
def test_many_random_configurations(world):
    found = ranks(partial(anything, seeds=range(12, 112)), world, seconds=500.0)
    assert found == [found[0]] * world and min(found[0]) > 0


def steady(rank: int, world: int, lag: int) -> dict[str, Any]:
    with Pipeline(stage(rank, world), loss=F.cross_entropy, lag=lag) as pipeline:
        for _ in pipeline.run(batches(12)):
            pass
    return pipeline.report()


@pytest.mark.parametrize("lag", [0, 3, 5])
def test_ages_are_those_that_were_asked_for(lag):
    report = ranks(partial(steady, lag=lag), 2)[0]
    age = report["age"]
    assert (age["mean"], age["oldest"]) == (lag, lag)
    assert [(row["from"], row["targets"]) for row in age["by_age"]] == [
        ({0: 0, 3: 2, 5: 4}[lag], 12 - lag)
    ]
    assert (report["learned"], report["left"]) == (12 - lag, lag)
