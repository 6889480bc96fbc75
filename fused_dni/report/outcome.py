"""What a training run ended with, whatever it trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fused_dni.report.blocks import Block, Table, Text


def unfinished(report: Mapping[str, Any]) -> list[Block]:
    """Say how far an experiment is that is not through."""
    so_far = f"Unfinished: {len(report['runs'])} runs so far."
    return [] if report["finished"] else [Text(so_far)]


def tuning(
    tried: Sequence[Mapping[str, Any]], caption: str, unit: str = "", lags: bool = False
) -> Table:
    """Show what each rate came to, a row an arm (and lag), a column a rate."""
    rows: dict[tuple[str, ...], dict[float, str]] = {}
    for one in tried:
        lag = ["any" if one["lag"] is None else str(one["lag"])] if lags else []
        cell = "diverged" if one["diverged"] else f"{100 * one['error']:.2f}{unit}"
        rows.setdefault((one["name"], *lag), {})[one["rate"]] = cell
    rates = list(dict.fromkeys(one["rate"] for one in tried))
    lines = [[*key, *(cells.get(rate, "-") for rate in rates)] for key, cells in rows.items()]
    return Table(["arm", *["lag"] * lags, *(f"{rate:g}" for rate in rates)], lines, caption)


@dataclass
class Outcome:
    """What a finished training run has to report.

    Attributes:
        settings: those of the experiment, or what a report keeps of them, by the same names.
        data: the dataset's name, or what is said of a text.
        runs: for each method and seed ``name``, ``seed``, ``history`` (a row a turn) and
            ``fingerprint`` of the final parameters.
        notes: what the reader should know, a paragraph each.
        commit: of the program that trained, several if it was another after a stop.
    """

    settings: Any
    data: Any
    runs: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    commit: str | None = field(default=None, kw_only=True)

    def names(self) -> list[str]:
        """List the methods in order."""
        return list(dict.fromkeys(run["name"] for run in self.runs))

    def of(self, name: str) -> list[dict[str, Any]]:
        """Select the runs of a method, one a seed."""
        return [run for run in self.runs if run["name"] == name]

    def summary(self) -> list[dict[str, Any]]:
        """Sum up every method in a row."""
        raise NotImplementedError
