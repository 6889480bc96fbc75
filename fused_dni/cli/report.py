"""``report``."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fused_dni.cli.arguments import PROGRAM, UsageError, common

if TYPE_CHECKING:
    from fused_dni.report import Block

FORMATS = (".html", ".md")


def add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="a page of HTML, Markdown or text from a measurement's JSON",
        description="Make a readable report from the JSON that a command wrote: one HTML page with "
        "its figures inside, Markdown with its figures beside it, or text on the terminal.",
        epilog=f"example:\n  {PROGRAM} verdict mlp --json > mlp.json\n"
        f"  {PROGRAM} report mlp.json -o mlp.html",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument("file", metavar="FILE.json", help="what a command wrote")
    report.add_argument(
        "-o", "--output", metavar="FILE", help="page to write, .html or .md (text on stdout)"
    )
    report.add_argument(
        "--json", action="store_true", help="say as JSON what was read and which files were written"
    )
    report.add_argument("--quiet", action="store_true", help="do not name the files written")
    common(report, threads=False)
    report.set_defaults(run=_report)


def _report(args: argparse.Namespace, command: str) -> int:
    from fused_dni.report import as_text, blocks_of, drawable, load

    page = None if args.output is None else _page(args.output)
    found = load(args.file)
    blocks = blocks_of(found)
    if page is None:
        if args.json:
            print(json.dumps({"kind": found["kind"], "version": found["version"], "files": []}))
        else:
            print(as_text(blocks))
        return 0
    files = _write(page, drawable(blocks), found["facts"])
    if args.json:
        named = [str(path) for path in files]
        print(json.dumps({"kind": found["kind"], "version": found["version"], "files": named}))
    elif not args.quiet:
        print(*files, sep="\n")
    return 0


def _page(given: str) -> Path:
    """Where the page goes; refused before anything is read."""
    page = Path(given)
    if page.suffix not in FORMATS:
        raise UsageError(f"--output must end in {' or '.join(FORMATS)}, got {given!r}")
    if page.is_dir():
        raise UsageError(f"--output {given} is a folder")
    if not page.parent.is_dir():
        raise UsageError(f"--output {given}: there is no folder {page.parent}")
    if not os.access(page if page.exists() else page.parent, os.W_OK):
        raise UsageError(f"--output {given} cannot be written: permission denied")
    return page


def _write(page: Path, blocks: list[Block], facts: dict[str, Any]) -> list[Path]:
    """The page and, of Markdown, the figures that lie beside it."""
    from fused_dni.report import Figure, as_markdown
    from fused_dni.report.html import as_html

    if page.suffix == ".html":
        page.write_text(as_html(blocks, facts), encoding="utf-8")
        return [page]
    figures = page.parent / f"{page.stem}-figures"
    made = as_markdown(blocks, figures, f"{figures.name}/")
    page.write_text(made + "\n", encoding="utf-8")
    return [page, *(figures / f"{b.name}.svg" for b in blocks if isinstance(b, Figure))]
