"""``docs/verdict.md``, and its lines in the README."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from claims import QUESTIONS, Report, answered
from fused_dni.report import Figure
from fused_dni.report.blocks import as_markdown
from stored import ROOT, named

PAGE = ROOT / "docs" / "verdict.md"
FIGURES = ROOT / "docs" / "verdict"

HEAD = """# The verdict

Is the synthetic gradient really cheaper? What people say of it, sentence by sentence, each with
what was measured, where, and by which command. All figures are made from `bench/results` by
`python bench/answers.py render`; `python bench/answers.py measure --data DIR` measures them on
another machine. Cheaper, faster and slower mean that the 99 % interval of paired ratios lies
beyond one by more than a per cent; what backprop is compared with is backprop *on the same
kernels*, unless it says stock. No figure here is from a GPU yet."""


def provenance(reports: dict[str, Report]) -> str:
    """Device, versions, and the commands."""
    first = next(iter(reports.values()))
    known = first["facts"]
    commits = sorted({str(r["facts"]["commit"]) for r in reports.values()})
    asked = list(
        dict.fromkeys(r["facts"]["command"] for r in reports.values() if r["facts"]["command"])
    )
    more = f" and {len(asked) - 1} like it" if len(asked) > 1 else ""
    run = f": `{asked[0]}`{more}" if asked else ""
    return (
        f"{named(known)}, {known['threads']} threads, torch {known['torch']}, {known['date']}, "
        f"commit {', '.join(commits)}{run}."
    )


def page(figures: Path) -> str:
    """The page; figures are written into a folder."""
    parts = [HEAD]
    for number, question in enumerate(QUESTIONS, 1):
        parts += [f"## {question.claim}", question.about]
        found = list(answered(question))
        if question.answer is not None and not found:
            parts.append("Not measured yet.")
        for machine, (reports, answer) in enumerate(found, 1):
            parts += [f"**{answer.sentence}**", provenance(reports)]
            made = [
                replace(block, name=f"{number}-{machine}-{place}-{block.name}")
                if isinstance(block, Figure)
                else block
                for place, block in enumerate(answer.blocks, 1)
            ]
            parts.append(as_markdown(made, figures, link=f"{FIGURES.name}/"))
    return "\n\n".join(part for part in parts if part) + "\n"


def short() -> str:
    """A line a question, for the README."""
    rows = []
    for question in QUESTIONS:
        found = list(answered(question))
        missing = "Not measured yet." if question.answer else "Left open."
        said = " ".join(answer.brief or answer.sentence for _, answer in found) or missing
        rows.append([question.claim, said])
    devices = sorted(
        {named(r["facts"]) for q in QUESTIONS for rs, _ in answered(q) for r in rs.values()}
    )
    head = f"Measured on: {', '.join(devices) or 'nothing yet'}."
    lines = ["| they say | measured |", "| --- | --- |"]
    lines += [f"| {claim} | {said} |" for claim, said in rows]
    return head + "\n\n" + "\n".join(lines)


def render(check: bool) -> int:
    """Write the page, or with ``check`` say whether it differs."""
    with tempfile.TemporaryDirectory() as folder:
        made = page(Path(folder) if check else FIGURES)
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == made:
        return 0
    if check:
        print("docs/verdict.md differs from the results: run python bench/answers.py render")
        return 1
    PAGE.write_text(made, encoding="utf-8")
    for path in FIGURES.iterdir():  # of questions that have another number now
        if f"{FIGURES.name}/{path.name}" not in made:
            path.unlink()
    print("rewrote docs/verdict.md")
    return 0
