"""Ceilings and floors: rates are work over time, and nothing is below a floor."""

import pytest
import torch

from fused_dni.measure import timing
from fused_dni.measure.verdict.ceilings import LARGE_COPY, LARGE_PRODUCT, Ceilings, measure_ceilings
from fused_dni.measure.verdict.work import Work


def test_a_floor_is_by_arithmetic_or_by_traffic():
    ceilings = Ceilings({"large": 100.0, "own": 50.0}, {"large": 10.0, "own": 40.0})
    assert ceilings.floor(Work(1000, 8)) == 10.0
    assert ceilings.floor(Work(100, 80)) == 2.0


def test_rates_are_work_over_time(monkeypatch):
    seen = {}

    def compare(calls, **options):
        for name, call in calls.items():
            call()
            seen[name] = timing.Timing.of(name, (0.5,) * 8, (0.5,) * 8, 1)
        return seen

    monkeypatch.setattr(timing, "compare", compare)
    monkeypatch.setitem(LARGE_PRODUCT, "cpu", 16)
    monkeypatch.setitem(LARGE_COPY, "cpu", 4096)
    found = measure_ceilings(torch.float32, torch.device("cpu"), [(2, 3, 4), (2, 4, 5)], 40_000)
    # Forward and weight gradient of each shape, a multiply-add being two.
    assert found.flops == {
        "16 x 16 x 16": 4 * 16**3 / 0.5,
        "the segment's own": 4 * (2 * 3 * 4 + 2 * 4 * 5) / 0.5,
    }
    assert found.bytes == {"large": 4096 / 0.5, "the segment's own": 40_000 / 0.5}
    assert set(found.to_json()) == {"flops per second", "bytes per second"}


def test_measured_ceilings_are_positive(monkeypatch):
    monkeypatch.setitem(LARGE_PRODUCT, "cpu", 16)
    monkeypatch.setitem(LARGE_COPY, "cpu", 4096)
    found = measure_ceilings(torch.float64, torch.device("cpu"))
    assert min(*found.flops.values(), *found.bytes.values()) > 0
    assert found.floor(Work(0, 0)) == pytest.approx(0.0)
