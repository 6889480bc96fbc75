"""A report as one page of HTML: figures inline, nothing loaded from anywhere, no script."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from fused_dni.report.blocks import Block, Figure, Heading, Table, Text

#: A number and its unit stay on one line.
_UNIT = re.compile(r"(\d) (?=%|(?:[µm]?s|[kMGT]?B)\b)")

#: What a cell of a column of numbers looks like: ``1.46 ms``, ``0.98 ~``, ``-``, ``(k = 4)`` not.
_NUMBER = re.compile(r"([~≈<>≤≥±×+\-−]? ?\d.*|[-–—~]?|n/a|nan|inf)", re.IGNORECASE)


def as_html(blocks: Iterable[Block], facts: Mapping[str, Any]) -> str:
    """Make one self-contained page; light or dark as the reader's browser asks.

    Args:
        blocks: a heading of level 1 is the title of the page, too.
        facts: of device, versions and command, for the foot of the page; None is left out.

    Raises:
        ImportError: there is a figure and matplotlib is missing (see :func:`drawable`).
    """
    title, parts = "fused_dni", []
    for number, block in enumerate(blocks):
        if isinstance(block, Heading):
            level = min(block.level, 6)
            if level == 1:
                title = block.text
            parts.append(f"<h{level}>{_inline(block.text)}</h{level}>")
        elif isinstance(block, Text):
            parts.append(f"<p{' class=lead' * block.lead}>{_inline(block.text)}</p>")
        elif isinstance(block, Table):
            parts.append(_table(block))
        else:
            parts.append(_figure(block, f"figure{number}"))
    rows = [
        f"<dt>{escape(str(name))}</dt><dd>{_fact(name, value)}</dd>"
        for name, value in facts.items()
        if value is not None
    ]
    page = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return page.substitute(title=escape(title), body="\n".join(parts), facts="\n".join(rows))


def _inline(text: str) -> str:
    """Mark up code and bold, all the Markdown that a paragraph may have.

    A library for Markdown would take what names hold, like ``*`` and ``_``, for more of it.
    """
    made = escape(text, quote=False)
    made = _UNIT.sub("\\1\N{NO-BREAK SPACE}", made)
    made = re.sub(r"`([^`\n]+)`", r"<code>\1</code>", made)
    return re.sub(r"\*\*([^*\n]+)\*\*", r"<strong>\1</strong>", made)


def _fact(name: str, value: Any) -> str:
    made = escape(str(value))
    return f"<code>{made}</code>" if name in ("command", "commit") else made


def _captioned(content: str, caption: str) -> str:
    below = f"\n<figcaption>{_inline(caption)}</figcaption>" if caption else ""
    return f"<figure>\n{content}{below}\n</figure>"


def _table(table: Table) -> str:
    columns = list(zip(*table.rows, strict=True)) or [()] * len(table.header)
    kinds = [_kind(column) for column in columns]

    def row(tag: str, cells: Iterable[str]) -> str:
        made = "".join(
            f"<{tag}{f' class={kind}' * bool(kind)}>{_inline(cell)}</{tag}>"
            for kind, cell in zip(kinds, cells, strict=True)
        )
        return f"<tr>{made}</tr>"

    body = "\n".join(row("td", cells) for cells in table.rows)
    return _captioned(
        f"<div class=scroll tabindex=0>\n<table>\n<thead>{row('th', table.header)}</thead>\n"
        f"<tbody>\n{body}\n</tbody>\n</table>\n</div>",
        table.caption,
    )


def _kind(column: Iterable[str]) -> str:
    """Choose a column's class: numbers go to the right, sentences may break."""
    cells = [cell.strip() for cell in column]
    if any(cells) and all(_NUMBER.fullmatch(cell) for cell in cells):
        return "number"
    return "prose" if max(map(len, cells), default=0) > 48 else ""


def _figure(figure: Figure, name: str) -> str:
    drawn = figure.svg(inline=True)
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    # Ids are one page's, not one plot's.
    drawn = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", drawn)
    label = escape(figure.caption)
    return _captioned(
        drawn.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip(), figure.caption
    )
