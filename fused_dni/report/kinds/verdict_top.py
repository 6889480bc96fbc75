"""What an expensive top's verdict says, as tables, plots and paragraphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fused_dni.report import plots, text
from fused_dni.report.blocks import Block, Figure, Heading, Table
from fused_dni.report.kinds import race
from fused_dni.report.kinds.verdict import TIMES, times
from fused_dni.report.schema import Result, result_of
from fused_dni.report.timings import Ratio
from fused_dni.report.words import machine, often, versus

#: The k that the sentence is about, where it was measured.
ABOUT = 8
PARTS = {
    "bottom": "b: what learns",
    "top": "τ: what is above",
    "prediction": "s: prediction",
    "lesson": "m: lesson",
}


def blocks(report: Result) -> list[Block]:
    """Show the parts; measured factors beside predicted ones, with a plot; the race."""
    made: list[Block] = [parts(report), factors(report), over_k(report)]
    if (run := raced(report)) is not None:
        made += [Heading("At equal wall-clock"), *race.blocks(run)]
    return made


def raced(report: Result) -> Result | None:
    """Read the race that stands in a report, if there was one."""
    return None if report["race"] is None else result_of(report["race"])


# ---------------------------------------------------------------------------------------- sentence


def sentence(report: Result) -> str:
    """Say whether it pays: by the time of a step, and by the race if there was one."""
    backprop, bottom, top = (
        text.seconds(report.timings[name].median) for name in ("backprop", "bottom", "top")
    )
    dearer = text.significant(report["top over bottom"].median, 2)
    said = [
        f"On {machine(report.facts)} a step of {report.title} takes {backprop} by backprop: "
        f"{bottom} for what learns, {top} for what is above it ({dearer} times as much)."
    ]
    variant = _best(report)
    named = f" ({variant['synthesizer']})"
    said.append(
        f"A prediction{named} takes {text.seconds(variant['prediction']['median'])}, a lesson "
        f"{text.seconds(variant['lesson'].median)}."
    )
    k = _about(variant)
    cycle = variant["cycles"][k]
    said.append(
        f"With the top run {often(int(k))} alone a step takes "
        f"{text.seconds(cycle['measured'].median)}, {versus(cycle['ratio'])} backprop "
        f"(predicted: {_times(cycle['predicted ratio'])})."
    )
    first = _pays_from(variant)
    if first is None:
        said.append("It does not pay at any k that was measured.")
    else:
        said.append(f"It pays from k = {first} on.")
    said.append(_most(variant))
    said += _learns(report, first is not None)
    return " ".join(said)


def _best(report: Result) -> dict[str, Any]:
    """Return the variant with the fastest cycle."""
    found: list[dict[str, Any]] = report["variants"]
    return min(found, key=lambda v: v["cycles"][_about(v)]["measured"].median)


def _about(variant: Mapping[str, Any]) -> str:
    """Return the k of the sentence: 8, or the largest."""
    ks = [int(k) for k in variant["cycles"]]
    return str(ABOUT if ABOUT in ks else max(ks))


def _pays_from(variant: Mapping[str, Any]) -> int | None:
    """Return the smallest measured k from which on all were faster than backprop."""
    first = None
    for k in sorted(map(int, variant["cycles"]), reverse=True):
        if variant["cycles"][str(k)]["ratio"].verdict() != "faster":
            break
        first = k
    return first


def _most(variant: Mapping[str, Any]) -> str:
    """Say what is gained if the top is never run."""
    most = variant["most"]
    if most.verdict() == "faster":
        return f"By its parts no k can make it more than {_times(most)} as fast, (b + τ)/(b + s)."
    return f"Were the top never run, a step would be {versus(most)} backprop, by (b + τ)/(b + s)."


def _learns(report: Result, pays: bool) -> list[str]:
    """Say what a race adds, and what both come to."""
    run = raced(report)
    if run is None:
        return ["This is time per step only; what is learned in it, --race SECONDS measures."]
    if not run["runs"]:
        return ["No seed of the race was finished."]
    won = [name for name, _ in race.outcome(run).won]
    said = [
        f"In a race of {text.seconds(run.settings['seconds'])} each, by the loss on data held "
        f"out: {race.sentence(run)}"
    ]
    if won:
        said.append(f"So yes: {won[0]}.")
    elif pays:
        said.append("So no: a step takes less time, and less is learned in the same time.")
    else:
        said.append("So no.")
    return said


def _times(found: Ratio) -> str:
    return f"{text.significant(1.0 / found.median)}x"


# ------------------------------------------------------------------------------------------ tables


def parts(report: Result) -> Table:
    """Show a row a part, and what a step of backprop takes."""
    rows = [["backprop", *times(report.timings["backprop"]), text.size(report.memory["backprop"])]]
    rows += [[PARTS[part], *times(report.timings[part]), "-"] for part in ("bottom", "top")]
    several = len(report["variants"]) > 1
    for variant in report["variants"]:
        behind = f", {variant['synthesizer']}" if several else ""
        held, predicted = variant["memory"], text.seconds(variant["prediction"]["median"])
        rows += [
            [f"{PARTS['prediction']}{behind}", predicted, "-", "-", "-"],
            [f"{PARTS['lesson']}{behind}", *times(variant["lesson"]), "-"],
            [
                f"b + s: without the top{behind}",
                *times(variant["without"]),
                text.size(held["without"]),
            ],
            [f"with the top{behind}", "-", "-", "-", text.size(held["with the top"])],
        ]
    caption = (
        "b: forward, local backward and optimizer; τ: forward and backward, the loss and the "
        "optimizer of what is trained there included; m with its optimizer: each alone, "
        "interleaved with whole steps. s: what a step without the top takes more than b, the "
        "prediction and all that delivers it."
    )
    return Table(["part of a step", *TIMES, "memory"], rows, caption)


def factors(report: Result) -> Table:
    """Show a row for each synthesizer and k: how many times as fast as backprop."""
    rows = []
    for variant in report["variants"]:
        for k, cycle in variant["cycles"].items():
            rows.append(
                [
                    f"{variant['synthesizer']}, k = {k}",
                    text.seconds(cycle["measured"].median),
                    text.seconds(cycle["predicted"].median),
                    _cell(cycle["ratio"]),
                    _cell(cycle["predicted ratio"]),
                    text.percent(cycle["measured over predicted"].median - 1.0, "+.0f"),
                ]
            )
        rows.append(
            [f"{variant['synthesizer']}, never", "-", "-", "-", _cell(variant["most"]), "-"]
        )
    header = ["step", "measured", "predicted", "times as fast", "predicted", "off by"]
    caption = (
        "Whole cycles of k steps, the top run in one of them; predicted: b + s + (τ + m)/k, and "
        "b + τ over that, from the parts. With 99 % intervals; a ~ marks a factor whose interval "
        "reaches one. never: (b + τ)/(b + s), the most that can be gained."
    )
    return Table(header, rows, caption)


def _cell(found: Ratio) -> str:
    """Write how many times as fast, the inverse of a ratio of times, with its interval."""
    mark = "~" if found.verdict() == "inconclusive" else ""
    made = f"{mark}{text.significant(1.0 / found.median)}"
    if found.bounds is None:
        return made
    high, low = (text.significant(1.0 / bound) for bound in found.bounds)
    return f"{made} ({low} to {high})"


# ------------------------------------------------------------------------------------------- plots


def over_k(report: Result) -> Figure:
    """Say how many times as fast, over k: measured and predicted."""
    return Figure(
        "times-as-fast",
        lambda canvas: _draw(report, canvas),
        "How many times as fast as backprop, by how often the top is run (bars: 99 %).",
    )


def figure(report: Result) -> Figure:
    """Draw the factors, and a race's losses beside them."""
    run = raced(report)
    if run is None or not run["runs"]:
        return over_k(report)

    def draw(canvas: Any) -> None:
        left, right = canvas.subfigures(1, 2)
        _draw(report, left)
        race.draw(run, right)

    return Figure("times-as-fast", draw, "", (11.0, 4.4))


def _draw(report: Result, canvas: Any) -> None:
    axes = canvas.add_subplot()
    for i, variant in enumerate(report["variants"]):
        ks = [int(k) for k in variant["cycles"]]
        cycles = list(variant["cycles"].values())
        found = [cycle["ratio"] for cycle in cycles]
        plots.spread(
            axes,
            ks,
            [
                (1.0 / r.median, *(1.0 / b for b in (r.bounds or (r.median,) * 2)[::-1]))
                for r in found
            ],
            marker="o",
            linestyle="none",
            color=f"C{i % 10}",
            label=f"{variant['synthesizer']}, measured",
        )
        predicted = [1.0 / cycle["predicted ratio"].median for cycle in cycles]
        axes.plot(ks, predicted, color=f"C{i % 10}", linestyle="--", label="predicted")
    axes.axhline(1.0, color="#777777", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, map(str, ks))
    axes.set_ylim(bottom=0)
    plots.finish(axes, "k: the top is run on every k-th step", "times as fast as backprop")
