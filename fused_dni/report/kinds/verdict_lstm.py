"""What the JSON of an LSTM's verdict says."""

from __future__ import annotations

from typing import Any

from fused_dni.report import text
from fused_dni.report.blocks import Block, Figure, Heading, Table, Text, label


def blocks(report: dict[str, Any]) -> list[Block]:
    """The sentence; a row a candidate with time per step, ratios and peak memory; a plot."""
    short, long = report["window"], report["long"]
    facts = report["facts"]
    bases = (f"floor T={short}", f"fused T={short}", f"fused T={long}")
    rows = []
    for name, timing in report["timings"].items():
        times = [text.seconds(timing[key]) for key in ("median", "p10", "p90")]
        ratios = [_ratio(report, name, base) for base in bases]
        rows.append([name, *times, *ratios, text.size(report["memory"].get(name))])
    header = ["time step", "median", "p10", "p90", *(f"x {base}" for base in bases), "memory"]
    where = facts["gpu"] if facts["where"] == "cuda" else facts["device"]
    return [
        Heading(f"Verdict: {report['title']}", 1),
        Text(report["sentence"], lead=True),
        Table(header, rows, "A ~ marks a ratio whose interval reaches one."),
        Figure("time-per-step", lambda canvas: _draw(report, canvas), "Time by candidate."),
        *map(Text, report["notes"]),
        Text(f"Memory: {report['memory_is']}. Times: {report['per_step']}"),
        Text(
            f"{where}, {facts['threads']} threads, torch {facts['torch']}, {facts['date']}, "
            f"commit {facts['commit'] or 'unknown'}."
        ),
    ]


def _ratio(report: dict[str, Any], name: str, base: str) -> str:
    if name == base:
        return "1"
    found = report["ratios"][base][name]
    doubt = found["verdict"] == "inconclusive" and not base.startswith("floor")
    return f"{'~' if doubt else ''}{found['median']:.2f}"


def _draw(report: dict[str, Any], canvas: Any) -> None:
    axes = canvas.add_subplot()
    names = list(report["timings"])[::-1]
    middle = [1e6 * report["timings"][name]["median"] for name in names]
    spread = [
        [m - 1e6 * report["timings"][n]["p10"] for m, n in zip(middle, names, strict=True)],
        [1e6 * report["timings"][n]["p90"] - m for m, n in zip(middle, names, strict=True)],
    ]
    axes.barh([label(name) for name in names], middle, xerr=spread, color="#6fa8dc", capsize=3)
    axes.set_xlabel("time per step of the sequence, µs (bars: 10-90 %)")
    axes.grid(True, axis="x", alpha=0.2)
