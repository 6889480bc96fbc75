"""Races under an expensive top."""

from __future__ import annotations

import statistics
from typing import Any

import races
from stored import named


def render_races(results: list[dict[str, Any]]) -> str:
    """A row a race: who came first to what backprop ends with, and in what part of its time."""
    if not results:
        return "Not measured yet."
    header = ["", "synthetic gradients", "part of the time", "otherwise", "part of the time"]
    lines = [f"| {' | '.join(header)} |", "| --- | --- | ---: | --- | ---: |"]
    order = list(races.TITLES.values())
    for report in sorted(results, key=lambda r: order.index(races.title(r))):
        row = [races.title(report)]
        for ours in (True, False):
            found = races.soonest(report, ours)
            if found is None:
                row += ["none", "-"]
            else:
                name, times = found
                spread = f"{min(times):.2f} to {max(times):.2f}"
                row += [name, f"{statistics.median(times):.2f} ({spread})"]
        lines.append(f"| {' | '.join(row)} |")
    facts, settings = results[0]["facts"], results[0]["settings"]
    where = sorted({f"{named(r['facts'])}, torch {r['facts']['torch']}" for r in results})
    lines += [
        "",
        f"{'; '.join(where)}; {facts['threads']} threads, {settings['seconds']:g} s an arm and "
        f"seed, {len(settings['seeds'])} seeds: the median, and the range.",
    ]
    return "\n".join(lines)
