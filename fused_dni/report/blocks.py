"""What a report is made of, and how it reads as text and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fused_dni import text

#: Two reports of the same data give the same file.
_SVG: Any = {"svg.hashsalt": "fused_dni", "svg.fonttype": "none", "font.size": 9}


@dataclass(frozen=True)
class Heading:
    """A heading; ``level`` 1 is the report's title."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column is to the left, the others to the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """A plot: ``draw`` fills an empty ``matplotlib.figure.Figure``; ``name`` is its file's stem."""

    name: str
    draw: Callable[[Any], None]
    caption: str
    size: tuple[float, float] = (6.4, 4.0)

    def svg(self) -> str:
        """The plot as SVG; the same data give the same bytes under one version of matplotlib."""
        import io

        import matplotlib
        from matplotlib.figure import Figure as Canvas

        with matplotlib.rc_context(_SVG):
            canvas = Canvas(figsize=self.size, layout="constrained")
            self.draw(canvas)
            out = io.StringIO()
            canvas.savefig(out, format="svg", metadata={"Date": None})
        return out.getvalue()


Block = Heading | Text | Table | Figure


def as_text(blocks: Iterable[Block]) -> str:
    """For a terminal; figures are left out."""
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"{block.text}\n{'=-'[block.level > 1] * len(block.text)}")
        elif isinstance(block, Text):
            parts.append(block.text)
        elif isinstance(block, Table):
            made = text.table(block.header, block.rows)
            parts.append(f"{made}\n{block.caption}" if block.caption else made)
    return "\n\n".join(parts)


def as_markdown(blocks: Iterable[Block], figures: Path, prefix: str = "", lower: int = 0) -> str:
    """For the docs; figures are written into the folder ``figures`` as SVG and linked.

    Args:
        figures: made if absent; links are relative to its parent.
        prefix: of the figures' file names.
        lower: by how many levels headings are lowered.
    """
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"{'#' * (block.level + lower)} {block.text}")
        elif isinstance(block, Text):
            parts.append(block.text)
        elif isinstance(block, Table):
            made = text.table(block.header, block.rows, markdown=True)
            parts.append(f"{made}\n\n{block.caption}" if block.caption else made)
        else:
            figures.mkdir(parents=True, exist_ok=True)
            path = figures / f"{prefix}{block.name}.svg"
            path.write_text(block.svg())
            parts.append(f"![{block.caption}]({figures.name}/{path.name})\n\n{block.caption}")
    return "\n\n".join(parts)
