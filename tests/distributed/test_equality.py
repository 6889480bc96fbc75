"""A pipeline computes what one process does: exactly, and with a lag what its twin does."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import ranks
from torch import Tensor, nn

import fused_dni as fd
from fused_dni.distributed import Pipeline, Stage, Twin
from fused_dni.distributed.stage import Worker

WIDTH, CLASSES, ROWS, STEPS = 12, 5, 16, 12
RULES = {"none": None, "sgd": fd.SGD(0.05, momentum=0.9), "adam": fd.Adam(0.01)}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As the ranks: bits depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def segment(inputs: int) -> nn.Sequential:
    # No bias: in front of a batch normalisation its gradient is rounding, which Adam makes a step.
    linear = nn.Linear(inputs, WIDTH, bias=False)
    return nn.Sequential(linear, nn.BatchNorm1d(WIDTH), nn.ReLU()).double()


def split(world: int, mode: str, rule: str = "none") -> list[Stage]:
    """The same stages on every rank and in one process."""
    torch.manual_seed(3)
    stages = []
    for i in range(world):
        last = i == world - 1
        module = segment(8 if i == 0 else WIDTH)
        if last:
            module.append(nn.Linear(WIDTH, CLASSES).double())
        synthesizer = fd.LinearSynthesizer(WIDTH, rank=3, context_features=CLASSES).double()
        options = {} if last or mode != "decoupled" else {"synthesizer": synthesizer}
        if options:
            options["update"] = RULES[rule]
        local = LocalLoss() if mode == "local" and not last else None
        stages.append(Stage(module, i, world, local_loss=local, **options))
    return stages


class LocalLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES).double()

    def forward(self, h: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.head(h), target)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(STEPS):
        y = torch.randint(0, CLASSES, (ROWS,), generator=generator)
        found.append((torch.randn(ROWS, 8, generator=generator, dtype=torch.float64), y))
    return found


def optimizer_of(modules: list[nn.Module]) -> torch.optim.Optimizer | None:
    parameters = [p for m in modules for p in fd.ordinary_parameters(m)]
    return torch.optim.Adam(parameters, 0.01) if parameters else None


def schedules(stages: list[Stage], every: int, warmup: int) -> list[fd.Schedule]:
    decoupled = [stage for stage in stages if stage.decoupled is not None]
    return [fd.Schedule(s, target_every=every, warmup_steps=warmup) for s in decoupled]


def advance(optimizer: torch.optim.Optimizer | None, schedules: list[fd.Schedule]) -> None:
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    for schedule in schedules:
        schedule.step()


def on_rank(
    rank: int,
    world: int,
    mode: str,
    lag: int | None,
    rule: str,
    every: int,
    warmup: int,
    **options: Any,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    stage = split(world, mode, rule)[rank]
    optimizer, plan = optimizer_of([stage]), schedules([stage], every, warmup)
    losses = []
    with Pipeline(stage, loss=F.cross_entropy, mode=mode, lag=lag, **options) as pipeline:
        for out in pipeline.run(batches()):
            advance(optimizer, plan)
            losses += [] if out.loss is None else [out.loss]
    return {k: v.detach().clone() for k, v in stage.state_dict().items()}, losses


def twin(
    world: int, mode: str, lag: Any, rule: str, every: int, warmup: int, **options: Any
) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    stages = split(world, mode, rule)
    optimizers, plan = [optimizer_of([s]) for s in stages], schedules(stages, every, warmup)
    losses = []
    alone = Twin(stages, loss=F.cross_entropy, mode=mode, lag=lag, **options)
    for x, y in batches():
        losses.append(alone.step(x, y).loss)
        for optimizer in optimizers:
            advance(optimizer, [])
        advance(None, plan)
    return [dict(stage.state_dict()) for stage in stages], losses


def alone(world: int, mode: str, rule: str, every: int, warmup: int) -> list[dict[str, Tensor]]:
    """One process, one autograd graph."""
    stages = split(world, mode, rule)
    net = nn.Sequential(*stages)
    optimizer, plan = optimizer_of([net]), schedules(stages, every, warmup)
    for x, y in batches():
        with fd.condition_on(y):
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        advance(optimizer, plan)
    return [dict(stage.state_dict()) for stage in stages]


def differences(found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]) -> float:
    largest = 0.0
    for a, b in zip(found, wanted, strict=True):
        assert a.keys() == b.keys()
        for name, t in b.items():
            largest = max(largest, float((a[name].double() - t.double()).abs().max()))
    return largest


def moved(found: list[dict[str, Tensor]], world: int, mode: str, rule: str) -> bool:
    """Whether every parameter is another than at first."""
    first = [dict(s.state_dict()) for s in split(world, mode, rule)]
    return all(
        not torch.equal(a[name], b[name])
        for a, b in zip(found, first, strict=True)
        for name in b
        if name.endswith("weight")
    )


@pytest.mark.parametrize("world", [1, 2, 4])
def test_exact_is_backprop_in_one_process(world):
    found = [p for p, _ in ranks(partial(on_rank, mode="exact", lag=None, rule="none", every=1,
                                         warmup=0), world)]  # fmt: skip
    wanted = alone(world, "exact", "none", 1, 0)
    assert differences(found, wanted) < 1e-12
    assert moved(found, world, "exact", "none")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("world", "every", "warmup"), [(2, 1, 0), (4, 3, 4)])
def test_decoupled_without_lag_is_one_process(world, every, warmup, rule):
    """Warm-up, steps without targets, rules: each stage learns in its step what arrives in it."""
    run = partial(on_rank, mode="decoupled", lag=0, rule=rule, every=every, warmup=warmup)
    found = [p for p, _ in ranks(run, world)]
    assert differences(found, alone(world, "decoupled", rule, every, warmup)) < 1e-12
    assert moved(found, world, "decoupled", rule)


@pytest.mark.parametrize("mode", ["decoupled", "stale", "local"])
@pytest.mark.parametrize(("world", "lag"), [(2, 1), (2, 5), (3, 3)])
def test_lag_is_the_twin_to_the_bit(mode, world, lag):
    every, warmup = (2, 2) if mode == "decoupled" else (1, 0)
    found = ranks(partial(on_rank, mode=mode, lag=lag, rule="none", every=every, warmup=warmup),
                  world)  # fmt: skip
    wanted, losses = twin(world, mode, lag, "none", every, warmup)
    assert differences([p for p, _ in found], wanted) == 0.0
    assert [float(x) for x in found[-1][1]] == [float(x) for x in losses]


@pytest.mark.parametrize(("world", "lag"), [(2, 3), (3, 0), (3, 2)])
def test_true_targets_are_the_twins_to_the_bit(world, lag):
    run = partial(on_rank, mode="decoupled", lag=lag, rule="adam", every=2, warmup=2,
                  targets="true")  # fmt: skip
    found = [p for p, _ in ranks(run, world)]
    wanted, _ = twin(world, "decoupled", lag, "adam", 2, 2, targets="true")
    assert differences(found, wanted) == 0.0
    bootstrapped, _ = twin(world, "decoupled", lag, "adam", 2, 2)
    # Two stages have one cut, whose target is the true gradient anyway.
    assert (differences(found, bootstrapped) > 1e-6) == (world > 2)


class Failing(nn.Module):
    """Raises when it is told to."""

    now = False

    def forward(self, x: Tensor) -> Tensor:
        if self.now:
            raise RuntimeError("not now")
        return x


def test_a_true_gradients_way_back_leaves_buffers_and_generators():
    torch.manual_seed(0)
    failing = Failing()
    module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), failing)
    stage = Stage(module, 1, 3, synthesizer=fd.LinearSynthesizer(6))
    worker = Worker(stage, None, "decoupled", 4, None, targets="true")
    before = [b.clone() for b in module.buffers()], torch.get_rng_state()

    def same() -> bool:
        kept = zip(before[0], module.buffers(), strict=True)
        return all(torch.equal(*pair) for pair in kept) and torch.equal(
            before[1], torch.get_rng_state()
        )

    x, gradient = torch.ones(8, 4).cumsum(0), torch.ones(8, 6)
    assert worker._back(x, gradient).shape == x.shape and same()
    failing.now = True
    with pytest.raises(RuntimeError, match="not now"):
        worker._back(x, gradient)
    assert same()


@pytest.mark.parametrize("every", [1, 3])
def test_true_targets_are_the_gradients_of_backprop(every, monkeypatch):
    """Without a lag, each synthesizer learns what one graph over all stages gives at its output."""
    stages = split(4, "decoupled", "none")
    optimizer, plan = optimizer_of(list(stages)), schedules(stages, every, 0)
    alone, taught = Twin(stages, loss=F.cross_entropy, targets="true"), {}
    for i, worker in enumerate(alone.workers[:-1]):

        def learn(step, now, gradient, i=i, learn=worker.mailbox.learn):
            assert step == now
            taught[i] = gradient
            return learn(step, now, gradient)

        monkeypatch.setattr(worker.mailbox, "learn", learn)
    for step, (x, y) in enumerate(batches()):
        plain = copy.deepcopy([s.submodule if s.is_last else s.submodule.module for s in stages])
        outputs, h = [], x
        for module in plain:
            outputs.append(h := module(h))
        wanted = torch.autograd.grad(F.cross_entropy(h, y), outputs[:-1])
        alone.step(x, y)
        for stage, module in zip(stages, plain, strict=True):
            of = stage.submodule if stage.is_last else stage.submodule.module
            for b, once in zip(of.buffers(), module.buffers(), strict=True):
                assert torch.equal(b, once)  # a batch was counted once
        assert set(taught) == (set(range(3)) if step % every == 0 else set())
        for i, gradient in taught.items():
            assert float((gradient - wanted[i]).abs().max()) < 1e-12
        taught.clear()
        advance(optimizer, plan)


def under_another_backend(rank: int, world: int, store: str) -> tuple[dict[str, Tensor], Any]:
    from torch.testing._internal.distributed import fake_pg

    assert fake_pg  # its import makes that backend known
    dist.barrier()  # until both are connected
    dist.destroy_process_group()
    dist.init_process_group("fake", store=dist.FileStore(store, world), rank=rank,
                            world_size=world)  # fmt: skip
    assert dist.get_backend() == "fake"  # whose messages never arrive
    return on_rank(rank, world, "decoupled", 2, "adam", 1, 2)


def test_links_are_gloos_whatever_the_default_group_is_of(tmp_path):
    run = partial(under_another_backend, store=str(tmp_path / "store"))
    found = [p for p, _ in ranks(run, 2)]
    assert differences(found, twin(2, "decoupled", 2, "adam", 1, 2)[0]) == 0.0


def test_a_lag_of_its_own_for_each_stage():
    """What passes two cuts may be later than what passes one; the last entry says nothing."""
    found = [twin(3, "stale", lag, "none", 1, 0)[0] for lag in (2, [2, 2, 9], [4, 2, 0])]
    assert differences(found[0], found[1]) == 0.0 < differences(found[0], found[2])
    ages = Twin(split(3, "stale", "none"), loss=F.cross_entropy, mode="stale", lag=[4, 2, 0])
    for x, y in batches():
        ages.step(x, y)
    assert [w.ages.oldest for w in ages.workers] == [4, 2, 0]


TRUE = {"targets": "true"}


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        (None, {"targets": "late"}, "targets must be one of"),
        (None, {"mode": "stale", **TRUE}, 'targets="true" is of mode="decoupled", got'),
        (fd.FusedDNILinear(WIDTH, WIDTH).double(), TRUE, "back through a plain submodule"),
        (None, {"lag": [1, 2]}, "or 3 of them, one a stage, got"),
        (None, {"lag": [1, 2, -1]}, "integer of at least 0"),
    ],
)
def test_a_twin_refuses(changed, options, message):
    stages = split(3, "stale" if "mode" in options else "decoupled", "none")
    if changed is not None:
        stages[1] = Stage(changed, 1, 3)
    with pytest.raises(ValueError, match=message):
        Twin(stages, loss=F.cross_entropy, **options)


def test_a_lag_changes_what_is_learned():
    a, b = (twin(2, "decoupled", lag, "none", 1, 0)[0] for lag in (0, 5))
    assert differences(a, b) > 1e-6
