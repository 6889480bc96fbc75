"""Benchmarks: checked, then timed, warm or cold, on torch's own thread count.

``pytest bench --benchmark-only`` with ``-k`` for a question, ``--caches cold`` (or ``both``), and
``--benchmark-json FILE`` for ``fused-dni compare``.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from clocks import Clock
from fused_dni.measure.baseline import facts
from fused_dni.measure.waiting import Stopwatch
from fused_dni.report.times import PARTS

#: Most rounds of a benchmark.
MOST = 2000


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--caches",
        choices=("warm", "cold", "both"),
        default="warm",
        help="what benchmarks find in the last cache: what the call before left there (warm), or "
        "nothing of theirs (cold)",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "caches" in metafunc.fixturenames:
        asked = metafunc.config.getoption("--caches")
        metafunc.parametrize("caches", ["warm", "cold"] if asked == "both" else [asked])


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    """Say what ``fused-dni compare`` holds against the other file's."""
    machine_info["fused_dni"] = facts()


@pytest.fixture
def clock(request: pytest.FixtureRequest) -> Iterator[Clock]:
    """Made before ``benchmark``, which takes its timer from the mark."""
    with contextlib.closing(Stopwatch()) as watch:
        made = Clock(watch)
        request.node.add_marker(pytest.mark.benchmark(timer=made.now))
        yield made


@pytest.fixture
def timed(
    clock: Clock, benchmark: Any, caches: str, pytestconfig: pytest.Config
) -> Callable[..., None]:
    """Check, then time: ``timed(question, candidate, check, steps=n, device="cuda")``.

    ``check`` raises if the candidate is wrong, and then nothing is timed. ``steps`` divides the
    table's figures into time a step only in ``extra_info``; candidates of a group make equally
    many, so the printed columns compare as they are. ``device`` says whether the host's clock or
    the GPU's events count.
    """
    seconds = float(pytestconfig.getoption("benchmark_max_time"))
    fewest = max(int(pytestconfig.getoption("benchmark_min_rounds")), PARTS)

    def run(
        question: str,
        make: Callable[[], Callable[[], object]],
        check: Callable[[], None] | None = None,
        steps: int = 1,
        device: str = "cpu",
    ) -> None:
        if check is not None:
            check()
        candidate, cold = make(), caches == "cold"
        benchmark.group = f"{question}, cold caches" if cold else question
        benchmark.extra_info.update(steps=steps, threads=torch.get_num_threads(), caches=caches)
        if not benchmark.enabled:
            benchmark.pedantic(candidate)  # one call, not timed
            return
        repeats = 1 if cold else clock.repeats(candidate, device)
        benchmark.extra_info["repeats"] = repeats

        def sample() -> None:
            clock.measure(candidate, device, repeats, cold)

        sample()
        before = time.perf_counter()
        sample()
        whole = time.perf_counter() - before  # with what does not count
        rounds = min(max(math.ceil(seconds / whole), fewest), MOST)
        benchmark.pedantic(sample, rounds=rounds)

    return run
