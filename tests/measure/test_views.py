"""What parts say of steps that were not measured: by hand."""

import pytest

from fused_dni.measure.verdict.views import amdahl, critical_path
from fused_dni.report.kinds.verdict import _amdahl as said


def test_the_share_is_what_a_free_prediction_would_leave_out():
    found = amdahl(fused=4.0, without=3.5, predict=0.5)
    assert found["share"] == pytest.approx(0.25) and found["speedup"] == pytest.approx(4 / 3)


def test_where_nothing_can_be_gained_the_share_is_zero():
    assert amdahl(fused=1.0, without=2.0, predict=0.5)["share"] == 0.0
    assert amdahl(fused=1.0, without=2.0, predict=0.5)["speedup"] == 1.0


def test_a_prediction_as_long_as_its_step_tells_nothing():
    """Of a small layer, whose step is one call: the prediction alone is one, too."""
    for predict in (2.0, 2.5):
        found = amdahl(fused=3.0, without=2.0, predict=predict)
        assert found["share"] is None and found["speedup"] is None
        assert "cannot be told" in said(found)


def test_the_lock_grows_with_the_chain_under_backprop_alone():
    parts = {
        "forward": 1.0,
        "predict": 0.25,
        "local backward": 1.5,
        "local backward, dx": 2.0,
        "update": 0.5,
    }
    found = critical_path(parts, [1, 4])
    assert found["backprop"] == [1 + 2 + 0.5, 4 * (1 + 2) + 0.5]
    assert found["dni"] == [3.25, 3.25]
    assert found["unlocked"] == pytest.approx([3.5 / 3.25, 12.5 / 3.25])
