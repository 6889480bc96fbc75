"""What the report of a recurrent run says: the sentence, tables and curves."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from fused_dni.report import plots, text
from fused_dni.report.blocks import Block, Figure, Heading, Table, Text
from fused_dni.report.outcome import Outcome as AnyOutcome
from fused_dni.report.schema import Result

#: Level of the curriculum whose episodes costs are measured on: 20 symbols of copy.
COST_LEVEL = 19
#: What is plotted, by the column of the histories on the horizontal axis.
CURVES = {
    "charlm": {"bits-vs-characters": "characters", "bits-vs-wall-clock": "seconds"},
    "copy": {"solved-vs-steps": "steps", "solved-vs-wall-clock": "seconds"},
}
CURVES["repeat-copy"] = CURVES["copy"]
CURVES["rows"] = {"error-vs-steps": "steps", "error-vs-wall-clock": "seconds"}
#: What each task is judged by: a column of the histories, its format, and whether less is better.
KEYS = {
    "charlm": ("bits", ".3f", True),
    "copy": ("solved", ".3g", False),
    "repeat-copy": ("solved", ".3g", False),
    "rows": ("error", ".2%", True),
}
PROBE_PLOTS = ("future-vs-window", "prediction-vs-training")
AXES = {
    "characters": "characters seen",
    "seconds": "training wall-clock, seconds",
    "steps": "training steps",
    "bits": "validation, bits per character",
    "error": "error, share of images",
}


@dataclass
class Outcome(AnyOutcome):
    """What a finished recurrent run has to report.

    A run has ``method`` and ``window``, too; rows of its ``history`` have seconds, updates and what
    the task's trainer evaluates, with ``probe`` also ``prediction``, and the run ``future``: a row
    a window. ``costs`` is what :func:`fused_dni.experiments.recurrent.costs` gives,
    ``memory_curve`` what :func:`fused_dni.measure.memory.memory_curve` gives, each if it was asked
    for.
    """

    costs: dict[str, dict[str, Any]] = field(default_factory=dict)
    memory_curve: list[dict[str, Any]] = field(default_factory=list)

    @property
    def key(self) -> str:
        """What the task is judged by: a column of the histories."""
        return KEYS[self.settings.task][0]

    @property
    def axis(self) -> str:
        """What training is counted in: a column of the histories."""
        return "characters" if self.settings.task == "charlm" else "steps"

    def summary(self) -> list[dict[str, Any]]:
        """Sum up every arm in a row: final values, seconds of the training, costs if measured."""
        rows = []
        for name in self.names():
            runs = self.of(name)
            final = [run["history"][-1][self.key] for run in runs]
            cost = self.costs.get(name)
            unit = None if cost is None else cost["timing"].median / cost["units"]
            rows.append(
                {
                    "name": name,
                    "method": runs[0]["method"],
                    "window": runs[0]["window"],
                    f"{self.key}_mean": statistics.fmean(final),
                    f"{self.key}_min": min(final),
                    f"{self.key}_max": max(final),
                    self.key: final,
                    f"seconds_per_{self.axis[:-1]}": unit,
                    "seconds_total": statistics.median(
                        [run["history"][-1]["seconds"] for run in runs]
                    ),
                    "peak_memory": None if cost is None else cost["peak_memory"],
                }
            )
        return rows


def _judged(outcome: Outcome) -> str:
    """Say what the task is judged by, in words."""
    return {
        "charlm": "bits per character",
        "copy": "longest length solved",
        "repeat-copy": "longest episode solved, steps",
        "rows": "error",
    }[outcome.settings.task]


# ----------------------------------------------------------------------------------------- verdict


def gap_closed(outcome: Outcome, name: str) -> float | None:
    """Share of the distance from truncated backprop at an arm's window to truncated backprop at the
    longest window that the arm covers, by means over seeds; None where there is no
    such distance: no arm to measure it by, or the longer window is not better."""
    rows = {row["name"]: row for row in outcome.summary()}
    arm, mean = rows[name], f"{outcome.key}_mean"
    short, long = _references(outcome, arm)
    if short is None or long is None or short["name"] == name:
        return None
    gap = short[mean] - long[mean]
    return (short[mean] - arm[mean]) / gap if gap > 0.0 else None


def _references(
    outcome: Outcome, arm: dict[str, Any]
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Truncated backprop at the arm's window and at the longest: on our kernels, if there."""
    exact = [row for row in outcome.summary() if row["method"] in ("fused", "backprop")]
    method = "fused" if any(row["method"] == "fused" for row in exact) else "backprop"
    exact = [row for row in exact if row["method"] == method]
    short = next((row for row in exact if row["window"] == arm["window"]), None)
    longer = [row for row in exact if row["window"] > arm["window"]]
    return short, max(longer, key=lambda row: int(row["window"]), default=None)


def sentence(report: Result) -> str:
    """Say what the numbers say, and no more: a clause for every arm that predicts."""
    outcome = outcome_of(report)
    said = []
    for row in outcome.summary():
        if not row["method"].startswith("dni"):
            continue
        short, long = _references(outcome, row)
        if short is not None:
            say = _closing if KEYS[outcome.settings.task][2] else _copying
            said.append(say(outcome, row, short, long))
    if not said:
        return "No arm with synthetic gradients ran beside truncated backprop at the same window."
    seeds = len(outcome.settings.seeds)
    ending = "One seed, so no spread is known" if seeds == 1 else f"Means of {seeds} seeds"
    return " ".join(said) + f" ({ending}.)"


def _against(row: dict[str, Any], other: dict[str, Any], key: str, form: str) -> str:
    """``1.71 (1.70 to 1.72) against 1.75 (...)``."""
    parts = []
    for r in (row, other):
        low, high = r[f"{key}_min"], r[f"{key}_max"]
        spread = f" ({low:{form}} to {high:{form}})" if len(r[key]) > 1 else ""
        parts.append(f"{r[f'{key}_mean']:{form}}{spread}")
    return " against ".join(parts)


def _apart(row: dict[str, Any], other: dict[str, Any], key: str) -> str:
    """Say how sure the order of two arms is, from the ranges of their seeds."""
    if len(row[key]) == 1:
        return ""
    overlap = row[f"{key}_min"] <= other[f"{key}_max"] and other[f"{key}_min"] <= row[f"{key}_max"]
    return ", and the seeds' ranges overlap" if overlap else ", and the seeds' ranges are apart"


def _closing(
    outcome: Outcome, row: dict[str, Any], short: dict[str, Any], long: dict[str, Any] | None
) -> str:
    name, window = row["method"], row["window"]
    key, form, _ = KEYS[outcome.settings.task]
    mean = f"{key}_mean"
    difference = row[mean] - short[mean]
    if abs(difference) < 5e-4:
        which = "no difference at the third decimal"
    else:
        which = f"{'worse' if difference > 0 else 'better'} by {abs(difference):{form}}"
    said = (
        f"{name} at T={window}: {_against(row, short, key, form)} {_judged(outcome)} of "
        f"truncated backprop at T={window}, {which}{_apart(row, short, key)}"
    )
    closed = gap_closed(outcome, row["name"])
    if long is not None:
        there = f"truncated backprop at T={long['window']} ({long[mean]:{form}})"
        if closed is None:
            said += f"; {there} is no better than at T={window} here, so there is no gap to close"
        else:
            gap = short[mean] - long[mean]
            said += f"; of the gap of {gap:{form}} to {there} it closes {text.percent(closed)}"
    return f"{said}.{_costs(row, short, long, outcome.axis[:-1])}"


def _copying(
    outcome: Outcome, row: dict[str, Any], short: dict[str, Any], long: dict[str, Any] | None
) -> str:
    name, window, steps = row["method"], row["window"], outcome.settings.amount
    said = (
        f"{name} at T={window} after {steps} steps: {_judged(outcome)} "
        f"{_against(row, short, 'solved', '.3g')} of truncated backprop at T={window}"
    )
    if short["solved_mean"] > 0:
        said += f", {row['solved_mean'] / short['solved_mean']:.2f} times"
    return f"{said}{_apart(row, short, 'solved')}.{_costs(row, short, long, 'step')}"


def _costs(
    row: dict[str, Any], short: dict[str, Any], long: dict[str, Any] | None, unit: str
) -> str:
    def both(r: dict[str, Any]) -> str:
        return f"{text.size(r['peak_memory'])} and {text.seconds(r[f'seconds_per_{unit}'])}"

    if row["peak_memory"] is None:
        return ""
    said = f" Peak memory and time per {unit}: {both(row)}, truncated backprop {both(short)}"
    if long is not None:
        said += f", at T={long['window']} {both(long)}"
    return said + "."


# ------------------------------------------------------------------------------------------ tables


def summary(outcome: Outcome) -> Table:
    """Show a row an arm."""
    unit = outcome.axis[:-1]
    key, form, closing = KEYS[outcome.settings.task]
    judged = "bits/char" if key == "bits" else key
    header = ["arm", judged, "range", f"per {unit}", "total", "peak memory"]
    if closing:
        header.append("gap closed")
    lines = []
    for row in outcome.summary():
        low, high = row[f"{outcome.key}_min"], row[f"{outcome.key}_max"]
        line = [
            row["name"],
            f"{row[f'{outcome.key}_mean']:{form}}",
            f"{low:{form}}-{high:{form}}" if len(row[outcome.key]) > 1 else "-",
            text.seconds(row[f"seconds_per_{unit}"]),
            text.seconds(row["seconds_total"]),
            text.size(row["peak_memory"]),
        ]
        if closing:
            closed = gap_closed(outcome, row["name"])
            line.append(text.percent(closed))
        lines.append(line)
    return Table(header, lines)


def future_table(outcome: Outcome) -> Table:
    """Say what truncation leaves out, a row an arm, a column a window: medians over seeds."""
    found = _future(outcome)
    windows = sorted({window for rows in found.values() for window in rows})
    lines = [
        [name, *(f"{rows[w]:.2g}" if w in rows else "-" for w in windows)]
        for name, rows in found.items()
    ]
    return Table(["future / own, trained by", *(f"T={w}" for w in windows)], lines)


def _future(outcome: Outcome) -> dict[str, dict[int, float]]:
    """``parameter_ratio`` by arm and window."""
    made: dict[str, dict[int, float]] = {}
    for name in outcome.names():
        by_window: dict[int, list[float]] = {}
        for run in outcome.of(name):
            for row in run.get("future", ()):
                ratio = row["parameter_ratio"]  # null in a report: nothing to divide by
                by_window.setdefault(row["window"], []).append(math.inf if ratio is None else ratio)
        made[name] = {w: statistics.median(values) for w, values in by_window.items()}
    return made


def memory_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Peak memory, a row a method and window, a column a length of the sequence."""
    lengths = sorted({row["sequence"] for row in rows})
    by_arm: dict[str, dict[int, int]] = {}
    for row in rows:
        whole = row["window"] == row["sequence"] and row["window"] == max(
            r["window"] for r in rows if r["sequence"] == row["sequence"]
        )
        name = f"{row['method']} {'whole sequence' if whole else 'T=' + str(row['window'])}"
        by_arm.setdefault(name, {})[row["sequence"]] = row["bytes"]
    lines = [[name, *(text.size(held.get(s)) for s in lengths)] for name, held in by_arm.items()]
    return Table(["peak memory", *(f"S={s}" for s in lengths)], lines)


# ------------------------------------------------------------------------------------------ blocks


def outcome_of(report: Result) -> Outcome:
    """Make the outcome that a report was written from."""
    return Outcome(
        SimpleNamespace(**report.settings),
        report["data"],
        report["runs"],
        report.notes,
        report["costs"],
        report["memory_curve"],
    )


def title(report: Result) -> str:
    """Name the task or the text, and the LSTM."""
    s = report.settings
    if s["task"] == "charlm":
        return f"{report['data']['name']}: characters, LSTM {s['hidden']}"
    if s["task"] == "rows":
        what = "pixels, permuted" if s["full"] else "rows"
        return f"{report['data']['name']}: {what}, LSTM {s['hidden']}"
    return f"{s['task']}: LSTM {s['hidden']}"


def blocks(report: Result) -> list[Block]:
    """Show settings, tables and curves."""
    outcome = outcome_of(report)
    s, d = outcome.settings, outcome.data
    updates = f"an update every {s.update_every} steps" if s.update_every else "one a window"
    if s.task == "charlm":
        what = (
            f"{s.amount} characters for every arm, {s.batch_size} streams, {updates}; validated on "
            f"the last {d['validation_characters']} of {d['name']}'s characters, "
            f"{d['symbols']} symbols"
        )
    elif s.task == "rows":
        what = (
            f"{s.amount} batches of {s.batch_size} images for every arm, "
            f"{'a pixel' if s.full else 'a row'} a step, a loss at the last step alone (local: at "
            f"every window's end), an update a batch; error on the {d['evaluated_on']}, "
            f"{d['images']} images; synthesizers conditioned on: {s.condition}; lambda "
            f"{s.sg_lambda:g}; RMSprop for immediate"
        )
    else:
        what = (
            f"{s.amount} batches of {s.batch_size} episodes for every arm, symbols of {s.width} "
            "bits, an update a window"
        )
    said: list[Block] = [
        Text(
            f"{what}; Adam at {s.lr:g} (truncated backprop {s.exact_lr or s.lr:g}, synthesizers "
            f"{s.sg_lr:g}), "
            f"{'cosine to zero' if s.cosine else 'constant'}, clipped at {s.clip:g}; synthetic "
            f"gradients times {s.sg_scale:g}, synthesizer: {s.synthesizer}; "
            f"{text.count(len(s.seeds), 'seed')}. Total times are of training alone, arms taking "
            "turns; "
            f"times per {outcome.axis[:-1]} are interleaved medians on untrained nets"
            f"{f', at level {COST_LEVEL + 1} of the curriculum' * (outcome.key == 'solved')}."
        ),
        summary(outcome),
        *curves(outcome),
    ]
    if s.probe:
        said += [
            Heading("The gradient of the future"),
            Text(
                "Norm of the future's contribution to the parameter gradient of a window over the "
                "norm of the window's own, by full backprop after the training "
                "(`fused_dni.experiments.future`: every term is defined there):"
            ),
            future_table(outcome),
        ]
    if outcome.memory_curve:
        said += [Heading("Peak memory"), memory_table(outcome.memory_curve)]
    return said


# ------------------------------------------------------------------------------------------- plots


def curves(outcome: Outcome) -> list[Figure]:
    """Draw the task's measure against data and wall-clock, and what the probe found."""
    subject = f"{outcome.settings.task}, LSTM {outcome.settings.hidden}"
    made = [
        Figure(name, functools.partial(_measure, outcome, key), f"{subject}: {name}.")
        for name, key in CURVES[outcome.settings.task].items()
    ]
    # Where windows have no loss of their own at all there is no ratio to draw.
    ratios = {
        arm: {window: ratio for window, ratio in rows.items() if 0.0 < ratio < math.inf}
        for arm, rows in _future(outcome).items()
    }
    if any(ratios.values()):
        draw: Callable[[Any], None] = functools.partial(_draw_future, ratios)
        said = f"{subject}: the gradient of the future over the window's own, by window."
        made.append(Figure(PROBE_PLOTS[0], draw, said))
    predicted = {
        arm: [
            [{**row, **row["prediction"]} for row in run["history"] if row.get("prediction")]
            for run in outcome.of(arm)
        ]
        for arm in outcome.names()
    }
    predicted = {arm: histories for arm, histories in predicted.items() if all(histories)}
    if predicted:
        draw = functools.partial(_draw_prediction, predicted, outcome.axis)
        said = f"{subject}: the prediction beside the true gradient, during training."
        made.append(Figure(PROBE_PLOTS[1], draw, said, (6.4, 6.0)))
    return made


def _measure(outcome: Outcome, key: str, canvas: Any) -> None:
    axes = canvas.add_subplot()
    for arm, colour in zip(outcome.names(), itertools.cycle(plots.CYCLE), strict=False):
        _curve(axes, [run["history"] for run in outcome.of(arm)], key, outcome.key, colour, arm)
    axes.set_xlim(left=0)
    plots.finish(axes, AXES[key], AXES.get(outcome.key, _judged(outcome)))


def _draw_future(ratios: dict[str, dict[int, float]], canvas: Any) -> None:
    axes = canvas.add_subplot()
    for (arm, rows), colour in zip(ratios.items(), itertools.cycle(plots.CYCLE), strict=False):
        axes.plot(list(rows), list(rows.values()), "o-", color=colour, label=arm)
    axes.set_xscale("log", base=2)
    plots.finish(axes, "window T", "gradient of the future / window's own", log=True)
    plots.plain_ticks(axes.xaxis)


def _draw_prediction(predicted: dict[str, Any], axis: str, canvas: Any) -> None:
    panels = canvas.subplots(2, 1, sharex=True)
    keys = (("prediction_cosine", "cosine"), ("prediction_norm_ratio", "norm ratio"))
    for axes, (key, label) in zip(panels, keys, strict=True):
        for (arm, found), colour in zip(
            predicted.items(), itertools.cycle(plots.CYCLE), strict=False
        ):
            _curve(axes, found, axis, key, colour, arm)
        axes.axhline(0.0, color="black", linewidth=0.6)
        plots.finish(axes, "", f"prediction and true gradient: {label}")
    panels[1].set_xlabel(AXES[axis])


def _curve(
    axes: Any, histories: list[list[dict[str, Any]]], x: str, y: str, colour: str, label: str
) -> None:
    """Draw the median over seeds, the seeds thin behind it."""
    found = [[(row[x], row[y]) for row in rows] for rows in histories]
    plots.runs(axes, found, label, colour, middle=statistics.median)
