"""What a report of interfaces says: cosine of the synthetic gradient by layer and depth."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from fused_dni.report import plots, text
from fused_dni.report.blocks import Block, Figure, Heading, Table, Text
from fused_dni.report.schema import Result


def title(report: Result) -> str:
    """Name what is compared, and the data."""
    return f"Synthetic and true gradients by depth, on {report['dataset']}"


def blocks(report: Result) -> list[Block]:
    """Say what :func:`fused_dni.experiments.interfaces.measure` came to."""
    settings = report.settings
    networks = [row for row in report["networks"] if row["runs"]]
    deepest = max(row["depth"] for row in report["networks"])
    each = [row for row in networks if row["every"] == 1]
    spaced = [row for row in networks if row["every"] and row["depth"] == deepest]
    said: list[Block] = [
        Text(
            f"Hidden layers of {settings['hidden']} (Linear, BatchNorm, ReLU) trained by "
            f"label-conditioned DNI for {settings['steps']} steps of batch "
            f"{settings['batch_size']}, Adam at {settings['lr']:g} (synthesizers "
            f"{settings['sg_lr']:g}), cosine to zero, {text.percent(settings['warmup'])} of the "
            "steps for warm-up, targets on every step. Then each layer's synthetic gradient is "
            "held against the true gradient of the whole network on "
            f"{settings['batches']} training batches. Mean over "
            f"{text.count(len(settings['seeds']), 'seed')}."
        ),
        Heading("Error"),
        _errors(networks),
        Heading("Cosine with the true gradient, by layer"),
        _by_layer(networks, "true_cosine"),
        _figure("cosine-by-depth", each, "an interface behind every layer"),
    ]
    if len(spaced) > 1:
        said.append(_figure("cosine-by-spacing", spaced, f"{deepest} layers, fewer interfaces"))
    said += [
        Heading("Size against the true gradient, by layer"),
        _by_layer(networks, "true_norm_ratio"),
        Heading("Cosine with what arrived, by layer"),
        Text(
            "What a synthesizer is trained on is itself made of the prediction above it. A high "
            "cosine here beside a low one above means that it predicts well what is no longer the "
            "gradient."
        ),
        _by_layer(networks, "arrived_cosine"),
    ]
    if not report.get("finished", True):  # files of before it could be gone on with have no such
        runs = sum(len(row["runs"]) for row in networks)
        said.append(Text(f"Unfinished: {runs} runs so far."))
    return said


def named(depth: int, every: int) -> str:
    """Name a network, in progress and reports; ``every`` as in a report's ``networks``."""
    layers = text.count(depth, "layer")
    if every == 0:
        return f"{layers}, backprop"
    if every == 1:
        return f"{layers}, an interface each"
    return f"{layers}, an interface every {every}"


def mean_of(row: dict[str, Any], layer: int, name: str) -> float | None:
    """Mean over seeds of what ``name`` was at an interface; None if there is none."""
    found = values_of(row, layer, name)
    return statistics.fmean(found) if found else None


def values_of(row: dict[str, Any], layer: int, name: str) -> list[float]:
    """Return a value a seed; none where there is no interface or nothing to divide by."""
    return [
        at[name]
        for run in row["runs"]
        for at in run["layers"]
        if at["layer"] == layer and at[name] is not None
    ]


def _errors(networks: list[dict[str, Any]]) -> Table:
    exact = {row["depth"]: _errors_of(row) for row in networks if row["every"] == 0}
    lines = []
    for row in networks:
        if row["every"]:
            found = _errors_of(row)
            lines.append(
                [named(row["depth"], row["every"]), *_spread(found), *_spread(exact[row["depth"]])]
            )
    return Table(["network", "error", "range", "backprop", "range"], lines)


def _errors_of(row: dict[str, Any]) -> list[float]:
    return [100 * run["error"] for run in row["runs"]]


def _spread(values: Sequence[float]) -> tuple[str, str]:
    between = text.span(values, to="-") if len(values) > 1 else "-"
    return f"{statistics.fmean(values):.2f} %", between


def _by_layer(networks: list[dict[str, Any]], name: str) -> Table:
    held = {at["layer"] for row in networks for run in row["runs"] for at in run["layers"]}
    layers = sorted(held)
    lines = []
    for row in networks:
        if row["every"]:
            means = [mean_of(row, layer, name) for layer in layers]
            lines.append(
                [
                    named(row["depth"], row["every"]),
                    *("" if mean is None else text.significant(mean, 2) for mean in means),
                ]
            )
    header = ["network", *(f"layer {layer}" for layer in layers)]
    return Table(header, lines, "Layer 1 reads the input.")


def _figure(name: str, rows: list[dict[str, Any]], what: str) -> Figure:
    return Figure(
        name,
        functools.partial(_draw, rows),
        "Cosine of the synthetic with the true gradient against the number of layers between the "
        f"interface and the head: {what}. Bars: range over seeds.",
    )


def _draw(rows: list[dict[str, Any]], canvas: Any) -> None:
    axes = canvas.add_subplot()
    for colour, row in zip(itertools.cycle(plots.CYCLE), rows, strict=False):
        layers = [at["layer"] for at in row["runs"][0]["layers"]]
        found = {
            row["depth"] - layer: values
            for layer in layers
            if (values := values_of(row, layer, "true_cosine"))
        }
        plots.ranges(axes, found, named(row["depth"], row["every"]), colour)
    axes.axhline(0.0, color=plots.GREY, linewidth=0.8)
    axes.set_ylim(top=1.0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axis = "layers between the interface and the head"
    plots.finish(axes, axis, "cosine with the true gradient")
