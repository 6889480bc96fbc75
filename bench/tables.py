"""Committed results and the tables made from them.

    python bench/tables.py measure [--suite step ...] [--only 64/256]   interleaved timings
    python bench/tables.py errors --data DIR [--only 64/256]            test errors of the same rows
    python bench/tables.py render [--check]                             rewrite the tables

What ``bench/gpu.sh`` measured becomes part of them as ``bench/results/<device>-gpu.json``.

``measure`` takes every group of candidates *together* (``fused_dni.measure.timing.compare``),
checks each candidate first (``workloads.check_*``) and merges what it measured into
``bench/results/<device>-cpu.json`` (``-lstm.json`` for that suite), so that single groups can be
measured again. A candidate that fails its check, or that cannot run, stands in the table with that
reason and no figure. Measure on an otherwise idle machine: two thread pools on the same cores cost
each other factors.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "recurrent.md")
SUITES = ("step", "linear", "synthesizer", "memory", "gemm", "lstm")
FLOOR = "floor: 8 products by torch"
FLOOR_BF16 = "floor: 8 products by torch, bf16"


# ------------------------------------------------------------------------------------ measuring


def device_facts() -> dict[str, Any]:
    """What the figures hold for: machine, versions, threads, commit, date."""
    from fused_dni.measure import baseline, environment

    report = environment.report()
    facts = baseline.facts()
    del facts["gpu"]  # one that is there, but not measured here
    return facts | {
        "flags": report["processor"]["flags"],
        "cores": report["processor"].get("cores allowed", report["processor"]["cores seen"]),
        "C++ compiler": report["package"].get("C++ compiler"),
    }


def named(facts: dict[str, Any]) -> str:
    """The device: a GPU, or a processor and the instruction set that our kernels run on there (one
    processor's name may stand for several)."""
    if facts.get("gpu"):
        return str(facts["gpu"])
    return f"{facts['device']} ({facts['isa']})" if facts.get("isa") else str(facts["device"])


def slug(text: str) -> str:
    """A device's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def result_path(facts: dict[str, Any], suite: str) -> Path:
    """Where this machine's results of a suite are kept."""
    return RESULTS / f"{slug(named(facts))}-{'lstm' if suite == 'lstm' else 'cpu'}.json"


def load(path: Path) -> dict[str, Any]:
    """Results so far; an empty set where there is no file yet."""
    return json.loads(path.read_text()) if path.exists() else {}


def save(path: Path, results: dict[str, Any]) -> None:
    """Written whole and moved into place: an interrupted run keeps the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    labelled = {"kind": "benchmarks", "version": 1, **results}
    partial.write_text(json.dumps(rounded(labelled), indent=1, sort_keys=True) + "\n")
    partial.replace(path)


def rounded(value: Any) -> Any:
    """Floats to six significant digits: more would be noise in the history."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return value


def compared(
    candidates: dict[str, Callable[[], object]],
    failures: dict[str, str],
    *,
    floor: str | None = None,
    seconds: float | None = None,
    steps: int = 1,
    against: dict[str, str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measure one group; per candidate seconds a step and the paired ratio to the floor, if any.
    ``options`` are more of :func:`fused_dni.measure.timing.compare`."""
    from fused_dni.measure import timing

    timings = timing.compare(candidates, seconds=seconds, **options)
    rows: dict[str, Any] = {}
    for name, taken in timings.items():
        row = taken.to_json()
        for key in ("median", "p10", "p90", "iqr"):
            row[key] /= steps
        if row["interval"]:
            row["interval"] = [bound / steps for bound in row["interval"]]
        if floor is not None:
            row["per_floor"] = timing.ratio(taken, timings[floor]).to_json()
        rows[name] = row
    for name, reason in failures.items():
        rows[name] = {"failed": reason}
    group: dict[str, Any] = {"floor": floor, "rows": rows, "order": [*candidates, *failures]}
    group["ratios"] = {
        label: timing.ratio(timings[top], timings[bottom]).to_json()
        for label, (top, _, bottom) in {
            label: pair.partition(" / ") for label, pair in (against or {}).items()
        }.items()
        if top in timings and bottom in timings
    }
    return group


def gather(
    makers: dict[str, Callable[[], Callable[[], object]]],
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Check and build candidates; those that fail are kept as reasons."""
    candidates, failures = {}, {}
    for name, make in makers.items():
        try:
            candidates[name] = make()
        except Exception as error:  # compilers raise what they like
            lines = str(error).splitlines() or [""]
            failures[name] = f"{type(error).__name__}: {lines[0]}"
            print(f"  no figure for {name}: {failures[name]}", file=sys.stderr)
    return candidates, failures


def measure_step(seconds: float, only: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The table of the whole network, a group a case and rule."""
    import torch

    import workloads as w
    from fused_dni.measure import timing

    for case in w.CASES:
        for rule in w.RULES:
            key = f"{case} {rule}"
            if only and only not in key:
                continue
            products = [(case.batch, case.hidden, case.hidden)] * w.DEPTH * w.CYCLE
            makers: dict[str, Callable[[], Callable[[], object]]] = {
                FLOOR: lambda p=products: timing.gemm_floor(p),
                FLOOR_BF16: lambda p=products: timing.gemm_floor(p, torch.bfloat16),
            }
            for method in w.METHODS:
                makers[method.name] = lambda c=case, r=rule, m=method: w.stepper(
                    w.prepared(c, r, m)
                )
            torch._dynamo.reset()
            candidates, failures = gather(makers)
            yield (
                key,
                compared(
                    candidates,
                    failures,
                    floor=FLOOR,
                    seconds=seconds,
                    steps=w.CYCLE,
                    against={
                        "DNI k=4 / backprop on our kernels": f"{w.DNI_4.name} / {w.OURS.name}",
                        "DNI k=4 / stock eager": f"{w.DNI_4.name} / {w.STOCK.name}",
                        "DNI k=1 / stock eager": f"{w.DNI_1.name} / {w.STOCK.name}",
                        "DNI k=1 / stock compiled": f"{w.DNI_1.name} / {w.COMPILED.name}",
                    },
                ),
            )


def measure_linear(seconds: float, only: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """One layer's step, with and without dx."""
    import torch

    import workloads as w
    from bench_linear import products

    for shape in w.SHAPES:
        for dx in (False, True):
            key = f"{shape} {'with' if dx else 'without'} dx"
            if only and only not in key:
                continue
            floor = f"floor: {3 if dx else 2} products by torch"
            makers: dict[str, Callable[[], Callable[[], object]]] = {
                floor: lambda s=shape, d=dx: products(s, d)
            }

            def checked(shape: Any, kind: str, dx: bool, backend: str | None = None) -> Any:
                w.check_layer(shape, kind, dx, backend)
                return w.Layer(shape, kind, dx, backend=backend).step

            for kind in ("eager", "compiled"):
                makers[f"stock {kind}"] = lambda s=shape, k=kind, d=dx: checked(s, k, d)
            for backend in w.backends():
                for kind, label in (("ours", "backprop"), ("dni", "DNI")):
                    makers[f"{label}, {backend}"] = lambda s=shape, k=kind, d=dx, b=backend: (
                        checked(s, k, d, b)
                    )
            torch._dynamo.reset()
            candidates, failures = gather(makers)
            yield key, compared(candidates, failures, floor=floor, seconds=seconds)


def measure_synthesizer(seconds: float, only: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Prediction and update of each kind of synthesizer; the floor is the dense product."""
    import workloads as w
    from bench_linear import products

    for case in w.CASES:
        for what in ("predict", "update"):
            key = f"{case} {what}"
            if only and only not in key:
                continue
            floor = "floor of dense: 1 product by torch"
            shape = w.Shape(case.batch, case.hidden, case.hidden)
            makers: dict[str, Callable[[], Callable[[], object]]] = {
                floor: lambda s=shape: products(s, False, forward_only=True)
            }

            def checked(kind: str, case: Any, backend: str, what: str) -> Callable[[], object]:
                w.check_synthesizer(kind, case, backend)
                step = w.SynthesizerStep(kind, case, backend)
                if what == "predict":
                    return step.predict
                prediction = step.predict()
                return lambda: step.update(prediction)

            for backend in w.backends():
                for kind in w.KINDS:
                    makers[f"{kind}, {backend}"] = lambda k=kind, c=case, b=backend, t=what: (
                        checked(k, c, b, t)
                    )
            candidates, failures = gather(makers)
            yield key, compared(candidates, failures, floor=floor, seconds=seconds)


def measure_memory(seconds: float, only: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Peak memory of a step by depth, measured, in bytes."""
    import workloads as w
    from fused_dni.measure import timing

    curves: dict[str, Any] = {
        "what": timing.PEAK_MEMORY_CPU,
        "batch": w.MEMORY_CASE.batch,
        "hidden": w.MEMORY_CASE.hidden,
        "depths": list(w.MEMORY_DEPTHS),
    }
    for method in ("stock", "deferred", "immediate"):
        curves[method] = [timing.peak_memory(w.memory_step(method, d)) for d in w.MEMORY_DEPTHS]
    yield "curve", curves


def measure_gemm(seconds: float, only: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Products of the kernels against torch's over shapes, GFLOP/s; ``seconds`` is for all."""
    import torch

    from bench_gemm import FEATURES, PRODUCTS, ROWS, crossover

    each_one = seconds / (len(FEATURES) * len(ROWS) * len(PRODUCTS))
    with torch.no_grad():
        yield "crossover", {"gflops": [list(row) for row in crossover(max(each_one, 0.1))]}


def measure_lstm(seconds: float, only: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The LSTM: cell, window, training step, boundary, memory. A tenth of ``seconds`` a group, but
    at least eight rounds."""
    import torch

    import workloads_lstm as w

    floors = {False: "floor: forward products by torch", True: "floor: products by torch"}

    def group(
        makers: dict[str, Callable[[], Callable[[], object]]],
        floor: str | None,
        against: dict[str, str],
    ) -> dict[str, Any]:
        torch._dynamo.reset()
        candidates, failures = gather(makers)
        return compared(
            candidates, failures, floor=floor, seconds=seconds / 10, against=against, block=1
        )

    def wanted(key: str) -> bool:
        return only is None or only in key

    for shape in w.cell_shapes():
        for backward in (False, True):
            what = "forward+backward" if backward else "forward"
            key = f"{shape.batch}/{shape.hidden} cell {what}"
            if not wanted(key):
                continue

            def cell(ours: bool, s: w.Shape = shape, b: bool = backward) -> Callable[[], object]:
                made = w.check_cell(s, ours, backward=b)
                return made.backward if b else made.forward

            floor = floors[backward]
            makers: dict[str, Callable[[], Callable[[], object]]] = {
                floor: lambda s=shape, b=backward: w.floor(s, b),
                "nn.LSTMCell": lambda make=cell: make(False),
                "ours": lambda make=cell: make(True),
            }
            yield key, group(makers, floor, {"nn.LSTMCell / ours": "nn.LSTMCell / ours"})

    for shape in w.SHAPES:
        for what in ("forward", "forward, for a backward", "forward+backward"):
            key = f"{shape} {what}"
            if not wanted(key):
                continue
            backward = what == "forward+backward"
            floor = floors[backward]
            makers = {floor: lambda s=shape, b=backward: w.floor(s, b)}

            def window(method: w.Method, s: w.Shape = shape, t: str = what) -> Callable[[], object]:
                made = w.check_window(s, method, backward=t == "forward+backward")
                return {"forward": made.infer, "forward+backward": made.backward}.get(
                    t, made.forward
                )

            for method in w.WINDOW_METHODS:
                if method.synthesizer and what == "forward":
                    continue  # nothing is predicted there: it is ours
                if method.compiled and what != "forward+backward":
                    continue  # compiling takes longer than all else
                makers[method.name] = lambda m=method, make=window: make(m)
            pairs = {
                f"{other.name} / ours": f"{other.name} / {w.OURS.name}"
                for other in (w.STOCK, w.NATIVE, w.UNROLLED_LOOP)
            }
            yield key, group(makers, floor, pairs)
        key = f"{shape} training step"
        if wanted(key):
            makers = {floors[True]: lambda s=shape: w.floor(s, True)}
            for method in w.STEP_METHODS:
                makers[method.name] = lambda m=method, s=shape: w.check_training(s, m).step
            stock, ours, dni = (m.name for m in (w.STOCK_STEP, w.OURS_STEP, w.DNI_STEP))
            pairs = {
                "nn.LSTM / ours": f"{stock} / {ours}",
                "nn.LSTM / DNI": f"{stock} / {dni}",
                "DNI / ours": f"{dni} / {ours}",
            }
            yield key, group(makers, floors[True], pairs)

    for shape in w.boundary_shapes():
        key = f"{shape} boundary"
        if wanted(key):
            makers = {
                method.name: lambda m=method, s=shape: w.check_window(s, m, backward=True).backward
                for method in (w.OURS, w.DNI)
            }
            pairs = {"DNI / ours": f"{w.DNI.name} / {w.OURS.name}"}
            yield key, group(makers, None, pairs)

    if wanted("memory"):
        yield "memory", w.memory_curves()


def measure(suites: list[str], only: str | None, seconds: float, given: Path | None) -> None:
    """Measure and merge into the machine's files, or into the one that is given."""
    facts = device_facts()
    for suite in suites:
        path = given or result_path(facts, suite)
        for key, group in globals()[f"measure_{suite}"](seconds, only):
            results = load(path)
            results["facts"] = facts
            group["commit"], group["date"] = facts["commit"], facts["date"]
            group["threads"] = facts["threads"]
            results.setdefault(suite, {})[key] = group
            save(path, results)
            print(f"{suite} {key}", flush=True)
            for name, row in group.get("rows", {}).items():
                if "median" in row:
                    floor = row.get("per_floor")
                    ratio = f" {floor['median']:6.2f} x the floor" if floor else ""
                    print(f"  {name:45} {row['median'] * 1e3:9.3f} ms{ratio}")
        print(f"wrote {path}")


def errors(
    folder: str | None, only: str | None, epochs: int, seeds: int, path: Path | None, keep: bool
) -> None:
    """Train every row of the step table and keep its final test error.

    Compiled rows are left out: they are their eager rows' arithmetic.
    """
    from rich.progress import Progress

    import workloads as w
    from fused_dni.experiments import data as loading

    facts = device_facts()
    path = path or result_path(facts, "errors")
    data = loading.load("mnist" if folder else "digits", folder=folder)
    rows = [
        (case, rule, method)
        for case in w.CASES
        for rule in w.RULES
        for method in w.METHODS
        if not method.compiled and (not only or only in f"{case} {rule} {method.name}")
    ]
    done = load(path).get("errors", {}).get("rows", {})
    with Progress(disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("test errors", total=len(rows) * seeds * epochs)
        for case, rule, method in rows:
            key = f"{case} {rule}"
            if keep and "errors" in done.get(key, {}).get(method.name, {}):
                progress.advance(task, seeds * epochs)
                continue
            entry: dict[str, Any]
            try:
                finals = []
                for seed in range(seeds):
                    by_epoch = []
                    for error in w.train_error(data, case, rule, method, epochs=epochs, seed=seed):
                        by_epoch.append(error)
                        progress.advance(task)
                    finals.append(by_epoch[-1])
                entry = {"errors": finals, "mean": sum(finals) / len(finals)}
            except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
                entry = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            results = load(path)
            section = results.setdefault("errors", {})
            section |= {
                "data": data.name,
                "epochs": epochs,
                "learning_rates": w.LEARNING_RATES,
                "synthesizer_rate": w.SYNTHESIZER_RATE,
                "date": facts["date"],
                "commit": facts["commit"],
            }
            section.setdefault("rows", {}).setdefault(key, {})[method.name] = entry
            save(path, results)
            print(f"{key:16} {method.name:45} {entry.get('mean', entry.get('failed'))}", flush=True)
    print(f"wrote {path}")


# ------------------------------------------------------------------------------------ rendering


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; every column after the first to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def provenance(results: dict[str, Any], groups: dict[str, Any]) -> str:
    """One line: machine, threads, versions, when and at which commit."""
    facts = results["facts"]
    dates = sorted({group["date"] for group in groups.values()})
    commits = sorted({str(group["commit"]) for group in groups.values()})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    threads = sorted({group["threads"] for group in groups.values()})
    return (
        f"{named(facts)}, {' or '.join(map(str, threads))} threads, torch {facts['torch']}, "
        f"{span}, commit {', '.join(commits)}."
    )


def milliseconds(row: dict[str, Any]) -> str:
    """Median with its 95 % interval."""
    text = f"{row['median'] * 1e3:.3g}"
    if row.get("interval"):
        low, high = (f"{bound * 1e3:.3g}" for bound in row["interval"])
        text += f" ({low}–{high})"
    return text


def error_of(results: dict[str, Any], key: str, name: str) -> str:
    """Test error of a row, mean over its seeds; of a compiled row, that of the eager one."""
    trained = name.replace("compiled", "eager")
    entry = results.get("errors", {}).get("rows", {}).get(key, {}).get(trained)
    if entry is None:
        return "–" if name.startswith("floor") else "not measured"
    return f"{entry['mean']:.2f}" if "mean" in entry else "failed"


def render_step(results: dict[str, Any]) -> str:
    """The step table: a table a rule and size, errors beside the speeds, then the ratios."""
    groups = results.get("step", {})
    if not groups:
        return "Not measured yet."
    found = results.get("errors", {})
    parts = [provenance(results, groups)]
    if found:
        seeds = max(
            (len(e.get("errors", ())) for rows in found["rows"].values() for e in rows.values()),
            default=0,
        )
        parts[0] += (
            f" Test error: {found['data']}, {found['epochs']} epochs, "
            f"{seeds} seed{'s' if seeds != 1 else ''}, images resampled to the network's width."
        )
    parts.append(
        "Milliseconds a step: median of interleaved rounds (95 % interval). "
        "The floor is the forward and the weight-gradient product of the four hidden layers, "
        "`torch.mm(out=)`, measured in the same run."
    )
    for key in ordered(groups):
        group = groups[key]
        case, _, rule = key.partition(" ")
        batch, _, hidden = case.partition("/")
        rows = []
        for name in group["order"]:
            row = group["rows"][name]
            if "failed" in row:
                rows.append([name, "–", "–", error_of(results, key, name)])
                continue
            ratio = f"{row['per_floor']['median']:.2f}"
            rows.append([name, milliseconds(row), ratio, error_of(results, key, name)])
        title = f"**B={batch}, H={hidden}, {rule.upper() if rule == 'sgd' else rule.title()}**"
        parts.append(title + "\n\n" + table(["step", "ms", "× floor", "test error %"], rows))
        failed = [
            f"{name}: {row['failed']}" for name, row in group["rows"].items() if "failed" in row
        ]
        if failed:
            parts.append("No figure: " + "; ".join(failed) + ".")
    parts.append(render_ratios(groups))
    return "\n\n".join(parts)


# Columns of the summary, by the name of the row they show.
SUMMARY = {
    "stock backprop, eager, fused optimizer": "stock eager",
    "stock backprop, compiled, fused optimizer": "stock compiled",
    "backprop on our kernels": "backprop, our kernels",
    "DNI, targets on every step": "DNI k=1",
    "DNI, targets on every 4th step": "DNI k=4",
    "DNI, never a target": "DNI, never",
    "stock backprop, eager, bf16": "stock eager, bf16",
    "DNI, targets on every 4th step, bf16": "DNI k=4, bf16",
}


def render_summary(results: dict[str, Any]) -> str:
    """The step table in one: time over the floor and test error, a row a size and rule."""
    groups = results.get("step", {})
    if not groups:
        return "Not measured yet."
    rows = []
    for key in ordered(groups):
        made = groups[key]["rows"]
        floor = next(row for name, row in made.items() if name.startswith("floor"))
        cells = [key, f"{floor['median'] * 1e3:.2f}"]
        for name in SUMMARY:
            row = made.get(name, {})
            time = f"{row['per_floor']['median']:.2f}" if "per_floor" in row else "–"
            cells.append(f"{time} · {error_of(results, key, name)} %")
        rows.append(cells)
    header = ["B/H, rule", "floor, ms", *SUMMARY.values()]
    what = "Each cell: time of a step over the floor · test error."
    return "\n\n".join(
        [
            f"{provenance(results, groups)} {what}",
            table(header, rows),
            render_ratios(groups),
        ]
    )


def render_ratios(groups: dict[str, Any]) -> str:
    """Paired ratios of times, one column a ratio."""
    keys = ordered(groups)
    labels = list(dict.fromkeys(label for key in keys for label in groups[key]["ratios"]))
    rows = []
    for key in keys:
        cells = [key]
        for label in labels:
            ratio = groups[key]["ratios"].get(label)
            cells.append("–" if ratio is None else interval(ratio))
        rows.append(cells)
    return "Ratios of times (99 % interval), below one is faster:\n\n" + table(
        ["B/H, rule", *labels], rows
    )


def interval(ratio: dict[str, Any]) -> str:
    """A ratio with its interval."""
    text = f"{ratio['median']:.2f}"
    if ratio["interval"]:
        text += " ({:.2f}–{:.2f})".format(*ratio["interval"])
    return text


def ordered(groups: dict[str, Any]) -> list[str]:
    """Group names by the numbers in them, then by the rest."""
    return sorted(groups, key=lambda key: ([int(n) for n in re.findall(r"\d+", key)], key))


def render_groups(results: dict[str, Any], suite: str) -> str:
    """Groups of one suite as tables of time and ratio to the floor."""
    groups = results.get(suite, {})
    if not groups:
        return "Not measured yet."
    parts = [provenance(results, groups)]
    for key in ordered(groups):
        rows = []
        for name in groups[key]["order"]:
            row = groups[key]["rows"][name]
            if "failed" in row:
                rows.append([name, "–", "–"])
                continue
            microseconds = f"{row['median'] * 1e6:.3g}"
            rows.append([name, microseconds, f"{row['per_floor']['median']:.2f}"])
        parts.append(f"**{key}**\n\n" + table(["", "µs", "× floor"], rows))
    return "\n\n".join(parts)


def render_memory(results: dict[str, Any]) -> str:
    """The curve of peak memory over depth."""
    groups = results.get("memory", {})
    if not groups:
        return "Not measured yet."
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
    return "\n\n".join([provenance(results, groups), text, table(header, rows)])


def render_gemm(results: dict[str, Any]) -> str:
    """Products: torch's rate, ours, and their ratio, by shape."""
    groups = results.get("gemm", {})
    if not groups:
        return "Not measured yet."
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
    return "\n\n".join([provenance(results, groups), text, table(header, rows), last])


def render_lstm(results: dict[str, Any]) -> str:
    """The LSTM in one table: times over the floor, ratios to nn.LSTM, the boundary's cost."""
    groups = results.get("lstm", {})
    shapes = _lstm_shapes(groups)
    if not shapes:
        return "Not measured yet."
    header = ["B/H/T", "floor, ms", "nn.LSTM", "oneDNN off", "compiled", "ours"]
    header += ["nn.LSTM / ours, forward+backward", "forward", "training step", "step: DNI / ours"]
    rows = []
    for shape in shapes:
        whole = groups[f"{shape} forward+backward"]
        made = whole["rows"]
        cells = [shape, f"{made[whole['floor']]['median'] * 1e3:.3g}"]
        for name in ("nn.LSTM", "nn.LSTM, oneDNN off", "unrolled steps, compiled", "ours"):
            row = made.get(name, {})
            cells.append(f"{row['per_floor']['median']:.2f}" if "per_floor" in row else "–")
        for what in ("forward+backward", "forward", "training step"):
            cells.append(_lstm_ratio(groups, f"{shape} {what}", "nn.LSTM / ours"))
        cells.append(_lstm_ratio(groups, f"{shape} training step", "DNI / ours"))
        rows.append(cells)
    what = (
        "Input size H, float32. Columns 3 to 6: time of forward and backward (gradients of weights "
        "and input) over the floor, the products that cannot be avoided, by `torch.mm(out=)` in "
        "the same run. Then ratios of times (99 % interval), above one where ours is faster; the "
        "training step is forward, backward and Adam: nn.LSTM with `Adam(fused=True)` against the "
        "update inside our backward. Last: the same with the boundary synthesizer, trained, over "
        "without."
    )
    parts = [f"{provenance(results, groups)} {what}", table(header, rows)]
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


def _lstm_ratio(groups: dict[str, Any], key: str, label: str) -> str:
    ratio = groups.get(key, {}).get("ratios", {}).get(label)
    return "–" if ratio is None else interval(ratio)


def _lstm_boundary(groups: dict[str, Any]) -> str:
    found: dict[str, dict[int, str]] = {}
    for key in ordered(groups):
        if not key.endswith(" boundary"):
            continue
        size, _, steps = key.removesuffix(" boundary").rpartition("/")
        ratio = groups[key]["ratios"].get("DNI / ours")
        cell = "–"
        if ratio is not None:
            cell = f"{(ratio['median'] - 1) * 100:.1f}"
            if ratio["interval"]:
                low, high = ((bound - 1) * 100 for bound in ratio["interval"])
                cell += f" ({low:.1f} to {high:.1f})"
        found.setdefault(size, {})[int(steps)] = cell
    columns = sorted({steps for cells in found.values() for steps in cells})
    if not columns:
        return ""
    rows = [[size, *(cells.get(t, "–") for t in columns)] for size, cells in found.items()]
    return table(["B/H", *(f"T={t}" for t in columns)], rows)


def render_lstm_details(results: dict[str, Any]) -> str:
    """All groups of the LSTM: a table a kind of group, a column a shape."""
    groups = results.get("lstm", {})
    shapes = _lstm_shapes(groups)
    if not shapes:
        return "Not measured yet."
    cells = [key.removesuffix(" forward") for key in ordered(groups) if " cell forward" in key]
    cells = [key for key in cells if not key.endswith("+backward")]
    parts = [
        f"{provenance(results, groups)} Milliseconds, median (times the floor of the same run)."
    ]
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
            if "median" not in row:
                cells.append("–")
                continue
            cells.append(f"{row['median'] * 1e3:.3g} ({row['per_floor']['median']:.2f})")
        rows.append(cells)
    text = table(["", *(re.match(r"[\d/]+(, \d+ layers)?", key)[0] for key in keys)], rows)
    return text + (f"\n\nNo figure: {'; '.join(reasons)}." if reasons else "")


def render_lstm_memory(results: dict[str, Any]) -> str:
    """Peak memory of training on a sequence, against the window and against its length."""
    curves = results.get("lstm", {}).get("memory")
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
            provenance(results, {"memory": curves}),
            text,
            by_window,
            table(["steps of the sequence", *map(str, lengths["lengths"])], by_length),
        ]
    )


def _gpu_provenance(results: dict[str, Any], groups: dict[str, Any]) -> str:
    """One line: GPU, versions, when and at which commits."""
    facts = results["facts"]
    dates = sorted({group["date"] for group in groups.values()})
    commits = sorted({str(group["commit"]) for group in groups.values()})
    return (
        f"{named(facts)}, torch {facts['torch']}, Triton {facts['triton']}, "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}, commit {', '.join(commits)}."
    )


def _microseconds(group: dict[str, Any], name: str, steps: int = 1) -> str:
    row = group["rows"].get(name, {})
    return f"{row['median'] / steps * 1e6:.3g}" if "median" in row else "–"


def _over_floor(group: dict[str, Any], name: str) -> str:
    row = group["rows"].get(name, {})
    return f"{row['per_floor']['median']:.2f}" if "per_floor" in row else "–"


def _ratio(group: dict[str, Any], label: str) -> str:
    ratio = group["ratios"].get(label)
    return "–" if ratio is None else interval(ratio)


def render_gpu(results: dict[str, Any]) -> str:
    """The decoupled step of one layer: launches, floor, and what it is compared with."""
    groups = results.get("gpu-layer", {})
    if not groups:
        return "Not measured yet."
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
        cells.append(_over_floor(group, "DNI"))
        cells += [_ratio(group, f"{name} / DNI") for name in others]
        cells.append(_microseconds(group, "DNI, CUDA"))
        cells += [_ratio(group, f"{name} / DNI, CUDA") for name in rivals]
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
    return "\n\n".join([f"{_gpu_provenance(results, groups)} {text}", table(header, rows)])


def render_gpu_lstm(results: dict[str, Any]) -> str:
    """Windows of an LSTM against cuDNN's, whichever way it falls."""
    groups = results.get("gpu-lstm", {})
    if not groups:
        return "Not measured yet."
    times = ("nn.LSTM", "ours", "ours, a launch a step", "ours, CUDA")
    ratios = {
        "nn.LSTM / ours": "nn.LSTM / ours",
        "nn.LSTM, eager / ours, eager": "eager",
        "forward": "forward",
        "nn.LSTM / ours, CUDA": "nn.LSTM / CUDA",
        "ours / ours, CUDA": "ours / CUDA",
        "forward, CUDA": "forward, CUDA",
    }
    rows = [
        [
            key,
            _microseconds(group, group["floor"]),
            *(_microseconds(group, name) for name in times),
            _microseconds(group, "ours, CUDA", group["steps"]),
            *(_ratio(group, label) for label in ratios),
        ]
        for key, group in groups.items()
    ]
    header = ["B/H/T, products", "floor, µs", "nn.LSTM, µs", "ours, µs", "a launch a step, µs"]
    header += ["CUDA, µs", "CUDA, µs a time step", *ratios.values()]
    text = (
        "Forward and backward of a window, gradients of weights and input, input size H, as "
        "replays of CUDA graphs. Ours is a persistent kernel where the weights fit. The floor is "
        "the products that cannot be avoided, by `torch.mm(out=)`. Ratios of times (99 % "
        "interval), above one where ours is faster; some without a graph, or of the forward alone. "
        "Ours is Triton's; CUDA is the one in CUDA C++, with parameters and their gradients in "
        "float32."
    )
    grids = results.get("gpu-floors", {}).get("barrier", {}).get("grids", {})
    bare = grids.get(str(results["facts"].get("multiprocessors")), {}).get("CUDA barrier")
    if bare is not None:
        text += (
            " A time step has two barriers of the grid, forward and backward, which bare take "
            f"{2 * bare * 1e6:.3g} µs."
        )
    return "\n\n".join([f"{_gpu_provenance(results, groups)} {text}", table(header, rows)])


def render_gpu_details(results: dict[str, Any]) -> str:
    """All candidates of all groups, and what a launch and a grid barrier cost."""
    parts = []
    for suite in ("gpu-layer", "gpu-lstm"):
        groups = results.get(suite, {})
        for key, group in groups.items():
            rows = [
                [name, _microseconds(group, name), _over_floor(group, name)]
                for name in group["order"]
            ]
            parts.append(f"**{key}**\n\n" + table(["", "µs", "× floor"], rows))
            failed = [f"{n}: {r['failed']}" for n, r in group["rows"].items() if "failed" in r]
            if failed:
                parts.append("No figure: " + "; ".join(failed) + ".")
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
    return "\n\n".join([_gpu_provenance(results, measured), *parts])


def render_training(report: dict[str, Any]) -> str:
    """Errors and wall-clock of one ``fused-dni train`` run."""
    facts, settings = report["facts"], report["settings"]
    stock = report["summary"][0]["seconds_per_epoch"]
    names = {
        "backprop": "stock backprop, eager, fused optimizer",
        "fused": "backprop on our kernels",
        "cdni k=1": "cDNI, targets on every step",
        "cdni k=4": "cDNI, targets on every 4th step",
    }
    rows = [
        [
            names.get(row["name"], row["name"]),
            f"{row['error_mean']:.2%} ({row['error_min']:.2%}–{row['error_max']:.2%})",
            f"{row['seconds_per_epoch'] * 1e3:.0f}",
            f"{row['seconds_per_epoch'] / stock:.2f}",
            f"{row['seconds_to_threshold']:.2f} s"
            if row["seconds_to_threshold"]
            else "not reached",
        ]
        for row in report["summary"]
    ]
    header = ["", f"error, {report['evaluated_on']}", "epoch, ms", "÷ first row"]
    header.append(f"to {report['summary'][0]['threshold']:.0%}")
    text = (
        f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, {facts['date']}, "
        f"commit {facts['commit']}: `{facts['command']}`. {settings['depth']} hidden layers of "
        f"{settings['hidden']}, batch {settings['batch_size']}, {settings['epochs']} epochs, "
        f"{len(settings['seeds'])} seeds (mean, range), {settings['update']} at "
        f"{settings['lr']:g}, synthesizers of rank {settings['rank'] or 'O (dense)'} at "
        f"{settings['sg_lr']:g}, {settings['warmup_steps']} steps of warm-up."
    )
    return f"{text}\n\n{table(header, rows)}"


def render_recurrent(report: dict[str, Any]) -> str:
    """What one ``fused-dni train charlm``, ``copy`` or ``repeat-copy`` run came to."""
    from fused_dni.report.blocks import as_markdown
    from fused_dni.report.kinds import recurrent as recurrent_report

    outcome, facts = recurrent_report.outcome_of(report), report["facts"]
    s = outcome.settings
    said = (
        f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, {facts['date']}, "
        f"commit {facts['commit']}: `{facts['command']}`. LSTM {s.hidden}, batch {s.batch_size}, "
        f"{s.amount:,} {outcome.axis} an arm, {len(s.seeds)} seeds (mean, range)."
    )
    rows = as_markdown([recurrent_report.summary(outcome)], RESULTS)
    return f"{said}\n\n{rows}\n\n{recurrent_report.sentence(outcome)}"


def render_future(report: dict[str, Any]) -> str:
    """The true gradient of the future beside the window's own, and beside what was predicted."""
    from fused_dni.report.blocks import as_markdown
    from fused_dni.report.kinds import recurrent as recurrent_report

    outcome = recurrent_report.outcome_of(report)
    left_out = as_markdown([recurrent_report.future_table(outcome)], RESULTS)
    shares = (0.1, 0.25, 0.5, 0.75, 1.0)
    rows = []
    for name in outcome.names():
        runs = [[r for r in run["history"] if r.get("prediction")] for run in outcome.of(name)]
        if not all(runs) or not any("prediction_cosine" in r["prediction"] for r in runs[0]):
            continue
        for key in ("cosine", "norm_ratio"):
            cells = []
            for share in shares:
                at = [run[max(0, round(share * len(run)) - 1)]["prediction"] for run in runs]
                found = [r[f"prediction_{key}"] for r in at if r[f"prediction_{key}"] is not None]
                cells.append(f"{statistics.median(found):.3f}" if found else "-")
            rows.append([f"{name}, {key.replace('_', ' ')}", *cells])
    header = ["prediction against truth, by share of the training"]
    predicted = table([*header, *(f"{share:.0%}" for share in shares)], rows)
    return f"{left_out}\n\n{predicted}"


def render_ranks(reports: list[dict[str, Any]]) -> str:
    """Error by rank of the synthesizer, one ``fused-dni train --held-out --rank`` run each."""
    if not reports:
        return "Not measured yet."
    reports = sorted(reports, key=lambda report: report["settings"]["rank"] or 10**9)
    names = [row["name"] for row in reports[0]["summary"]]
    rows = [
        [
            str(report["settings"]["rank"] or "dense"),
            *(
                f"{row['error_mean']:.2%} ({row['error_min']:.2%}–{row['error_max']:.2%})"
                for row in report["summary"]
            ),
        ]
        for report in reports
    ]
    facts = reports[0]["facts"]
    text = (
        f"Error, {reports[0]['evaluated_on']}, mean and range of "
        f"{len(reports[0]['settings']['seeds'])} seeds. {facts['device']}, {facts['date']}, commit "
        f"{facts['commit']}: `{facts['command']}`."
    )
    return f"{text}\n\n{table(['rank', *names], rows)}"


def each(
    renderer: Callable[[dict[str, Any]], str],
) -> Callable[[list[dict[str, Any]]], str]:
    """A renderer of several results: one part a device."""
    return lambda results: "\n\n".join(map(renderer, results)) or "Not measured yet."


def on_gpus(
    renderer: Callable[[dict[str, Any]], str],
) -> Callable[[list[dict[str, Any]]], str]:
    """As :func:`each`, which says so where no GPU was measured."""
    return lambda results: (
        "\n\n".join(map(renderer, results)) or "No GPU figure has been measured yet."
    )


def _short_answers() -> str:
    import answers  # which imports this module

    return answers.short()


# By name of the table: which results it is made from, and how.
RENDERERS: dict[str, tuple[str, Callable[[list[dict[str, Any]]], str]]] = {
    "verdict": ("", lambda _: _short_answers()),
    "summary": ("*-cpu.json", each(render_summary)),
    "step": ("*-cpu.json", each(render_step)),
    "linear": ("*-cpu.json", each(lambda results: render_groups(results, "linear"))),
    "synthesizer": ("*-cpu.json", each(lambda results: render_groups(results, "synthesizer"))),
    "memory": ("*-cpu.json", each(render_memory)),
    "gemm": ("*-cpu.json", each(render_gemm)),
    "lstm": ("*-lstm.json", each(render_lstm)),
    "lstm-details": ("*-lstm.json", each(render_lstm_details)),
    "lstm-memory": ("*-lstm.json", each(render_lstm_memory)),
    "gpu": ("*-gpu.json", on_gpus(render_gpu)),
    "gpu-lstm": ("*-gpu.json", on_gpus(render_gpu_lstm)),
    "gpu-details": ("*-gpu.json", on_gpus(render_gpu_details)),
    "mnist": ("*-mnist.json", each(render_training)),
    "ranks": ("*-mnist-rank-*.json", render_ranks),
    "copy": ("*-copy.json", each(render_recurrent)),
    "copy-future": ("*-copy.json", each(render_future)),
    "charlm": ("*-charlm.json", each(render_recurrent)),
    "charlm-future": ("*-charlm.json", each(render_future)),
}


def committed(pattern: str) -> list[dict[str, Any]]:
    """The results whose file name fits."""
    paths = sorted(RESULTS.glob(pattern)) if pattern else []
    return [json.loads(path.read_text()) for path in paths]


def render_document(text: str, results: Callable[[str], list[dict[str, Any]]] = committed) -> str:
    """``text`` with everything between its markers made anew from ``results(pattern)``.

    Raises:
        ValueError: a marker without its end, or of a table that does not exist.
    """
    opening = re.compile(r"<!-- table: (\S+) -->\n")
    closing = "<!-- end of table -->"
    done, position = [], 0
    for match in opening.finditer(text):
        end = text.find(closing, match.end())
        if end < 0:
            raise ValueError(f"table {match[1]!r} has no end marker")
        if match[1] not in RENDERERS:
            raise ValueError(f"unknown table {match[1]!r}; there are {', '.join(RENDERERS)}")
        pattern, renderer = RENDERERS[match[1]]
        done += [text[position : match.end()], "\n", renderer(results(pattern)), "\n\n"]
        position = end
    return "".join([*done, text[position:]])


def render(check: bool) -> int:
    """Rewrite the documents, or with ``check`` say which of them differ."""
    import answers  # which imports this module

    stale = answers.render(check)
    for path in DOCUMENTS:
        old = path.read_text()
        new = render_document(old)
        if new == old:
            continue
        stale += 1
        name = path.relative_to(ROOT)
        if check:
            print(f"{name} differs from the results: run python bench/tables.py render")
        else:
            path.write_text(new)
            print(f"rewrote {name}")
    return 1 if check and stale else 0


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("measure", help="time everything, or --suite and --only of it")
    sub.add_argument("--suite", action="append", choices=SUITES)
    sub.add_argument("--only", help="only groups whose name contains this")
    sub.add_argument("--seconds", type=float, default=10.0, help="timed seconds a group")
    sub.add_argument("--out", type=Path)
    sub = commands.add_parser("errors", help="train every row of the step table")
    sub.add_argument("--data", metavar="DIR", help="folder of the MNIST files; digits without")
    sub.add_argument("--only", help="only rows whose name contains this")
    sub.add_argument("--epochs", type=int, default=5)
    sub.add_argument("--seeds", type=int, default=1)
    sub.add_argument("--keep", action="store_true", help="leave rows that already have errors")
    sub.add_argument("--out", type=Path)
    sub = commands.add_parser("render", help="rewrite the tables of the documents")
    sub.add_argument("--check", action="store_true", help="change nothing, fail if they differ")
    given = parser.parse_args(arguments)
    if given.command == "measure":
        measure(given.suite or list(SUITES), given.only, given.seconds, given.out)
        return 0
    if given.command == "errors":
        errors(given.data, given.only, given.epochs, given.seeds, given.out, given.keep)
        return 0
    return render(given.check)


if __name__ == "__main__":
    sys.exit(main())
