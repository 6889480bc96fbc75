"""What a result says, in the order of all kinds: title, sentence, what its kind has, origin."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fused_dni.report import words
from fused_dni.report.blocks import Block, Heading, Table, Text, as_markdown, as_text
from fused_dni.report.loaded import reading
from fused_dni.report.schema import Result


def blocks_of(result: Result, *, origin: bool = True) -> list[Block]:
    """Say what a result says: the title, the sentence, what its kind has, notes, where it is from.

    Args:
        result: of any kind.
        origin: False where a page says itself where it is from.

    Raises:
        ReportError: the file that it is from does not hold what a report of this kind does.
    """
    with reading(result):
        said = result.described()
        made: list[Block] = [Heading(said.title, 1), Text(said.sentence, lead=True)]
        made += [*said.module().blocks(said), *map(Text, said.notes)]
        if said.memory_is:
            made.append(Text(f"Memory: {said.memory_is}."))
        if origin and (line := words.provenance(said.facts)):
            made.append(Text(line))
        return [_as_text(block) for block in made if block != Text("", lead=True)]


def tables(result: Result, *, markdown: bool = False) -> str:
    """Write the tables of a result with what is to be read under them, as text or as Markdown."""
    said = result.described()
    made = [b for b in own_blocks(said) if isinstance(b, (Table, Text))]
    made += [*map(Text, said.notes), Text(f"Memory: {said.memory_is}.")]
    return as_markdown(made, Path()) if markdown else as_text(made)


def own_blocks(result: Result) -> list[Block]:
    """Say what a result's kind has alone, for a page that gives the rest."""
    return [_as_text(block) for block in result.module().blocks(result)]


def _as_text(block: Block) -> Block:
    """Return the same, of strings alone: a name that is a number in somebody's file is one here."""
    if isinstance(block, (Heading, Text)):
        return replace(block, text=str(block.text))
    if isinstance(block, Table):
        rows = [[str(cell) for cell in row] for row in block.rows]
        if any(len(row) != len(block.header) for row in rows):
            raise ValueError("rows of a table differ in length")
        return replace(block, header=[str(cell) for cell in block.header], rows=rows)
    return block
