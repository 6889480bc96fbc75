"""What an LSTM's verdict says."""

from __future__ import annotations

from typing import Any

from fused_dni.report import plots, text
from fused_dni.report.blocks import Block, Figure, Table, Text, label
from fused_dni.report.kinds.verdict import TIMES, against, times
from fused_dni.report.schema import Result
from fused_dni.report.words import DOUBT, PAIRED, machine, versus


def blocks(report: Result) -> list[Block]:
    """Show a row a candidate with time per step, ratios and peak memory; a plot."""
    short, long = report["window"], report["long"]
    bases = (f"floor T={short}", f"fused T={short}", f"fused T={long}")
    rows = [
        [name, *times(timed), *ratios, text.size(report.memory.get(name))]
        for name, timed in report.timings.items()
        for ratios in [[against(report, name, base) for base in bases]]
    ]
    header = ["time step", *TIMES, *(f"x {base}" for base in bases), "memory"]
    return [
        Table(header, rows, f"{PAIRED} {DOUBT}"),
        Figure("time-per-step", lambda canvas: _draw(report, canvas), "Time by candidate."),
        Text(f"Times: {report['per_step']}"),
    ]


def sentence(report: Result) -> str:
    """Say what is cheaper, in plain English."""
    short, long = f"T={report['window']}", f"T={report['long']}"
    dni = f"dni {short}"

    def took(name: str) -> str:
        return text.seconds(report.timings[name].median)

    def compared(base: str) -> str:
        return versus(report["ratios"][base][dni])

    return " ".join([
        f"On {machine(report.facts)} a time step of {report.title} takes {took(dni)} by DNI at "
        f"{short}; by truncated backprop at {short} {took(f'fused {short}')} on the same kernels "
        f"and {took(f'backprop {short}')} by nn.LSTM; by backprop at {long} "
        f"{took(f'fused {long}')} and {took(f'backprop {long}')}.",
        f"The synthetic gradient itself: DNI is {compared(f'fused {short}')} truncated backprop "
        f"at {short} on the same kernels, {_memory(report, dni, f'fused {short}')}.",
        f"What it replaces: DNI at {short} is {compared(f'fused {long}')} backprop at {long} on "
        f"the same kernels, {_memory(report, dni, f'fused {long}')}. "
        + _cheaper(report["cheaper"][f"fused {long}"], f"fused {long}", f"backprop at {long}"),
        f"It is {compared(f'backprop {long}')} nn.LSTM at {long}, "
        f"{_memory(report, dni, f'backprop {long}')}; that mixes kernels and method.",
        f"Whether DNI at {short} reaches the quality of backprop at {long} is yours to establish: "
        f"fused-dni train charlm --windows {report['window']} --long {report['long']}.",
    ])  # fmt: skip


def _memory(report: Result, dni: str, base: str) -> str:
    ours, theirs = report.memory[dni], report.memory[base]
    held = report["cheaper"][base]["memory"]
    if held == "same":
        return f"at the same peak memory ({text.size(ours)})"
    more, less = max(ours, theirs), min(ours, theirs)
    word = "less" if held == "dni" else "more"
    return f"at {more / less:.2f}x {word} peak memory ({text.size(ours)}, {text.size(theirs)})"


def _cheaper(found: dict[str, str], base: str, called: str) -> str:
    names = {"dni": "DNI", base: called}
    time, memory = found["time"], found["memory"]
    if time == memory:
        return f"{names[time]} is cheaper in both.".replace("backprop", "Backprop")
    in_time = (
        "time is inconclusive, the intervals overlap"
        if time == "inconclusive"
        else f"{names[time]} is cheaper in time"
    )
    in_memory = "memory is the same" if memory == "same" else f"{names[memory]} in memory"
    if memory != "same" and time == "inconclusive":
        in_memory = f"{names[memory]} is cheaper in memory"
    made = f"{in_time}; {in_memory}."
    return made[0].upper() + made[1:]


def _draw(report: Result, canvas: Any) -> None:
    axes = canvas.add_subplot()
    shown = list(report.timings.items())[::-1]
    middle = [1e6 * timed.median for _, timed in shown]
    spread = [
        [m - 1e6 * timed.p10 for m, (_, timed) in zip(middle, shown, strict=True)],
        [1e6 * timed.p90 - m for m, (_, timed) in zip(middle, shown, strict=True)],
    ]
    names = [label(name) for name, _ in shown]
    axes.barh(names, middle, xerr=spread, color=plots.LIGHT, capsize=3)
    plots.finish(axes, "time per step of the sequence, µs (bars: 10-90 %)", "")
