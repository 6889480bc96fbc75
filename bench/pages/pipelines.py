"""Pipelines of real processes over a link: steps a second by way of training and latency."""

from __future__ import annotations

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
