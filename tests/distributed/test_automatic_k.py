"""k that is chosen where targets come late: each lesson counts for the step that it belongs to."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from ranks import ranks
from torch import Tensor, nn

import fused_dni as fd
from fused_dni.distributed import Pipeline, Stage, Twin

WIDTH, ROWS, STEPS = 6, 8, 260

pytestmark = pytest.mark.usefixtures("one_thread")


def loss(out: Tensor, target: Tensor) -> Tensor:
    return out.mean()


def stages(noise: bool) -> list[Stage]:
    """A top whose gradient is the same for all rows, so that it is soon predicted; or with another
    sign for each step, so that it never is."""
    torch.manual_seed(1)
    top = nn.Linear(WIDTH, 3).double().requires_grad_(False)
    if noise:
        top = Flipping().double()
    bottom = nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh()).double()
    synthesizer = fd.LinearSynthesizer(WIDTH).double()
    rule = fd.SGD(0.1)
    return [Stage(bottom, 0, 2, synthesizer=synthesizer, update=rule), Stage(top, 1, 2)]


class Flipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.draw = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (2 * torch.randint(2, (), generator=self.draw) - 1)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(ROWS, 4, generator=generator, dtype=torch.float64), torch.zeros(ROWS))
        for _ in range(STEPS)
    ]


def automatic(stage: Stage) -> fd.Schedule:
    return fd.Schedule(stage, warmup_steps=3, target_every="auto", cost_ratio=30.0)


def twin(lag: int, noise: bool = False) -> list[int]:
    made = stages(noise)
    schedule, alone, found = automatic(made[0]), Twin(made, loss=loss, lag=lag), []
    for x, y in batches():
        alone.step(x, y)
        schedule.step()
        found.append(schedule.k)
    return found


def on_rank(rank: int, world: int, lag: int) -> list[Any]:
    stage, found = stages(False)[rank], []
    schedule = automatic(stage) if rank == 0 else None
    with Pipeline(stage, loss=loss, lag=lag) as pipeline:
        for _ in pipeline.run(batches()):
            if schedule is not None:
                schedule.step()
                found.append(schedule.k)
            stage.zero_grad()
    return found


@pytest.mark.parametrize("lag", [0, 6, 13])
def test_what_is_predicted_well_is_asked_for_rarely(lag):
    """Lags that are no multiple of k: no lesson comes in a step that has a target of its own."""
    found = twin(lag)
    assert found[0] == 4 and found[-1] > 10, found[-1]
    assert found == sorted(found)


@pytest.mark.parametrize("lag", [0, 6])
def test_what_is_not_predicted_is_asked_for_always(lag):
    assert twin(lag, noise=True)[-1] == 1


def test_the_pipeline_chooses_as_its_twin():
    assert ranks(partial(on_rank, lag=6), 2)[0] == twin(6)


def test_a_lesson_counts_for_its_step(monkeypatch):
    """What is observed is what was taught, by step; a target that is dropped is skipped, and what a
    layer inside learned on time goes with the late lesson of the same step."""
    torch.manual_seed(0)
    inner = fd.FusedDNILinear(4, 5, update=fd.SGD(0.05)).double()
    outer = fd.Decoupled(
        nn.Sequential(inner, nn.Linear(5, WIDTH)).double(),
        fd.LinearSynthesizer(WIDTH).double(),
        update=fd.SGD(0.05),
    )
    schedule = fd.Schedule(outer, target_every="auto", cost_ratio=1.0, bounds=(3, 3))
    seen: list[Any] = []
    pace = schedule._pace
    monkeypatch.setattr(pace, "observe", lambda sums, distance: seen.append((sums, distance)))
    waiting, taught = [], {}
    for step in range(30):
        before = [m.statistics.clone() for m in (outer, inner)]
        _, _, ticket = fd.step_local(outer, torch.randn(ROWS, 4, dtype=torch.float64))
        inside = inner.statistics - before[1]
        if step % 3 == 0:
            waiting.append((step, ticket, inside, inner.unit**2))
        if waiting and step >= waiting[0][0] + 7:
            of, ticket, inside, unit = waiting.pop(0)
            if of != 6:  # that one is lost
                before = outer.statistics.clone(), outer.unit
                fd.learn_late(outer, ticket, torch.randn(ROWS, WIDTH, dtype=torch.float64))
                after = outer.statistics * outer.unit**2 - before[0] * before[1] ** 2
                taught[of] = (after, inside * unit)
        schedule.step()
    assert len(seen) == len(taught) == 7
    for (sums, _), (of, wanted) in zip(seen, sorted(taught.items()), strict=True):
        for got, statistics in zip(sums, wanted, strict=True):
            for value in got:
                assert any(abs(value - float(s)) < 1e-9 for s in statistics), (of, got, statistics)
    assert [distance for _, distance in seen] == [1, *[3] * 6]


def test_who_listens_last_is_told_alone():
    layer = fd.FusedDNILinear(4, 5, update=fd.SGD(0.05))
    fd.Schedule(layer, target_every="auto", cost_ratio=1.0)
    assert layer.late_sums is not None and layer.due == 0
    fd.Schedule(layer, target_every=2)
    assert layer.late_sums is None and layer.due is None
    _, _, ticket = fd.step_local(layer, torch.randn(ROWS, 4))
    fd.learn_late(layer, ticket, torch.randn(ROWS, 5))
    assert layer.late_sums is None
