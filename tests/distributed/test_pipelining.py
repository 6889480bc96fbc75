"""A decoupled stage under torch's own schedules: what the twin computes, and nothing waits."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import ranks
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

import fused_dni as fd
from fused_dni.distributed import Stage, Twin
from fused_dni.distributed.pipelining import DecoupledPipelineStage, _why_not

WIDTH, CLASSES, ROWS, STEPS = 6, 3, 8, 7

pytestmark = pytest.mark.usefixtures("one_thread")


def modules(world: int) -> list[nn.Module]:
    torch.manual_seed(4)
    made: list[nn.Module] = []
    for i in range(world):
        part = nn.Sequential(nn.Linear(5 if i == 0 else WIDTH, WIDTH), nn.Tanh())
        if i == world - 1:
            made.append(part.append(nn.Linear(WIDTH, CLASSES)).double())
        else:
            synthesizer = fd.LinearSynthesizer(WIDTH, context_features=CLASSES)
            made.append(fd.Decoupled(part, synthesizer).double())
    return made


def batches(chunks: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(ROWS * chunks, 5, generator=generator, dtype=torch.float64),
            torch.randint(0, CLASSES, (ROWS * chunks,), generator=generator),
        )
        for _ in range(STEPS)
    ]


def on_rank(rank: int, world: int, schedule: Any, chunks: int, lag: int | None) -> dict[str, Any]:
    module = modules(world)[rank]
    example = torch.zeros(ROWS, 5 if rank == 0 else WIDTH, dtype=torch.float64)
    example.requires_grad_(rank > 0)
    out = torch.zeros(ROWS, WIDTH if rank < world - 1 else CLASSES, dtype=torch.float64)
    stage = DecoupledPipelineStage(
        module,
        rank,
        world,
        torch.device("cpu"),
        example,
        out.requires_grad_(),
        lag=lag,
        timeout=20.0,
    )
    plan = schedule(stage, chunks, loss_fn=F.cross_entropy)
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    last = rank == world - 1
    for x, y in batches(chunks):
        optimizer.zero_grad()
        given = {} if last else {"context": y}
        plan.step(*([x] if rank == 0 else []), target=y if last else None, **given)
        optimizer.step()
    stage.close()
    state = {k: v.clone() for k, v in module.state_dict().items()}
    ages = None if stage.mailbox is None else stage.mailbox.ages.count
    return {"state": state, "learned": ages, "chunks": stage.forwards}


def twin(world: int, chunks: int, lag: int) -> list[dict[str, Tensor]]:
    made = modules(world)
    stages = [Stage(module, i, world) for i, module in enumerate(made)]
    alone = Twin(stages, loss=F.cross_entropy, lag=lag)
    optimizers = [torch.optim.Adam(module.parameters(), 0.01) for module in made]
    for x, y in batches(chunks):
        for part, labels in zip(x.chunk(chunks), y.chunk(chunks), strict=True):
            alone.step(part, labels)
        for module, optimizer in zip(made, optimizers, strict=True):
            for p in module.parameters():
                if p.grad is not None:
                    p.grad /= chunks
            optimizer.step()
            optimizer.zero_grad()
    return [dict(module.state_dict()) for module in made]


@pytest.mark.parametrize(
    ("schedule", "chunks", "lag", "world"),
    [
        (ScheduleGPipe, 1, 1, 2),
        (Schedule1F1B, 4, 2, 2),
        (ScheduleGPipe, 3, 4, 2),
        (Schedule1F1B, 3, 3, 3),
    ],
)
def test_under_a_stock_schedule_it_is_the_twin(schedule, chunks, lag, world):
    """To 1e-12 in float64: sums over chunks have another order."""
    found = ranks(partial(on_rank, schedule=schedule, chunks=chunks, lag=lag), world)
    for one, wanted in zip(found, twin(world, chunks, lag), strict=True):
        assert one["state"].keys() == wanted.keys()
        for name, value in wanted.items():
            difference = (one["state"][name].double() - value.double()).abs().max()
            assert float(difference) < 1e-12, (name, float(difference))
    assert found[0]["learned"] == STEPS * chunks - lag


def test_without_a_lag_it_goes_on():
    found = ranks(partial(on_rank, schedule=Schedule1F1B, chunks=4, lag=None), 2)
    assert [one["chunks"] for one in found] == [STEPS * 4] * 2
    assert 0 <= found[0]["learned"] <= STEPS * 4


def refusals(rank: int, world: int) -> list[str]:
    made, said = modules(world), []
    example = torch.zeros(ROWS, WIDTH, dtype=torch.float64)
    wrong = made[1 - rank] if world == 2 else made[rank]
    for module, index, options in (
        (wrong, rank, {}),
        (made[rank], 1 - rank, {}),
        (made[rank], rank, {"window": 0}),
    ):
        with pytest.raises(ValueError) as error:
            DecoupledPipelineStage(
                module, index, world, torch.device("cpu"), example, example, **options
            )
        said.append(str(error.value))
    return said


def test_what_does_not_fit_is_refused():
    first, last = ranks(refusals, 2)
    assert "submodule needs a synthesizer" in first[0] and "takes no synthesizer" in last[0]
    for said in (first, last):
        assert "the stages must be the ranks" in said[1] and "window must be" in said[2]


def test_another_version_is_refused():
    class Other(PipelineStage):
        def backward_one_chunk(self, chunk, loss=None):  # type: ignore[override]
            return None

    assert _why_not(PipelineStage) == ""
    assert "backward_one_chunk takes" in _why_not(Other)
    assert "has no forward_one_chunk" in _why_not(object)
