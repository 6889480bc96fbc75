"""What a stage may consist of, and what a user may do between steps."""

from __future__ import annotations

import gc
import time
import weakref
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import Ranks, ranks
from stages import CLASSES, INPUTS, ROWS, WIDTH, batches, stage
from torch import Tensor, nn

import fused_dni as fd
from fused_dni.distributed import Pipeline, Stage, Twin


class Recurrent(nn.Module):
    """Words in, the last output of an LSTM out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.lstm = nn.LSTM(4, WIDTH, batch_first=True)

    def forward(self, words: Tensor) -> Tensor:
        return self.lstm(self.embedding(words))[0][:, -1]


def contents(case: str) -> nn.Module:
    if case == "words":
        return Recurrent()
    if case == "layers with rules":
        return nn.Sequential(
            fd.FusedDNILinear(
                INPUTS, WIDTH, activation="relu", update=fd.SGD(0.05),
                synthesizer=fd.LinearSynthesizer(WIDTH, context_features=CLASSES),
            ),
            nn.Linear(WIDTH, WIDTH),
        )  # fmt: skip
    if case == "exact layers with rules":
        inner = fd.FusedDNILinear(INPUTS, WIDTH, synthesizer=None, update=fd.SGD(0.05))
        return nn.Sequential(inner, nn.Tanh())
    return nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.Tanh())


def stages(case: str, mode: str) -> list[Stage]:
    torch.manual_seed(2)
    synthesizer = fd.LinearSynthesizer(
        WIDTH, context_features={"no context": 0, "other context": 2}.get(case, CLASSES)
    )
    options: dict[str, Any] = {"synthesizer": synthesizer} if mode == "decoupled" else {}
    return [Stage(contents(case), 0, 2, **options), Stage(nn.Linear(WIDTH, CLASSES), 1, 2)]


def given(case: str) -> list[tuple[Tensor, ...]]:
    found = []
    for x, y in batches(6):
        if case == "words":
            x = torch.arange(ROWS * 7).reshape(ROWS, 7) % 11
        found.append((x, y, F.one_hot(y % 2, 2).float()) if case == "other context" else (x, y))
    return found


def advance(stages: list[Stage], case: str) -> None:
    with torch.no_grad():
        for made in stages:
            for p in fd.ordinary_parameters(made):
                if p.grad is not None:
                    p -= 0.1 * p.grad
                    p.grad = None


def on_rank(rank: int, world: int, case: str, mode: str) -> dict[str, Tensor]:
    made = stages(case, mode)[rank]
    with Pipeline(made, loss=F.cross_entropy, mode=mode, lag=2) as pipeline:
        for _ in pipeline.run(given(case)):
            advance([made], case)
    return {k: v.clone() for k, v in made.state_dict().items()}


CASES = [
    ("words", "decoupled"),
    ("words", "stale"),
    ("layers with rules", "decoupled"),
    ("layers with rules", "stale"),
    ("exact layers with rules", "decoupled"),
    ("exact layers with rules", "stale"),
    ("no context", "decoupled"),
    ("other context", "decoupled"),
]


@pytest.mark.parametrize(("case", "mode"), CASES)
def test_contents_are_trained_as_in_one_process(case, mode, one_thread):
    """To the bit; and every parameter has moved."""
    alone = stages(case, mode)
    twin = Twin(alone, loss=F.cross_entropy, mode=mode, lag=2)
    for batch in given(case):
        twin.step(*batch)
        advance(alone, case)
    for found, wanted, first in zip(
        ranks(partial(on_rank, case=case, mode=mode), 2), alone, stages(case, mode), strict=True
    ):
        for name, t in wanted.state_dict().items():
            assert torch.equal(found[name], t), name
            assert not torch.equal(t, first.state_dict()[name]), name


def pausing(rank: int, world: int, who: int, mode: str) -> str:
    """A rank that is away, evaluating say, for longer than the time-out."""
    made = stage(rank, world, mode)
    try:
        with Pipeline(made, loss=F.cross_entropy, mode=mode, timeout=1.0, window=4) as pipeline:
            for out in pipeline.run(batches(3)):
                if rank == who and out.step == 1:
                    time.sleep(2.5)
    except Exception as problem:
        return str(problem)
    return f"{pipeline.steps} steps"


def test_a_pause_of_all_is_none():
    assert ranks(partial(everyone_pauses), 2) == ["2 steps"] * 2


def everyone_pauses(rank: int, world: int) -> str:
    made = stage(rank, world)
    with Pipeline(made, loss=F.cross_entropy, timeout=1.0) as pipeline:
        one = next(batches(1)) if rank == 0 else ()
        pipeline.step(*one)
        time.sleep(2.0)
        made.eval()
        made(torch.zeros(ROWS, INPUTS if rank == 0 else WIDTH))
        made.train()
        pipeline.step(*one)
        return f"{pipeline.steps} steps"


def test_a_pause_that_others_wait_for_says_so():
    found = ranks(partial(pausing, who=0, mode="exact"), 2)
    assert found[1].startswith("stage 0 was silent for 1 s (timeout)")
    assert found[0].startswith("stage 1 failed") or "stage 0 was silent" in found[0]


def left_early(rank: int, world: int) -> str:
    """The last stage leaves the loop while the first goes on."""
    with Pipeline(stage(rank, world), loss=F.cross_entropy, timeout=10.0) as pipeline:
        for out in pipeline.run(batches(30)):
            if rank == 1 and out.step == 5:
                break
    return f"{pipeline.steps} steps"


def test_a_stage_that_leaves_early_takes_in_what_still_comes():
    assert ranks(left_early, 2) == ["30 steps", "6 steps"]


def raising(rank: int, world: int) -> str:
    """Outside of with: the time-out of a pipeline that nobody closes."""
    pipeline = Pipeline(stage(rank, world), loss=F.cross_entropy, timeout=2.0)
    if rank == 1:
        pipeline.step()
        time.sleep(6.0)
        return ""
    with pytest.raises(ValueError, match="x goes to the first stage, and to no other"):
        pipeline.step()
    x, y = next(batches(1))
    pipeline.step(x, y)  # none the worse
    pipeline.close()
    return "closed"


def test_a_neighbour_that_never_closes():
    found = Ranks(raising, 2).results()
    assert found[0][0] == "PipelineError" and "stage 1 was silent for 2 s" in found[0][1]


class Kept(nn.Module):
    """Activations whose derivatives are made of their outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        out = torch.sigmoid(torch.tanh(x))
        self.outputs.append(weakref.ref(out))
        return out


def test_graphs_that_wait_are_gone_when_they_are_used():
    """Without the garbage collector: of each step in flight one, and no more."""
    kept = Kept()
    body = nn.Sequential(nn.Linear(INPUTS, WIDTH), kept, nn.Softmax(1))
    twin = Twin(
        [Stage(body, 0, 2), Stage(nn.Linear(WIDTH, CLASSES), 1, 2)],
        loss=F.cross_entropy, mode="stale", lag=3,
    )  # fmt: skip
    gc.disable()
    try:
        for x, y in batches(20):
            twin.step(x, y)
            assert sum(out() is not None for out in kept.outputs) <= 3
    finally:
        gc.enable()
