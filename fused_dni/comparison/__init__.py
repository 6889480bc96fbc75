"""Two files of results against each other: what became faster, what slower, what cannot be told."""

from fused_dni.comparison.compare import compare
from fused_dni.comparison.files import ComparisonError, Results, Row, read
from fused_dni.comparison.report import blocks

__all__ = ["ComparisonError", "Results", "Row", "blocks", "compare", "read"]
