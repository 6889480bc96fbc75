"""The committed results: where they lie, what they are called, how they are read and written.

``bench/results`` has a JSON file a device and kind, ``bench/results/verdict`` those that
``docs/verdict.md`` is made from.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from fused_dni.report.files import as_json, finite, write_text
from fused_dni.report.schema import Result, load

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
VERDICT = RESULTS / "verdict"


def named(facts: dict[str, Any]) -> str:
    """Name the device: a GPU, or a processor and the instruction set that our kernels run on there
    (one processor's name may stand for several)."""
    if facts.get("gpu"):
        return str(facts["gpu"])
    return f"{facts['device']} ({facts['isa']})" if facts.get("isa") else str(facts["device"])


def machine(facts: dict[str, Any]) -> str:
    """Write the device's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", named(facts).lower()).strip("-")


def result_path(facts: dict[str, Any], suite: str) -> Path:
    """Say where this machine's results of a suite are kept; those of one thread by themselves."""
    if suite == "lstm":
        return RESULTS / f"{machine(facts)}-lstm.json"
    return RESULTS / f"{machine(facts)}{'-1-thread' if facts['threads'] == 1 else ''}-cpu.json"


def matching(*patterns: str) -> dict[Path, Result]:
    """Read the results whose names, below ``bench/results`` and without ``.json``, fit a
    pattern; the sentence of each is what its kind says of its numbers now."""
    paths = {path for pattern in patterns for path in RESULTS.glob(f"{pattern}.json")}
    return {path: said_anew(load(path)) for path in sorted(paths)}


def said_anew(found: Result) -> Result:
    """Return a result with the sentence that its kind makes of it, where the kind makes one."""
    made = replace(found, sentence="").described()
    return made if made.sentence else found


def benchmarks(path: Path | None, facts: dict[str, Any] | None = None) -> Result:
    """Read the benchmarks so far, to be continued with these facts, or those they have; an empty
    set where there is no file yet."""
    found = Result("benchmarks")
    if path is not None and path.exists():
        found = load(path, "benchmarks")
    return replace(found, facts=found.facts if facts is None else facts, sentence="")


def put(results: Result, suite: str, key: str, group: dict[str, Any]) -> None:
    """Put one measured group into results; it keeps when and how it was measured, since others may
    be measured later."""
    group |= {name: results.facts[name] for name in ("date", "commit", "threads")}
    results.body.setdefault(suite, {})[key] = group


def write(path: Path, result: Result) -> None:
    """Write a result whole, its numbers rounded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, as_json(rounded(finite(result))))


def rounded(value: Any) -> Any:
    """Round floats to six significant digits: more would be noise in the history."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return value
