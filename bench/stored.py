"""The committed results: where they lie, what they are called, how they are read and written.

``bench/results`` has a JSON file a device and kind, ``bench/results/verdict`` those that
``docs/verdict.md`` is made from.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
VERDICT = RESULTS / "verdict"


def named(facts: dict[str, Any]) -> str:
    """The device: a GPU, or a processor and the instruction set that our kernels run on there (one
    processor's name may stand for several)."""
    if facts.get("gpu"):
        return str(facts["gpu"])
    return f"{facts['device']} ({facts['isa']})" if facts.get("isa") else str(facts["device"])


def machine(facts: dict[str, Any]) -> str:
    """The device's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", named(facts).lower()).strip("-")


def result_path(facts: dict[str, Any], suite: str) -> Path:
    """Where this machine's results of a suite are kept."""
    return RESULTS / f"{machine(facts)}-{'lstm' if suite == 'lstm' else 'cpu'}.json"


def matching(*patterns: str) -> dict[Path, dict[str, Any]]:
    """The results whose names, below ``bench/results`` and without ``.json``, fit a pattern."""
    paths = {path for pattern in patterns for path in RESULTS.glob(f"{pattern}.json")}
    return {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(paths)}


def load(path: Path) -> dict[str, Any]:
    """Results so far; an empty set where there is no file yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def put(results: dict[str, Any], suite: str, key: str, group: dict[str, Any]) -> None:
    """One measured group into results that have facts; it keeps when and how it was measured, since
    others may be measured later."""
    group |= {name: results["facts"][name] for name in ("date", "commit", "threads")}
    results.setdefault(suite, {})[key] = group


def save(path: Path, results: dict[str, Any]) -> None:
    """Results of benchmarks."""
    write(path, {"kind": "benchmarks", "version": 1, **results}, sort_keys=True)


def write(path: Path, report: dict[str, Any], *, sort_keys: bool = False) -> None:
    """Written whole and moved into place: an interrupted run keeps the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(
        json.dumps(rounded(report), indent=1, sort_keys=sort_keys) + "\n", encoding="utf-8"
    )
    partial.replace(path)


def rounded(value: Any) -> Any:
    """Floats to six significant digits: more would be noise in the history."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return value
