"""The measuring instrument itself: planted differences are found, equal things are not told apart,
and intervals cover what they claim to cover."""

import itertools
import json
import math
import random
import time

import pytest
import torch
from torch import nn

from fused_dni.measure import timing
from fused_dni.measure.waiting import Stopwatch
from fused_dni.report import intervals


def _spin(seconds: float):
    def call() -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    return call


def _timing(name: str, rounds) -> timing.Timing:
    return timing.Timing.of(name, tuple(rounds), tuple(rounds), 1)


def _work(amount: int):
    """Work that takes as long as ``amount`` says, however busy the machine is: on it all candidates
    run slower alike, which a delay by the clock would not."""

    def call() -> None:
        total = 0
        for i in range(amount):
            total += i * i

    return call


@pytest.fixture
def taking(monkeypatch):
    """``taking(seconds)``: a call that takes so long, on a clock that such calls alone turn."""
    now = 0.0

    class Turned(Stopwatch):
        def __init__(self) -> None:
            super().__init__(lambda: now)

        def _waits(self) -> float:
            return 0.0

    def make(seconds: float):
        def call() -> None:
            nonlocal now
            now += seconds

        return call

    monkeypatch.setattr(timing, "Stopwatch", Turned)
    return make


@pytest.mark.parametrize(
    ("ours", "theirs", "word"),
    [(2300, 2000, "slower"), (2000, 2300, "faster"), (2000, 2000, "inconclusive")],
)
def test_a_planted_difference_of_15_per_cent_is_called_rightly(ours, theirs, word):
    """Two of three verdicts at least: one of a hundred may be wrong, by what 99 % means."""
    found = []
    for seed in range(3):
        timings = timing.compare(
            {"theirs": _work(theirs), "ours": _work(ours)}, rounds=120, block=1, seed=seed
        )
        ratio = timing.ratio(timings["ours"], timings["theirs"])
        assert ratio.low <= ratio.median <= ratio.high
        found.append(timing.differs(timings["ours"], timings["theirs"]))
    assert found.count(word) >= 2
    assert {"slower": "faster", "faster": "slower"}.get(word) not in found


def _noisy(level: float, seed: int):
    """A clock's samples by a fixed random sequence: none of the machine's own noise."""
    generator = random.Random(seed)
    return lambda call, repeats, samples: [
        call() * generator.lognormvariate(0.0, level) for _ in range(samples)
    ]


def _synthetic(monkeypatch, ours: float, level: float, seed: int, **options) -> timing.Ratio:
    """Ours against a candidate of one second, on a clock with noise; rounds take no time."""
    monkeypatch.setattr(timing, "_host_clock", lambda watch: _noisy(level, seed))
    made = timing.compare({"theirs": lambda: 1.0, "ours": lambda: ours}, seed=seed, **options)
    return timing.ratio(made["ours"], made["theirs"])


@pytest.mark.parametrize(
    ("ours", "word"), [(1.15, "slower"), (1.0, "inconclusive"), (1 / 1.15, "faster")]
)
def test_under_heavy_noise_verdicts_are_right(monkeypatch, ours, word):
    """Samples that vary by a third: nine of ten are right and none says the opposite."""
    found = [_synthetic(monkeypatch, ours, 0.3, seed, rounds=200).verdict() for seed in range(40)]
    assert found.count(word) >= 36
    opposite = {"slower": "faster", "faster": "slower"}
    assert opposite.get(word) not in found


def test_a_run_goes_on_until_the_interval_is_narrow_and_no_further(monkeypatch):
    now = [0.0]

    def tick() -> float:
        now[0] += 0.01
        return now[0]

    monkeypatch.setattr(timing.time, "perf_counter", tick)

    def rounds(level: float, **options) -> int:
        monkeypatch.setattr(timing, "_host_clock", lambda watch: _noisy(level, 1))
        made = timing.compare({"a": lambda: 1.0, "b": lambda: 1.0}, seconds=0.5, **options)
        return len(made["a"].rounds)

    calm = rounds(0.001, precision=0.02)
    assert calm == rounds(0.2)  # without a precision noise changes nothing
    assert calm < rounds(0.1, precision=0.02) <= rounds(0.5, precision=0.02)
    assert rounds(0.5, precision=0.02) <= timing.PATIENCE * calm + 1


def test_only_the_second_half_of_a_staged_call_is_timed(taking):
    calls: list[str] = []
    staged = timing.Staged(lambda: calls.append("prepare") or 7, lambda given: calls.append(given))
    staged()
    assert calls == ["prepare", 7]
    heavy, light = taking(1.2e-3), taking(60e-6)
    timings = timing.compare(
        {
            "light": light,
            "behind": timing.Staged(heavy, lambda _: light()),
            "whole": timing.Staged(lambda: None, lambda _: (heavy(), light())),
        },
        rounds=12,
    )
    ratio = timing.ratio(timings["whole"], timings["behind"])
    assert ratio.median == pytest.approx(21.0)
    assert timings["behind"].repeats < timings["light"].repeats  # its samples hold both halves


def test_drift_that_hits_both_candidates_does_not_decide():
    generator = random.Random(1)
    drift = [1.0 + 0.05 * i for i in range(60)]
    a = _timing("a", [d * generator.gauss(1.0, 0.02) for d in drift])
    b = _timing("b", [d * generator.gauss(1.0, 0.02) for d in drift])
    c = _timing("c", [d * generator.gauss(1.1, 0.02) for d in drift])
    assert timing.differs(a, b) == "inconclusive"
    assert timing.differs(a, c) == "faster"  # though the ranges of a and c overlap almost wholly
    assert max(a.rounds) > min(c.rounds)


def test_too_few_rounds_are_inconclusive_however_large_the_difference():
    a, b = _timing("a", [1.0] * 5), _timing("b", [2.0] * 5)
    assert timing.differs(a, b) == "inconclusive"
    assert a.interval == (-math.inf, math.inf)
    assert json.loads(json.dumps(a.to_json()))["interval"] is None


def test_a_difference_below_the_margin_is_inconclusive():
    a, b = _timing("a", [1.0] * 50), _timing("b", [1.005] * 50)
    assert timing.differs(a, b) == "inconclusive"
    assert timing.differs(a, b, margin=0.001) == "faster"


@pytest.mark.parametrize("n", [6, 7, 20, 101, 1000])
def test_the_interval_of_the_median_covers_what_it_claims(n):
    generator = random.Random(n)
    trials, covered = 400, 0
    for _ in range(trials):
        low, high = intervals.median_interval([generator.expovariate(1.0) for _ in range(n)])
        covered += low <= math.log(2.0) <= high
    # at least 95 %, less three standard deviations of the count
    assert covered / trials > 0.95 - 3 * math.sqrt(0.05 * 0.95 / trials)


def test_the_normal_approximation_joins_the_exact_ranks():
    exact, approximate = intervals._rank(1000, 0.95), intervals._rank(1001, 0.95)
    assert approximate <= exact <= approximate + 2


def test_pairing_needs_one_run():
    with pytest.raises(ValueError, match=r"only timings from one compare"):
        timing.ratio(_timing("a", [1.0] * 8), _timing("b", [1.0] * 9))


def test_samples_are_long_enough_and_calls_are_counted(taking):
    calls, take = 0, taking(1e-6)

    def tiny() -> None:
        nonlocal calls
        calls += 1
        take()

    result = timing.compare({"tiny": tiny}, rounds=4, warmup=2, min_sample=1e-4, block=2)["tiny"]
    assert result.repeats == 100 and result.median == pytest.approx(1e-6)
    assert result.n == 8 and len(result.rounds) == 4
    # warm-up, calibration, and in each round one lead-in call and two samples
    assert calls >= 2 + 3 + 4 * (1 + 2 * result.repeats)
    calls = 0
    timing.compare({"tiny": tiny}, rounds=4, warmup=2, min_sample=1e-9, block=2)
    assert calls == 2 + 3 + 4 * (1 + 2)


def test_samples_of_all_candidates_are_of_one_length(taking):
    timings = timing.compare({"short": taking(50e-6), "long": taking(2e-3)}, rounds=3, warmup=1)
    assert (timings["short"].repeats, timings["long"].repeats) == (40, 1)


def test_the_order_changes_from_round_to_round_and_is_repeatable():
    def turns(seed: int) -> list[str]:
        seen: list[str] = []
        calls = {name: lambda name=name: seen.append(name) for name in "abc"}
        timing.compare(calls, rounds=6, warmup=1, min_sample=1e-9, block=1, seed=seed)
        return [name for name, _ in itertools.groupby(seen)]

    assert turns(0) == turns(0)
    assert turns(0) != turns(1)
    assert turns(0)[:3] == ["a", "b", "c"]  # warm-up and calibration
    assert turns(0) != ["a", "b", "c"] * 7


def test_progress_ends_at_one():
    seen: list[float] = []
    timing.compare({"a": _spin(300e-6)}, seconds=0.05, progress=seen.append)
    assert seen[-1] == 1.0 and seen == sorted(seen)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"candidates": {}}, "at least one"),
        ({"candidates": {"a": _spin(0)}, "seconds": 1.0, "rounds": 1}, "not both"),
        ({"candidates": {"a": _spin(0)}, "rounds": 0}, "at least 1"),
        ({"candidates": {"a": _spin(0)}, "seconds": -1.0}, "positive"),
        ({"candidates": {"a": _spin(0)}, "seconds": math.nan}, "positive"),
        ({"candidates": {"a": _spin(0)}, "precision": 0.0}, "precision must be positive"),
    ],
)
def test_bad_limits(arguments, message):
    with pytest.raises(ValueError, match=message):
        timing.compare(**arguments)


def test_an_error_in_a_candidate_comes_through_and_collection_is_on_again():
    import gc

    def broken() -> None:
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        timing.compare({"broken": broken}, rounds=1)
    assert gc.isenabled()


def test_a_combination_is_the_weighted_sum_of_rounds():
    cycle = timing.combine(
        "cycle", [(0.25, _timing("a", [4.0, 8.0])), (0.75, _timing("b", [4.0, 4.0]))]
    )
    assert cycle.rounds == (4.0, 5.0)


def test_the_floor_multiplies_forward_and_weight_gradient():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        timing.gemm_floor([(8, 16, 32), (8, 32, 4)])()
    assert counter.get_total_flops() == 2 * 2 * (8 * 16 * 32 + 8 * 32 * 4)


def test_peak_memory_is_that_of_the_step():
    kept = []

    def step() -> None:
        kept.clear()
        a = torch.empty(1 << 20, dtype=torch.uint8)
        b = torch.empty(1 << 21, dtype=torch.uint8)
        del a
        kept.append(torch.empty(1 << 19, dtype=torch.uint8))
        del b

    assert timing.peak_memory(step) == (1 << 20) + (1 << 21)


def test_a_release_of_what_lived_before_is_never_counted():
    """The profiler keeps the addresses of an earlier recording, and with them wrong sizes."""

    def many() -> list[torch.Tensor]:
        return [torch.empty(1 << 14, dtype=torch.uint8) for _ in range(256)]

    left = []
    timing.allocations(lambda: left.extend(many()))
    recorded = {tensor.data_ptr() for tensor in left}
    left.clear()  # where nothing records
    holders = many()
    assert recorded & {tensor.data_ptr() for tensor in holders}
    calls = []

    def step() -> None:
        calls.append(torch.empty(16, dtype=torch.uint8))
        if len(calls) == 2:  # the first that is recorded
            holders.clear()

    assert timing.peak_memory(step) == 2 * 16
    assert [bytes_ for _, bytes_ in timing.allocations(step)] == [16]


def test_peak_memory_of_backprop_grows_with_depth():
    def peak(depth: int) -> int:
        model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(depth)])
        model.requires_grad_(False)
        model[0].requires_grad_(True)
        x = torch.randn(512, 64)

        def step() -> None:
            model(x).mean().backward()
            model.zero_grad()

        return timing.peak_memory(step)

    activation = 512 * 64 * 4
    assert peak(16) - peak(8) == pytest.approx(8 * activation, rel=0.1)


def test_the_profiler_says_nothing(capfd):
    timing.peak_memory(lambda: torch.ones(8))
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""
