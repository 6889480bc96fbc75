"""Tables of a CPU's results: whole steps, layers, synthesizers, memory, products."""

from __future__ import annotations

from typing import Any

from pages.cells import (
    milliseconds,
    named,
    ordered,
    over_floor,
    ratio_of,
    table,
    threads_of,
    timed_rows,
    where,
    without_figure,
)


def error_of(results: dict[str, Any], key: str, name: str) -> str:
    """Test error of a row, mean over its seeds; of a compiled row, that of the eager one."""
    trained = name.replace("compiled", "eager")
    if name.startswith("stock backprop and optimizer"):
        trained = "stock backprop, eager, fused optimizer"
    entry = results.get("errors", {}).get("rows", {}).get(key, {}).get(trained)
    if entry is None:
        return "–" if name.startswith("floor") else "not measured"
    return f"{entry['mean']:.2f}" if "mean" in entry else "failed"


def render_step(results: dict[str, Any], groups: dict[str, Any]) -> str:
    """Render the step table: a table a rule and size, errors beside the speeds, then the ratios."""
    found = results.get("errors", {})
    said = f"{where(results['facts'], groups.values())}."
    if found:
        seeds = max(
            (len(e.get("errors", ())) for rows in found["rows"].values() for e in rows.values()),
            default=0,
        )
        said += (
            f" Test error: {found['data']}, {found['epochs']} epochs, "
            f"{seeds} seed{'s' if seeds != 1 else ''}, images resampled to the network's width."
        )
    parts = [
        said,
        "Milliseconds a step: median of interleaved rounds (95 % interval). "
        "The floor is the forward and the weight-gradient product of the four hidden layers, "
        "`torch.mm(out=)`, measured in the same run.",
    ]
    for key in ordered(groups):
        group = groups[key]
        case, _, rule = key.partition(" ")
        batch, _, hidden = case.partition("/")
        rows = []
        for name in group["order"]:
            row = group["rows"][name]
            time = milliseconds(row["timing"]) if "timing" in row else "–"
            rows.append([name, time, over_floor(row), error_of(results, key, name)])
        title = f"**B={batch}, H={hidden}, {rule.upper() if rule == 'sgd' else rule.title()}**"
        parts.append(title + "\n\n" + table(["step", "ms", "× floor", "test error %"], rows))
        parts += without_figure(group["rows"])
    parts.append(render_ratios(groups))
    return "\n\n".join(parts)


# Columns of the summary, by the name of the row they show.
SUMMARY = {
    "stock backprop, eager, fused optimizer": "stock eager",
    "stock backprop, compiled, fused optimizer": "stock compiled",
    "stock backprop and optimizer, one compiled step, autotuned": "stock autotuned",
    "backprop on our kernels": "backprop, our kernels",
    "DNI, targets on every step": "DNI k=1",
    "DNI, targets on every 4th step": "DNI k=4",
    "DNI, never a target": "DNI, never",
    "stock backprop, eager, bf16": "stock eager, bf16",
    "DNI, targets on every 4th step, bf16": "DNI k=4, bf16",
}


def render_summary(results: dict[str, Any], groups: dict[str, Any]) -> str:
    """Render the step table in one: time over the floor and, where any was measured, test error, a
    row a size and rule."""
    shown = [n for n in SUMMARY if any(n in group["rows"] for group in groups.values())]
    errors = bool(results.get("errors"))
    rows = []
    for key in ordered(groups):
        made = groups[key]["rows"]
        floor = next(row for name, row in made.items() if name.startswith("floor"))
        cells = [key, f"{floor['timing'].median * 1e3:.2f}"]
        for name in shown:
            row = made.get(name, {})
            time = over_floor(row)
            cells.append(f"{time} · {error_of(results, key, name)} %" if errors else time)
        rows.append(cells)
    header = ["B/H, rule", "floor, ms", *[SUMMARY[name] for name in shown]]
    what = f"Each cell: time of a step over the floor{' · test error' if errors else ''}."
    said = f"{where(results['facts'], groups.values())}. {what}"
    return "\n\n".join([said, table(header, rows), render_ratios(groups)])


#: What the step is judged by, ours over the other.
JUDGED = (
    "our backprop / stock eager",
    "DNI k=4 / stock eager",
    "DNI k=4 / backprop on our kernels",
)


def render_extremes(results: list[dict[str, Any]]) -> str:
    """Render the ratios of the step table that are best and worst over processors, instruction
    sets, threads and rules, a row a size."""
    found: dict[str, dict[str, list[float]]] = {}
    places = []
    for report in results:
        groups = report.get("step", {})
        if groups:
            places.append(f"{named(report['facts'])}, {threads_of(groups.values())}")
        for key in ordered(groups):
            of = found.setdefault(key.partition(" ")[0], {label: [] for label in JUDGED})
            for label, ratio in groups[key]["ratios"].items():
                if label in of:
                    of[label].append(ratio.median)
    if not places:
        return "Not measured yet."
    rows = [
        [size, *(f"{min(ratios):.2f} to {max(ratios):.2f}" for ratios in of.values())]
        for size, of in found.items()
    ]
    said = f"Both rules; {'; '.join(places)}. Ratios of times, best to worst, below one is faster:"
    return f"{said}\n\n" + table(["B/H", *JUDGED], rows)


def render_instructions(results: dict[str, Any], groups: dict[str, Any]) -> str:
    """Counted instructions a step, and their part of stock's (the first row's)."""
    parts = [f"{where(results['facts'], groups.values())}."]
    for key in ordered(groups):
        counts, order = groups[key]["rows"], groups[key]["order"]
        rows = [
            [name, f"{counts[name]:,}", f"{counts[name] / counts[order[0]]:.2f}"] for name in order
        ]
        parts.append(f"**{key}**\n\n" + table(["step", "instructions", "× stock"], rows))
    return "\n\n".join(parts)


def render_ratios(groups: dict[str, Any]) -> str:
    """Paired ratios of times, one column a ratio."""
    keys = ordered(groups)
    labels = list(dict.fromkeys(label for key in keys for label in groups[key]["ratios"]))
    rows = [[key, *(ratio_of(groups[key], label) for label in labels)] for key in keys]
    return "Ratios of times (99 % interval), below one is faster:\n\n" + table(
        ["B/H, rule", *labels], rows
    )


def render_groups(results: dict[str, Any], groups: dict[str, Any]) -> str:
    """Groups of one suite as tables of time and ratio to the floor."""
    parts = [f"{where(results['facts'], groups.values())}."]
    for key in ordered(groups):
        parts.append(f"**{key}**\n\n" + table(["", "µs", "× floor"], timed_rows(groups[key])))
    return "\n\n".join(parts)


def render_memory(results: dict[str, Any], groups: dict[str, Any]) -> str:
    """Render the curve of peak memory over depth."""
    curve = groups["curve"]
    names = {
        "stock": "stock backprop",
        "deferred": "DNI, nn.Sequential (deferred)",
        "immediate": "DNI, DecoupledSequential (immediate)",
    }
    rows = [
        [label, *(f"{size / 2**20:.2f}" for size in curve[method])]
        for method, label in names.items()
    ]
    text = (
        f"MiB at the peak of a training step, layers {curve['hidden']} wide, batch "
        f"{curve['batch']}, by depth. Measured: {curve['what']}."
    )
    header = ["depth", *map(str, curve["depths"])]
    said = f"{where(results['facts'], groups.values())}."
    return "\n\n".join([said, text, table(header, rows)])


def render_gemm(results: dict[str, Any], groups: dict[str, Any]) -> str:
    """Products: torch's rate, ours, and their ratio, by shape."""
    measured = groups["crossover"]["gflops"]
    rows, slower = [], []
    for count, features, rates in measured:
        cells = [f"{count} × {features}"]
        for product, (theirs, ours) in rates.items():
            cells.append(f"{theirs:.0f} / {ours:.0f} ({ours / theirs:.2f})")
            if ours < theirs:
                slower.append(f"{product} {count}×{features}")
        rows.append(cells)
    text = "GFLOP/s: torch / ours (ratio), float32, one call from Python each."
    last = "torch is the faster one at: " + (", ".join(slower) or "none of these") + "."
    header = ["rows × features", *measured[0][2]]
    said = f"{where(results['facts'], groups.values())}."
    return "\n\n".join([said, text, table(header, rows), last])
