"""Nsight Compute: the command line, and its CSV reduced to a table of kernels."""

from __future__ import annotations

import csv
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MISSING = (
    "ncu is not on PATH: install NVIDIA Nsight Compute (package nsight-compute of NVIDIA's CUDA "
    "repository, or developer.nvidia.com/nsight-compute)"
)

#: The metrics behind each number of a kernel, all of which :func:`read` returns in SI units and
#: shares (0 to 1).
METRICS = {
    "time": "gpu__time_duration.sum",
    "bandwidth": "dram__bytes.sum.per_second",
    "bandwidth_share": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "memory_share": "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed",
    "tensor_share": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "occupancy": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
    "shared_memory": "launch__shared_mem_per_block",
    "programs": "launch__grid_size",
}

#: What every run of ncu is asked for. The section has the stalls by reason, whose metrics differ
#: from one architecture to the next; a name that one does not know would end the run.
OPTIONS = (
    *("--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"),
    *("--section", "WarpStateStats", "--metrics", ",".join(METRICS.values())),
)

#: The kernels of both backends, by their functions' names.
OURS = r"regex:^(lstm_\w+|(linear|synthesizer|forward|backward|update)_kernel)$"

_STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
_UNIT = re.compile(r"(?:([num]?)s(?:econd)?|([kmgt]?)byte)(?:/.*)?", re.IGNORECASE)
_OF_A_SECOND = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0}
_OF_A_BYTE = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


def line(
    command: Sequence[str],
    folder: Path,
    *,
    only: str | None = None,
    kernels: str = OURS,
    skip: int = 0,
    count: int = 50,
) -> list[str]:
    """Return the command line.

    Args:
        command: what is profiled.
        folder: where ``ncu.csv`` goes.
        only: launches inside ranges of this name alone.
        kernels: filter of the kernels' function names, in ncu's own form.
        skip, count: of the launches that pass the filters.
    """
    words = ["ncu", *OPTIONS, "--target-processes", "all", "--nvtx"]
    words += ["--kernel-name-base", "function", "--kernel-name", kernels]
    words += ["--launch-skip", str(skip), "--launch-count", str(count)]
    if only is not None:
        words += ["--nvtx-include", f"{only}/"]  # a slash: a range that is pushed and popped
    return [*words, "--log-file", str(folder / "ncu.csv"), *command]


def read(written: str) -> list[dict[str, Any]]:
    """Say what ``ncu --csv --page raw`` wrote, a kernel of one launch shape each, the dearest
    first.

    Returns:
        By kernel: ``kernel``, ``launches``, what :data:`METRICS` names (medians over the launches;
        seconds, bytes, bytes per second, shares; None where this GPU has no such metric), ``grid``,
        ``block`` and ``stalls``: by reason the share of the warps' waiting, largest first.
    """
    rows = [row for row in written.splitlines() if row.startswith('"')]
    first = next((i for i, row in enumerate(rows) if row.startswith('"ID"')), None)
    if first is None:
        return []
    table = csv.DictReader(rows[first:])
    units = next(table, {})
    launches: dict[tuple[str, str, str], list[dict[str, str]]] = defaultdict(list)
    for launch in table:
        name, grid, block = (
            launch.get(column) or "?" for column in ("Kernel Name", "Grid Size", "Block Size")
        )
        launches[name, grid, block].append(launch)
    found = [_kernel(key, uses, units) for key, uses in launches.items()]
    return sorted(found, key=lambda kernel: -(kernel["time"] or 0.0) * kernel["launches"])


def _kernel(
    key: tuple[str, str, str], uses: list[dict[str, str]], units: dict[str, str]
) -> dict[str, Any]:
    def median(metric: str) -> float | None:
        values = [_number(use.get(metric), units.get(metric)) for use in uses]
        there = [value for value in values if value is not None]
        return statistics.median(there) if there else None

    kernel: dict[str, Any] = {"kernel": key[0], "grid": key[1], "block": key[2]}
    kernel["launches"] = len(uses)
    kernel.update((name, median(metric)) for name, metric in METRICS.items())
    stalls = {}
    for metric in units:
        match = _STALL.fullmatch(metric)
        # Selected warps issue, and what was not issued is counted under its reason already.
        if match and match[1] != "selected" and not match[1].endswith("_not_issued"):
            stalls[match[1]] = median(metric) or 0.0
    waiting = sum(stalls.values())
    kernel["stalls"] = {
        reason: warps / waiting
        for reason, warps in sorted(stalls.items(), key=lambda item: -item[1])
        if warps
    }
    return kernel


def _number(given: str | None, unit: str | None) -> float | None:
    """Return a cell in SI units, a percentage as a share; None where there is no number."""
    try:
        value = float((given or "").replace(",", ""))
    except ValueError:  # "n/a", "no data"
        return None
    if unit == "%":
        return value / 100.0
    match = _UNIT.fullmatch(unit or "")
    if match is None:
        return value
    seconds, size = match.groups()
    return value * (_OF_A_BYTE[size.lower()] if size is not None else _OF_A_SECOND[seconds.lower()])
