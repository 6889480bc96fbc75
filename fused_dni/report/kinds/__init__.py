"""Which reports there are, and which of their formats this version reads."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from fused_dni.report import text
from fused_dni.report.blocks import Block


class ReportError(ValueError):
    """A file is no report, or one that this version does not read; the message says why."""


class Kind(NamedTuple):
    """Where a kind's blocks are made (``module:function``), and the format that it reads."""

    blocks: str
    version: int


#: By what stands under ``kind`` in the JSON.
KINDS: dict[str, Kind] = {
    "verdict": Kind("fused_dni.report.kinds.verdict:blocks", 1),
    "verdict lstm": Kind("fused_dni.report.kinds.verdict_lstm:blocks", 1),
    "train": Kind("fused_dni.report.kinds.train:blocks", 1),
    "train charlm": Kind("fused_dni.report.kinds.recurrent:blocks", 1),
    "train copy": Kind("fused_dni.report.kinds.recurrent:blocks", 1),
    "train repeat-copy": Kind("fused_dni.report.kinds.recurrent:blocks", 1),
    "advice": Kind("fused_dni.report.kinds.advice:blocks", 1),
    "map": Kind("fused_dni.report.kinds.map:blocks", 1),
    "rivals": Kind("fused_dni.report.kinds.rivals:blocks", 1),
    "interfaces": Kind("fused_dni.report.kinds.interfaces:blocks", 1),
    "profile": Kind("fused_dni.report.kinds.profile:blocks", 1),
    "comparison": Kind("fused_dni.report.kinds.comparison:blocks", 1),
    "benchmarks": Kind("fused_dni.report.kinds.benchmarks:blocks", 1),
    "pytest-benchmark": Kind("fused_dni.report.kinds.benchmarks:blocks", 1),
    "planted": Kind("fused_dni.report.kinds.planted:blocks", 1),
}


def load(path: str | os.PathLike[str], kind: str | None = None) -> dict[str, Any]:
    """Read a report.

    Args:
        path: a JSON file; one by ``pytest --benchmark-json``, which says nothing of its kind, is
            read as of kind ``pytest-benchmark``.
        kind: what it must be; None for any kind.

    Raises:
        ReportError: no such file, no JSON, another kind, or a format of another version.
    """
    try:
        found: Any = json.loads(Path(path).read_text())
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ReportError(f"{path} is no JSON: {error}") from error
    if isinstance(found, dict) and {"benchmarks", "machine_info"} <= found.keys():
        found = _by_pytest(found)
    name = found.get("kind") if isinstance(found, dict) else None
    if name not in KINDS:
        known = ", ".join(KINDS)
        raise ReportError(f"{path} is no report of fused_dni: its kind is {name!r}, known: {known}")
    if kind is not None and name != kind:
        raise ReportError(f"{path} holds a report of kind {name!r}, wanted is {kind!r}")
    version = found.get("version", 1)  # formats have numbers since their second
    if version != KINDS[name].version:
        raise ReportError(
            f"{path} is a {name!r} report in format {version!r}, this version of "
            f"fused_dni reads format {KINDS[name].version}: measure it again, or read it with the "
            f"version that wrote it ({found.get('facts', {}).get('fused_dni', 'unknown')})"
        )
    report: dict[str, Any] = found
    return report


def _by_pytest(found: dict[str, Any]) -> dict[str, Any]:
    machine = found["machine_info"]
    facts = machine.get("fused_dni") or {
        "device": machine.get("cpu", {}).get("brand_raw"),
        "python": machine.get("python_version"),
    }
    return {
        "kind": "pytest-benchmark",
        "version": KINDS["pytest-benchmark"].version,
        "facts": facts,
        "benchmarks": found["benchmarks"],
    }


def blocks_of(report: dict[str, Any]) -> list[Block]:
    """What a loaded report says.

    Raises:
        ReportError: its kind is unknown.
    """
    name = str(report.get("kind"))
    if name not in KINDS:
        raise ReportError(text.unknown("report", name, KINDS))
    module, _, function = KINDS[name].blocks.partition(":")
    made: list[Block] = getattr(importlib.import_module(module), function)(report)
    return made
