"""``report``."""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fused_dni.cli.command import Command, UsageError
from fused_dni.cli.output import OutFile, say
from fused_dni.measure.options import FILE, option

if TYPE_CHECKING:
    from fused_dni.report import Block, Result

FORMATS = (".html", ".md")


@dataclass(kw_only=True)
class Report(Command):
    """Make a readable report from the JSON that a command wrote: one HTML page with its figures
    inside, Markdown with its figures beside it, or text on the terminal."""

    name = "report"
    summary = "a page of HTML, Markdown or text from a measurement's JSON"
    needs_library = False
    epilog = """example:
  {program} verdict mlp --json > mlp.json
  {program} report mlp.json -o mlp.html"""

    file: str = option(MISSING, FILE, "what a command wrote", place=True)
    output: str | None = option(
        None, FILE, "page to write, .html or .md (text on stdout)", short="-o"
    )
    json: bool = option(False, help="say as JSON what was read and which files were written")
    quiet: bool = option(False, help="do not name the files written")

    def run(self, command: str) -> int:
        from fused_dni.report import as_text, blocks_of, drawable, load
        from fused_dni.report.errors import WriteError

        page = None if self.output is None else _page(self.output)
        found = load(self.file)
        blocks = blocks_of(found)
        if page is None:
            if self.json:
                say(json.dumps({"kind": found["kind"], "version": found["version"], "files": []}))
            else:
                say(as_text(blocks))
            return 0
        try:
            files = _write(page, drawable(blocks), found)
        except WriteError:
            say(as_text(blocks))
            raise
        if self.json:
            named = [str(path) for path in files]
            say(json.dumps({"kind": found["kind"], "version": found["version"], "files": named}))
        elif not self.quiet:
            say("\n".join(map(str, files)))
        return 0


def _page(given: str) -> Path:
    """Say where the page goes; it is refused before anything is read."""
    page = Path(given)
    if page.suffix not in FORMATS:
        raise UsageError(f"--output must end in {' or '.join(FORMATS)}, got {given!r}")
    OutFile("--output", given, needed=True)
    return page


def _write(page: Path, blocks: list[Block], report: Result) -> list[Path]:
    """Write the page and, of Markdown, the figures that lie beside it."""
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
