"""Reports: what a measurement's JSON says, as text, Markdown or a page of HTML.

Every measurement writes plain data with ``kind``, ``version`` and ``facts``. For each kind there is
one function from that data to :mod:`blocks <fused_dni.report.blocks>` (paragraphs, tables and
figures), and one renderer for each place where people read them.
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
from fused_dni.report.kinds import ReportError, blocks_of, load

__all__ = [
    "Block",
    "Figure",
    "Heading",
    "ReportError",
    "Table",
    "Text",
    "as_markdown",
    "as_text",
    "blocks_of",
    "drawable",
    "load",
]
