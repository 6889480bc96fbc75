"""Races, and grids of rivals."""

from __future__ import annotations

from typing import Any

import races
import readings
from fused_dni.report import Table, Text, blocks_of
from fused_dni.report.blocks import as_markdown
from fused_dni.report.kinds import race as race_report
from pages.cells import where
from stored import RESULTS, named


def render_races(results: list[dict[str, Any]]) -> str:
    """Render a row a race: who came first to what backprop ends with, and in what part of its
    time."""
    if not results:
        return "Not measured yet."
    order = list(races.TITLES.values())
    found = sorted(results, key=lambda report: order.index(races.title(report)))
    answer = readings.tops({races.title(report): report for report in found})
    assert answer.shown is not None
    facts, settings = found[0]["facts"], found[0]["settings"]
    devices = sorted({f"{named(r['facts'])}, torch {r['facts']['torch']}" for r in found})
    return (
        f"{as_markdown([answer.shown], RESULTS)} {'; '.join(devices)}; {facts['threads']} threads, "
        f"{settings['seconds']:g} s an arm and seed, {len(settings['seeds'])} seeds."
    )


def _where(report: dict[str, Any]) -> str:
    facts = report["facts"]
    return f"{where(facts)}: `{facts['command']}`."


def render_race(report: dict[str, Any]) -> str:
    """Render all arms of one race."""
    table = race_report.table(report)  # type: ignore[arg-type]
    return as_markdown([Text(report["sentence"]), table, Text(_where(report))], RESULTS)


def render_grid(report: dict[str, Any]) -> str:
    """Render the tables of a grid but for rates and steps."""
    shown = [block for block in blocks_of(report) if isinstance(block, Table)][:3]  # type: ignore[arg-type]
    head = Text(f"**{report['title']}.** {report['sentence']}")
    return as_markdown([head, *shown, Text(_where(report))], RESULTS)
