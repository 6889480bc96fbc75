"""What a report is made of, and how it reads as text and as Markdown."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fused_dni.report import text
from fused_dni.report.errors import ReportError
from fused_dni.report.files import unwritten

#: Two reports of the same data give the same file.
_STYLE: Any = {"svg.hashsalt": "fused_dni", "svg.fonttype": "none", "font.size": 9}

#: For a page with a text colour of its own: the colour in which text and axes are drawn before it
#: is replaced (no plot asks for it), and no background.
_INK = "#010203"
_ON_A_PAGE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), _INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
}


@dataclass(frozen=True)
class Heading:
    """A heading; ``level`` 1 is the report's title."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph; ``lead`` is the sentence that the report comes down to, set large on a page."""

    text: str
    lead: bool = False


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

    def svg(self, *, inline: bool = False) -> str:
        """Return the plot as SVG; the same data give the same bytes under one version of
        matplotlib.

        Args:
            inline: for a page's own markup: text and axes take the page's text colour.

        Raises:
            ReportError: it cannot be drawn from what the report holds.
        """
        import io

        out = io.StringIO()
        style = _ON_A_PAGE if inline else {}
        self._save(out, style, format="svg", metadata={"Date": None})
        drawn = out.getvalue()
        if inline:
            for colour in (_INK, "stroke: #000000"):
                drawn = drawn.replace(colour, colour.replace(colour[-7:], "currentColor"))
        return drawn

    def save(self, path: Path) -> Path:
        """Write the plot in the format that the file's name says.

        Raises:
            WriteError: the file cannot be written.
            ReportError: an unknown format, or it cannot be drawn from what the report holds.
        """
        stable: dict[str, Any] = {"metadata": {"Date": None}} if path.suffix == ".svg" else {}
        try:
            self._save(path, {}, dpi=120, **stable)
        except OSError as error:
            raise unwritten(path, error) from error
        return path

    def _save(self, to: Any, style: dict[str, Any], **options: Any) -> None:
        import matplotlib
        from matplotlib.figure import Figure as Canvas

        rc: Any = {**_STYLE, **style}
        with matplotlib.rc_context(rc), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # glyphs that no font has, tight places
            canvas = Canvas(figsize=self.size, layout="constrained")
            try:
                self.draw(canvas)
                _no_formulas(canvas)
                canvas.savefig(to, **options)
            except ReportError:
                raise
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise ReportError(
                    f"does not hold what the figure {self.name!r} is drawn from: {reason}"
                ) from error


def _no_formulas(canvas: Any) -> None:
    """Show names that hold dollars as they are, but what matplotlib itself writes."""
    from matplotlib.text import Text as Artist

    for artist in canvas.findobj(Artist):
        if "$" in artist.get_text() and r"\mathdefault" not in artist.get_text():
            artist.set_text(label(artist.get_text()))


def label(name: str) -> str:
    """Escape what matplotlib would take for the beginning of a formula."""
    return name.replace("$", r"\$")


Block = Heading | Text | Table | Figure


def drawable(blocks: Iterable[Block]) -> list[Block]:
    """Leave figures out, and say so in a paragraph, where matplotlib is missing."""
    found = list(blocks)
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        rest: list[Block] = [block for block in found if not isinstance(block, Figure)]
        left_out = len(found) - len(rest)
        if left_out:
            figures = "1 figure is" if left_out == 1 else f"{left_out} figures are"
            rest.append(Text(f"{figures} left out: {error} (pip install matplotlib)."))
        return rest
    return found


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
