"""``Schedule(target_every="auto")``: a k that follows what steps with targets measure."""

from __future__ import annotations

import copy
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import twins
from torch import Tensor, nn
from twins import BACKENDS, double, linear

import fused_dni as fd
from fused_dni import pace as pacing
from fused_dni import schedule as scheduling
from fused_dni.pace import Pace, Seen

pytestmark = pytest.mark.usefixtures("one_thread")
SGD = fd.SGD(0.05)


def seen(r2: float, size: float = 1.0) -> Seen:
    """Sums of a prediction that explains so much of a gradient of that size."""
    return Seen(size * max(r2, 1e-9), size, size * (1.0 - r2))


def planted(pace: Pace, r2: Any, targets: int) -> list[int]:
    """k behind each of so many targets, at which ``r2(k)`` was measured."""
    found = []
    for _ in range(targets):
        pace.observe([seen(r2(pace.k))], pace.k)
        found.append(pace.k)
    return found


def best_rate(r2: Any, ratio: float, mix: float, bounds: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """All k of the bounds and their rates, by the formula."""
    k = torch.arange(bounds[0], bounds[1] + 1, dtype=torch.float64)
    explained = torch.tensor([r2(int(i)) for i in k], dtype=torch.float64)
    gain = explained - (k - 1) / 3.0 * (r2(1) - explained)
    return k, (mix + (k - mix) * gain) / (k + ratio)


@pytest.mark.parametrize("bounds", [(1, 64), (2, 9), (3, 3)], ids=str)
def test_a_perfect_prediction_leads_to_the_largest_k(bounds: tuple[int, int]) -> None:
    found = planted(Pace(bounds, 500.0, 1.0), lambda k: 1.0, 160)
    assert found[-1] == bounds[1]
    assert found == sorted(found) and max(found) <= bounds[1] and min(found) >= bounds[0]


@pytest.mark.parametrize("bounds", [(1, 64), (2, 9)], ids=str)
def test_noise_leads_to_the_least_k(bounds: tuple[int, int]) -> None:
    drawn = random.Random(0)
    pace = Pace(bounds, 5.0, 1.0)
    for _ in range(60):
        # s, of the size of g, has nothing to do with it.
        together = drawn.gauss(0.0, 0.05)
        pace.observe([Seen(together, 1.0, 2.0 - 2.0 * together)], pace.k)
    assert pace.k == bounds[0]


def test_targets_that_cost_nothing_lead_to_the_least_k() -> None:
    assert planted(Pace((1, 64), 0.0, 1.0), lambda k: 0.9, 60)[-1] == 1


@pytest.mark.parametrize("mix", [0.0, 1.0])
@pytest.mark.parametrize("ratio", [1.0, 11.0, 100.0])
@pytest.mark.parametrize("fall", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("fresh", [0.4, 0.95])
def test_a_decay_leads_to_the_best_k(fresh: float, fall: float, ratio: float, mix: float) -> None:
    """Extrapolated from two of its points an exponential is exact: the k that is reached is as
    good as the best, by the formula in float64, but for the margin."""

    def r2(k: int) -> float:
        return fresh * fall**k

    bounds = (1, 128)
    pace = Pace(bounds, ratio, mix)
    found = planted(pace, r2, 500)[250:]
    # Longer ones are tried again, ever more rarely.
    most_often = max(set(found), key=found.count)
    assert found.count(most_often) > 0.7 * len(found)
    k, rates = best_rate(r2, ratio, mix, bounds)
    chosen = float(rates[k == most_often])
    assert float(rates.max()) - chosen <= pacing.MARGIN * abs(chosen) * (1 + 1e-12)


def test_the_rate_is_the_formula() -> None:
    pace = Pace((1, 64), 11.0, 0.5)
    pace.k = 8
    wanted, best, now = pace.best(0.7, 0.99, 11.0)
    k, rates = best_rate(lambda i: 0.7 * 0.99 ** (i - 8), 11.0, 0.5, (1, 64))
    assert wanted == int(k[rates.argmax()])
    assert best == pytest.approx(float(rates.max()), rel=1e-12)
    assert now == pytest.approx(float(rates[7]), rel=1e-12)


def test_noise_around_a_constant_does_not_flap() -> None:
    """Where it is settled k stays for the most part, though no measurement is like the other."""
    drawn = random.Random(1)
    pace = Pace((1, 64), 11.0, 1.0)
    found = planted(pace, lambda k: 0.9 * 0.985**k + drawn.gauss(0.0, 0.003), 600)[200:]
    changes = sum(a != b for a, b in itertools.pairwise(found))
    assert changes <= 400 / 40
    assert max(found) <= 2 * min(found)


def test_k_stays_for_some_targets() -> None:
    found = planted(Pace((1, 64), 500.0, 1.0), lambda k: 1.0, 60)
    lengths = [len(list(group)) for k, group in itertools.groupby(found) if k < 64]
    assert lengths[0] == pacing.PATIENCE - 1  # k is 4 before the first
    assert lengths[1:-1] == [6, 8, 11, 16]  # in front of a longer one, k targets
    assert all(b <= max(a + 1, round(1.42 * a)) for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("together", [0.0, -0.5])
def test_a_prediction_that_points_elsewhere_makes_k_the_least_at_once(together: float) -> None:
    pace = Pace((2, 64), 500.0, 1.0)
    assert planted(pace, lambda k: 1.0, 50)[-1] > 16
    # One layer of two, whatever the distance.
    pace.observe([seen(1.0), Seen(together, 1.0, 2.0)], 3)
    assert pace.k == 2


def test_the_layer_that_is_predicted_worst_counts() -> None:
    pace = Pace((1, 64), 5.0, 1.0)
    for _ in range(60):
        pace.observe([seen(1.0, 100.0), seen(0.9 * 0.5**pace.k)], pace.k)
    alone = Pace((1, 64), 5.0, 1.0)
    assert pace.k == planted(alone, lambda k: 0.9 * 0.5**k, 60)[-1] < 4


@pytest.mark.parametrize(
    "sums", [(float("nan"), 1.0, 0.0), (1.0, float("inf"), 0.0), (0.0, 0.0, 0.0)]
)
def test_what_says_nothing_is_not_looked_at(sums: tuple[float, float, float]) -> None:
    pace = Pace((1, 64), 5.0, 1.0)
    planted(pace, lambda k: 0.8, 6)
    before = pace.state_dict()
    pace.observe([Seen(*sums)], pace.k)
    assert pace.state_dict() == before


def test_a_fall_that_is_no_noise_is_a_retreat() -> None:
    """To a quarter of k at once; then k grows again, and for a long time not to what it was."""
    pace = Pace((1, 16), 500.0, 1.0)
    drawn = random.Random(2)

    def r2(_: int) -> float:
        return 0.8 + drawn.gauss(0.0, 0.01)

    assert planted(pace, r2, 80)[-1] == 16
    pace.observe([seen(0.7)], 16)
    assert pace.k == 4
    found = planted(pace, r2, pacing.LONGER * pacing.AGAIN + 60)
    held = found[: pacing.LONGER * pacing.AGAIN - 1]
    assert max(held) == 11 and held[-1] == 11
    assert found[-1] == 16


def test_noise_is_no_fall() -> None:
    drawn = random.Random(3)
    pace = Pace((1, 16), 500.0, 1.0)
    found = planted(pace, lambda k: 0.6 + drawn.gauss(0.0, 0.03), 600)[100:]
    assert min(found) > 16 // pacing.RETREAT


def test_costs_that_are_measured() -> None:
    """Medians of cycles: as told the same ratio, and an outlier changes nothing."""
    timed, told = Pace((1, 64), None, 1.0), Pace((1, 64), 11.0, 1.0)
    for i in range(80):
        timed.time(None if timed.k == 1 else 5.0 if i == 20 else 0.01, 0.12)
        for pace in (timed, told):
            pace.observe([seen(0.8 * 0.98**pace.k)], pace.k)
    assert timed.ratio() == pytest.approx(11.0)
    assert timed.k == told.k


def test_without_a_step_to_time_k_leaves_the_least() -> None:
    pace = Pace((1, 64), None, 1.0)
    pace.observe([Seen(-1.0, 1.0, 2.0)], 1)
    assert pace.k == 1
    for _ in range(pacing.PATIENCE):
        pace.time(None, 0.1)
        pace.observe([seen(0.8)], pace.k)
    assert pace.k == 2


# ---------------------------------------------------------------------------------------------
# In training


def bottom(rule: Any = None) -> nn.Module:
    """A segment of ordinary layers, predicted for as one."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)).double()
    return fd.Decoupled(inner, fd.LinearSynthesizer(5, 5, dtype=torch.float64), update=rule)


def chain(rule: Any = None) -> nn.Module:
    """Two fused layers; the segment's context is told to both."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"update": rule, "context_features": 5, "dtype": torch.float64}
    return nn.Sequential(
        fd.FusedDNILinear(4, 6, activation="tanh", **options), fd.FusedDNILinear(6, 5, **options)
    )


MODELS = {"segment": bottom, "layers": chain}
models = pytest.mark.parametrize("name", MODELS)
rules = pytest.mark.parametrize("rule", [None, SGD], ids=["returned", "fused"])
AUTO: dict[str, Any] = {"warmup_steps": 6, "target_every": "auto", "mix": 1.0, "cost_ratio": 9.0}


class Run:
    """A training that can be stopped and gone on with."""

    def __init__(self, name: str, rule: Any, **schedule: Any) -> None:
        self.model = MODELS[name](rule)
        left = list(fd.ordinary_parameters(self.model) if rule else self.model.parameters())
        self.optimizers: list[Any] = [torch.optim.Adam(left, 0.01)] if left else []
        if rule is not None:
            self.optimizers.append(fd.FusedOptimizer(self.model))
        self.schedule = fd.Schedule(self.model, **{**AUTO, **schedule})
        self.ks: list[tuple[bool, int | None]] = []

    def train(self, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            x, y = double(8, 4), double(8, 5)
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            with fd.condition_on(y):
                h = self.model(x)
                if self.schedule.target:
                    (h - y).square().sum(1).mean().backward()
                else:
                    fd.backward_local(h)
            for optimizer in self.optimizers:
                optimizer.step()
            self.ks.append((self.schedule.target, self.schedule.k))
            self.schedule.step()

    def state(self) -> dict[str, Any]:
        return copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "optimizers": [o.state_dict() for o in self.optimizers],
                "schedule": self.schedule.state_dict(),
            }
        )

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
        self.schedule.load_state_dict(state["schedule"])


@models
@rules
def test_a_run_repeated_has_the_same_bits(name: str, rule: Any) -> None:
    runs = [Run(name, rule) for _ in range(2)]
    for run in runs:
        run.train(range(110))
    assert runs[0].ks == runs[1].ks and len({k for _, k in runs[0].ks}) > 1
    twins.unchanged(*(twins.snapshot(run.model) for run in runs))


@pytest.mark.parametrize("stop", [3, 6, 7, 53])
@pytest.mark.parametrize(("name", "rule"), [("segment", None), ("layers", SGD)])
def test_a_run_gone_on_with_has_the_same_bits(name: str, rule: Any, stop: int) -> None:
    """In warm-up, in front of and behind a target, within a cycle; through a file."""
    whole, first, second = (Run(name, rule) for _ in range(3))
    whole.train(range(110))
    first.train(range(stop))
    state = first.state()
    state["schedule"] = json.loads(json.dumps(state["schedule"]))
    second.load(state)
    second.train(range(stop, 110))
    assert first.ks + second.ks == whole.ks
    assert len({k for _, k in whole.ks}) > 1
    for mine, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert second.schedule.state_dict() == whole.schedule.state_dict()


@models
@rules
def test_it_sees_what_diagnostics_sees(name: str, rule: Any) -> None:
    """The sums that it takes of a step are those of the layers' statistics in the unit 1."""
    run = Run(name, rule)
    taken: list[list[Seen]] = []
    pace = run.schedule._pace
    assert pace is not None
    observe = pace.observe
    pace.observe = lambda s, d: (taken.append(s), observe(s, d))[1]  # type: ignore[method-assign, func-returns-value]
    run.train(range(6))
    for step in range(6, 40):
        fd.diagnostics(run.model, reset=run.schedule.target)
        run.schedule._before = run.schedule._sums()
        told = run.schedule.target
        run.train(range(step, step + 1))
        if told:
            found = fd.diagnostics(run.model)
            for layer, sums in zip(found.values(), taken[-1], strict=True):
                loss = sums.squared_error / layer["targets"]
                assert loss == pytest.approx(layer["synthesizer_loss"], rel=1e-9)
                size = (sums.g_dot_g * (layer["norm_ratio"] ** 2 * sums.g_dot_g)) ** 0.5
                assert sums.s_dot_g == pytest.approx(layer["cosine"] * size, rel=1e-9, abs=1e-12)
    assert len(taken) > 4


@pytest.mark.parametrize("backend", BACKENDS)
@rules
def test_every_backend_is_seen(backend: str, rule: Any) -> None:
    torch.manual_seed(0)
    layer = linear(4, 5, update=rule, backend=backend)
    schedule = fd.Schedule(layer, target_every="auto", cost_ratio=9.0)
    measured = []
    for _ in range(3):
        x, g = double(6, 4), double(6, 5)
        with torch.no_grad():
            s = 6 * twins.synthetic(layer, layer(x))
        layer(x).backward(g)
        [sums] = schedule._measured()
        measured.append(sums)
        expected = torch.stack([(s * 6 * g).sum(), (6 * g).square().sum()])
        found = torch.tensor(sums[:2], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert sums.squared_error == pytest.approx(float((s - 6 * g).square().sum()), rel=1e-9)
        schedule._before = schedule._sums()


def test_the_first_cycle_and_warm_up() -> None:
    """A target right behind warm-up, whose prediction is a step old; then every fourth."""
    run = Run("segment", None)
    run.train(range(20))
    assert [told for told, _ in run.ks] == [True] * 7 + [False] * 3 + [True] + [False] * 3 + [
        True, False, False, False, True, False,
    ]  # fmt: skip
    assert {k for _, k in run.ks} == {4}


def test_a_state_of_another_model() -> None:
    run = Run("segment", None)
    before = run.schedule.state_dict()
    with pytest.raises(ValueError, match="the state is of 2 layers .* this model has 1"):
        run.schedule.load_state_dict(Run("layers", None).schedule.state_dict())
    assert run.schedule.state_dict() == before


def test_k_of_a_number() -> None:
    layer = linear(3, 3)
    assert [fd.Schedule(layer, target_every=k).k for k in (1, 7, None)] == [1, 7, None]


@pytest.mark.parametrize("pause", [0.0, 50.0])
def test_by_the_clock(pause: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds between calls of step(): what a target adds is ten times what a step costs. Pauses,
    one in most cycles and in some of the steps with a target, are of no step."""
    run = Run("segment", None, cost_ratio=None)
    now = 0.0
    monkeypatch.setattr(scheduling.time, "perf_counter", lambda: now)
    for step in range(80):
        told = run.schedule.target
        now += 11.0 if told else 1.0
        now += pause * (step % 5 == 3)
        run.train(range(step, step + 1))
    pace = run.schedule._pace
    assert pace is not None and pace.ratio() == pytest.approx(10.0)
    twin = Run("segment", None, cost_ratio=10.0)
    twin.train(range(80))
    assert run.ks == twin.ks


def test_a_state_from_before() -> None:
    run = Run("segment", None)
    run.train(range(50))
    run.schedule.load_state_dict({"steps": 50})
    assert run.schedule.steps == 50 and run.schedule.k == 4 and run.schedule.target
    state = run.schedule.state_dict()["pace"]
    assert (state["due"], state["distance"], state["sums"], state["count"]) == (50, 0, [], 0)
    run.train(range(50, 51))
    assert run.schedule.state_dict()["pace"]["count"] == 0  # the age of its prediction is not known
    fixed = fd.Schedule(run.model, target_every=5)
    fixed.load_state_dict(Run("segment", None).schedule.state_dict() | {"steps": 4})
    assert fixed.state_dict() == {"steps": 4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_every": "often"}, "at least 1, \"auto\" or None, got 'often'"),
        ({"target_every": 4, "cost_ratio": 2.0}, "bounds and cost_ratio go with"),
        ({"target_every": 4, "bounds": (1, 8)}, "bounds and cost_ratio go with"),
        ({"bounds": (0, 8)}, r"1 <= least <= largest, got \(0, 8\)"),
        ({"bounds": (8, 4)}, r"1 <= least <= largest, got \(8, 4\)"),
        ({"bounds": (1, 2.5)}, r"1 <= least <= largest, got \(1, 2.5\)"),
        ({"bounds": 8}, "1 <= least <= largest, got 8"),
        ({"cost_ratio": -1.0}, "cost_ratio must be None or finite and at least 0, got -1.0"),
        ({"cost_ratio": float("nan")}, "cost_ratio must be None or finite and at least 0, got nan"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    layer = linear(3, 3)
    before = layer.phase
    with pytest.raises(ValueError, match=message):
        fd.Schedule(layer, **{"target_every": "auto", **arguments})
    assert layer.phase is before


def test_nobody_who_can_learn() -> None:
    frozen = linear(3, 3)
    frozen.synthesizer.requires_grad_(False)
    for model in (frozen, linear(3, 3, synthesizer=None), fd.FusedDNILSTM(3, 3)):
        with pytest.raises(ValueError, match="needs a layer whose synthesizer learns"):
            fd.Schedule(model, target_every="auto")
    fd.Schedule(nn.ModuleList([frozen, linear(3, 3), fd.FusedDNILSTM(3, 3)]), target_every="auto")


# ---------------------------------------------------------------------------------------------
# Replicas


def _replica(rank: int, file: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2
    )
    try:
        torch.manual_seed(0)
        model = nn.Sequential(
            fd.FusedDNILinear(4, 6, activation="tanh", dtype=torch.float64),
            nn.Linear(6, 5).double(),
        )
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)

        def train(schedule: fd.Schedule, steps: int) -> list[int | None]:
            found = []
            for step in range(steps):
                torch.manual_seed(2 * step + rank)  # each sees rows of its own
                optimizer.zero_grad()
                parallel(double(8, 4)).square().sum(1).mean().backward()  # linear in h at h
                optimizer.step()
                schedule.step()
                found.append(schedule.k)
            return found

        ks = train(fd.Schedule(model, target_every="auto", mix=1.0, cost_ratio=9.0), 200)
        try:
            train(fd.Schedule(model, target_every="auto"), 1)
            said = ""
        except RuntimeError as error:
            said = str(error)
        torch.save((ks, model.state_dict(), said), f"{out}.{rank}")
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def test_replicas_choose_one_k(tmp_path: Path) -> None:
    """From the sums over all; by clocks of their own they would not."""
    ranks.replicas(_replica, tmp_path / "init", tmp_path / "out")
    (ks, state, said), (others, other, _) = (torch.load(tmp_path / f"out.{r}") for r in range(2))
    assert ks == others and len(set(ks)) > 1
    for key, value in state.items():
        if "statistics" not in key:
            assert torch.equal(value, other[key]), key
    assert "needs cost_ratio" in said
