"""The break-even map: where, over batch, width, k and synthesizer, the synthetic gradient pays."""

from fused_dni.measure.map.grid import Point, Settings, make_grid
from fused_dni.measure.map.layer import measure
from fused_dni.measure.map.store import merge

__all__ = ["Point", "Settings", "make_grid", "measure", "merge"]
