"""Tables of the LSTM on a CPU."""

from __future__ import annotations

import re
from typing import Any

from pages.cells import ordered, over_floor, ratio_of, table, where


def render_lstm(results: dict[str, Any], groups: dict[str, Any]) -> str:
    """Render the LSTM in one table: times over the floor, ratios to nn.LSTM, the boundary's
    cost."""
    shapes = _lstm_shapes(groups)
    if not shapes:
        return "Not measured yet."
    header = ["B/H/T", "floor, ms", "nn.LSTM", "oneDNN off", "compiled", "ours"]
    header += ["nn.LSTM / ours, forward+backward", "forward", "training step", "step: DNI / ours"]
    rows = []
    for shape in shapes:
        whole = groups[f"{shape} forward+backward"]
        made = whole["rows"]
        cells = [shape, f"{made[whole['floor']]['timing'].median * 1e3:.3g}"]
        for name in ("nn.LSTM", "nn.LSTM, oneDNN off", "unrolled steps, compiled", "ours"):
            cells.append(over_floor(made.get(name, {})))
        for what in ("forward+backward", "forward", "training step"):
            cells.append(ratio_of(groups.get(f"{shape} {what}", {}), "nn.LSTM / ours"))
        cells.append(ratio_of(groups.get(f"{shape} training step", {}), "DNI / ours"))
        rows.append(cells)
    what = (
        "Input size H, float32. Columns 3 to 6: time of forward and backward (gradients of weights "
        "and input) over the floor, the products that cannot be avoided, by `torch.mm(out=)` in "
        "the same run. Then ratios of times (99 % interval), above one where ours is faster; the "
        "training step is forward, backward and Adam: nn.LSTM with `Adam(fused=True)` against the "
        "update inside our backward. Last: the same with the boundary synthesizer, trained, over "
        "without."
    )
    said = f"{where(results['facts'], groups.values())}. {what}"
    parts = [said, table(header, rows)]
    boundary = _lstm_boundary(groups)
    if boundary:
        parts += [
            "What the boundary synthesizer adds to the forward and backward of a window of T steps "
            "(its prediction and its own training included), in per cent of the window without it:",
            boundary,
        ]
    return "\n\n".join(parts)


def _lstm_shapes(groups: dict[str, Any]) -> list[str]:
    ending = " forward+backward"
    names = [key.removesuffix(ending) for key in ordered(groups) if key.endswith(ending)]
    return [name for name in names if not name.endswith(" cell")]


def _lstm_boundary(groups: dict[str, Any]) -> str:
    found: dict[str, dict[int, str]] = {}
    for key in ordered(groups):
        if not key.endswith(" boundary"):
            continue
        size, _, steps = key.removesuffix(" boundary").rpartition("/")
        ratio = groups[key]["ratios"].get("DNI / ours")
        cell = "–"
        if ratio is not None:
            cell = f"{(ratio.median - 1) * 100:.1f}"
            if ratio.bounds:
                low, high = ((bound - 1) * 100 for bound in ratio.bounds)
                cell += f" ({low:.1f} to {high:.1f})"
        found.setdefault(size, {})[int(steps)] = cell
    columns = sorted({steps for cells in found.values() for steps in cells})
    if not columns:
        return ""
    rows = [[size, *(cells.get(t, "–") for t in columns)] for size, cells in found.items()]
    return table(["B/H", *(f"T={t}" for t in columns)], rows)


def render_lstm_details(results: dict[str, Any], groups: dict[str, Any]) -> str:
    """All groups of the LSTM: a table a kind of group, a column a shape."""
    shapes = _lstm_shapes(groups)
    if not shapes:
        return "Not measured yet."
    cells = [key.removesuffix(" forward") for key in ordered(groups) if " cell forward" in key]
    cells = [key for key in cells if not key.endswith("+backward")]
    said = where(results["facts"], groups.values())
    parts = [f"{said}. Milliseconds, median (times the floor of the same run)."]
    for title, keys in (
        ("The cell, forward", [f"{c} forward" for c in cells]),
        ("The cell, forward and backward", [f"{c} forward+backward" for c in cells]),
        ("Window, forward without gradients", [f"{s} forward" for s in shapes]),
        (
            "Window, forward that keeps what a backward needs",
            [f"{s} forward, for a backward" for s in shapes],
        ),
        ("Window, forward and backward", [f"{s} forward+backward" for s in shapes]),
        ("Training step", [f"{s} training step" for s in shapes]),
    ):
        parts.append(f"**{title}**\n\n" + _lstm_columns(groups, keys))
    return "\n\n".join(parts)


def _lstm_columns(groups: dict[str, Any], keys: list[str]) -> str:
    """Groups beside each other: a row a candidate, a column a group."""
    keys = [key for key in keys if key in groups]
    names = list(dict.fromkeys(name for key in keys for name in groups[key]["order"]))
    rows, reasons = [], []
    for name in names:
        cells = [name]
        for key in keys:
            row = groups[key]["rows"].get(name, {})
            if "failed" in row:
                reasons.append(f"{name} at {key}: {row['failed']}")
            if "timing" not in row:
                cells.append("–")
                continue
            cells.append(f"{row['timing'].median * 1e3:.3g} ({row['per_floor'].median:.2f})")
        rows.append(cells)
    text = table(["", *(re.match(r"[\d/]+(, \d+ layers)?", key)[0] for key in keys)], rows)
    return text + (f"\n\nNo figure: {'; '.join(reasons)}." if reasons else "")


def render_lstm_memory(results: dict[str, Any], groups: dict[str, Any]) -> str:
    """Peak memory of training on a sequence, against the window and against its length."""
    curves = groups.get("memory")
    if curves is None:
        return "Not measured yet."
    names = {"backprop": "truncated backprop, nn.LSTM", "fused": "truncated backprop, our kernels"}
    names["dni"] = "DNI"

    def mebibytes(sizes: list[int]) -> list[str]:
        return [f"{size / 2**20:.2f}" for size in sizes]

    windows, lengths = curves["by_window"], curves["by_length"]
    sequence, window = windows["sequence"], lengths["window"]
    last = "through the whole sequence"
    by_window = table(
        [f"T, sequence of {sequence}", *map(str, windows["windows"]), f"{sequence}: {last}"],
        [[text, *mebibytes(windows[name])] for name, text in names.items()],
    )
    by_length = [[f"{text}, T={window}", *mebibytes(lengths[name])] for name, text in names.items()]
    by_length += [
        [f"backprop {last}, {text}", *mebibytes(lengths["through"][name])]
        for name, text in (("backprop", "nn.LSTM"), ("fused", "our kernels"))
    ]
    text = (
        f"MiB at the peak of training once on a sequence: B={curves['batch']}, "
        f"H={curves['hidden']}, one layer. Measured: {curves['what']}."
    )
    return "\n\n".join(
        [
            f"{where(results['facts'], [curves])}.",
            text,
            by_window,
            table(["steps of the sequence", *map(str, lengths["lengths"])], by_length),
        ]
    )
