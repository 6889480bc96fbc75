"""Links that are made longer: nothing comes early, nothing is lost, and who waits relays."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import ranks
from stages import batches, stage
from torch import Tensor

from fused_dni.distributed import Pipeline
from fused_dni.distributed.delayed import delay_links
from fused_dni.distributed.wire import HEADER

LATENCY, STEPS = 0.05, 12


def clocked(rank: int, world: int, bandwidth: float) -> tuple[list[float], int]:
    """By message, how long after it was sent it was handed out, by the clock of all processes."""
    made, late = stage(rank, world, "local"), []

    def loss(h: Tensor, target: Tensor) -> Tensor:
        late.append(time.monotonic() - float(target))
        return h.square().mean()

    made.local_loss = loss
    with Pipeline(made, loss=loss, mode="local", timeout=20.0) as pipeline:
        delay_links(pipeline, LATENCY, bandwidth)
        dist.barrier()
        x = next(batches(1))[0]
        stamps = (torch.tensor(time.monotonic(), dtype=torch.float64) for _ in range(STEPS))
        for _ in pipeline.run((x, stamp) for stamp in stamps):
            pass
    return late, pipeline.steps


@pytest.mark.parametrize("bandwidth", [float("inf"), 1e5])
def test_nothing_comes_before_its_time(bandwidth):
    (_, first), (late, steps) = ranks(partial(clocked, bandwidth=bandwidth), 2)
    assert first == steps == len(late) == STEPS
    assert min(late) >= LATENCY + HEADER / bandwidth


def later(rank: int, world: int, latency: float) -> dict[str, Tensor]:
    made = stage(rank, world)
    with Pipeline(made, loss=F.cross_entropy, lag=3, timeout=20.0) as pipeline:
        delay_links(pipeline, latency)
        dist.barrier()
        for _ in pipeline.run(batches(STEPS)):
            with torch.no_grad():
                for p in made.parameters():
                    if p.grad is not None:
                        p -= 0.1 * p.grad
            made.zero_grad()
    return {k: v.clone() for k, v in made.state_dict().items()}


def test_a_distance_changes_no_bits_of_a_fixed_lag():
    near, far = (ranks(partial(later, latency=latency), 2) for latency in (0.0, 0.02))
    for a, b in zip(near, far, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def pausing(rank: int, world: int) -> bool:
    """The lowest stage sends nothing more until the gradient of its first step is back."""
    back = True
    with Pipeline(
        stage(rank, world, "stale"), loss=F.cross_entropy, mode="stale", timeout=20.0
    ) as pipeline:
        if rank == world - 1:
            time.sleep(0.3)  # the stage below waits for input by now
        for out in pipeline.run(batches(2)):
            if rank == 0 and out.step == 0:
                until = time.monotonic() + 10.0
                while not (back := pipeline.report()["learned"] + len(pipeline.worker._come) > 0):
                    if time.monotonic() > until:
                        break
                    pipeline._take_in()
                    time.sleep(0.005)
    return back


def test_a_stage_that_waits_for_input_relays_stale_gradients():
    assert ranks(pausing, 3)[0]


def refused(rank: int, world: int) -> list[str]:
    said = []
    with Pipeline(stage(rank, world), loss=F.cross_entropy, timeout=20.0) as pipeline:
        for given in ((-1.0,), (float("nan"),), (0.0, 0.0)):
            with pytest.raises(ValueError) as error:
                delay_links(pipeline, *given)
            said.append(str(error.value))
        for _ in pipeline.run(batches(1)):
            pass
        with pytest.raises(RuntimeError, match="has made 1 steps"):
            delay_links(pipeline, 0.0)
    return said


def test_what_is_no_distance_is_refused():
    said = ranks(refused, 2)[0]
    assert said[0].startswith("latency must be finite seconds from 0 on, got -1.0")
    assert "got nan" in said[1] and said[2].startswith("bandwidth must be positive")
