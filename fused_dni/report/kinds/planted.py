"""What the planted differences, segments and sums of ``bench/planted.py`` came to."""

from __future__ import annotations

from fused_dni.report import text
from fused_dni.report.blocks import Block, Table
from fused_dni.report.schema import Result

WORDS = ("slower", "inconclusive", "faster")


def title(report: Result) -> str:
    """Name what was planted."""
    return "Planted differences"


def blocks(report: Result) -> list[Block]:
    """Show a table of each part that was run."""
    made: list[Block] = []
    if found := report.get("differences"):
        rows = [
            [
                "no difference" if word == "inconclusive" else f"15 % {word}",
                *(str(counts.get(w, 0)) for w in WORDS),
            ]
            for word, counts in found.items()
        ]
        made.append(Table(["planted", *(f"called {word}" for word in WORDS)], rows))
    if found := report.get("segments"):
        rows = [[name, row["said"], " or ".join(row["allowed"])] for name, row in found.items()]
        made.append(Table(["planted segment", "called", "must be"], rows))
    if found := report.get("sums"):
        rows = [
            [row["step"], text.ratio(row["sum over step"], marked=False, to=" to ")]
            for row in found
        ]
        made.append(Table(["composed step", "sum of its parts over it"], rows))
    if found := report.get("tops"):
        rows = [
            [
                f"{times}, k = {k}",
                f"{row['top over bottom'].median:.1f}",
                text.percent(ratio.median - 1, "+.0f"),
            ]
            for times, row in found.items()
            for k, ratio in row["measured over predicted"].items()
        ]
        caption = (
            "The top's time over that of what is below it, planted and measured, and by how much "
            "the mean step over whole cycles of k steps is off b + s + (τ + m)/k, whose parts were "
            "measured apart."
        )
        made.append(Table(["planted top, times", "measured", "off by"], rows, caption))
    return made


def sentence(report: Result) -> str:
    """Count how much of what was planted was called rightly."""
    said = []
    if found := report.get("differences"):
        right = [f"{found[w].get(w, 0)} of {report['runs']} {w}" for w in found]
        said.append(f"planted differences were called rightly in {', '.join(right)}")
    if found := report.get("segments"):
        right = [row for row in found.values() if row["said"] in row["allowed"]]
        said.append(f"planted segments in {len(right)} of {len(found)}")
    if found := report.get("tops"):
        off = [
            abs(ratio.median - 1.0)
            for row in found.values()
            for ratio in row["measured over predicted"].values()
        ]
        said.append(
            f"mean steps under {len(found)} planted tops were the formula's within "
            f"{text.percent(max(off))}"
        )
    if not said:
        return "Only sums of parts were measured."
    joined = "; ".join(said)
    beside = f", with {report['busy']} other processes on the cores" if report["busy"] else ""
    return f"{joined[0].upper()}{joined[1:]}{beside}."
