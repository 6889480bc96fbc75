"""Races under an expensive top."""

from __future__ import annotations

from typing import Any

import races
from fused_dni.report.kinds import race
from stored import named


def render_races(results: list[dict[str, Any]]) -> str:
    """A part a race: where it was run and by what command, its table, its sentence."""
    if not results:
        return "Not measured yet."
    parts = []
    for report in results:
        facts, settings = report["facts"], report["settings"]
        parts.append(
            f"**{races.title(report)}.** {named(facts)}, {facts['threads']} threads, torch "
            f"{facts['torch']}, {facts['date']}, commit {facts['commit']}: "
            f"`{facts['command']}`. {settings['seconds']:g} s an arm and seed, "
            f"{len(settings['seeds'])} seeds."
        )
        table = race.table(report)
        parts.append(
            "\n".join(
                [
                    f"| {' | '.join(table.header)} |",
                    "| --- |" + " ---: |" * (len(table.header) - 1),
                    *(f"| {' | '.join(row)} |" for row in table.rows),
                ]
            )
        )
        parts.append(race.sentence(report))
    return "\n\n".join(parts)
