"""What the JSON of an expensive top's verdict says, as tables, plots and paragraphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fused_dni.report import text
from fused_dni.report.blocks import Block, Figure, Heading, Table, Text
from fused_dni.report.kinds import race
from fused_dni.report.words import often

#: The k that the sentence is about, where it was measured.
ABOUT = 8
PARTS = {
    "bottom": "b: what learns",
    "top": "τ: what is above",
    "prediction": "s: prediction",
    "lesson": "m: lesson",
}


def blocks(report: dict[str, Any]) -> list[Block]:
    """The sentence; the parts; measured factors beside predicted ones, with a plot; the race."""
    facts = report["facts"]
    where = facts["gpu"] if facts["where"] == "cuda" else facts["device"]
    made: list[Block] = [
        Heading(f"Verdict: {report['title']}", 1),
        Text(sentence(report), lead=True),
        parts(report),
        factors(report),
        over_k(report),
        *map(Text, report["notes"]),
        Text(f"Memory: {report['memory_is']}."),
        Text(
            f"{where}, {facts['threads']} threads, torch {facts['torch']}, {facts['date']}, "
            f"commit {facts['commit'] or 'unknown'}."
        ),
    ]
    if report["race"] is not None:
        made += [Heading("At equal wall-clock"), *race.blocks(report["race"])[1:]]
    return made


def tables(report: dict[str, Any], *, markdown: bool = False) -> str:
    """The tables alone, with what is to be read under them."""
    made = [parts(report), factors(report)]
    if report["race"] is not None and report["race"]["runs"]:
        made.append(race.table(report["race"]))
    lines = []
    for table in made:
        lines += [text.table(table.header, table.rows, markdown=markdown), table.caption]
    lines += [*report["notes"], f"Memory: {report['memory_is']}."]
    return "\n\n".join(lines)


# ---------------------------------------------------------------------------------------- sentence


def sentence(report: dict[str, Any]) -> str:
    """Whether it pays: by the time of a step, and by the race if there was one."""
    facts, timings = report["facts"], report["timings"]
    unit = "thread" if facts["threads"] == 1 else "threads"
    where = facts["gpu"] if facts["where"] == "cuda" else f"{facts['threads']} CPU {unit}"
    backprop, bottom, top = (
        text.seconds(timings[name]["median"]) for name in ("backprop", "bottom", "top")
    )
    times = text.significant(report["top over bottom"]["median"], 2)
    said = [
        f"On {where} a step of {report['title']} takes {backprop} by backprop: {bottom} for what "
        f"learns, {top} for what is above it ({times} times as much)."
    ]
    variant = _best(report)
    named = f" ({variant['synthesizer']})"
    said.append(
        f"A prediction{named} takes {text.seconds(variant['prediction']['median'])}, a lesson "
        f"{text.seconds(variant['lesson']['median'])}."
    )
    k = _about(variant)
    cycle = variant["cycles"][k]
    said.append(
        f"With the top run {often(int(k))} alone a step takes "
        f"{text.seconds(cycle['measured']['median'])}, {_versus(cycle['factor'])} backprop "
        f"(predicted: {_times(cycle['predicted factor'])})."
    )
    first = _pays_from(variant)
    if first is None:
        said.append("It does not pay at any k that was measured.")
    else:
        said.append(f"It pays from k = {first} on.")
    said.append(_most(variant))
    said += _learns(report, first is not None)
    return " ".join(said)


def _best(report: dict[str, Any]) -> dict[str, Any]:
    """The variant with the fastest cycle."""
    found: list[dict[str, Any]] = report["variants"]
    return min(found, key=lambda v: v["cycles"][_about(v)]["measured"]["median"])


def _about(variant: Mapping[str, Any]) -> str:
    """The k of the sentence: 8, or the largest."""
    ks = [int(k) for k in variant["cycles"]]
    return str(ABOUT if ABOUT in ks else max(ks))


def _pays_from(variant: Mapping[str, Any]) -> int | None:
    """The smallest measured k from which on all were faster than backprop."""
    first = None
    for k in sorted(map(int, variant["cycles"]), reverse=True):
        if variant["cycles"][str(k)]["factor"]["verdict"] != "faster":
            break
        first = k
    return first


def _most(variant: Mapping[str, Any]) -> str:
    """What is gained if the top is never run."""
    most = variant["most"]
    if most["verdict"] == "faster":
        return f"By its parts no k can make it more than {_times(most)} as fast, (b + τ)/(b + s)."
    return f"Were the top never run, a step would be {_versus(most)} backprop, by (b + τ)/(b + s)."


def _learns(report: dict[str, Any], pays: bool) -> list[str]:
    """What a race adds, and what both come to."""
    run = report["race"]
    if run is None:
        return ["This is time per step only; what is learned in it, --race SECONDS measures."]
    if not run["runs"]:
        return ["No seed of the race was finished."]
    won = [name for name, _ in race.outcome(run).won]
    said = [
        f"In a race of {text.seconds(run['settings']['seconds'])} each, by the loss on data held "
        f"out: {race.sentence(run)}"
    ]
    if won:
        said.append(f"So yes: {won[0]}.")
    elif pays:
        said.append("So no: a step takes less time, and less is learned in the same time.")
    else:
        said.append("So no.")
    return said


def _versus(factor: Mapping[str, Any]) -> str:
    """A factor in the words of a sentence: ``3.2x faster than``."""
    if factor["verdict"] == "inconclusive":
        return "not measurably different from"
    times = factor["median"] if factor["verdict"] == "faster" else 1.0 / factor["median"]
    return f"{text.significant(times)}x {factor['verdict']} than"


def _times(factor: Mapping[str, Any]) -> str:
    return f"{text.significant(factor['median'])}x"


# ------------------------------------------------------------------------------------------ tables


def parts(report: dict[str, Any]) -> Table:
    """A row a part, and what a step of backprop takes."""
    rows = [["backprop", *_row(report["timings"]["backprop"]), text.size(report["memory"])]]
    rows += [[PARTS[part], *_row(report["timings"][part]), "-"] for part in ("bottom", "top")]
    several = len(report["variants"]) > 1
    for variant in report["variants"]:
        behind = f", {variant['synthesizer']}" if several else ""
        held = variant["memory"]
        rows += [
            *(
                [f"{PARTS[part]}{behind}", *_row(variant[part]), "-"]
                for part in ("prediction", "lesson")
            ),
            [
                f"b + s: without the top{behind}",
                *_row(variant["without"]),
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
    return Table(["part of a step", "median", "p10", "p90", "memory"], rows, caption)


def _row(timed: Mapping[str, Any]) -> list[str]:
    return [text.seconds(timed.get(key)) for key in ("median", "p10", "p90")]


def factors(report: dict[str, Any]) -> Table:
    """A row for each synthesizer and k: how many times as fast as backprop."""
    rows = []
    for variant in report["variants"]:
        for k, cycle in variant["cycles"].items():
            rows.append(
                [
                    f"{variant['synthesizer']}, k = {k}",
                    text.seconds(cycle["measured"]["median"]),
                    text.seconds(cycle["predicted"]["median"]),
                    _cell(cycle["factor"]),
                    _cell(cycle["predicted factor"]),
                    f"{100.0 * (cycle['measured over predicted']['median'] - 1.0):+.0f} %",
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


def _cell(factor: Mapping[str, Any]) -> str:
    mark = "~" if factor["verdict"] == "inconclusive" else ""
    made = f"{mark}{text.significant(factor['median'])}"
    if factor["interval"] is None:
        return made
    low, high = (text.significant(bound) for bound in factor["interval"])
    return f"{made} ({low} to {high})"


# ------------------------------------------------------------------------------------------- plots


def over_k(report: dict[str, Any]) -> Figure:
    """How many times as fast, over k: measured and predicted."""
    return Figure(
        "times-as-fast",
        lambda canvas: _draw(report, canvas),
        "How many times as fast as backprop, by how often the top is run (bars: 99 %).",
    )


def figure(report: dict[str, Any]) -> Figure:
    """The factors, and a race's losses beside them."""
    if report["race"] is None or not report["race"]["runs"]:
        return over_k(report)

    def draw(canvas: Any) -> None:
        left, right = canvas.subfigures(1, 2)
        _draw(report, left)
        race._draw(report["race"], right)

    return Figure("times-as-fast", draw, "", (11.0, 4.4))


def _draw(report: dict[str, Any], canvas: Any) -> None:
    axes = canvas.add_subplot()
    for i, variant in enumerate(report["variants"]):
        ks = [int(k) for k in variant["cycles"]]
        cycles = list(variant["cycles"].values())
        middle = [cycle["factor"]["median"] for cycle in cycles]
        bounds = [
            cycle["factor"]["interval"] or [m, m] for cycle, m in zip(cycles, middle, strict=True)
        ]
        axes.errorbar(
            ks,
            middle,
            yerr=[
                [max(0.0, m - low) for m, (low, _) in zip(middle, bounds, strict=True)],
                [max(0.0, high - m) for m, (_, high) in zip(middle, bounds, strict=True)],
            ],
            marker="o",
            capsize=3,
            linestyle="none",
            color=f"C{i % 10}",
            label=f"{variant['synthesizer']}, measured",
        )
        predicted = [cycle["predicted factor"]["median"] for cycle in cycles]
        axes.plot(ks, predicted, color=f"C{i % 10}", linestyle="--", label="predicted")
    axes.axhline(1.0, color="#777777", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, map(str, ks))
    axes.set_xlabel("k: the top is run on every k-th step")
    axes.set_ylabel("times as fast as backprop")
    axes.set_ylim(bottom=0)
    axes.grid(True, alpha=0.2)
    axes.legend(frameon=False, fontsize=8)
