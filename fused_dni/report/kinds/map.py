"""What a map says: a table for each synthesizer, heat maps of the ratios and of the break-even."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from fused_dni.report import text
from fused_dni.report.blocks import Block, Figure, Heading, Table, Text
from fused_dni.report.schema import Result
from fused_dni.report.words import device, often

#: The k that are drawn, if they were measured: the dearest, the usual one, the cheapest.
DRAWN = ("1", "4", "never")
#: A ratio of two, either way, has the strongest colour.
STRONGEST = 2.0
#: The largest break-even k that has a colour of its own.
LARGEST = 64
#: Colour of what could not be decided.
UNDECIDED = "lightgray"
#: Few enough that the bar of colours is drawn as such, and not as an image.
SHADES = 32
FAILED = {"memory": "out of memory", "gate": "wrong", "error": "failed"}

Cell = tuple[float | None, str]  # what is coloured, None for no colour; what is written
Points = list[dict[str, Any]]


def title(report: Result) -> str:
    """Name the map."""
    return "Where the synthetic gradient pays"


def blocks(report: Result) -> list[Block]:
    """Show a series after the other."""
    made: list[Block] = [
        Text(
            "One layer (Linear, BatchNorm, ReLU) inside a network, as wide at its input as at its "
            "output. Ratios are times of a training step by DNI, with targets on every k-th step, "
            "over those by backprop on the same kernels: below 1 the synthetic gradient is "
            "cheaper. A ~ marks a ratio whose 99 % interval reaches 1: no difference was shown. "
            "Time only: what a k costs in accuracy, `fused-dni train` measures."
        ),
    ]
    for number, series in enumerate(report["series"].values(), 1):
        made += _series(series, number)
    return made


def sentence(report: Result) -> str:
    """At how many points of the whole map it pays, for each k."""
    measured = [
        point
        for series in report["series"].values()
        for point in series["points"].values()
        if "failed" not in point
    ]
    counts = []
    for k in DRAWN:
        words = [p["ratios"]["fused"][k].verdict() for p in measured if k in p["ratios"]["fused"]]
        if words:
            counts.append(f"{_when(k)} at {words.count('faster')} of {len(words)}")
    found = ", ".join(counts) or "not measured"
    return (
        "Points at which the synthetic gradient is faster than backprop on the same kernels: "
        f"{found}."
    )


def _series(series: dict[str, Any], number: int) -> list[Block]:
    facts, settings = series["facts"], series["settings"]
    where = device({**facts, "where": settings["where"]})
    if settings["where"] != "cuda":
        where += f", {text.count(facts['threads'], 'thread')}"
    ks = [str(k or "never") for k in settings["ks"]]
    drawn = [k for k in DRAWN if k in ks] or ks[:3]
    points = list(series["points"].values())
    made: list[Block] = [
        Heading(where),
        Text(
            f"{settings['dtype']}, {settings['update'].partition('(')[0]}, torch {facts['torch']}, "
            f"fused_dni {facts['fused_dni']}, commit {facts['commit']}, {facts['date']}."
        ),
    ]
    for interface in _unique(point["interface"] for point in points):
        here = [point for point in points if point["interface"] == interface]
        at = "" if interface == "output" else f", interface at the {interface}"
        kinds = _unique(point["synthesizer"] for point in here)
        made += [_sentence(here, kind, drawn, at) for kind in kinds]
        made += [_table(here, kind, drawn, at) for kind in kinds]
        made += _figures(here, kinds, drawn, f"{where}{at}", f"map-{number}-{interface}")
    return made + _failures(series["points"])


def _failures(points: dict[str, dict[str, Any]]) -> list[Block]:
    """Say why points were not measured, and which."""
    reasons: dict[str, list[str]] = {}
    for key, point in points.items():
        if "failed" in point:
            reason = f"{FAILED[point['failed']]}: {point['reason']}"
            reasons.setdefault(reason, []).append(key)
    return [
        Text(f"Not measured ({reason}): {', '.join(keys)}.") for reason, keys in reasons.items()
    ]


def _unique(values: Iterable[str]) -> list[str]:
    return sorted(dict.fromkeys(values), key=_order)


def _order(name: str) -> tuple[float, str]:
    """Synthesizers from the dearest to the cheapest, other names by the alphabet."""
    if name.startswith("rank"):
        return -float(name.removeprefix("rank")), name
    return (-math.inf if name == "dense" else 0.0), name


def _sentence(points: Points, kind: str, ks: list[str], at: str) -> Text:
    """At how many points it pays, for each k."""
    counts = []
    for k in ks:
        found = [p["ratios"]["fused"][k].verdict() for p in _of(points, kind) if "failed" not in p]
        faster, slower = found.count("faster"), found.count("slower")
        counts.append(
            f"{_when(k)} it is faster at {faster} of {len(found)} points, slower at {slower}, "
            f"inconclusive at {len(found) - faster - slower}"
        )
    return Text(f"{_named(kind).capitalize()} synthesizer{at}: " + "; ".join(counts) + ".")


def _table(points: Points, kind: str, ks: list[str], at: str) -> Table:
    header = ["batch x width", "stock", "fused", *(f"k {k}" for k in ks), "from", "from (stock)"]
    rows = []
    for point in sorted(_of(points, kind), key=lambda p: (p["batch"], p["width"])):
        name = f"{point['batch']} x {point['width']}"
        if "failed" in point:
            cells = [FAILED[point["failed"]], *("-" for _ in header[2:])]
        else:
            cells = [
                *(text.seconds(point["timings"][base].median) for base in ("backprop", "fused")),
                *(_ratio(point, k)[1] for k in ks),
                *(_even(point, base)[1] for base in ("fused", "backprop")),
            ]
        rows.append([name, *cells])
    return Table(
        header,
        rows,
        f"{_named(kind).capitalize()} synthesizer{at}. stock, fused: a step of backprop by "
        "PyTorch and by our kernels; k: DNI over fused; from: the k from which on DNI is faster "
        "than fused, and than stock.",
    )


def _figures(points: Points, kinds: list[str], ks: list[str], where: str, stem: str) -> list[Block]:
    size = (2.2 + 2.6 * len(kinds), 3.2)
    made: list[Block] = [
        Figure(
            f"{stem}-{k}",
            partial(_draw, points, kinds, partial(_ratio, k=k), _ratio_colours),
            f"DNI {_when(k)} over backprop on the same kernels, {where}: below 1 (blue) the "
            "synthetic gradient is cheaper; ~ no difference was shown; hatched: not measured.",
            size,
        )
        for k in ks
    ]
    made.append(
        Figure(
            f"{stem}-break-even",
            partial(_draw, points, kinds, partial(_even, base="fused"), _even_colours),
            f"The k from which on DNI is faster than backprop on the same kernels, {where}; ~ "
            "inconclusive; hatched: not measured.",
            size,
        )
    )
    return made


# ------------------------------------------------------------------------------- cells and colours


def _ratio(point: dict[str, Any], k: str) -> Cell:
    found = point["ratios"]["fused"][k]
    return math.log2(found.median), text.ratio(found)


def _even(point: dict[str, Any], base: str) -> Cell:
    found = point["break_even"][base]
    if found.kind == "from":
        return math.log2(min(found.k, LARGEST)), str(found.k)
    return (None, "~") if found.kind == "inconclusive" else (math.log2(LARGEST) + 1, "never")


def _ratio_colours() -> tuple[str, float, float, str]:
    return "RdBu_r", -math.log2(STRONGEST), math.log2(STRONGEST), "DNI / fused"


def _even_colours() -> tuple[str, float, float, str]:
    return "Blues_r", 0.0, math.log2(LARGEST) + 1, "k"


def _draw(
    points: Points,
    kinds: list[str],
    cell: Callable[[dict[str, Any]], Cell],
    colours: Callable[[], tuple[str, float, float, str]],
    canvas: Any,
) -> None:
    """Draw a panel a synthesizer: batch downwards, width to the right."""
    import matplotlib

    name, low, high, label = colours()
    palette = matplotlib.colormaps[name].resampled(SHADES)
    scale = matplotlib.colors.Normalize(low, high, clip=True)
    batches = sorted({p["batch"] for p in points})
    widths = sorted({p["width"] for p in points})
    panels = canvas.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for panel, kind in zip(panels, kinds, strict=True):
        for point in _of(points, kind):
            x, y = widths.index(point["width"]), batches.index(point["batch"])
            if "failed" in point:
                _fill(panel, x, y, "white", "", hatch="////")
                continue
            value, written = cell(point)
            _fill(panel, x, y, UNDECIDED if value is None else palette(scale(value)), written)
        panel.set_xlim(-0.5, len(widths) - 0.5)
        panel.set_ylim(len(batches) - 0.5, -0.5)
        panel.set_xticks(range(len(widths)), [str(w) for w in widths])
        panel.set_yticks(range(len(batches)), [str(b) for b in batches])
        panel.set_xlabel("width")
        panel.set_title(_named(kind), fontsize=9)
    panels[0].set_ylabel("batch")
    shades = matplotlib.cm.ScalarMappable(scale, palette)
    bar = canvas.colorbar(shades, ax=list(panels), label=label)
    if label == "k":
        ticks = [1, 4, 16, LARGEST]
        bar.set_ticks(
            [*(math.log2(k) for k in ticks), high], labels=[*(str(k) for k in ticks), "never"]
        )
    else:
        bar.set_ticks([low, 0.0, high], labels=[f"{2.0**at:g}" for at in (low, 0.0, high)])


def _fill(panel: Any, x: int, y: int, colour: Any, written: str, hatch: str | None = None) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    corner = (x - 0.5, y - 0.5)
    panel.add_patch(Rectangle(corner, 1, 1, facecolor=colour, edgecolor="gray", hatch=hatch))
    red, green, blue = to_rgb(colour)
    ink = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.55 else "white"
    panel.text(x, y, written, ha="center", va="center", fontsize=7, color=ink)


def _of(points: Points, kind: str) -> Points:
    return [point for point in points if point["synthesizer"] == kind]


def _named(kind: str) -> str:
    return f"rank {kind.removeprefix('rank')}" if kind.startswith("rank") else kind


def _when(k: str) -> str:
    return "on steps without targets" if k == "never" else f"with targets {often(int(k))}"
