"""``report``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fused_dni.cli.arguments import PROGRAM, UsageError, common
from fused_dni.cli.output import OutFile, say

if TYPE_CHECKING:
    from fused_dni.report import Block, Result

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
    report.set_defaults(run=_report, needs_library=False)


def _report(args: argparse.Namespace, command: str) -> int:
    from fused_dni.report import as_text, blocks_of, drawable, load
    from fused_dni.report.errors import WriteError

    page = None if args.output is None else _page(args.output)
    found = load(args.file)
    blocks = blocks_of(found)
    if page is None:
        if args.json:
            say(json.dumps({"kind": found["kind"], "version": found["version"], "files": []}))
        else:
            say(as_text(blocks))
        return 0
    try:
        files = _write(page, drawable(blocks), found)
    except WriteError:
        say(as_text(blocks))
        raise
    if args.json:
        named = [str(path) for path in files]
        say(json.dumps({"kind": found["kind"], "version": found["version"], "files": named}))
    elif not args.quiet:
        say("\n".join(map(str, files)))
    return 0


def _page(given: str) -> Path:
    """Where the page goes; refused before anything is read."""
    page = Path(given)
    if page.suffix not in FORMATS:
        raise UsageError(f"--output must end in {' or '.join(FORMATS)}, got {given!r}")
    if not page.parent.is_dir():
        raise UsageError(f"--output {given}: there is no folder {page.parent}")
    OutFile("--output", given, needed=True)
    return page


def _write(page: Path, blocks: list[Block], report: Result) -> list[Path]:
    """The page and, of Markdown, the figures that lie beside it."""
    from fused_dni.report import Figure, as_markdown
    from fused_dni.report.errors import WriteError
    from fused_dni.report.files import unwritten, write_text
    from fused_dni.report.html import as_html
    from fused_dni.report.loaded import reading

    if page.suffix == ".html":
        with reading(report):
            made = as_html(blocks, report.facts)
        return [write_text(page, made)]
    figures = page.parent / f"{page.stem}-figures"
    try:
        made = as_markdown(blocks, figures, f"{figures.name}/")
    except WriteError:
        raise
    except OSError as error:
        raise unwritten(figures, error) from error
    write_text(page, made + "\n")
    return [page, *(figures / f"{b.name}.svg" for b in blocks if isinstance(b, Figure))]
