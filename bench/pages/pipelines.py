"""Pipelines of real processes over a link: steps a second by way of training and latency."""

from __future__ import annotations

import statistics
from typing import Any

from pages.cells import table
from stored import named


def render_pipelines(report: dict[str, Any]) -> str:
    """A table for each split: a row a way, a column a latency."""
    splits: dict[str, list[dict[str, Any]]] = {}
    for title, group in report["pipelines"].items():
        splits.setdefault(title.partition(",")[0], []).append({"title": title, **group})
    return "\n\n".join(_split(report, name, groups) for name, groups in splits.items())


def _split(report: dict[str, Any], name: str, groups: list[dict[str, Any]]) -> str:
    groups = sorted(groups, key=lambda group: group["latency_ms"])
    first = groups[0]
    rows = []
    for way in first["order"]:
        found = [group["rows"].get(way, {}) for group in groups]
        exact = "" if any(row.get("exact") for row in found) else ", not exact"
        rows.append([f"{way}{exact}", *map(_rate, found)])
    padded = first["padded_ms"]
    sleeping = "" if padded is None else (
        f" Each stage's passes over a batch are stretched to {padded[0]:g} and {padded[1]:g} ms by "
        "sleeping, so that two cores stand for one a stage."
    )  # fmt: skip
    facts = report["facts"]
    said = (
        f"{named(facts)}, threads {facts['threads']} a process, torch {facts['torch']}, "
        f"{first['date']}, commit {first['commit']}. Stages x blocks of Linear, BatchNorm, ReLU x "
        f"features x batch: {name}.{sleeping} Steps a second, median of rounds (lowest to highest)."
    )
    header = ["gradient", *(f"{group['latency_ms']:g} ms one way" for group in groups)]
    return f"{said}\n\n{table(header, rows)}"


def _rate(row: dict[str, Any]) -> str:
    if "timing" not in row:
        return str(row.get("failed", "–"))
    rates = sorted(1.0 / seconds for seconds in row["timing"].rounds)
    return f"{1.0 / row['timing'].median:.2f} ({rates[0]:.2f} to {rates[-1]:.2f})"


def render_stragglers(report: Any) -> str:
    """A table with a row a way: steps a second and error by how slow the upper stage is now and
    then."""
    facts, s = report["facts"], report["settings"]
    factors = sorted({row["factor"] for row in report["stragglers"]})
    names = list(dict.fromkeys(row["name"] for row in report["stragglers"]))
    rows = []
    for name in names:
        rates = [
            row["measured"]
            for factor in factors
            for row in report["throughput"]
            if (row["name"], row["factor"]) == (name, factor)
        ]
        errors, ages = [], []
        for factor in factors:
            found = [
                row
                for row in report["stragglers"]
                if (row["name"], row["factor"]) == (name, factor)
            ]
            percent = [100.0 * row["error"] for row in found]
            errors.append(
                f"{statistics.fmean(percent):.2f} ({min(percent):.2f}–{max(percent):.2f})"
            )
            known = [row["age"] for row in found if row["age"] is not None]
            ages.append(f"{statistics.fmean(known):.1f}" if known else "–")
        paces = [f"{rate:.1f}" for rate in rates] or ["as stale"] * len(factors)
        rows.append([name, *paces, *errors, *ages])
    header = [
        "gradient",
        *(f"steps/s, {factor:g}x" for factor in factors),
        *(f"error, {factor:g}x" for factor in factors),
        *(f"age, {factor:g}x" for factor in factors),
    ]
    seeds = sorted({row["seed"] for row in report["stragglers"]})
    said = (
        f"{named(facts)}, threads 1 a process, torch {facts['torch']}, {facts['date']}, commit "
        f"{facts['commit']}. Error on MNIST in per cent after {s['epochs']} epochs, mean (range) "
        f"over {len(seeds)} seeds, and mean age of gradients in steps; passes stretched to "
        f"{1e3 * s['forward_s']:g} and {1e3 * s['backward_s']:g} ms. Steps a second are of "
        f"processes that sleep for 20 and 40 ms, one run of {s.get('seconds', 15):g} s each: the "
        "same spells for all ways."
    )
    return f"{said}\n\n{table(header, rows)}"


def render_simulated(report: Any) -> str:
    """A table with a row a mode and number of stages: measured steps a second by latency, and by
    how much the simulated are more."""
    facts, checked = report["facts"], report["checked"]
    latencies = sorted({row["latency"] for row in checked})
    keys = dict.fromkeys((row["mode"], row["stages"]) for row in checked)
    rows = []
    for mode, stages in keys:
        cells = [
            f"{row['measured']:.2f} ({100 * row['deviation']:+.0f} %)"
            for latency in latencies
            for row in checked
            if (row["mode"], row["stages"], row["latency"]) == (mode, stages, latency)
        ]
        rows.append([mode, str(stages), *cells])
    header = ["mode", "stages", *(f"{1e3 * latency:g} ms" for latency in latencies)]
    worst = max(abs(row["deviation"]) for row in checked)
    said = (
        f"{named(facts)}, threads {facts['threads']} a process, torch {facts['torch']}, "
        f"{facts['date']}, commit {facts['commit']}; a busy machine. Measured steps a second, and "
        f"by how much the simulated are more; the largest deviation of {len(checked)} is "
        f"{100 * worst:.0f} %. By `{facts['command']}`."
    )
    return f"{said}\n\n{table(header, rows)}"
