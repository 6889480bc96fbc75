"""What tables are made of: rows, cells, and the line that says what they hold for."""

from __future__ import annotations

import re
from typing import Any

from stored import named


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; every column after the first to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def provenance(results: dict[str, Any], groups: dict[str, Any]) -> str:
    """One line: machine, threads, versions, when and at which commit."""
    facts = results["facts"]
    dates = sorted({group["date"] for group in groups.values()})
    commits = sorted({str(group["commit"]) for group in groups.values()})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    threads = sorted({group["threads"] for group in groups.values()})
    return (
        f"{named(facts)}, {' or '.join(map(str, threads))} threads, torch {facts['torch']}, "
        f"{span}, commit {', '.join(commits)}."
    )


def milliseconds(row: dict[str, Any]) -> str:
    """Median with its 95 % interval."""
    text = f"{row['median'] * 1e3:.3g}"
    if row.get("interval"):
        low, high = (f"{bound * 1e3:.3g}" for bound in row["interval"])
        text += f" ({low}–{high})"
    return text


def interval(ratio: dict[str, Any]) -> str:
    """A ratio with its interval."""
    text = f"{ratio['median']:.2f}"
    if ratio["interval"]:
        text += " ({:.2f}–{:.2f})".format(*ratio["interval"])
    return text


def ordered(groups: dict[str, Any]) -> list[str]:
    """Group names by the numbers in them, then by the rest."""
    return sorted(groups, key=lambda key: ([int(n) for n in re.findall(r"\d+", key)], key))
