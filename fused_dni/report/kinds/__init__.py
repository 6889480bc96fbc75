"""Which reports there are, and which of their formats this version reads."""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fused_dni.report import text
from fused_dni.report.blocks import Block, Heading, Table, Text
from fused_dni.report.errors import ReportError as ReportError
from fused_dni.report.loaded import parts_of, reading


class Kind(NamedTuple):
    """Where a kind's blocks are made (``module:function``), and the format that it reads."""

    blocks: str
    version: int


#: By what stands under ``kind`` in the JSON.
KINDS: dict[str, Kind] = {
    "verdict": Kind("fused_dni.report.kinds.verdict:blocks", 1),
    "verdict lstm": Kind("fused_dni.report.kinds.verdict_lstm:blocks", 1),
    "verdict top": Kind("fused_dni.report.kinds.verdict_top:blocks", 1),
    "verdict link": Kind("fused_dni.report.kinds.verdict_link:blocks", 1),
    "train": Kind("fused_dni.report.kinds.train:blocks", 1),
    "train charlm": Kind("fused_dni.report.kinds.recurrent:blocks", 1),
    "train copy": Kind("fused_dni.report.kinds.recurrent:blocks", 1),
    "train repeat-copy": Kind("fused_dni.report.kinds.recurrent:blocks", 1),
    "train pipeline": Kind("fused_dni.report.kinds.pipeline:blocks", 1),
    "advice": Kind("fused_dni.report.kinds.advice:blocks", 1),
    "map": Kind("fused_dni.report.kinds.map:blocks", 1),
    "rivals": Kind("fused_dni.report.kinds.rivals:blocks", 1),
    "delay": Kind("fused_dni.report.kinds.delay:blocks", 1),
    "race": Kind("fused_dni.report.kinds.race:blocks", 1),
    "interfaces": Kind("fused_dni.report.kinds.interfaces:blocks", 1),
    "simulation": Kind("fused_dni.report.kinds.simulation:blocks", 1),
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

    Returns:
        The report; to ask it for what the file has not is a ReportError that names both.

    Raises:
        ReportError: no such file, no JSON, another kind, or a format of another version.
    """
    try:
        found: Any = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if isinstance(found, dict) and {"benchmarks", "machine_info"} <= found.keys():
            found = _by_pytest(found)
        if not isinstance(found, dict) or found.get("kind") not in list(KINDS):
            name = repr(found.get("kind") if isinstance(found, dict) else None)[:100]
            known = ", ".join(KINDS)
            raise ReportError(
                f"{path} is no report of fused_dni: its kind is {name}, known: {known}"
            )
        report: dict[str, Any] = parts_of({"version": 1, **found}, path)
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror or error}") from error
    except RecursionError as error:
        raise ReportError(f"{path} is no report: it is nested too deeply") from error
    except ReportError:
        raise
    except ValueError as error:  # of the decoder, of the parser, of a number of too many digits
        raise ReportError(f"{path} is no JSON: {error}") from error
    name = report["kind"]
    if kind is not None and name != kind:
        raise ReportError(f"{path} holds a report of kind {name!r}, wanted is {kind!r}")
    version = report["version"]  # formats have numbers since their second
    if version != KINDS[name].version:
        facts = report.get("facts")
        writer = facts.get("fused_dni") if isinstance(facts, dict) else None
        raise ReportError(
            f"{path} is a {name!r} report in format {version!r}, this version of "
            f"fused_dni reads format {KINDS[name].version}: measure it again, or read it with the "
            f"version that wrote it ({writer or 'unknown'})"
        )
    return report


def _by_pytest(found: dict[str, Any]) -> dict[str, Any]:
    machine = found["machine_info"] if isinstance(found["machine_info"], dict) else {}
    cpu = machine.get("cpu")
    facts = machine.get("fused_dni") or {
        "device": cpu.get("brand_raw") if isinstance(cpu, dict) else None,
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
        ReportError: its kind is unknown, or the file that it is from does not hold what a report
            of this kind does.
    """
    name = str(report.get("kind"))
    if name not in KINDS:
        raise ReportError(text.unknown("report", name, KINDS))
    module, _, function = KINDS[name].blocks.partition(":")
    make = getattr(importlib.import_module(module), function)
    with reading(report):
        return [_as_text(block) for block in make(report)]


def _as_text(block: Block) -> Block:
    """The same, of strings alone: a name that is a number in somebody's file is one here."""
    if isinstance(block, (Heading, Text)):
        return replace(block, text=str(block.text))
    if isinstance(block, Table):
        rows = [[str(cell) for cell in row] for row in block.rows]
        if any(len(row) != len(block.header) for row in rows):
            raise ValueError("rows of a table differ in length")
        return replace(block, header=[str(cell) for cell in block.header], rows=rows)
    return block
