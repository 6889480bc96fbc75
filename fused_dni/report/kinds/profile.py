"""What a profile's JSON says."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from fused_dni.report import text
from fused_dni.report.blocks import Block, Figure, Heading, Table, Text, label
from fused_dni.report.schema import Result

#: The range of what lies in none, and the op of what is none of torch's: our kernels, Python.
NOWHERE = "(no range)"
NO_OP = "(outside torch's ops)"
#: Rows of a table of ranges or ops, and bars of the figure.
ROWS = 30
BARS = 12


def title(report: Result) -> str:
    """Name the command."""
    return f"Profile: {shlex.join(report['profiled'])}"


def blocks(report: Result) -> list[Block]:
    """Show what one of the tools has seen of a command."""
    said = {"torch": _torch, "ncu": _ncu, "nsys": _nsys}[report["tool"]](report)
    if report["status"]:
        said.append(Text(f"The command ended with exit status {report['status']}."))
    return said


def sentence(report: Result) -> str:
    """Say where most of the time went; nothing of a timeline, which is looked at."""
    return {"torch": _torch_sentence, "ncu": _ncu_sentence}.get(report["tool"], lambda _: "")(
        report
    )


# --------------------------------------------------------------------------------------- torch


def _torch(report: Result) -> list[Block]:
    ranges, ops = report["ranges"], report["ops"]
    device = any(row["device"] for row in ops)
    spent = _spent(report)

    def own(row: dict[str, Any]) -> list[str]:
        share = text.percent(row["own"] / spent, ".1f")
        on_gpu = [text.seconds(row["device"])] * device
        return [text.seconds(row["own"]), share, *on_gpu, text.size(row["memory"])]

    said: list[Block] = [
        Heading("By range"),
        Table(
            ["range", "calls", "with what is inside", "own", "share", *["GPU"] * device, "memory"],
            [
                [
                    row["range"],
                    str(row["calls"] or "-"),
                    text.seconds(row["total"] or None),
                    *own(row),
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
                    *own(row),
                ]
                for row in ops[:ROWS]
            ],
            f"own: without the ops that it calls. {NO_OP}: the range's time in none of them, in "
            "our kernels and in Python." + _rest(len(ops)),
        ),
        Text(f"The trace is in {report['trace']}, for chrome://tracing or ui.perfetto.dev."),
    ]
    if any(row["range"] != NOWHERE for row in ranges):
        said.insert(0, _bars(ranges))
    return said


def _spent(report: Result) -> float:
    return sum(row["own"] for row in report["ranges"]) or 1.0


def _torch_sentence(report: Result) -> str:
    inside = [row for row in report["ranges"] if row["range"] != NOWHERE]
    recorded = f"{text.seconds(report['seconds'])} recorded"
    if not inside:
        return f"{recorded}; no decoupled layer ran in them."
    spent = _spent(report)
    share = sum(row["own"] for row in inside) / spent
    most = inside[0]
    return (
        f"{recorded}; {text.percent(share)} of the processor's time was spent in ranges, most of "
        f"it in {most['range']}: {text.percent(most['own'] / spent)}, {text.seconds(most['own'])} "
        f"in {most['calls']} calls."
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
            *(text.percent(kernel[name]) for name in _SHARES),
            ", ".join(
                f"{reason.replace('_', ' ')} {text.percent(share)}"
                for reason, share in list(kernel["stalls"].items())[:2]
            )
            or "-",
            _whole(kernel["registers"]),
            text.size(kernel["shared_memory"]),
            _whole(kernel["programs"]),
        ]
        for kernel in kernels
    ]


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _ncu_sentence(report: Result) -> str:
    kernels = report["kernels"]
    if not kernels:
        return "ncu saw no launch of a kernel that passed its filter."
    total = sum((k["time"] or 0.0) * k["launches"] for k in kernels)
    most = kernels[0]
    share = (most["time"] or 0.0) * most["launches"] / (total or 1.0)
    return (
        f"{sum(k['launches'] for k in kernels)} launches of {len(kernels)} kernels took "
        f"{text.seconds(total)}; {most['kernel']} took {text.percent(share)} of it."
    )


def _ncu(report: Result) -> list[Block]:
    if not report["kernels"]:
        return []
    return [
        Table(
            HEADER,
            rows(report["kernels"]),
            "Medians over launches of one shape. DRAM: bytes moved over the kernel's time, and "
            "that beside the peak of this GPU; memory system: the busiest of its levels; tensor "
            "cores: cycles in which they work; occupancy: warps resident of those that could be; "
            "warps wait for: share of the waiting by reason.",
        )
    ]


def _nsys(report: Result) -> list[Block]:
    return [
        Text(f"The timeline is in {report['timeline']}: open it in Nsight Systems."),
        Text(f"Recorded by: `{shlex.join(report['line'])}`"),
    ]
