"""What a profile's JSON says."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from fused_dni.report import text
from fused_dni.report.blocks import Block, Figure, Heading, Table, Text, label

#: The range of what lies in none, and the op of what is none of torch's: our kernels, Python.
NOWHERE = "(no range)"
NO_OP = "(outside torch's ops)"
#: Rows of a table of ranges or ops, and bars of the figure.
ROWS = 30
BARS = 12


def blocks(report: dict[str, Any]) -> list[Block]:
    """The profile of a command by one of the tools."""
    parts = {"torch": _torch, "ncu": _ncu, "nsys": _nsys}
    said = [
        Heading(f"Profile: {shlex.join(report['profiled'])}", 1),
        *parts[report["tool"]](report),
    ]
    if report["status"]:
        said.append(Text(f"The command ended with exit status {report['status']}."))
    return said


# --------------------------------------------------------------------------------------- torch


def _torch(report: dict[str, Any]) -> list[Block]:
    ranges, ops = report["ranges"], report["ops"]
    device = any(row["device"] for row in ops)
    spent = sum(row["own"] for row in ranges) or 1.0
    said: list[Block] = [
        Text(_sentence(report, spent), lead=True),
        Heading("By range"),
        Table(
            ["range", "calls", "with what is inside", "own", "share", *["GPU"] * device, "memory"],
            [
                [
                    row["range"],
                    str(row["calls"] or "-"),
                    text.seconds(row["total"] or None),
                    text.seconds(row["own"]),
                    f"{100 * row['own'] / spent:.1f} %",
                    *[text.seconds(row["device"])] * device,
                    text.size(row["memory"]),
                ]
                for row in ranges[:ROWS]
            ],
            "own: without the ranges inside it. Memory is what was allocated there less what was "
            "released." + _rest(len(ranges)),
        ),
        Heading("By range and op"),
        Table(
            ["range › op", "calls", "own", "share", *["GPU"] * device, "memory"],
            [
                [
                    f"{row['range']} › {row['op']}",
                    str(row["calls"]),
                    text.seconds(row["own"]),
                    f"{100 * row['own'] / spent:.1f} %",
                    *[text.seconds(row["device"])] * device,
                    text.size(row["memory"]),
                ]
                for row in ops[:ROWS]
            ],
            f"own: without the ops that it calls. {NO_OP}: the range's time in none of them, in "
            "our kernels and in Python." + _rest(len(ops)),
        ),
        Text(f"The trace is in {report['trace']}, for chrome://tracing or ui.perfetto.dev."),
    ]
    if any(row["range"] != NOWHERE for row in ranges):
        said.insert(1, _bars(ranges))
    return said


def _sentence(report: dict[str, Any], spent: float) -> str:
    inside = [row for row in report["ranges"] if row["range"] != NOWHERE]
    recorded = f"{text.seconds(report['seconds'])} recorded"
    if not inside:
        return f"{recorded}; no decoupled layer ran in them."
    share = sum(row["own"] for row in inside) / spent
    most = inside[0]
    return (
        f"{recorded}; {100 * share:.0f} % of the processor's time was spent in ranges, most of it "
        f"in {most['range']}: {100 * most['own'] / spent:.0f} %, {text.seconds(most['own'])} in "
        f"{most['calls']} calls."
    )


def _rest(count: int) -> str:
    return f" {count - ROWS} more are in the JSON." if count > ROWS else ""


def _bars(ranges: list[dict[str, Any]]) -> Figure:
    dearest = [row for row in ranges if row["range"] != NOWHERE][:BARS]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        names = [label(row["range"]) for row in reversed(dearest)]
        axes.barh(names, [1e3 * row["own"] for row in reversed(dearest)], height=0.65)
        axes.set_xlabel("own time, ms")
        axes.spines[["top", "right"]].set_visible(False)

    size = (7.5, 0.9 + 0.28 * len(dearest))
    return Figure("ranges", draw, "The dearest ranges, without what is inside them.", size)


# -------------------------------------------------------------------------------------- Nsight


HEADER = (
    "kernel", "launches", "time", "DRAM", "of its peak", "memory system", "tensor cores",
    "occupancy", "warps wait for", "registers", "shared memory", "programs",
)  # fmt: skip
_SHARES = ("bandwidth_share", "memory_share", "tensor_share", "occupancy")


def rows(kernels: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Put the kernels that ncu saw into rows of a table under :data:`HEADER`."""
    return [
        [
            kernel["kernel"],
            str(kernel["launches"]),
            text.seconds(kernel["time"]),
            "-" if kernel["bandwidth"] is None else f"{text.size(kernel['bandwidth'])}/s",
            *(_percent(kernel[name]) for name in _SHARES),
            ", ".join(
                f"{reason.replace('_', ' ')} {_percent(share)}"
                for reason, share in list(kernel["stalls"].items())[:2]
            )
            or "-",
            _whole(kernel["registers"]),
            text.size(kernel["shared_memory"]),
            _whole(kernel["programs"]),
        ]
        for kernel in kernels
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _ncu(report: dict[str, Any]) -> list[Block]:
    kernels = report["kernels"]
    if not kernels:
        return [Text("ncu saw no launch of a kernel that passed its filter.")]
    total = sum((k["time"] or 0.0) * k["launches"] for k in kernels)
    most = kernels[0]
    share = (most["time"] or 0.0) * most["launches"] / (total or 1.0)
    return [
        Text(
            f"{sum(k['launches'] for k in kernels)} launches of {len(kernels)} kernels took "
            f"{text.seconds(total)}; {most['kernel']} took {100 * share:.0f} % of it.",
            lead=True,
        ),
        Table(
            HEADER,
            rows(kernels),
            "Medians over launches of one shape. DRAM: bytes moved over the kernel's time, and "
            "that beside the peak of this GPU; memory system: the busiest of its levels; tensor "
            "cores: cycles in which they work; occupancy: warps resident of those that could be; "
            "warps wait for: share of the waiting by reason.",
        ),
    ]


def _nsys(report: dict[str, Any]) -> list[Block]:
    return [
        Text(f"The timeline is in {report['timeline']}: open it in Nsight Systems."),
        Text(f"Recorded by: `{shlex.join(report['line'])}`"),
    ]
