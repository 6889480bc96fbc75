"""Results of measurements, and what they say as text, Markdown or a page of HTML.

Every measurement makes a :class:`Result <fused_dni.report.schema.Result>`. For each kind there is
one function from that to :mod:`blocks <fused_dni.report.blocks>` (paragraphs, tables and figures),
and one renderer for each place where people read them.
"""

from fused_dni.report.blocks import (
    Block,
    Figure,
    Heading,
    Table,
    Text,
    as_markdown,
    as_text,
    drawable,
)
from fused_dni.report.errors import ReportError
from fused_dni.report.layout import blocks_of
from fused_dni.report.schema import Result, load, save

__all__ = [
    "Block",
    "Figure",
    "Heading",
    "ReportError",
    "Result",
    "Table",
    "Text",
    "as_markdown",
    "as_text",
    "blocks_of",
    "drawable",
    "load",
    "save",
]
