"""What is compared: files by ``pytest bench --benchmark-json``, and this package's own reports."""

from __future__ import annotations

import itertools
import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fused_dni.report.errors import ReportError
from fused_dni.report.intervals import median_interval
from fused_dni.report.loaded import reading
from fused_dni.report.schema import Result, load
from fused_dni.report.timings import Timing

#: ``kind`` of a file by pytest-benchmark.
BENCHMARKS = "pytest-benchmark"
#: Consecutive parts that a benchmark's rounds are cut into. A median lies between the smallest
#: and the largest of eight parts' medians with 99 % confidence; and what a machine does for
#: seconds moves whole parts, which rounds taken as independent would not show.
PARTS = 8
#: Widens an interval of 95 %, which timings keep, to one of 99 % (of a normal distribution).
WIDER = statistics.NormalDist().inv_cdf(0.995) / statistics.NormalDist().inv_cdf(0.975)


class ComparisonError(ReportError):
    """The files cannot be compared; the message says why."""


@dataclass(frozen=True)
class Row:
    """A benchmark.

    Attributes:
        group: the question that it belongs to; "" if none is stated.
        median: seconds.
        low, high: the median's 99 % interval, seconds; 0 and infinity if there is none.
    """

    group: str
    median: float
    low: float = 0.0
    high: float = math.inf


@dataclass(frozen=True)
class Results:
    """A file's contents.

    Attributes:
        kind: ``pytest-benchmark``, or that of a report.
        facts: machine, versions and settings.
        rows: by name.
    """

    kind: str
    facts: dict[str, Any]
    rows: dict[str, Row]


def read(path: str | os.PathLike[str]) -> Results:
    """Read either kind of file.

    Raises:
        ComparisonError: it holds no times, or not what intervals are made from.
        ReportError: it cannot be read, is none, or is in a format that this version does not read.
    """
    report = load(path)
    with reading(report):
        results = results_of(report)
    if not results.rows:
        raise ComparisonError(f"{path} holds no times")
    return results


def results_of(report: Result) -> Results:
    """Gather the times in a result, by name.

    Raises:
        ComparisonError: it has not what intervals are made from, or is of several runs.
    """
    if report.kind == BENCHMARKS:
        return Results(BENCHMARKS, report.facts, _benchmarks(report))
    if report.kind != "map":
        return Results(report.kind, report.facts, dict(_timings(report, "")))
    # A series is one device, version and setting: its name says that again, and would keep the
    # points of two versions from meeting.
    if len(report["series"]) != 1:
        raise ComparisonError(
            f"holds {len(report['series'])} series, of several devices, versions or "
            "settings: only maps of one can be compared"
        )
    (series,) = report["series"].values()
    facts = {**series["facts"], **series["settings"]}
    return Results("map", facts, dict(_timings(series["points"], "")))


def _benchmarks(report: Result) -> dict[str, Row]:
    rows = {}
    for benchmark in report["benchmarks"]:
        rounds = benchmark["stats"].get("data")
        if rounds is None:
            raise ComparisonError(
                "has no rounds, which intervals are made from: write it by "
                "--benchmark-json, or with --benchmark-save-data"
            )
        name = str(benchmark["fullname"])
        if not isinstance(rounds, list) or not rounds:
            raise ComparisonError(f"has no rounds of {name!r}")
        rounds = [_time(value, name) for value in rounds]
        low, high = interval(rounds)
        # As it was before the suites had a folder: files from then and now meet.
        rows[name.replace("bench/suites/", "bench/")] = Row(
            str(benchmark["group"] or ""), statistics.median(rounds), low, high
        )
    return rows


def _time(value: Any, name: str) -> float:
    """Seconds: a finite number, not negative."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e99:
        raise ComparisonError(f"has no time of {name!r} but {str(value)[:100]!r}")
    return float(value)


def interval(rounds: Sequence[float]) -> tuple[float, float]:
    """99 % interval of the median, from the medians of consecutive parts; 0 and infinity for fewer
    rounds than parts."""
    if len(rounds) < PARTS:
        return 0.0, math.inf
    cuts = [len(rounds) * part // PARTS for part in range(PARTS + 1)]
    parts = [statistics.median(rounds[a:b]) for a, b in itertools.pairwise(cuts)]
    return median_interval(parts, 0.99)


def _wider(bound: float, median: float) -> float:
    if bound == median:
        return median
    if median == 0.0:  # shorter than the clock could tell: there is no ratio to widen
        return math.inf
    ratio = bound / median
    return median * ratio**WIDER if 0.0 < ratio < 1e99 else math.copysign(math.inf, ratio - 1.0)


def _timings(value: Any, name: str) -> Iterator[tuple[str, Row]]:
    """Find every timing inside, by its path."""
    if isinstance(value, list):
        value = {str(i): item for i, item in enumerate(value)}
    if isinstance(value, Timing) and not math.isnan(value.median):  # else it was no number
        bounds = interval(value.rounds)
        if not value.rounds:  # of a file from before they were kept
            bounds = (
                _wider(value.interval[0], value.median),
                _wider(value.interval[1], value.median),
            )
        yield name, Row(name.rpartition("/")[0], value.median, max(0.0, bounds[0]), bounds[1])
    if isinstance(value, Mapping):
        for key, item in value.items():
            inner = f"{name}/{key}" if name else str(key)
            yield from _timings(item, name if key == "timing" else inner)
