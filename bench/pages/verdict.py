"""``docs/verdict.md``, the tables beside it, and the lines of both in the README."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from claims import QUESTIONS, Question, answered
from fused_dni.report import Block, Figure, Table
from fused_dni.report.blocks import as_markdown
from pages.cells import threads_of, where
from readings import Answer, Bullet, Report
from stored import ROOT, matching, named

PAGE = ROOT / "docs" / "verdict.md"
TABLES = ROOT / "docs" / "verdict-tables.md"
FIGURES = ROOT / "docs" / "verdict"
#: What the README says, a line each, and the picture above it.
BULLETS = ("tops", "iterations", "accuracy", "rivals", "reach")
PICTURE = "rivals"
#: What a table of the short page may have.
ROWS = 8

HEAD = """# The verdict

Is the synthetic gradient really cheaper? What people say of it, and what was measured of each
claim. All tables, the commands and what else was measured are in
[verdict-tables.md](verdict-tables.md). Both pages are made from `bench/results` by
`python bench/answers.py render`; `make answers MNIST=DIR CORPUS=FILE` measures them on another
machine.

Cheaper, faster and slower mean that the 99 % interval of paired ratios lies beyond one by more than
a per cent. Backprop is backprop *on the same kernels*, unless it says stock: what fusion saves is
not the synthetic gradient's. k: targets, and lessons for the synthesizers, on every k-th step.
"seldom", "in part" and "mostly" are counted: below a quarter, below three quarters, not all."""

TABLES_HEAD = """# The tables behind the verdict

All that [the verdict](verdict.md) rests on, claim by claim: what was measured, on which machine, by
which command. Made from `bench/results` by `python bench/answers.py render`."""


def provenance(reports: dict[str, Report]) -> str:
    """Device, versions, and the commands."""
    facts = [report["facts"] for report in reports.values()]
    asked = list(dict.fromkeys(of["command"] for of in facts if of["command"]))
    more = f" and {len(asked) - 1} like it" if len(asked) > 1 else ""
    run = f": `{asked[0]}`{more}" if asked else ""
    return f"{where(facts[0], facts)}{run}."


def device(reports: dict[str, Report]) -> str:
    """Say where results are from, and with how many threads."""
    facts = [report["facts"] for report in reports.values()]
    return f"{named(facts[0])}, {threads_of(facts)}"


def gpu() -> str:
    """Say which GPUs there are figures of."""
    found = sorted({named(report["facts"]) for report in matching("*-gpu").values()})
    if not found:
        return "No GPU figure has been measured yet."
    return f"GPU figures ({', '.join(found)}) are in docs/gpu.md, none of them on this page."


def anchor(heading: str) -> str:
    """Return the part of a link behind #, as GitHub and MyST make it of a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.lower())
    return kept.strip().replace(" ", "-")


def figures_of(question: Question, machine: int, blocks: list[Block]) -> list[Block]:
    """Return the blocks, with figures under the names of their files."""
    return [
        replace(block, name=f"{question.key}-{machine}-{place}-{block.name}")
        if isinstance(block, Figure)
        else block
        for place, block in enumerate(blocks, 1)
    ]


def each() -> Iterator[tuple[Question, list[tuple[dict[str, Report], Answer]]]]:
    """Yield every question with what is known, a machine at a time; figures under their files'
    names."""
    for question in QUESTIONS:
        found = []
        for machine, (reports, answer) in enumerate(answered(question), 1):
            blocks = figures_of(question, machine, answer.blocks)
            shown = answer.shown
            if isinstance(shown, Figure):
                shown = blocks[answer.blocks.index(shown)]
            found.append((reports, answer._replace(blocks=blocks, shown=shown)))
        yield question, found


def open_(question: Question) -> str:
    """Say what stands where there is no answer."""
    return "Not measured yet." if question.answer else "Left open."


def summary(below: str = TABLES.name) -> str:
    """Return the table of all claims: answer, figure, device."""
    lines = ["| they say | answer | figure | device |", "| --- | --- | --- | --- |"]
    for question, found in each():
        shown = any(answer.shown is not None for _, answer in found)
        link = f"[{question.claim}]({'' if shown else below}#{anchor(question.claim)})"
        if not found:
            lines.append(f"| {link} | {open_(question)[:-1].lower()} | - | - |")
        for reports, answer in found:
            lines.append(f"| {link} | {answer.answer} | {answer.number} | {device(reports)} |")
    return "\n".join(lines)


def page(figures: Path) -> str:
    """Return the short page; its figures are written into a folder."""
    parts = [HEAD, gpu(), "## In one table", summary()]
    for question, found in each():
        if not any(answer.shown is not None for _, answer in found):
            continue
        parts.append(f"## {question.claim}")
        for reports, answer in found:
            parts.append(f"{answer.sentence} ({device(reports)}.)")
            if answer.shown is not None:
                assert not isinstance(answer.shown, Table) or len(answer.shown.rows) <= ROWS
                parts.append(as_markdown([answer.shown], figures, link=f"{FIGURES.name}/"))
        parts.append(f"[All tables and commands]({TABLES.name}#{anchor(question.claim)}).")
    return "\n\n".join(parts) + "\n"


def tables(figures: Path) -> str:
    """Return the page of all tables; figures are written into a folder."""
    parts = [TABLES_HEAD, gpu()]
    for question, found in each():
        parts += [f"## {question.claim}", question.about]
        if question.answer is not None and not found:
            parts.append("Not measured yet.")
        for reports, answer in found:
            parts += [f"**{answer.sentence}**", provenance(reports)]
            parts.append(as_markdown(answer.blocks, figures, link=f"{FIGURES.name}/"))
    return "\n\n".join(part for part in parts if part) + "\n"


def short(folder: str) -> str:
    """Return the README's picture, answers, and what is known of GPUs; ``folder`` is docs/ from
    there."""
    return "\n\n".join([picture(folder), bullets(folder), gpu()])


def bullets(folder: str) -> str:
    """Return the README's answers: a sentence, a figure, a device, a link."""
    known = {question.key: (question, found) for question, found in each()}
    lines = []
    for key in BULLETS:
        question, found = known[key]
        chosen: dict[str, tuple[Bullet, str]] = {}
        for reports, answer in found:
            for bullet in answer.bullets:
                before = chosen.get(bullet.about)
                if before is None or before[0].seeds < bullet.seeds:
                    chosen[bullet.about] = bullet, device(reports)
        if chosen:
            said = " ".join(f"{bullet.text} ({on})." for bullet, on in chosen.values())
            link = f"[table]({folder}{PAGE.name}#{anchor(question.claim)})"
            lines.append(f"- {said.removesuffix(').')}; {link}).")
    return "\n".join(lines)


def picture(folder: str) -> str:
    """Return the README's figure, and how to read it."""
    for question, found in each():
        for reports, answer in found:
            if question.key == PICTURE and isinstance(answer.shown, Figure):
                link = f"{folder}{FIGURES.name}/{answer.shown.name}.svg"
                return (
                    f"![{answer.shown.caption}]({link})\n\n"
                    "Test error on MNIST against wall-clock ("
                    f"{device(reports)}). Look at `fused`, backprop on our kernels, and "
                    "`cdni-ce-k`, synthetic gradients of the best recipe with targets on every "
                    "k-th step. The "
                    f"other arms ([what each does]({folder}rivals.md#what-each-arm-does)) are "
                    "synthetic gradients of other forms, backprop by other means, and simpler ways "
                    "not to wait."
                )
    return "Not measured yet."


def render(check: bool) -> int:
    """Write the pages, or with ``check`` say whether they differ."""
    stale = 0
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) if check else FIGURES
        made = {PAGE: page(to), TABLES: tables(to)}
    for path, text in made.items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        if check:
            print(f"docs/{path.name} differs from the results: run python bench/answers.py render")
        else:
            path.write_text(text, encoding="utf-8")
            print(f"rewrote docs/{path.name}")
    if not check:
        for path in FIGURES.iterdir():  # of questions and figures that are no more
            if not any(f"{FIGURES.name}/{path.name}" in text for text in made.values()):
                path.unlink()
        return 0
    return 1 if stale else 0
