"""Training on N devices, simulated: who waits for whom, at which latency, and what that costs."""

from fused_dni.measure.simulate.check import compare
from fused_dni.measure.simulate.modes import MODES, Case, simulate
from fused_dni.measure.simulate.sweep import sweep
from fused_dni.measure.simulate_settings import Failures, Link, Settings, Stragglers, Times

__all__ = [
    "MODES",
    "Case",
    "Failures",
    "Link",
    "Settings",
    "Stragglers",
    "Times",
    "compare",
    "simulate",
    "sweep",
]
