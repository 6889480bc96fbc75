"""The map's file: written whole after each point, continued, and joined with those of others.

Points are kept in *series*: what was measured on one device, by one version, with one set of
settings. So a map that goes on elsewhere, or later, or otherwise, gets a series of its own, and
files of several machines join without a question.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fused_dni.measure.baseline import facts
from fused_dni.measure.map.grid import Settings
from fused_dni.report.loaded import reading
from fused_dni.report.schema import Result, load

#: Facts that tell one series from another.
IDENTITY = ("device", "gpu", "threads", "python", "torch", "fused_dni", "commit")


def empty(command: str | None = None) -> Result:
    """Make a map without points."""
    return Result("map", facts=facts(command), body={"series": {}})


def read_or_empty(path: Path, command: str | None = None) -> Result:
    """Read the map in ``path``, to be continued; an empty one if there is no such file.

    Raises:
        ReportError: the file holds something else.
    """
    if not path.exists():
        return empty(command)
    found = load(path, "map")
    _check(found)
    return found


def series_for(report: Result, settings: Settings, command: str | None = None) -> dict[str, Any]:
    """Find the series of this machine, version and settings; added to ``report`` if it has none."""
    here, chosen = facts(command), settings.to_json()
    identity = json.dumps([{name: here[name] for name in IDENTITY}, chosen], sort_keys=True)
    key = hashlib.sha256(identity.encode()).hexdigest()[:12]
    found: dict[str, Any] = report["series"].setdefault(
        key, {"facts": here, "settings": chosen, "points": {}}
    )
    return found


def merge(reports: Sequence[Result]) -> Result:
    """Join maps; none of them is changed.

    Where two have the same point of the same series, a measured one goes before a failed one, and
    else the later one before the earlier.

    Raises:
        ReportError: one of them, from a file, is incomplete.
    """
    joined = empty()
    for report in reports:
        _check(report)
    for key in dict.fromkeys(key for report in reports for key in report["series"]):
        parts = [report["series"][key] for report in reports if key in report["series"]]
        joined["series"][key] = {**parts[0], "points": dict(_worst_first(parts))}
    return joined


def _check(report: Result) -> None:
    """Refuse, by a ReportError that names the file, what is no whole map."""
    with reading(report):
        for series in report["series"].values():
            if not (series["facts"].keys() and series["settings"].keys()):
                raise ValueError("a series without facts or settings")
            for point in series["points"].values():
                str(point["date"])


def _worst_first(parts: Iterable[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """All points by name, of equal names the one to be kept last."""
    every = [item for part in parts for item in part["points"].items()]
    return sorted(every, key=lambda item: ("failed" not in item[1], item[1]["date"]))
