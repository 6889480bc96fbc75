"""A report as one page of HTML: figures inline, nothing loaded from anywhere, no script."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from fused_dni.report.blocks import Block, Figure, Heading, Table, Text

#: A number and its unit stay on one line.
_UNIT = re.compile(r"(\d) (?=%|(?:[µm]?s|[kMGT]?B)\b)")

#: What a cell of a column of numbers looks like: ``1.46 ms``, ``0.98 ~``, ``-``, ``(k = 4)`` not.
_NUMBER = re.compile(r"([~≈<>≤≥±×+\-−]? ?\d.*|[-–—~]?|n/a|nan|inf)", re.IGNORECASE)

_STYLE = """
:root {
  color-scheme: light dark;
  --text: #1d2733; --muted: #5b6775; --page: #ffffff; --raised: #f4f6f8; --line: #d8dee5;
  --accent: #0b62a8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --text: #e3e8ee; --muted: #9aa7b5; --page: #14181d; --raised: #1e242b; --line: #343d47;
    --accent: #6cb4f0;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
main, footer { max-width: 68rem; margin: 0 auto; padding: 0 1.5rem; }
main { padding-top: 2.5rem; padding-bottom: 2rem; }
h1, h2, h3 { line-height: 1.25; text-wrap: balance; overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; margin: 0 0 1rem; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 0.75rem; }
h3 { font-size: 1.05rem; margin: 2rem 0 0.5rem; }
p { max-width: 46rem; margin: 0 0 1rem; overflow-wrap: anywhere; white-space: pre-line; }
p.lead {
  font-size: 1.3rem; line-height: 1.45; max-width: none; margin-bottom: 2rem;
  padding: 0.2rem 0 0.2rem 1.1rem; border-left: 4px solid var(--accent);
}
code { font: 0.9em ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
figure { margin: 1.25rem 0 1.75rem; }
figcaption { color: var(--muted); font-size: 0.9rem; max-width: 46rem; margin-top: 0.6rem; }
.scroll { overflow: auto; max-height: 85vh; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
th, td { padding: 0.4rem 0.9rem; text-align: left; white-space: nowrap; vertical-align: top; }
td.prose { white-space: normal; min-width: 14rem; }
th {
  position: sticky; top: 0; background: var(--raised); font-weight: 600;
  box-shadow: inset 0 -1px var(--line);
}
td { border-top: 1px solid var(--line); }
tbody tr:first-child td { border-top: 0; }
tbody tr:hover td { background: var(--raised); }
.number { text-align: right; font-variant-numeric: tabular-nums; }
svg { display: block; max-width: 100%; height: auto; }
footer {
  border-top: 1px solid var(--line); padding-top: 1.25rem; padding-bottom: 2.5rem;
  color: var(--muted); font-size: 0.85rem;
}
dl {
  display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 0.2rem 1.2rem; margin: 0;
}
dt { font-weight: 600; }
dd { margin: 0; overflow-wrap: anywhere; }
@media print { .scroll { max-height: none; overflow: visible; } th { position: static; } }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
<footer>
<dl>
{facts}
</dl>
</footer>
</body>
</html>
"""


def as_html(blocks: Iterable[Block], facts: Mapping[str, Any]) -> str:
    """One self-contained page; light or dark as the reader's browser asks.

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
    return _PAGE.format(
        title=escape(title), style=_STYLE, body="\n".join(parts), facts="\n".join(rows)
    )


def _inline(text: str) -> str:
    """A paragraph's text with what little Markdown it may have: code and bold."""
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
    """A column's class: numbers go to the right, sentences may break."""
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
