"""Copy and repeat-copy: the longest length solved at each window, at equal steps and at equal
wall-clock, beside the published figures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

import readings
from pages.cells import table, where

TITLES = {"copy": "Copy", "repeat-copy": "Repeat-copy"}
#: Jaderberg et al. 2016, table 2: LSTM of 256, by task and method at T = 2, 3, 4, 5.
PUBLISHED = {
    "copy": {
        "bptt": (7, 8, 10, 8),
        "dni": (16, 14, 18, 18),
        "dni+aux": (16, 17, 19, 18),
    },
    "repeat-copy": {
        "bptt": (7, 5, 19, 23),
        "dni": (39, 33, 39, 59),
        "dni+aux": (39, 59, 67, 59),
    },
}
WINDOWS = (2, 3, 4, 5)
EXACT = ("fused", "backprop")  # whichever ran, ours first


def render_lengths(results: list[dict[str, Any]]) -> str:
    """Render a table a result: rows of windows, truncated backprop and DNI side by side."""
    results = [r for r in results if len(r["settings"]["windows"]) > 1]
    order = list(TITLES)
    results = sorted(results, key=lambda report: order.index(report["settings"]["task"]))
    return "\n\n".join(map(_one, results)) or "Not measured yet."


def _one(report: dict[str, Any]) -> str:
    s, facts = report["settings"], report["facts"]
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for run in report["runs"]:
        runs.setdefault((run["method"], run["window"]), []).append(run)
    methods = list(dict.fromkeys(method for method, _ in runs))
    exact = next((method for method in EXACT if method in methods), None)
    predicted = [method for method in methods if method in PUBLISHED[s["task"]]]
    windows = sorted({window for _, window in runs})
    equal_steps, equal_time = [], []
    for window in windows:
        found = {m: runs[m, window] for m in (exact, *predicted) if (m, window) in runs}
        final = {m: [run["history"][-1]["solved"] for run in of] for m, of in found.items()}
        row = [f"T={window}"]
        row += [c for m in final for c in _cells(m, final, exact, s["task"], window)]
        equal_steps.append(row)
        end, cut = readings.in_equal_time(found)
        row = [f"T={window}", f"{end:.0f} s"]
        row += [c for m in cut for c in _cells(m, cut, exact)]
        equal_time.append(row)
    names = {exact: "truncated backprop"}
    header = [""]
    for method in (exact, *predicted):
        if method is not None:
            header += [names.get(method, method), "published"]
            header += ["ratio, ours", "ratio, published"] * (method != exact and exact is not None)
    later = ["", "after"]
    for method in (exact, *predicted):
        if method is not None:
            later += [names.get(method, method)]
            later += ["ratio"] * (method != exact and exact is not None)
    text = (
        f"{TITLES[s['task']]}: {where(facts)}: `{facts['command']}`. LSTM {s['hidden']}, "
        f"batch {s['batch_size']}, {s['amount']:,} steps an arm, {len(s['seeds'])} seeds: mean "
        "(range) of the longest length solved."
    )
    both = [table(header, equal_steps), "Cut where the fastest run at that T ended:"]
    return "\n\n".join([text, *both, table(later, equal_time)])


def _cells(
    method: str,
    solved: dict[str, list[float]],
    exact: str | None,
    task: str | None = None,
    window: int = 0,
) -> Iterable[str]:
    """Yield what a method solved and, of one that predicts, its ratio to truncated backprop; with
    a task the published figures beside them."""
    yield _spread(solved[method])
    known = PUBLISHED[task] if task and window in WINDOWS else None
    place = window - WINDOWS[0]
    if task:
        yield str(known["bptt" if method == exact else method][place]) if known else "-"
    if method != exact and exact in solved:
        base = statistics.fmean(solved[exact])
        yield f"{statistics.fmean(solved[method]) / base:.2f}" if base else "-"
        if task:
            yield f"{known[method][place] / known['bptt'][place]:.2f}" if known else "-"


def _spread(values: list[float]) -> str:
    mean = f"{statistics.fmean(values):.3g}"
    return mean if len(values) < 2 else f"{mean} ({min(values):.0f}–{max(values):.0f})"
