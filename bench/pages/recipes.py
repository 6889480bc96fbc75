"""Recipes of synthetic gradients: the tables of all runs of ``fused-dni recipes``."""

from __future__ import annotations

from typing import Any

from fused_dni.report.kinds import recipes
from pages.cells import table, where


def render_recipes(results: list[Any]) -> str:
    """Render error by row and k, and the share of exact steps, for each result, those of most
    seeds first; then what the rows are."""
    if not results:
        return "Not measured yet."
    rows = {name: what for report in results for name, what in report["rows"].items()}
    explained = table(["row", "what it is"], [[f"`{name}`", what] for name, what in rows.items()])
    ordered = sorted(results, key=lambda report: -len(report["settings"]["seeds"]))
    return "\n\n".join([*map(_one, ordered), explained])


def _one(report: Any) -> str:
    s, facts = report["settings"], report["facts"]
    ks = sorted(s["target_every"])
    shares = {line[0]: line[1:] for line in recipes.shares(report).rows}
    rows = [
        [name, *(recipes.cell(report, name, k).replace("*", "\\*") for k in ks), *shares[name]]
        for name in report["rows"]
    ]
    header = ["row", *(f"k={k}" for k in ks), *(f"exact, k={k}" for k in ks)]
    if len(set(shares["backprop"])) == 1:  # it has one error, whatever k
        rows[0][1 : 1 + len(ks)] = [rows[0][1].removesuffix(" \\*"), *[""] * (len(ks) - 1)]
    said = recipes.sentence(report)
    unfinished = "" if report["finished"] else f" Unfinished: {len(report['runs'])} runs so far."
    return (
        f"**{s['depth']} × {s['hidden']}, {s['epochs']} epochs.** {said} "
        f"{recipes.protocol(report)}{unfinished}\n\n{table(header, rows)}\n\n"
        "Error, %: mean (range) over seeds. \\*: the range lies below that of a held gradient at "
        f"the same k; !: above it.\n\n{where(facts)}. By `{facts['command']}`."
    )
