"""What figures have in common: colours, curves of runs, means with their range."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

BLUE, LIGHT, GREEN, RED, YELLOW, VIOLET, GREY = (
    "#1b6ca8", "#6fa8dc", "#2e9e5b", "#d1495b", "#edae49", "#8d6a9f", "#555555",
)  # fmt: skip
#: For what has no colour of its own, in turn.
CYCLE = (BLUE, LIGHT, GREEN, RED, YELLOW, VIOLET, GREY)
STYLES = ("-", "--", ":", "-.")
#: By what a method's name begins with, the longer first: backprop in blues and greens, synthetic
#: gradients in reds, the others between.
METHODS = {
    "backprop": BLUE,
    "compiled": LIGHT,
    "graph": "#12486f",
    "in-backward": "#88c9a1",
    "fused": GREEN,
    "floor": "#777777",
    "stale": VIOLET,
    "delayed": GREY,
    "nesterov": GREY,
    "local": YELLOW,
    "mono-forward": "#c9b458",
    "feedback": "#b0763a",
    "cdni-z": "#f08a9b",
    "cdni": RED,
    "dni": RED,
}

History = Sequence[Mapping[str, Any]]


class Methods:
    """Colours and line styles of methods by their names; those of one family differ in style."""

    def __init__(self) -> None:
        self._drawn: dict[str, int] = {}

    def style(self, name: str) -> tuple[str, str]:
        """Return the colour and the line style for the next of ``name``'s family; those of no
        family have colours in turn."""
        family = next((kind for kind in METHODS if name.startswith(kind)), "")
        seen = self._drawn[family] = self._drawn.get(family, -1) + 1
        if family:
            return METHODS[family], STYLES[seen % len(STYLES)]
        return CYCLE[seen % len(CYCLE)], STYLES[seen // len(CYCLE) % len(STYLES)]


def runs(
    axes: Any,
    points: Sequence[Sequence[tuple[float, float]]],
    name: str,
    colour: str,
    style: str = "-",
    middle: Callable[[Sequence[float]], float] = statistics.fmean,
) -> None:
    """Draw the middle of several runs over their common length, and thin lines for single ones.

    Args:
        axes: of matplotlib.
        points: (x, y) of each run.
        name: of the line, for the legend.
        colour, style: of the line.
        middle: mean or median over the runs.
    """
    for single in points if len(points) > 1 else []:
        axes.plot(*zip(*single, strict=True), color=colour, alpha=0.25, linewidth=0.8)
    common = zip(*points, strict=False)
    line = [[middle(values) for values in zip(*at, strict=True)] for at in common]
    axes.plot(*zip(*line, strict=True), style, color=colour, linewidth=1.8, label=name)


def ranges(
    axes: Any, found: Mapping[float, Sequence[float]], name: str, colour: str, style: str = "-"
) -> None:
    """Draw the mean at each x, with bars from the least to the most."""
    spread(
        axes,
        list(found),
        [(statistics.fmean(values), min(values), max(values)) for values in found.values()],
        fmt=f"{style}o",
        markersize=3,
        color=colour,
        label=name,
    )


def arms(
    axes: Any, names: Iterable[str], at: Sequence[int], values: Callable[[str, int], list[float]]
) -> None:
    """Draw a line a method: the means of its values at each x, and their ranges."""
    methods = Methods()
    for name in names:
        colour, style = methods.style(name)
        found: dict[float, list[float]] = {x: there for x in at if (there := values(name, x))}
        if found:
            ranges(axes, found, name, colour, style)


def spread(
    axes: Any, xs: Sequence[float], points: Sequence[tuple[float, float, float]], **options: Any
) -> None:
    """Draw points (middle, low, high) with their bars."""
    bars = [
        [max(0.0, m - low) for m, low, _ in points],
        [max(0.0, high - m) for m, _, high in points],
    ]
    axes.errorbar(xs, [m for m, _, _ in points], yerr=bars, capsize=3, **options)


def finish(axes: Any, x: str, y: str, *, log: bool = False, **legend: Any) -> None:
    """Label the axes, draw the grid and, if anything is named, the legend.

    Args:
        axes: of matplotlib.
        x, y: what the axes show.
        log: y on a logarithmic scale.
        legend: more of ``Axes.legend``.
    """
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if log:
        axes.set_yscale("log")
    axes.grid(True, which="both", alpha=0.2)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**{"frameon": False, "fontsize": 8, **legend})


def plain_ticks(axis: Any) -> None:
    """Write the numbers of a logarithmic axis as they are, not as powers of ten."""
    from matplotlib.ticker import FormatStrFormatter

    for part in (axis.set_major_formatter, axis.set_minor_formatter):
        part(FormatStrFormatter("%g"))


def unit_of(seconds: float) -> tuple[float, str]:
    """Choose the scale and the name of the unit for times as long as this one."""
    return (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")
