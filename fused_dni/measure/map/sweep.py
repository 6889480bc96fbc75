"""Measure a grid of points into a file, from where it was left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from fused_dni.measure.errors import Interrupted
from fused_dni.measure.map import store
from fused_dni.measure.map.grid import Point, Settings
from fused_dni.measure.map.layer import measure
from fused_dni.report.schema import Result, save


def sweep(
    points: Sequence[Point],
    settings: Settings,
    path: Path,
    *,
    progress: Callable[[str, float, str], None] = lambda what, fraction, note: None,
    command: str | None = None,
    keep: Callable[[Result], None] | None = None,
) -> Result:
    """Measure ``points``, and write the map after each of them.

    Points that the file already has from this machine, version and settings are not measured
    again, but for those that failed.

    Args:
        path: of the map; continued if it exists.
        progress: called with ``"map"``, the fraction done, and a note on what is being measured.
        command: kept among the facts.
        keep: called with the map after each point, instead of writing it to ``path``.

    Returns:
        The map as it stands in the file.

    Raises:
        ReportError: ``path`` holds something else than a map.
        Interrupted: Ctrl-C; the file has what was measured.
        WriteError: the file cannot be written.
    """
    write = keep or partial(save, path)
    report = store.read_or_empty(path, command)
    found = store.series_for(report, settings, command)["points"]

    def measured(point: Point) -> bool:
        return point.key in found and "failed" not in found[point.key]

    def say(index: int, fraction: float) -> None:
        progress("map", (index + fraction) / len(points), points[index].key)

    try:
        for index, point in enumerate(points):
            say(index, 0.0)
            if not measured(point):
                found[point.key] = measure(point, settings, partial(say, index))
                write(report)
    except KeyboardInterrupt:
        done = sum(map(measured, points))
        raise Interrupted(
            f"{done} of {len(points)} points are in {path}; the same command measures the others"
        ) from None
    progress("map", 1.0, "")
    return report
