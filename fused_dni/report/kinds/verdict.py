"""What a verdict says, as tables, plots and paragraphs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fused_dni.report import plots, text
from fused_dni.report.blocks import Block, Figure, Heading, Table, Text
from fused_dni.report.schema import Result
from fused_dni.report.timings import BreakEven, Timing
from fused_dni.report.words import DOUBT, NAMES, PAIRED, machine, middle_k, often, row, versus

BASES = ("backprop", "compiled", "fused", "floor")
TIMES = ("median", "p10", "p90")


def blocks(report: Result) -> list[Block]:
    """Show the table of steps with its plot, the variants, the parts and what follows from them."""
    even = ", that ".join(
        f"against {NAMES[base]} is {_at(found)}" for base, found in report["break_even"].items()
    )
    compiling = report["compile_seconds"]
    made: list[Block] = [
        steps(report),
        over_k(report),
        Text(f"The break-even {even}. {report['cycle']}"),
    ]
    if len(report["variants"]) > 1:
        made += [Heading("Interfaces and synthesizers"), variants(report)]
    if report["parts"] is not None:
        made += [
            Heading("Where a step's time goes"),
            parts(report),
            sums(report),
            Heading("What can be gained at most"),
            Text(_amdahl(report["parts"]["amdahl"])),
            critical_path(report),
            lock(report),
        ]
    if compiling is not None:
        made.append(Text(f"Compilation took {text.seconds(compiling)}, not counted."))
    return made


def _at(found: BreakEven) -> str:
    """Say where a break-even is."""
    return {"from": f"at {found}", "never": "at no k"}.get(found.kind, str(found))


def sentence(report: Result) -> str:
    """Say what won, in plain English."""
    named = [name.removeprefix("dni k=") for name in report.timings if name.startswith("dni k=")]
    ks = [None if k == "never" else int(k) for k in named]
    k = middle_k(ks)
    name = row(k)
    stock, ours, dni = (text.seconds(report.timings[n].median) for n in ("backprop", "fused", name))
    how = f"with targets {often(k)}"
    first = ""
    if len(report["variants"]) > 1:
        variant = report["variants"][0]
        first = f" (interface at the {variant['interface']}, synthesizer {variant['synthesizer']})"

    def against(what: str, base: str) -> str:
        return versus(report["ratios"][base][what])

    parts = [
        f"On {machine(report.facts)} a training step of {report.title} takes {stock} by stock "
        f"backprop, {ours} by backprop on our kernels and {dni} by DNI{first} {how}.",
        f"DNI {how} is {against(name, 'backprop')} stock backprop. That mixes two things: "
        f"backprop on our kernels is {against('fused', 'backprop')} stock backprop, and the "
        f"synthetic gradient itself is {against(name, 'fused')} backprop on the same kernels.",
    ]
    if 1 in ks and k != 1:
        parts.append(
            f"With targets on every step it is {against(row(1), 'fused')} backprop on the same "
            "kernels."
        )
    even = report["break_even"]["fused"]
    parts.append(
        {
            "from": f"The synthetic gradient pays from k = {even.k} on.",
            "never": "The synthetic gradient does not pay here at any k.",
            "inconclusive": "Whether the synthetic gradient pays here could not be decided: "
            "the intervals overlap.",
        }[even.kind]
    )
    if "compiled" in report.timings:
        parts.append(f"DNI {how} is {against(name, 'compiled')} compiled backprop.")
    parts += _best(report, k)
    parts.append("This is time per step only; what it does to accuracy, `train` measures.")
    return " ".join(parts)


def _best(report: Result, k: int | None) -> list[str]:
    """Name the fastest of several variants at the k that the sentence is about."""
    found = report["variants"]
    if len(found) < 2:
        return []
    at = str(k or "never")
    best = min(found, key=lambda variant: float(variant["cycles"][at]["median"]))
    return [
        f"Of {len(found)} combinations of interface and synthesizer the fastest with targets "
        f"{often(k)} has the interface at the {best['interface']} and a synthesizer "
        f"{best['synthesizer']}: it is {versus(best['cycles'][at]['ratios'][best['base']])} "
        "backprop on the same kernels."
    ]


def times(timed: Timing) -> list[str]:
    """Write the median and the percentiles, a cell each."""
    return [text.seconds(getattr(timed, name)) for name in TIMES]


def steps(report: Result) -> Table:
    """Show a row a candidate."""
    rows = [
        [name, *times(timed), *ratios, text.size(report.memory.get(name))]
        for name, timed in report.timings.items()
        for ratios in [[against(report, name, base) for base in ("floor", "backprop", "fused")]]
    ]
    header = ["step", *TIMES, "x floor", "x backprop", "x fused", "memory"]
    return Table(header, rows, f"{PAIRED} {DOUBT}")


def against(report: Result, name: str, base: str) -> str:
    """Write a candidate's time over another's."""
    if base not in report["ratios"]:
        return "-"
    if name == base:
        return "1"
    return text.ratio(report["ratios"][base][name], marked=not base.startswith("floor"))


def variants(report: Result) -> Table:
    """Show a row for each interface with each synthesizer: ratios to backprop on the same
    kernels."""
    ks = list(report["variants"][0]["cycles"])
    rows = []
    for variant in report["variants"]:
        base = variant["base"]
        rows.append(
            [
                f"{variant['interface']}, {variant['synthesizer']}",
                text.seconds(variant["with targets"].median),
                text.seconds(variant["without targets"].median),
                *(text.ratio(variant["cycles"][k]["ratios"][base]) for k in ks),
                str(variant["break_even"][base]),
                str(variant["break_even"]["backprop"]),
                text.size(max(variant["memory"].values())),
            ]
        )
    header = [
        *("interface, synthesizer", "with targets", "without"),
        *(f"k={k}" for k in ks),
        *("pays from", "against stock", "memory"),
    ]
    caption = f"Under k: ratios to backprop on the same kernels. {DOUBT}"
    return Table(header, rows, caption)


def parts(report: Result) -> Table:
    """Show a row a part: time, floating-point operations, bytes, floor."""
    found = report["parts"]
    rows = []
    for name, timed in found["timings"].items():
        work, floor = found["work"].get(name), found["floors"].get(name)
        rows.append(
            [
                name,
                *times(timed),
                _count(work["flops"]) if work else "-",
                text.size(work["bytes"]) if work else "-",
                text.seconds(floor),
                f"{timed.median / floor:.1f}" if floor else "-",
            ]
        )
    header = ["part", *TIMES, "FLOP", "bytes", "floor", "x floor"]
    rates = [
        f"{_count(rate)}FLOP/s ({what})"
        for what, rate in found["ceilings"]["flops per second"].items()
    ]
    rates += [
        f"{text.size(rate)}/s ({what} copy)"
        for what, rate in found["ceilings"]["bytes per second"].items()
    ]
    caption = f"DNI: {found['of']}. Measured ceilings of this device: {', '.join(rates)}."
    return Table(header, rows, caption)


def sums(report: Result) -> Table:
    """Hold parts against the steps that they make."""
    rows = [
        [
            made["step"],
            " + ".join(made["parts"]),
            "one after the other" if made["composed"] else "fused in the step",
            text.ratio(made["sum over step"], marked=False, to=" to "),
        ]
        for made in report["parts"]["sums"]
    ]
    caption = (
        "Sum of the parts over the measured step, with its 99 % interval. Parts that run one after "
        "the other are to agree with it within 15 %; where kernels fuse them, the sum over the "
        "step is what that saves, less the nodes of autograd and Python between them."
    )
    return Table(["step", "parts", "in the step", "sum / step"], rows, caption)


def critical_path(report: Result) -> Table:
    """Show the update lock of the lowest segment, by the length of the chain."""
    path = report["parts"]["critical path"]
    rows = [
        [str(n), text.seconds(back), text.seconds(dni), f"{unlocked:.1f}"]
        for n, back, dni, unlocked in zip(
            path["n"], path["backprop"], path["dni"], path["unlocked"], strict=True
        )
    ]
    header = ["segments side by side", "lock under backprop", "under DNI", "ratio"]
    return Table(header, rows, path["means"])


def over_k(report: Result) -> Figure:
    """Draw the cost of a step over k, baselines as lines."""
    return Figure(
        "verdict",
        lambda canvas: _draw_over_k(report, canvas),
        f"{report.title}: time of a training step (bars: 10-90 %).",
        (6.4, 4.2),
    )


def _draw_over_k(report: Result, canvas: Any) -> None:
    axes = canvas.add_subplot()
    timings = report.timings
    names = [name for name in timings if name.startswith("dni ")]
    scale, unit = plots.unit_of(timings["backprop"].median)
    found = [
        (scale * t.median, scale * t.p10, scale * t.p90) for t in map(timings.__getitem__, names)
    ]
    plots.spread(
        axes, range(len(found)), found, marker="o", color=plots.RED, label="DNI (bars: 10-90 %)"
    )
    for base, style in zip(BASES, ("-", "--", "-", ":"), strict=True):
        if base in timings:
            level = timings[base].median * scale
            axes.axhline(level, color=plots.METHODS[base], linestyle=style, label=NAMES[base])
    axes.set_xticks(range(len(names)), [name.partition("=")[2] for name in names])
    axes.set_ylim(bottom=0)
    axes.set_title(report.title, fontsize=10)
    plots.finish(axes, "k: targets on every k-th step", f"training step, {unit}")


def lock(report: Result) -> Figure:
    """Draw the update lock over the length of the chain."""
    return Figure(
        "update-lock",
        lambda canvas: _draw_lock(report["parts"]["critical path"], canvas),
        "How long the lowest of n segments waits for its update.",
    )


def _draw_lock(path: Mapping[str, Any], canvas: Any) -> None:
    axes = canvas.add_subplot()
    for name, label in (("backprop", "backprop"), ("dni", "DNI")):
        locked = [1e3 * t for t in path[name]]
        axes.plot(path["n"], locked, marker="o", color=plots.METHODS[name], label=label)
    axes.set_ylim(bottom=0)
    axis = "update lock of the lowest, ms"
    plots.finish(axes, "segments, each on a device of its own", axis)


def _amdahl(found: Mapping[str, Any]) -> str:
    if found["share"] is None:
        return (
            "How much of a step could be left out cannot be told: timed alone, the prediction "
            "takes as long as a whole step without targets, of which it is a part."
        )
    return (
        f"At most {text.percent(found['share'])} of a step ({found['speedup']:.2f}x faster). "
        f"{found['means']}"
    )


def _count(value: float) -> str:
    """Write a number of operations: ``1.46 G``."""
    if value == 0 or not math.isfinite(value):
        return "0 "
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{text.significant(value / scale)} {unit}"
    return f"{value:.0f} "
