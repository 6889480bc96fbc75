"""Held against what was measured: throughput of real pipelines beside the simulated."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from fused_dni.measure.simulate.modes import MODES, Case, simulate
from fused_dni.measure.simulate_settings import MOST_STAGES, Settings, Times
from fused_dni.report import text

#: A simulated throughput is to be the measured one within this share.
AGREEMENT = 0.2
#: What a measured row may say of its own, beside mode, stages, latency_s and steps_per_second.
OPTIONS = (
    "microbatches",
    "window",
    "buffer",
    "target_every",
    "max_age",
    "local_steps",
    "late_receives",
    "forward_bytes",
    "backward_bytes",
    "parameter_bytes",
)
_NEEDED = ("mode", "stages", "latency_s", "steps_per_second")


def compare(
    measured: Sequence[Mapping[str, Any]], settings: Settings | None = None
) -> list[dict[str, Any]]:
    """Simulate what was measured.

    Args:
        measured: rows with ``mode``, ``stages``, ``latency_s`` (one way, seconds) and
            ``steps_per_second``. A step is an update of the exact modes, 2BW and data parallel
            (of ``microbatches``), a microbatch of ``stale``, ``dni`` and ``local``, a local step
            of every replica of ``diloco``. Optional: ``times``, an object of seconds by the names
            of :class:`fused_dni.measure.simulate_settings.Times` (``forward`` and ``backward``
            at least; one number or one a stage), and the :data:`OPTIONS`, as in
            :class:`fused_dni.measure.simulate_settings.Settings`.
        settings: what rows do not say.

    Returns:
        The rows in order, each with ``mode``, ``stages``, ``latency``, ``measured`` and
        ``simulated`` steps a second, and ``deviation``: simulated over measured, less one.

    Raises:
        ValueError: a row that lacks something, knows more, or has a number out of range; which one
            is named.
    """
    settings = settings or Settings()
    found = []
    for i, row in enumerate(measured):
        try:
            case, rate = _case(row, settings)
            (made,) = simulate(row["mode"], [case])
        except (ValueError, TypeError) as error:
            raise ValueError(f"measured row {i + 1}: {error}") from error
        found.append(
            {
                "mode": row["mode"],
                "stages": case.stages,
                "latency": case.settings.link.latency,
                "measured": rate,
                "simulated": made["updates"],
                "deviation": made["updates"] / rate - 1.0,
            }
        )
    return found


def _case(row: Mapping[str, Any], settings: Settings) -> tuple[Case, float]:
    if not isinstance(row, Mapping):
        raise ValueError(f"must be an object, got {type(row).__name__}")
    known = (*_NEEDED, "times", *OPTIONS)
    for name in _NEEDED:
        if name not in row:
            raise ValueError(f"it lacks {name!r}")
    for name in row:
        if name not in known:
            raise ValueError(text.unknown("name", str(name), known))
    if row["mode"] not in MODES:
        raise ValueError(text.unknown("mode", str(row["mode"]), MODES))
    stages, rate = row["stages"], row["steps_per_second"]
    if not isinstance(stages, int) or not 1 <= stages <= MOST_STAGES:
        raise ValueError(f"stages must be a whole number from 1 to {MOST_STAGES}, got {stages!r}")
    if not isinstance(rate, (int, float)) or not 0.0 < rate < float("inf"):
        raise ValueError(f"steps_per_second must be a positive, finite number, got {rate!r}")
    changed: dict[str, Any] = {name: row[name] for name in OPTIONS if name in row}
    if "times" in row:
        changed["times"] = _times(row["times"], stages)
    link = replace(settings.link, latency=float(row["latency_s"]))
    return Case(stages, replace(settings, link=link, **changed)), float(rate)


def _times(given: Any, stages: int) -> Times:
    names = [part.name for part in fields(Times)]
    if not isinstance(given, Mapping) or not {"forward", "backward"} <= given.keys():
        raise ValueError("times must be an object with forward and backward, in seconds")
    for name, value in given.items():
        if name not in names:
            raise ValueError(text.unknown("time", str(name), names))
        values = value if isinstance(value, list) else [value]
        if len(values) not in (1, stages):
            raise ValueError(f"times/{name} must have one number or {stages}, got {len(values)}")
        if not all(isinstance(v, (int, float)) for v in values):
            raise ValueError(f"times/{name} must be seconds, got {value!r}")
    return Times.of(**given)


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read measured rows from a JSON file: a list, or an object with the list under ``rows``.

    Raises:
        ValueError: no such file, or it holds something else.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    rows = found.get("rows") if isinstance(found, dict) else found
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} must hold a list of measured rows, or one under 'rows'")
    return rows
