"""Races under an expensive top."""

from __future__ import annotations

from typing import Any

import races
import readings
from fused_dni.report.blocks import as_markdown
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
    where = sorted({f"{named(r['facts'])}, torch {r['facts']['torch']}" for r in found})
    return (
        f"{as_markdown([answer.shown], RESULTS)} {'; '.join(where)}; {facts['threads']} threads, "
        f"{settings['seconds']:g} s an arm and seed, {len(settings['seeds'])} seeds."
    )
