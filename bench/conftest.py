"""Benchmarks run with torch's own thread count, one set of tables a machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.fixture
def timed(benchmark: Any) -> Callable[..., None]:
    """Check, then time: ``timed(group, candidate, check, steps=n)``.

    ``check`` raises if the candidate is wrong, and then nothing is timed. ``steps`` divides the
    table's figures into time a step only in ``extra_info``; candidates of a group make equally
    many, so the printed columns compare as they are.
    """

    def run(
        group: str,
        make: Callable[[], Callable[[], object]],
        check: Callable[[], None] | None = None,
        steps: int = 1,
    ) -> None:
        if check is not None:
            check()
        benchmark.group = group
        benchmark.extra_info.update(steps=steps, threads=torch.get_num_threads())
        candidate = make()
        benchmark(candidate)

    return run
