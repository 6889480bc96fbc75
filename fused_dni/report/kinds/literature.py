"""What a report of reproduced tables says: our figures beside the published ones."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Iterable
from typing import Any

from fused_dni.report import plots, text
from fused_dni.report.blocks import Block, Figure, Heading, Table, Text
from fused_dni.report.outcome import unfinished
from fused_dni.report.schema import Result

#: Test error on MNIST, %, by arm and hidden layers (of 256 units): Jaderberg et al. 2016, table 1.
PUBLISHED = {
    "backprop": {3: "2.0", 4: "1.8", 5: "1.8", 6: "1.8"},
    "dni": {3: "1.9", 4: "2.2", 5: "3.4", 6: "4.3"},
    "cdni": {3: "2.2", 4: "1.9", 5: "1.7", 6: "1.6"},
}
#: The same of the other tables, as the paper's text and figures have it.
ABOUT = {"sparse": "about 2", "unlocked": "about 2"}
TITLES = {
    "depth": "Error by depth",
    "sparse": "Sparse updates",
    "unlock": "Full unlock",
    "clocks": "Two clocks",
}
WHAT = {
    "none": "no backprop: the head alone learns",
    "backprop": "backprop",
    "dni": "DNI, unconditional (dense), targets on every step",
    "cdni": "cDNI, linear, targets on every step",
    "cdni-cross-entropy": "cDNI, cross-entropy form, targets on every step",
    "full": "every layer in every step",
    "unlocked": "synthetic gradients and inputs",
}


def title(report: Result) -> str:
    """Name the paper and the data."""
    return f"Jaderberg et al. 2016 on {report['dataset']}, reproduced"


def blocks(report: Result) -> list[Block]:
    """Say what :func:`fused_dni.experiments.literature.reproduce` came to, finished or not."""
    said: list[Block] = [Text(protocol(report))]
    for name in report.settings["tables"]:
        if any(run["table"] == name for run in report["runs"]):
            said += [Heading(TITLES[name]), *tables(report, name), *_figures(report, name)]
    gone = sum(run["diverged"] for run in report["runs"])
    if gone:
        said.append(Text(f"{text.count(gone, 'run')} diverged, with the errors above."))
    return said + unfinished(report)


def protocol(report: Result, counted: bool = False) -> str:
    """Say how the runs were made, in a paragraph; ``counted`` if a column of the table says over
    how many seeds."""
    s = report.settings
    seeds = "seeds" if counted else text.count(len(s["seeds"]), "seed")
    return (
        f"Hidden layers of {s['hidden']} (Linear, BatchNorm, ReLU), batch {s['batch_size']}, "
        f"{s['epochs']} epochs, Adam at {s['lr']:g}, synthesizers of rank "
        f"{s['rank'] or 'O (dense)'} at {s['sg_lr']:g}, both along a cosine to zero; "
        f"{text.percent(s['warmup'], 'g')} of the steps for warm-up, whose gradients are exact. "
        f"Errors on the {report['evaluated_on']}, %: mean (range) over {seeds}."
    )


def sentence(report: Result) -> str:
    """By how much arms differ from what they are held against, paired by seed."""
    parts = []
    for table, base, names in (
        ("depth", "backprop", ["cdni", "cdni-cross-entropy", *_recipes(report)]),
        ("sparse", "full", ["sparse"]),
    ):
        for name in names:
            found = _mean_difference(report, table, name, base)
            if found is not None:
                parts.append(f"{_named(report, name)} {found:+.2f} points against {base}")
    return f"{'; '.join(parts)} (paired by seed, means over depths)." if parts else ""


def tables(report: Result, name: str) -> list[Table]:
    """Return the tables of that name, as far as there are runs."""
    if name == "depth":
        return _by_depth(report)
    return [_clocks(report)] if name == "clocks" else [_beside(report, name)]


def errors(report: Result, table: str, name: str, size: int) -> dict[int, float]:
    """Return the errors of an arm at a size by seed, in percent."""
    wanted = (table, name, size)
    return {
        run["seed"]: 100 * run["error"]
        for run in report["runs"]
        if (run["table"], run["name"], run["size"]) == wanted
    }


def differences(report: Result, table: str, name: str, base: str, size: int) -> list[float]:
    """Return an arm's error less another's at a size, in points, for each seed that both have."""
    ours, theirs = (errors(report, table, which, size) for which in (name, base))
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def _mean_difference(report: Result, table: str, name: str, base: str) -> float | None:
    by_size = [differences(report, table, name, base, size) for size in _sizes(report, table)]
    means = [statistics.fmean(found) for found in by_size if found]
    return statistics.fmean(means) if means else None


def _sizes(report: Result, table: str) -> list[int]:
    return sorted({run["size"] for run in report["runs"] if run["table"] == table})


def _names(report: Result, table: str) -> list[str]:
    return list(dict.fromkeys(run["name"] for run in report["runs"] if run["table"] == table))


def _recipes(report: Result) -> list[str]:
    return [name for name in _names(report, "depth") if name.startswith("recipe")]


def _named(report: Result, name: str) -> str:
    """Say what an arm is."""
    s = report.settings
    if name == "sparse":
        return f"each layer in {text.percent(s['probability'])} of the steps, at random"
    if not name.startswith("recipe"):
        return WHAT[name]
    run = [run for run in report["runs"] if run["name"] == name][0]  # noqa: RUF015
    lessons = f", {s['lessons']} lessons" if s["lessons"] > 1 else ""
    return (
        f"cDNI, {s['synthesizer']} form, k = {run['every']}, mix {s['mix']:g}{lessons}: "
        f"{text.percent(run['exact'], '.1f')} of the steps exact"
    )


def _cell(values: Iterable[float]) -> str:
    found = list(values)
    return text.mean(found) if found else ""


def _by_depth(report: Result) -> list[Table]:
    sizes, names = _sizes(report, "depth"), _names(report, "depth")
    lines, apart = [], []
    for name in names:
        found = [errors(report, "depth", name, size) for size in sizes]
        counts = [len(of) for of in found if of]
        seeds = " to ".join(map(str, dict.fromkeys((min(counts), max(counts)))))
        lines.append([_named(report, name), seeds, *(_cell(of.values()) for of in found)])
        if name in PUBLISHED:
            lines.append(["- published", "", *(PUBLISHED[name].get(s, "") for s in sizes)])
        if name != "backprop":
            paired = [differences(report, "depth", name, "backprop", size) for size in sizes]
            mean = _mean_difference(report, "depth", name, "backprop")
            if mean is not None:
                cells = ["" if not of else f"{statistics.fmean(of):+.2f}" for of in paired]
                apart.append([_named(report, name), *cells, f"{mean:+.2f}"])
    layers = [f"{size} layers" for size in sizes]
    made = [Table(["", "seeds", *layers], lines)]
    if apart:
        caption = "Error less backprop's, points: mean over paired seeds, and over the depths."
        made.append(Table(["less backprop", *layers, "mean"], apart, caption))
    return made


def _beside(report: Result, table: str) -> Table:
    (size,) = _sizes(report, table)
    lines = [
        [
            _named(report, name),
            _cell(errors(report, table, name, size).values()),
            ABOUT.get(name, ""),
        ]
        for name in _names(report, table)
    ]
    return Table([f"{text.count(size, 'hidden layer')}", "error, %", "published"], lines)


def _clocks(report: Result) -> Table:
    lines = []
    for window, name in itertools.product(_sizes(report, "clocks"), _names(report, "clocks")):
        found = _clock_runs(report, name, window)
        waits = _clock_runs(report, "waits", window)
        if not found:
            continue
        ends = [history[-1] for history in found]
        row = [f"T={window}, {name}", f"{ends[0]['updates']:,}"]
        row += [_cell(100 * end[key] for end in ends) for key in ("odd_error", "error")]
        early = []
        if waits and name != "waits":
            updates = waits[0][-1]["updates"]
            early = [[r for r in history if r["updates"] <= updates] for history in found]
        for key in ("odd_error", "error"):
            cut = [100 * rows[-1][key] for rows in early if rows]
            row.append(_cell(cut))
        lines.append(row)
    header = ["", "updates below", "odd digits, wrong, %", "threes, wrong, %"]
    header += ["odd, at the updates of waits", "threes, likewise"]
    return Table(
        header,
        lines,
        f"After {report.settings['digits']:,} digits a stream. The lower network counts odd digits "
        "in T, the upper one threes in T * T. waits: the lower one is updated when the upper one's "
        "gradient is there; dni, cdni: from a synthetic one, the latter conditioned on its own "
        "number of threes; alone: from its own loss.",
    )


def _clock_runs(report: Result, name: str, window: int) -> list[list[dict[str, Any]]]:
    return [
        run["history"]
        for run in report["runs"]
        if (run["table"], run["name"], run["size"]) == ("clocks", name, window)
    ]


def _figures(report: Result, table: str) -> list[Figure]:
    if table == "clocks":
        return [
            Figure(
                f"clocks-{window}",
                functools.partial(_draw_clocks, report, window),
                f"Two clocks, T = {window}: share of wrong counts against digits seen; above odd "
                "digits (lower network), below threes (upper network). Thin lines: single seeds.",
                (6.4, 6.0),
            )
            for window in _sizes(report, table)
        ]
    size = _sizes(report, table)[-1]
    return [
        Figure(
            f"{table}-error-vs-steps",
            functools.partial(_draw_curves, report, table, size),
            f"{TITLES[table]}, {text.count(size, 'hidden layer')}: error against steps. Thin "
            "lines: single seeds.",
        )
    ]


def _draw_curves(report: Result, table: str, size: int, canvas: Any) -> None:
    axes = canvas.add_subplot()
    for name, colour in zip(_names(report, table), itertools.cycle(plots.CYCLE), strict=False):
        found = [
            [(row["steps"], 100 * row["error"]) for row in run["history"]]
            for run in report["runs"]
            if (run["table"], run["name"], run["size"]) == (table, name, size)
        ]
        if found:
            plots.runs(axes, found, name, colour)
    plots.finish(axes, "steps", "error, %", log=True)


def _draw_clocks(report: Result, window: int, canvas: Any) -> None:
    panels = canvas.subplots(2, 1, sharex=True)
    keys = (("odd_error", "odd digits, wrong, %"), ("error", "threes, wrong, %"))
    for axes, (key, label) in zip(panels, keys, strict=True):
        names = _names(report, "clocks")
        for name, colour in zip(names, itertools.cycle(plots.CYCLE), strict=False):
            histories = _clock_runs(report, name, window)
            found = [[(row["digits"], 100 * row[key]) for row in rows] for rows in histories]
            if found:
                plots.runs(axes, found, name, colour)
        plots.finish(axes, "", label)
    panels[1].set_xlabel("digits of a stream")
