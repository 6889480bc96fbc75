"""Tables of what ``bench/gpu.sh`` measured."""

from __future__ import annotations

from typing import Any

from pages.cells import (
    grid_of,
    over_floor,
    ratio_of,
    table,
    time_of,
    timed_rows,
    where,
    without_figure,
)


def _microseconds(group: dict[str, Any], name: str, steps: int = 1) -> str:
    return time_of(group["rows"].get(name, {}), 1e6 / steps)


def render_gpu(results: dict[str, Any], groups: dict[str, Any]) -> str:
    """Render the decoupled step of one layer: launches, floor, and what it is compared with."""
    others = {
        "stock": "stock",
        "stock, compiled": "compiled",
        "stock, max-autotune": "max-autotune",
        "stock, max-autotune, its own graphs": "max-autotune, own graphs",
        "backprop, our kernels": "backprop, our kernels",
    }
    rivals = {
        "stock": "stock",
        "stock, max-autotune": "max-autotune",
        "backprop, CUDA kernels": "backprop, CUDA",
        "DNI": "DNI",
    }
    rows = []
    for key, group in groups.items():
        cells = [key, _microseconds(group, group["floor"])]
        moved = group["bytes"] / results["facts"].get("bandwidth", float("inf"))
        cells.append(f"{moved * 1e6:.3g}")
        cells += [
            _microseconds(group, name)
            for name in ("DNI", "DNI, one launch", "DNI, several launches")
        ]
        cells.append(over_floor(group["rows"].get("DNI", {})))
        cells += [ratio_of(group, f"{name} / DNI") for name in others]
        cells.append(_microseconds(group, "DNI, CUDA"))
        cells += [ratio_of(group, f"{name} / DNI, CUDA") for name in rivals]
        rows.append(cells)
    header = ["B/H, products, rule", "floor, µs", "bytes, µs", "DNI, µs", "one launch", "several"]
    header += ["DNI × floor", *(f"{name} / DNI" for name in others.values())]
    header += ["DNI, CUDA, µs", *(f"{name} / DNI, CUDA" for name in rivals.values())]
    text = (
        "One Linear-BatchNorm-ReLU step, all as replays of CUDA graphs: forward, rank-16 "
        "label-conditioned synthetic gradient, update, float32 weights; without dx and with data "
        "in the cache unless it says otherwise. The floor is its two products (three with dx) by "
        "`torch.mm(out=)` in the same run; bytes: what has to be moved over the bandwidth of a "
        "copy. Then times in as many launches as said, and ratios of times (99 % interval), above "
        "one where ours is faster: stock backprop of the same layer from a given gradient with a "
        "fused optimizer, the same compiled, and backprop on our own kernels. Triton's kernels but "
        "for the last columns, which are those in CUDA C++."
    )
    said = f"{where(results['facts'], groups.values())}. {text}"
    return f"{said}\n\n{table(header, rows)}"


def render_gpu_lstm(results: dict[str, Any], groups: dict[str, Any]) -> str:
    """Windows of an LSTM against cuDNN's, whichever way it falls."""
    times = ("nn.LSTM", "nn.LSTM, fp16", "ours", "ours, a launch a step", "ours, CUDA")
    ratios = {
        "nn.LSTM / ours": "nn.LSTM / ours",
        "nn.LSTM, eager / ours, eager": "eager",
        "forward": "forward",
        "nn.LSTM / ours, CUDA": "nn.LSTM / CUDA",
        "nn.LSTM, fp16 / ours, CUDA": "nn.LSTM, fp16 / CUDA",
        "ours / ours, CUDA": "ours / CUDA",
        "forward, CUDA": "forward, CUDA",
    }
    rows = [
        [
            key,
            _microseconds(group, group["floor"]),
            *(_microseconds(group, name) for name in times),
            _microseconds(group, "ours, CUDA", group["steps"]),
            *(ratio_of(group, label) for label in ratios),
        ]
        for key, group in groups.items()
    ]
    header = ["B/H/T, products", "floor, µs", "nn.LSTM, µs", "nn.LSTM, fp16, µs", "ours, µs"]
    header += ["a launch a step, µs", "CUDA, µs", "CUDA, µs a time step", *ratios.values()]
    text = (
        "Forward and backward of a window, gradients of weights and input, input size H, as "
        "replays of CUDA graphs. Ours is a persistent kernel where the weights fit. The floor is "
        "the products that cannot be avoided, by `torch.mm(out=)`. Ratios of times (99 % "
        "interval), above one where ours is faster; some without a graph, or of the forward alone. "
        "Ours is Triton's; CUDA is the one in CUDA C++, with parameters and their gradients in "
        "float32. Beside bf16 stands `nn.LSTM` in fp16: PyTorch takes cuDNN's persistent kernels "
        "for fp16 alone."
    )
    if (bare := grid_of(results).get("CUDA barrier")) is not None:
        text += (
            " A time step has two barriers of the grid, forward and backward, which bare take "
            f"{2 * bare * 1e6:.3g} µs."
        )
    said = f"{where(results['facts'], groups.values())}. {text}"
    return f"{said}\n\n{table(header, rows)}"


def render_gpu_details(results: dict[str, Any]) -> str:
    """All candidates of all groups, and what a launch and a grid barrier cost."""
    parts = []
    for suite in ("gpu-layer", "gpu-lstm"):
        for key, group in results.get(suite, {}).items():
            parts.append(f"**{key}**\n\n" + table(["", "µs", "× floor"], timed_rows(group)))
            parts += without_figure(group["rows"])
    grids = results.get("gpu-floors", {}).get("barrier", {}).get("grids", {})
    if grids:
        names = ("launch", "barrier", "CUDA launch", "CUDA barrier")
        rows = [
            [programs, *(f"{found[n] * 1e6:.3g}" if n in found else "–" for n in names)]
            for programs, found in sorted(grids.items(), key=lambda grid: int(grid[0]))
        ]
        parts.append(
            "A cooperative launch that does nothing, and a barrier of all its programs, of Triton "
            "and of CUDA C++:"
        )
        parts.append(table(["programs", *(f"{name}, µs" for name in names)], rows))
    measured = {
        k: g for s in ("gpu-layer", "gpu-lstm", "gpu-floors") for k, g in results.get(s, {}).items()
    }
    if not measured:
        return "Not measured yet."
    return "\n\n".join([f"{where(results['facts'], measured.values())}.", *parts])
