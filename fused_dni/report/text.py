"""Small things that every report prints: tables, times, sizes, ratios, suggestions for typos."""

from __future__ import annotations

import difflib
import math
import statistics
from collections.abc import Iterable, Sequence

from fused_dni.report.timings import Ratio


def seconds(value: float | None, digits: int = 3) -> str:
    """Return a time in the unit that suits it: ``812 µs``, ``1.46 ms``, ``12.3 s``."""
    if value is None or not math.isfinite(value):
        return "-"
    size = abs(value)
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if size >= scale:
            return f"{significant(value / scale, digits)} {unit}"
    return f"{significant(value / 1e-6, digits)} µs"


def significant(value: float, digits: int = 3) -> str:
    """``value`` to so many significant digits, without an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"


def raised(error: BaseException) -> str:
    """Say what a user's code has raised: ``KeyError: 'x'``, the first line of the message alone."""
    said, kind = str(error).strip(), type(error).__name__
    return f"{kind}: {said.splitlines()[0]}" if said else kind


def size(value: float | None) -> str:
    """Bytes as ``812 B``, ``1.46 MB`` (powers of ten)."""
    if value is None:
        return "-"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= scale:
            return f"{significant(value / scale)} {unit}"
    return f"{value:.0f} B"


def rate(value: float) -> str:
    """Write how many a second: ``12,345``, ``9.87``."""
    return f"{value:,.0f}" if value >= 100 else significant(value)


def ratio(found: Ratio, *, marked: bool = True, to: str = "") -> str:
    """Write a ratio of times: ``0.83``, ``~0.99``, ``0.83 (0.81 to 0.85)``.

    Args:
        found: the ratio.
        marked: put a ``~`` before one that could not be told from one.
        to: what stands between the bounds of its interval; "" leaves the interval out.
    """
    mark = "~" if marked and found.verdict() == "inconclusive" else ""
    made = f"{mark}{found.median:.2f}"
    if not to or found.bounds is None:
        return made
    low, high = found.bounds
    return f"{made} ({low:.2f}{to}{high:.2f})"


def percent(share: float | None, form: str = ".0f") -> str:
    """Write a share as ``12 %``; ``-`` for None."""
    return "-" if share is None else f"{100 * share:{form}} %"


def span(values: Iterable[float], form: str = ".2f", to: str = " to ") -> str:
    """Write the least and the most of some values: ``0.65 to 0.72``."""
    found = list(values)
    return f"{min(found):{form}}{to}{max(found):{form}}"


def mean(values: Sequence[float]) -> str:
    """Write a mean and, of several values, their range: ``2.31 (2.20-2.41)``; ``-`` for none."""
    if not values:
        return "-"
    between = f" ({span(values, to='-')})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{between}"


def parts(found: Sequence[float | None]) -> str:
    """Write in what part of a time something was reached, by seed, None where it was not: median,
    range, and how many seeds if not all."""
    known = [part for part in found if part is not None]
    if not known:
        return "never"
    said = f"{statistics.median(known):.2f} ({span(known)})"
    return said if len(known) == len(found) else f"{said}, {len(known)} of {len(found)} seeds"


def count(number: int, what: str) -> str:
    """Write a number of things: ``1 seed``, ``3 seeds``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, markdown: bool = False) -> str:
    """Align columns, the first to the left and the others to the right; or write Markdown.

    Not by rich, whose import takes about as long as all else that ``fused-dni report`` does.
    """
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def render(cells: Sequence[str], pad: str = " ") -> list[str]:
        return [
            cell.ljust(width, pad) if i == 0 else cell.rjust(width, pad)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]

    if markdown:
        rule = ["-" * widths[0]] + ["-" * (w - 1) + ":" if w > 1 else "-:" for w in widths[1:]]
        body = [render(lines[0]), rule, *(render(line) for line in lines[1:])]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in body)
    body = [render(lines[0]), ["-" * w for w in widths], *(render(line) for line in lines[1:])]
    return "\n".join("  ".join(cells).rstrip() for cells in body)


def unknown(what: str, given: str, allowed: Iterable[str]) -> str:
    """``unknown activation 'rleu', did you mean 'relu'? Allowed: ...``."""
    names = list(allowed)
    bare = {name.lstrip("-"): name for name in names}  # dashes make no two options alike
    close = difflib.get_close_matches(given.lstrip("-"), bare, n=1)
    hint = f", did you mean {bare[close[0]]!r}?" if close else "."
    return f"unknown {what} {given!r}{hint} Allowed: {', '.join(names)}"
