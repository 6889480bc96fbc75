"""What a simulation says: throughput over latency and stages, ages and bytes, who wins where."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

from fused_dni.report import plots, text
from fused_dni.report.blocks import Block, Figure, Heading, Table, Text
from fused_dni.report.schema import Result
from fused_dni.report.words import ordinal

#: Ahead is who carries more by this share: less is not worth a sentence.
AHEAD = 0.05
#: The latency that details are shown for: the one of the sweep nearest to it, in seconds.
DETAILS = 0.02
#: Simulated throughput is to be the measured one within this share.
AGREEMENT = 0.2
#: Slow spells of a stage beneath which a run is too short.
SPELLS = 20
#: Columns of latencies at most.
COLUMNS = 8

Rows = Sequence[dict[str, Any]]


def title(report: Result) -> str:
    """Name the number of devices."""
    return f"Training on {report.settings['stages']} devices, simulated"


def blocks(report: Result) -> list[Block]:
    """Say what :func:`fused_dni.measure.simulate.sweep.sweep` came to."""
    settings, stages = report.settings, report.settings["stages"]
    latency, chains = report["latency"], report["chains"]
    said: list[Block] = [
        Text(_times(report)),
        Text(_given(settings) + _few_spells(report)),
        Text(
            "Throughput is not accuracy. Stale gradients, DNI and local losses wait for nothing "
            "that comes back and carry about the same; they differ in what they learn from: a "
            "gradient as old as the column age says, a prediction taught by targets that old, a "
            "loss that knows nothing of what lies above. Which of these is good enough, a race "
            "must tell, not this model."
        ),
        Heading("Rows a second, by latency"),
        _over(latency, "latency", _named_latency),
        Figure(
            "throughput-latency",
            functools.partial(_draw, latency, "latency", "latency one way, ms", 1e3),
            f"Rows a second over the latency, {stages} stages.",
            (7.2, 4.6),
        ),
        Heading("Who is ahead, from which latency on"),
        _who(report),
    ]
    if len(settings["latencies"]) > 0:
        at = min(settings["latencies"], key=lambda one: abs(one - DETAILS))
        said += [
            Heading(f"At {_named_latency(at)} and {stages} stages"),
            _details([row for row in latency if row["latency"] == at]),
        ]
    base = settings["link"]["latency"]
    said += [
        Heading(f"Rows a second, by the number of stages, at {_named_latency(base)}"),
        _over(chains, "stages", str),
        Figure(
            "throughput-stages",
            functools.partial(_draw, chains, "stages", "stages", 1.0),
            f"Rows a second over the number of stages at {_named_latency(base)}; every stage is "
            "the same, so a longer chain is a larger model.",
            (7.2, 4.6),
        ),
        Heading("The modes"),
        Table(["mode", "what a stage does"], [list(mode) for mode in settings["modes"]]),
    ]
    if report["checked"] is not None:
        said += _checked(report["checked"])
    return said


def _times(report: Result) -> str:
    times, measured = report.settings["times"], report["measured"]

    def mean(name: str) -> str:
        return text.seconds(sum(times[name]) / len(times[name]))

    source = "given" if measured is None else f"measured on {measured['what']}"
    each = "" if len(times["forward"]) == 1 else ", on the average of the stages"
    return (
        f"Times of a stage and microbatch{each}, {source}: forward {mean('forward')}, backward "
        f"{mean('backward')} (of it {mean('weight')} for the weights), optimizer "
        f"{mean('optimizer')}; DNI step {mean('dni')}, {mean('target')} more with a target, lesson "
        f"{mean('lesson')}; local step {mean('local')}."
    )


def _given(settings: dict[str, Any]) -> str:
    link, slow, failures = settings["link"], settings["stragglers"], settings["failures"]
    m, window, oldest = (settings[name] for name in ("microbatches", "window", "max_age"))
    said = [
        f"A message is {text.size(settings['forward_bytes'])} forward and "
        f"{text.size(settings['backward_bytes'])} back, a microbatch {settings['rows']} rows; an "
        f"update of the exact modes takes {f'{m} microbatches' if m else 'four a stage'}.",
        (
            f"Stale stages have {window} microbatches under way at most, "
            if window
            else "Stale stages have as many microbatches under way as the way there and back asks "
            "for, to 64 or two a stage; "
        )
        + f"DNI and local losses have {settings['buffer']} messages between two stages at most.",
        f"DNI makes targets for every {_every(settings['target_every'])}microbatch"
        + ("" if oldest is None else f", dropped beyond {oldest} steps")
        + f"; DiLoCo averages every {settings['local_steps']} steps.",
    ]
    wide = [link["bandwidth"], link["bandwidth_back"]]
    if any(value is not None for value in wide):
        forward = "no limit" if wide[0] is None else f"{text.size(wide[0])}/s"
        back = forward if wide[1] is None else f"{text.size(wide[1])}/s"
        said.append(f"Bandwidth {forward} forward, {back} back.")
    if link["latency_back"] is not None:
        said.append(f"The way back takes {_named_latency(link['latency_back'])}.")
    if link["jitter"] or link["jitter_share"]:
        share = f"{text.percent(link['jitter_share'], 'g')} of the latency"
        fixed = text.seconds(link["jitter"])
        both = " and ".join([fixed] * bool(link["jitter"]) + [share] * bool(link["jitter_share"]))
        said.append(f"Messages take {both} longer on the average ({link['shape']}).")
    if slow["factor"] > 1.0 and slow["share"] > 0.0:
        who = "Every stage" if slow["stage"] is None else f"Stage {slow['stage']}"
        said.append(
            f"{who} is {slow['factor']:g} times as slow for {text.percent(slow['share'], 'g')} "
            f"of the time, in spells of {text.seconds(slow['spell'])}."
        )
    if failures["every"] is not None:
        said.append(
            f"A device fails every {failures['every']:g} s on the average and is back after "
            f"{failures['restart']:g} s; checkpoints every {failures['checkpoint']:g} s."
        )
    if settings["late_receives"]:
        said.append(
            "GPipe, 1F1B and zero-bubble ask for each message when they need it, and the sender "
            "waits for that: a message that is awaited takes two latencies."
        )
    return " ".join(said)


def _few_spells(report: Result) -> str:
    """Say so if chance, not the model, decides what stragglers cost."""
    slow = report.settings["stragglers"]
    if slow["factor"] <= 1.0 or not 0.0 < slow["share"] < 1.0:
        return ""
    wanted = SPELLS * slow["spell"] / slow["share"]
    least = min(row["seconds"] for row in [*report["latency"], *report["chains"]])
    if least >= wanted:
        return ""
    steps = math.ceil(report.settings["steps"] * wanted / least)
    return (
        f" In the {text.seconds(least)} that were simulated at least, a stage has few slow spells: "
        f"--steps {steps} would hold {SPELLS}."
    )


def _every(k: int) -> str:
    return "" if k == 1 else f"{ordinal(k)} "


def _named_latency(value: float) -> str:
    return "no latency" if value == 0 else text.seconds(value)


def curve(rows: Rows, mode: str, over: str) -> list[tuple[float, float]]:
    """Points of a mode: latency or stages, and rows a second."""
    return sorted((row[over], row["rows"]) for row in rows if row["mode"] == mode)


def ahead(rows: Rows, mode: str, other: str) -> list[tuple[float, float]]:
    """Return the stretches of latency in which ``mode`` carries more than ``other`` by
    :data:`AHEAD`.

    Returns:
        From and to, in seconds; infinity for "to the end of the sweep", and 0 for its beginning.
        Between two points of the sweep the ratio is taken to be a straight line.
    """
    ours, theirs = curve(rows, mode, "latency"), curve(rows, other, "latency")
    leads = [
        (at, mine / yours - 1.0 - AHEAD)
        for (at, mine), (_, yours) in zip(ours, theirs, strict=True)
    ]
    found: list[tuple[float, float]] = []
    start = 0.0 if leads[0][1] > 0.0 else None
    for (x, before), (y, after) in itertools.pairwise(leads):
        if (before > 0.0) == (after > 0.0):
            continue
        crossing = x + (y - x) * before / (before - after)
        if after > 0.0:
            start = crossing
        else:
            assert start is not None
            found.append((start, crossing))
            start = None
    if start is not None:
        found.append((start, math.inf))
    return found


def _stretch(found: Sequence[tuple[float, float]]) -> str:
    if not found:
        return "never"
    said = []
    for low, high in found:
        if low == 0.0:
            said.append("always" if math.isinf(high) else f"to {_named_latency(high)}")
        elif math.isinf(high):
            said.append(f"from {_named_latency(low)}")
        else:
            said.append(f"{_named_latency(low)} to {_named_latency(high)}")
    return ", ".join(said)


def sentence(report: Result) -> str:
    """Say from where on DNI, or the first mode that is there instead, is ahead of others."""
    settings = report.settings
    names = [name for name, _ in settings["modes"]]
    name = "dni" if "dni" in names else names[0]
    last = settings["latencies"][-1]
    found = [
        f"of {rival} {_stretch(ahead(report['latency'], name, rival))}"
        for rival in names
        if rival != name
    ]
    if not found:
        return f"{name} alone: nothing to compare it with."
    best = max(
        (row for row in report["latency"] if row["latency"] == last), key=lambda row: row["rows"]
    )
    return (
        f"With {settings['stages']} stages and latencies to {_named_latency(last)}, {name} carries "
        f"{text.percent(AHEAD)} more rows or better than others in these latencies: ahead "
        f"{', '.join(found)}. At {_named_latency(last)} the most are carried by {best['mode']}, "
        f"{text.rate(best['rows'])} a second."
    )


def _some(values: Sequence[Any]) -> list[Any]:
    """Return as many as fit a table, the first and the last among them."""
    if len(values) <= COLUMNS:
        return list(values)
    last = len(values) - 1
    return [values[round(i * last / (COLUMNS - 1))] for i in range(COLUMNS)]


def _over(rows: Rows, over: str, name: Any) -> Table:
    points = _some(sorted({row[over] for row in rows}))
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    lines = []
    for mode in modes:
        found = dict(curve(rows, mode, over))
        lines.append([mode, *(text.rate(found[point]) for point in points)])
    return Table(["mode", *map(name, points)], lines)


def _who(report: Result) -> Table:
    names = [name for name, _ in report.settings["modes"]]
    lines = [
        [
            mode,
            *(
                "" if mode == other else _stretch(ahead(report["latency"], mode, other))
                for other in names
            ),
        ]
        for mode in names
    ]
    return Table(
        ["ahead of", *names],
        lines,
        f"In which latencies the mode of the row carries {text.percent(AHEAD)} more than that of "
        "the column; between two latencies of the sweep on a straight line.",
    )


def _details(rows: Rows) -> Table:
    failing = any(row["failure"] is not None for row in rows)
    lines = []
    for row in rows:
        dropped = "" if row["dropped"] is None else text.percent(row["dropped"])
        line = [
            row["mode"],
            text.rate(row["rows"]),
            f"{row['rows_an_update']:,.0f}",
            f"{text.percent(row['mean'])} ({100 * row['least']:.0f} to {100 * row['most']:.0f})",
            text.size(row["forward_bytes"]),
            text.size(row["backward_bytes"]),
            "-" if row["age"] is None else text.significant(row["age"], 2),
            "-" if row["oldest"] is None else str(row["oldest"]),
            dropped,
        ]
        if failing:
            line += [text.seconds(row["failure"]), text.seconds(row["lost"])]
        lines.append(line)
    header = [
        "mode", "rows/s", "rows an update", "at work", "sent on", "sent back", "age", "oldest",
        "dropped",
    ]  # fmt: skip
    caption = (
        "At work: share of the time, the mean over the stages and the range. Bytes a microbatch "
        "that a device sends its next and its last; replicas send round a ring. Age, in updates "
        "of the stage: of the gradient that an update uses; of dni, of the target that a lesson "
        "uses; of diloco, steps of its own since a replica was what the others are. Dropped: "
        "targets that came too late or found no room."
    )
    if failing:
        header += ["a failure costs", "lost work"]
        caption += (
            " A failure costs everyone that much time; lost is the work since the checkpoint, done "
            "again by all (gpipe to 2bw, data parallel) or missing in the parameters of one."
        )
    return Table(header, lines, caption)


def _checked(rows: Rows) -> list[Block]:
    lines = [
        [
            row["mode"],
            str(row["stages"]),
            _named_latency(row["latency"]),
            text.significant(row["measured"], 4),
            text.significant(row["simulated"], 4),
            text.percent(row["deviation"], "+.1f"),
        ]
        for row in rows
    ]
    off = [row for row in rows if abs(row["deviation"]) > AGREEMENT]
    worst = max((abs(row["deviation"]) for row in rows), default=0.0)
    return [
        Heading("Held against what was measured"),
        Table(["mode", "stages", "latency", "measured steps/s", "simulated", "deviation"], lines),
        Text(
            f"{len(rows) - len(off)} of {len(rows)} rows agree within {text.percent(AGREEMENT)}; "
            f"the largest deviation is {text.percent(worst, '.1f')}."
        ),
    ]


def _draw(rows: Rows, over: str, label: str, scale: float, canvas: Any) -> None:
    axes = canvas.add_subplot()
    for i, mode in enumerate(dict.fromkeys(row["mode"] for row in rows)):
        points = curve(rows, mode, over)
        axes.plot(
            [scale * x for x, _ in points],
            [y for _, y in points],
            color=f"C{i % 10}",
            marker="os^vD<>Px"[i % 9],
            markersize=4,
            linewidth=1.4,
            label=mode,
        )
    positive = [scale * row[over] for row in rows if row[over] > 0.0]
    if positive:
        # Beside the smallest latency there is room for none.
        axes.set_xscale("symlog", linthresh=min(positive), linscale=0.5)
    axes.set_xlim(left=0.0 if over == "latency" else None)
    plots.finish(axes, label, "rows a second", log=True)
