"""What the JSON of a verdict says, as tables, plots and paragraphs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fused_dni.report import text
from fused_dni.report.blocks import Block, Figure, Heading, Table, Text
from fused_dni.report.words import NAMES

DOUBT = "A ~ marks a ratio whose interval reaches one: no difference could be shown."
COLOURS = {"backprop": "#1b6ca8", "compiled": "#6fa8dc", "fused": "#2e9e5b", "floor": "#777777"}
STYLES = {"backprop": "-", "compiled": "--", "fused": "-", "floor": ":"}
DNI = "#d1495b"


def blocks(report: dict[str, Any]) -> list[Block]:
    """The sentence, the table of steps with its plot, the variants, the parts and what follows."""
    facts = report["facts"]
    where = facts["gpu"] if facts["where"] == "cuda" else facts["device"]
    made: list[Block] = [
        Heading(f"Verdict: {report['title']}", 1),
        Text(report["sentence"], lead=True),
        steps(report),
        over_k(report),
        Text(f"{_evens(report)} {report['cycle']}"),
    ]
    if len(report["variants"]) > 1:
        made += [Heading("Interfaces and synthesizers"), variants(report)]
    if report["parts"] is not None:
        parts_ = report["parts"]
        made += [
            Heading("Where a step's time goes"),
            parts(report),
            sums(report),
            Heading("What can be gained at most"),
            Text(_amdahl(parts_["amdahl"])),
            critical_path(report),
            lock(report),
        ]
    made += [
        *map(Text, report["notes"]),
        Text(f"Memory: {report['memory_is']}."),
        Text(
            f"{where}, {facts['threads']} threads, torch {facts['torch']}, {facts['date']}, "
            f"commit {facts['commit'] or 'unknown'}."
        ),
    ]
    return made


def tables(report: dict[str, Any], *, markdown: bool = False) -> str:
    """The tables alone, with what is to be read under them."""
    made = [steps(report)]
    if len(report["variants"]) > 1:
        made.append(variants(report))
    if report["parts"] is not None:
        made += [parts(report), sums(report), critical_path(report)]
    lines = []
    for table in made:
        lines.append(text.table(table.header, table.rows, markdown=markdown))
        lines.append("")
        if table is made[0]:
            lines += [
                f"break-even against {NAMES[base]}: {even(found)}"
                for base, found in report["break_even"].items()
            ]
        elif table.caption:
            lines += [table.caption, ""]
    if report["parts"] is not None:
        lines.append(_amdahl(report["parts"]["amdahl"]))
    if report["compile_seconds"] is not None:
        lines.append(f"compilation took {text.seconds(report['compile_seconds'])}, not counted")
    lines += report["notes"]
    lines += [f"memory: {report['memory_is']}", f"cycles: {report['cycle']}"]
    if markdown:
        return "\n\n".join(line for line in lines if line)
    return "\n".join(lines)


def steps(report: dict[str, Any]) -> Table:
    """A row a candidate."""
    rows = []
    for name, timed in report["timings"].items():
        times = [text.seconds(timed[key]) for key in ("median", "p10", "p90")]
        ratios = [_ratio(report, name, base) for base in ("floor", "backprop", "fused")]
        rows.append([name, *times, *ratios, text.size(report["memory"].get(name))])
    header = ["step", "median", "p10", "p90", "x floor", "x backprop", "x fused", "memory"]
    return Table(header, rows, DOUBT)


def variants(report: dict[str, Any]) -> Table:
    """A row for each interface with each synthesizer: ratios to backprop on the same kernels."""
    ks = list(report["variants"][0]["cycles"])
    rows = []
    for variant in report["variants"]:
        against = variant["base"]
        rows.append(
            [
                f"{variant['interface']}, {variant['synthesizer']}",
                text.seconds(variant["with targets"]["median"]),
                text.seconds(variant["without targets"]["median"]),
                *(_cell(variant["cycles"][k]["ratios"][against]) for k in ks),
                even(variant["break_even"][against]),
                even(variant["break_even"]["backprop"]),
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


def parts(report: dict[str, Any]) -> Table:
    """A row a part: time, floating-point operations, bytes, floor."""
    found = report["parts"]
    rows = []
    for name, timed in found["timings"].items():
        work, floor = found["work"].get(name), found["floors"].get(name)
        rows.append(
            [
                name,
                *(text.seconds(timed[key]) for key in ("median", "p10", "p90")),
                _count(work["flops"]) if work else "-",
                text.size(work["bytes"]) if work else "-",
                text.seconds(floor),
                f"{timed['median'] / floor:.1f}" if floor else "-",
            ]
        )
    header = ["part", "median", "p10", "p90", "FLOP", "bytes", "floor", "x floor"]
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


def sums(report: dict[str, Any]) -> Table:
    """Parts against the steps that they make."""
    rows = [
        [
            made["step"],
            " + ".join(made["parts"]),
            "one after the other" if made["composed"] else "fused in the step",
            _spread(made["sum over step"]),
        ]
        for made in report["parts"]["sums"]
    ]
    caption = (
        "Sum of the parts over the measured step, with its 99 % interval. Parts that run one after "
        "the other are to agree with it within 15 %; where kernels fuse them, the sum over the "
        "step is what that saves, less the nodes of autograd and Python between them."
    )
    return Table(["step", "parts", "in the step", "sum / step"], rows, caption)


def critical_path(report: dict[str, Any]) -> Table:
    """Update lock of the lowest segment, by the length of the chain."""
    path = report["parts"]["critical path"]
    rows = [
        [str(n), text.seconds(back), text.seconds(dni), f"{unlocked:.1f}"]
        for n, back, dni, unlocked in zip(
            path["n"], path["backprop"], path["dni"], path["unlocked"], strict=True
        )
    ]
    header = ["segments side by side", "lock under backprop", "under DNI", "ratio"]
    return Table(header, rows, path["means"])


# ------------------------------------------------------------------------------------------- plots


def over_k(report: dict[str, Any]) -> Figure:
    """The cost of a step over k, baselines as lines."""
    return Figure(
        "verdict",
        lambda canvas: _draw_over_k(report, canvas),
        f"{report['title']}: time of a training step (bars: 10-90 %).",
        (6.4, 4.2),
    )


def _draw_over_k(report: dict[str, Any], canvas: Any) -> None:
    axes = canvas.add_subplot()
    timings = report["timings"]
    names = [name for name in timings if name.startswith("dni ")]
    scale = 1e3 if timings["backprop"]["median"] >= 1e-3 else 1e6
    rows = [{key: scale * timings[name][key] for key in ("median", "p10", "p90")} for name in names]
    axes.errorbar(
        range(len(rows)),
        [row["median"] for row in rows],
        yerr=[
            [max(0.0, row["median"] - row["p10"]) for row in rows],
            [max(0.0, row["p90"] - row["median"]) for row in rows],
        ],
        marker="o",
        capsize=3,
        color=DNI,
        label="DNI (bars: 10-90 %)",
    )
    for base, colour in COLOURS.items():
        if base in timings:
            level = timings[base]["median"] * scale
            axes.axhline(level, color=colour, linestyle=STYLES[base], label=NAMES[base])
    axes.set_xticks(range(len(names)), [name.partition("=")[2] for name in names])
    axes.set_xlabel("k: targets on every k-th step")
    axes.set_ylabel(f"training step, {'ms' if scale == 1e3 else 'µs'}")
    axes.set_ylim(bottom=0)
    axes.grid(True, alpha=0.2)
    axes.set_title(report["title"], fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def lock(report: dict[str, Any]) -> Figure:
    """The update lock over the length of the chain."""
    return Figure(
        "update-lock",
        lambda canvas: _draw_lock(report["parts"]["critical path"], canvas),
        "How long the lowest of n segments waits for its update.",
    )


def _draw_lock(path: Mapping[str, Any], canvas: Any) -> None:
    axes = canvas.add_subplot()
    for name, colour, label in (
        ("backprop", COLOURS["backprop"], "backprop"),
        ("dni", DNI, "DNI"),
    ):
        axes.plot(path["n"], [1e3 * t for t in path[name]], marker="o", color=colour, label=label)
    axes.set_xlabel("segments, each on a device of its own")
    axes.set_ylabel("update lock of the lowest, ms")
    axes.set_ylim(bottom=0)
    axes.grid(True, alpha=0.2)
    axes.legend(frameon=False)


# ------------------------------------------------------------------------------------------- cells


def _ratio(report: dict[str, Any], name: str, base: str) -> str:
    if base not in report["ratios"]:
        return "-"
    if name == base:
        return "1"
    return _cell(report["ratios"][base][name], marked=base != "floor")


def _cell(found: Mapping[str, Any], *, marked: bool = True) -> str:
    doubt = marked and found["verdict"] == "inconclusive"
    return f"{'~' if doubt else ''}{found['median']:.2f}"


def _spread(found: Mapping[str, Any]) -> str:
    middle = f"{found['median']:.2f}"
    if found["interval"] is None:
        return middle
    low, high = found["interval"]
    return f"{middle} ({low:.2f} to {high:.2f})"


def even(found: Mapping[str, Any]) -> str:
    """A break-even in words: ``k = 3 (in doubt from 2)``, ``never``, ``inconclusive``."""
    if found["kind"] != "from":
        return str(found["kind"])
    k, doubt = found["k"], found["slower_to"] + 1
    return f"k = {k}" if doubt >= k else f"k = {k} (in doubt from {doubt})"


def _evens(report: Mapping[str, Any]) -> str:
    found = [f"against {NAMES[base]}: {even(e)}" for base, e in report["break_even"].items()]
    return f"Break-even {'; '.join(found)}."


def _amdahl(found: Mapping[str, Any]) -> str:
    return (
        f"At most {100 * found['share']:.0f} % of a step ({found['speedup']:.2f}x faster). "
        f"{found['means']}"
    )


def _count(value: float) -> str:
    """A number of operations: ``1.46 G``."""
    if value == 0 or not math.isfinite(value):
        return "0 "
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{text.significant(value / scale)} {unit}"
    return f"{value:.0f} "
