"""Whatever goes wrong on one rank is a clear error on every rank, soon."""

from __future__ import annotations

import os
import signal
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import Ranks, ranks
from stages import INPUTS, ROWS, WIDTH, batches, part, stage
from torch import Tensor, nn

import fused_dni as fd
from fused_dni.distributed import Pipeline, PipelineError, Stage

ENDLESS = 10**6


def fate(rank: int, world: int, victim: int, how: str, mode: str, timeout: float = 20.0) -> str:
    """Train until ``how`` befalls the victim, in its 7th step; what was raised."""
    made = stage(rank, world, mode)

    def strike(*_: Any) -> None:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        raise ArithmeticError("struck")

    def data() -> Any:
        for i, batch in enumerate(batches(ENDLESS)):
            if how == "data" and i == 7:
                strike()
            yield batch

    calls = 0

    def loss(h: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if how == "loss" and calls == 7:
            strike()
        return F.cross_entropy(h, y)

    forwards = 0

    def hook(*_: Any) -> None:
        nonlocal forwards
        forwards += 1
        if how == "forward" and rank == victim and forwards == 7:
            strike()

    made.register_forward_pre_hook(hook)
    made.submodule.register_forward_pre_hook(hook) if mode == "decoupled" else None
    try:
        with Pipeline(made, loss=loss, mode=mode, window=2, timeout=timeout) as pipeline:
            for out in pipeline.run(data()):
                if rank == victim and out.step == 7 and how in ("kill", "stop", "between"):
                    strike()
    except (PipelineError, ArithmeticError) as problem:
        with pytest.raises(PipelineError):  # and it stays so
            pipeline.step(*([torch.zeros(ROWS, INPUTS)] if rank == 0 else []))
        return f"{type(problem).__name__}: {problem}"
    return "nothing"


@pytest.mark.parametrize(
    ("victim", "mode"), [(0, "decoupled"), (1, "exact"), (2, "decoupled"), (2, "local")]
)
def test_a_rank_that_is_killed(victim, mode):
    found = Ranks(partial(fate, victim=victim, how="kill", mode=mode), 3).results()
    assert found[victim] is None
    for rank in {0, 1, 2} - {victim}:
        assert found[rank].startswith(f"PipelineError: stage {victim} is gone"), found[rank]


@pytest.mark.parametrize(("victim", "mode"), [(0, "stale"), (1, "decoupled"), (3, "decoupled")])
def test_a_rank_that_is_stopped(victim, mode):
    run = Ranks(partial(fate, victim=victim, how="stop", mode=mode, timeout=2.0), 4)
    found = run.results(only={0, 1, 2, 3} - {victim})
    for rank in {0, 1, 2, 3} - {victim}:
        assert found[rank].startswith(f"PipelineError: stage {victim} was silent for "), found


@pytest.mark.parametrize(
    ("victim", "how", "mode"),
    [
        (0, "forward", "exact"),
        (3, "loss", "decoupled"),
        (3, "loss", "local"),
        (0, "data", "decoupled"),
        (1, "between", "stale"),
        (2, "forward", "decoupled"),
    ],
)
def test_what_one_rank_raises_reaches_all(victim, how, mode):
    """Along the whole chain, with its text."""
    found = ranks(partial(fate, victim=victim, how=how, mode=mode), 4)
    assert found[victim] == "ArithmeticError: struck"
    for rank in {0, 1, 2, 3} - {victim}:
        assert found[rank] == f"PipelineError: stage {victim} failed: ArithmeticError('struck')"


# ---------------------------------------------------------------------------------------------
# Before anything is trained

ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "mode": ({"mode": "exact"}, "synthesizer"),
    "unknown mode": ({"mode": "async"}, "mode must be one of"),
    "window": ({"window": 3}, "ranks differ: window is 4 on rank 0 and 3 on rank 1"),
    "lag": ({"lag": 2}, "ranks differ: lag is None on rank 0 and 2 on rank 1"),
    "targets": (
        {"targets": "true"},
        "ranks differ: targets is 'bootstrapped' on rank 0 and 'true'",
    ),
    "max_age": ({"max_age": 9}, "ranks differ: max_age"),
    "no number": ({"window": torch.tensor(2)}, "window must be an integer"),
    "zero": ({"window": 0}, "window must be an integer of at least 1, got 0"),
    "no window": ({"window": None}, "window must be an integer"),
    "capacity": ({"capacity": 0}, "capacity must be an integer"),
    "timeout": ({"timeout": "soon"}, "timeout must be positive"),
    "lag beyond max_age": ({"lag": 40}, "lag=40 is more than max_age=32"),
    "torch": ({}, "ranks differ: torch is"),
    "stage_index": ({}, "stage_index=0 in the place of 1"),
    "num_stages": ({}, "the world has 2 ranks, the model num_stages=3"),
    "no stage": ({}, "stage must be a Stage, got Linear"),
    "no loss": ({"loss": None}, "loss is missing"),
}


def refusals(rank: int, world: int) -> list[tuple[str, str]]:
    """Make one pipeline after another that does not fit on rank 1."""
    found = []
    for name, (wrong, _) in ARGUMENTS.items():
        made: Any = stage(rank, world)
        version = torch.__version__
        options: dict[str, Any] = {"loss": F.cross_entropy, "timeout": 30.0}
        if rank == 1:
            options |= wrong
            if name == "torch":
                torch.__version__ = "1.0"
            if name == "stage_index":
                made = stage(0, world)
            if name == "num_stages":
                made = stage(1, 3)
            if name == "no stage":
                made = nn.Linear(1, 1)
        if name == "mode" and rank == 0:
            options["mode"] = "exact"
        try:
            Pipeline(made, **options)
            found.append(("nothing", ""))
        except Exception as problem:
            found.append((type(problem).__name__, str(problem)))
        torch.__version__ = version
    return found


def test_ranks_that_do_not_fit_each_other():
    """An error on both, at once; and the ranks are none the worse for it."""
    here, there = ranks(refusals, 2)
    for (name, (_, text)), a, b in zip(ARGUMENTS.items(), here, there, strict=True):
        own = "TypeError" if name == "no stage" else "ValueError"
        assert (a[0], b[0]) == ("ValueError", own), (name, a, b)
        assert text in a[1] and text in b[1], (name, a, b)


def absent(rank: int, world: int) -> str:
    if rank == 1:
        return ""
    with pytest.raises(PipelineError, match=r"not every rank came .* within 1 s \(timeout\)"):
        Pipeline(stage(rank, world), timeout=1.0)
    return "raised"


def test_a_rank_that_makes_no_pipeline():
    assert Ranks(absent, 2).results() == ["raised", ""]


# ---------------------------------------------------------------------------------------------
# Batches and modules


class Cast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.long()


class Cut(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def nan_loss(h: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(h, y) * torch.nan


def cut_loss(h: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(h.detach(), y)


def taught(rank: int, world: int, case: str) -> str:
    """Train in the circumstances of a case; what was raised."""
    module: nn.Module = part(rank, world)
    mode, loss, data = "exact", F.cross_entropy, list(batches(4))
    if case == "larger last batch":
        data += batches(1, 50 * ROWS)
    if case == "smaller last batch":
        data += batches(1, 1)
    if case == "integers" and rank == 0:
        module = nn.Sequential(module, Cast())
    if case == "cut" and rank == 1:
        module = nn.Sequential(Cut(), module)
    if case == "pair" and rank == 0:
        module = nn.Sequential(module, Pair())
    if case == "wrong shape" and rank == 0:
        module = nn.Linear(INPUTS, WIDTH + 1)
    if case == "wrong dtype" and rank == 0:
        module.double()
        data = [(x.double(), y) for x, y in data]
    if case == "complex" and rank == 0:
        mode = "local"
        module = nn.Linear(INPUTS, WIDTH, dtype=torch.complex64)
        data = [(x.to(torch.complex64), y) for x, y in data]
    if case == "complex":
        mode = "local"
    if case == "cut loss":
        loss = cut_loss
    if case == "no labels":
        data = [(x, None) for x, _ in data]
    if case == "no pair":
        data = [x for x, _ in data]
    if case == "no tensor":
        data = [(x, {"y": y}) for x, y in data]
    if case == "frozen":
        module.requires_grad_(rank == 1)
    made = Stage(module, rank, world, local_loss=lambda h, y: h.abs().mean())
    try:
        with Pipeline(made, loss=loss, mode=mode, timeout=20.0) as pipeline:
            for _ in pipeline.run(data):
                pass
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    return f"{pipeline.steps} steps"


@pytest.mark.parametrize(
    ("case", "raises", "text"),
    [
        ("larger last batch", 0, "make the first batch the largest, or give capacity="),
        ("integers", 0, "carries no graph"),
        ("cut", 1, "does not depend on it"),
        ("pair", 0, "a stage must return one tensor, got tuple"),
        ("wrong shape", 1, "cannot be multiplied"),
        ("wrong dtype", 1, "dtype"),
        ("complex", 0, "a tensor between stages must be dense"),
        ("cut loss", 1, "the loss carries no graph"),
        ("no labels", 1, "target is missing"),
        ("no pair", 0, "a batch must be"),
        ("no tensor", 0, "target must be a tensor, got dict"),
    ],
)
def test_batches_and_modules_that_do_not_fit(case, raises, text):
    found = ranks(partial(taught, case=case), 2)
    assert text in found[raises], found
    other = found[1 - raises]
    assert other.startswith(f"PipelineError: stage {raises} failed: ") and text in other, found


@pytest.mark.parametrize(("case", "steps"), [("smaller last batch", 5), ("frozen", 4)])
def test_batches_and_modules_that_fit(case, steps):
    assert ranks(partial(taught, case=case), 2) == [f"{steps} steps"] * 2


def not_finite(rank: int, world: int, rule: fd.SGD | None) -> tuple[dict[str, Tensor], dict]:
    made = stage(rank, world, update=rule)
    with Pipeline(made, loss=nan_loss) as pipeline:
        for _ in pipeline.run(batches(5)):
            made.zero_grad()
    return {k: v.clone() for k, v in made.submodule.synthesizer.state_dict().items()} if not (
        rank
    ) else {}, pipeline.report()


def test_gradients_that_are_not_finite_are_counted_and_dropped():
    (state, report), _ = ranks(partial(not_finite, rule=fd.SGD(0.1)), 2)
    dropped = report["dropped"]["not_finite"]
    assert dropped + report["left"] + report["dropped"]["no_room"] == 5 and report["learned"] == 0
    assert all(bool(torch.isfinite(t).all()) for t in state.values())


def smaller_target_first(rank: int, world: int) -> int:
    """The first gradient that goes down is smaller than later ones."""
    made = stage(rank, world)
    plan = fd.Schedule(made, target_every=2) if rank == 0 else None
    data = [*batches(1), *batches(1, 1), *batches(4)]
    if plan is not None:
        plan.step()  # the targets are those of odd steps
    with Pipeline(made, loss=F.cross_entropy, lag=0) as pipeline:
        for _ in pipeline.run(data):
            if plan is not None:
                plan.step()
    return pipeline.report()["learned"]


def test_a_small_first_gradient_does_not_bound_the_others():
    assert ranks(smaller_target_first, 2)[0] == 3


def again(rank: int, world: int) -> list[Any]:
    """Close twice, go on after it, and make another pipeline."""
    found: list[Any] = []
    made = stage(rank, world)
    for _ in range(3):
        pipeline = Pipeline(made, loss=F.cross_entropy)
        found.append(len(list(pipeline.run(batches(3)))))
        pipeline.close()
        pipeline.close()
        with pytest.raises(PipelineError, match="closed"):
            pipeline.step(*([torch.zeros(1, INPUTS), torch.zeros(1)] if rank == 0 else []))
        found.append([r["steps"] for r in pipeline.reports()])
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_closed_twice_and_another_after_it(world):
    assert ranks(again, world) == [[3, [3] * world] * 3] * world


def test_stages_that_are_refused():
    synthesizer = fd.LinearSynthesizer(WIDTH)
    with pytest.raises(TypeError, match="must be an nn.Module"):
        Stage(F.relu, 0, 2)
    with pytest.raises(ValueError, match="update, max_norm: only together with synthesizer"):
        Stage(nn.Linear(2, 2), 0, 2, update=fd.SGD(0.1), max_norm=1.0)
    with pytest.raises(ValueError, match="the last stage has the true gradient"):
        Stage(nn.Linear(2, 2), 1, 2, synthesizer=synthesizer)
    with pytest.raises(ValueError, match="has one at its output already"):
        Stage(fd.FusedDNILinear(2, WIDTH, synthesizer=synthesizer), 0, 2, synthesizer=synthesizer)
    for index, count in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="stage_index must be in"):
            Stage(nn.Linear(2, 2), index, count)


def replicas(rank: int, world: int) -> str:
    inside = nn.Sequential(nn.parallel.DistributedDataParallel(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match="DistributedDataParallel: data parallelism inside"):
        Stage(inside, 0, 2)
    return "refused"


def test_replicas_are_refused():
    assert ranks(replicas, 1) == ["refused"]
