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

        out = io.StringIO()
        self._save(out, format="svg", metadata={"Date": None})
        return out.getvalue()

    def save(self, path: Path) -> Path:
        """Write the plot in the format that the file's name says.

        Raises:
            OSError: the file cannot be written.
            ValueError: an unknown format.
        """
        stable: dict[str, Any] = {"metadata": {"Date": None}} if path.suffix == ".svg" else {}
        self._save(path, dpi=120, **stable)
        return path

    def _save(self, to: Any, **options: Any) -> None:
        import matplotlib
        from matplotlib.figure import Figure as Canvas

        with matplotlib.rc_context(_SVG):
            canvas = Canvas(figsize=self.size, layout="constrained")
            self.draw(canvas)
            canvas.savefig(to, **options)


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


def as_markdown(
    blocks: Iterable[Block], folder: Path, link: str = "", suffix: str = ".svg", lower: int = 0
) -> str:
    """For a page of Markdown; figures are written beside it and linked.

    Args:
        folder: where figures go; made if absent.
        link: the folder as the page calls it, with its slash; also the place for a prefix of the
            files' names.
        suffix: format of the figures.
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
            folder.mkdir(parents=True, exist_ok=True)
            block.save(folder / f"{block.name}{suffix}")
            parts.append(f"![{block.caption}]({link}{block.name}{suffix})")
    return "\n\n".join(parts)
