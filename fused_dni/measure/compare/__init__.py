"""Two files of results against each other: what became faster, what slower, what cannot be told."""

from fused_dni.measure.compare.compare import compare
from fused_dni.report.layout import blocks_of as blocks
from fused_dni.report.times import ComparisonError, Results, Row, read

__all__ = ["ComparisonError", "Results", "Row", "blocks", "compare", "read"]
