"""What the tables are made from: the workloads, measured group by group, and rows' test errors.

What was measured is merged into the machine's results (:mod:`stored`), so that single groups can be
measured again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

import stored
from crossover import crossover
from fused_dni.backends import _cpu
from fused_dni.experiments import data as loading
from fused_dni.measure import timing
from groups import compared, device_facts, gather
from workloads import backends, gemm, linear, lstm, memory, step, synthesizer
from workloads.accuracy import train_error

FLOOR = "floor: 8 products by torch"
FLOOR_BF16 = "floor: 8 products by torch, bf16"


def measure_step(seconds: float, only: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure the table of the whole network, a group a case and rule."""
    k_1, k_4 = step.DNI_1.name, step.DNI_4.name
    # Where nothing multiplies bfloat16, stock layers take many times what they take in float32.
    methods = [method for method in step.METHODS if _cpu.bf16() or not method.bf16]
    for case in step.CASES:
        for rule in step.RULES:
            key = f"{case} {rule}"
            if only and only not in key:
                continue
            products = [(case.batch, case.hidden, case.hidden)] * step.DEPTH * step.CYCLE
            makers: dict[str, Callable[[], Callable[[], object]]] = {
                FLOOR: lambda p=products: timing.gemm_floor(p),
            }
            if _cpu.bf16():
                makers[FLOOR_BF16] = lambda p=products: timing.gemm_floor(p, torch.bfloat16)
            for method in methods:
                makers[method.name] = lambda c=case, r=rule, m=method: step.stepper(
                    step.prepared(c, r, m)
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
                    steps=step.CYCLE,
                    against={
                        "DNI k=4 / backprop on our kernels": f"{k_4} / {step.OURS.name}",
                        "our backprop / stock eager": f"{step.OURS.name} / {step.STOCK.name}",
                        "DNI k=4 / stock eager": f"{k_4} / {step.STOCK.name}",
                        "DNI k=4 / stock autotuned": f"{k_4} / {step.AUTOTUNED.name}",
                        "DNI k=1 / stock eager": f"{k_1} / {step.STOCK.name}",
                        "DNI k=1 / stock compiled": f"{k_1} / {step.COMPILED.name}",
                    },
                ),
            )


def measure_linear(seconds: float, only: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """One layer's step, with and without dx."""
    for shape in linear.SHAPES:
        for dx in (False, True):
            key = f"{shape} {'with' if dx else 'without'} dx"
            if only and only not in key:
                continue
            floor = f"floor: {3 if dx else 2} products by torch"
            makers: dict[str, Callable[[], Callable[[], object]]] = {
                floor: lambda s=shape, d=dx: linear.products(s, d)
            }

            def checked(shape: Any, kind: str, dx: bool, backend: str | None = None) -> Any:
                linear.check_layer(shape, kind, dx, backend)
                return linear.Layer(shape, kind, dx, backend=backend).step

            for kind in ("eager", "compiled"):
                makers[f"stock {kind}"] = lambda s=shape, k=kind, d=dx: checked(s, k, d)
            for backend in backends():
                for kind, label in (("ours", "backprop"), ("dni", "DNI")):
                    makers[f"{label}, {backend}"] = lambda s=shape, k=kind, d=dx, b=backend: (
                        checked(s, k, d, b)
                    )
            torch._dynamo.reset()
            candidates, failures = gather(makers)
            yield key, compared(candidates, failures, floor=floor, seconds=seconds)


def measure_synthesizer(seconds: float, only: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Prediction and update of each kind of synthesizer; the floor is the dense product."""
    for case in step.CASES:
        for what in ("predict", "update"):
            key = f"{case} {what}"
            if only and only not in key:
                continue
            floor = "floor of dense: 1 product by torch"
            shape = linear.Shape(case.batch, case.hidden, case.hidden)
            makers: dict[str, Callable[[], Callable[[], object]]] = {
                floor: lambda s=shape: linear.products(s, False, forward_only=True)
            }

            def checked(kind: str, case: Any, backend: str, what: str) -> Callable[[], object]:
                synthesizer.check_synthesizer(kind, case, backend)
                made = synthesizer.SynthesizerStep(kind, case, backend)
                if what == "predict":
                    return made.predict
                prediction = made.predict()
                return lambda: made.update(prediction)

            for backend in backends():
                for kind in synthesizer.KINDS:
                    makers[f"{kind}, {backend}"] = lambda k=kind, c=case, b=backend, t=what: (
                        checked(k, c, b, t)
                    )
            candidates, failures = gather(makers)
            yield key, compared(candidates, failures, floor=floor, seconds=seconds)


def measure_memory(seconds: float, only: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Peak memory of a step by depth, measured, in bytes."""
    curves: dict[str, Any] = {
        "what": timing.PEAK_MEMORY_CPU,
        "batch": memory.CASE.batch,
        "hidden": memory.CASE.hidden,
        "depths": list(memory.DEPTHS),
    }
    for method in ("stock", "deferred", "immediate"):
        curves[method] = [timing.peak_memory(memory.step(method, d)) for d in memory.DEPTHS]
    yield "curve", curves


def measure_gemm(seconds: float, only: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Products of the kernels against torch's over shapes, GFLOP/s; ``seconds`` is for all."""
    each_one = seconds / (len(gemm.FEATURES) * len(gemm.ROWS) * len(gemm.PRODUCTS))
    with torch.no_grad():
        yield "crossover", {"gflops": [list(row) for row in crossover(max(each_one, 0.1))]}


def measure_lstm(seconds: float, only: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure the LSTM: cell, window, training step, boundary, memory. A tenth of ``seconds`` a
    group, but at least eight rounds."""
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

    for shape in lstm.cell_shapes():
        for backward in (False, True):
            what = "forward+backward" if backward else "forward"
            key = f"{shape.batch}/{shape.hidden} cell {what}"
            if not wanted(key):
                continue

            def cell(ours: bool, s: lstm.Shape = shape, b: bool = backward) -> Callable[[], object]:
                made = lstm.check_cell(s, ours, backward=b)
                return made.backward if b else made.forward

            floor = floors[backward]
            makers: dict[str, Callable[[], Callable[[], object]]] = {
                floor: lambda s=shape, b=backward: lstm.floor(s, b),
                "nn.LSTMCell": lambda make=cell: make(False),
                "ours": lambda make=cell: make(True),
            }
            yield key, group(makers, floor, {"nn.LSTMCell / ours": "nn.LSTMCell / ours"})

    for shape in lstm.SHAPES:
        for what in ("forward", "forward, for a backward", "forward+backward"):
            key = f"{shape} {what}"
            if not wanted(key):
                continue
            backward = what == "forward+backward"
            floor = floors[backward]
            makers = {floor: lambda s=shape, b=backward: lstm.floor(s, b)}

            def window(
                method: lstm.Method, s: lstm.Shape = shape, t: str = what
            ) -> Callable[[], object]:
                made = lstm.check_window(s, method, backward=t == "forward+backward")
                return {"forward": made.infer, "forward+backward": made.backward}.get(
                    t, made.forward
                )

            for method in lstm.WINDOW_METHODS:
                if method.synthesizer and what == "forward":
                    continue  # nothing is predicted there: it is ours
                if method.compiled and what != "forward+backward":
                    continue  # compiling takes longer than all else
                makers[method.name] = lambda m=method, make=window: make(m)
            pairs = {
                f"{other.name} / ours": f"{other.name} / {lstm.OURS.name}"
                for other in (lstm.STOCK, lstm.NATIVE, lstm.UNROLLED_LOOP)
            }
            yield key, group(makers, floor, pairs)
        key = f"{shape} training step"
        if wanted(key):
            makers = {floors[True]: lambda s=shape: lstm.floor(s, True)}
            for method in lstm.STEP_METHODS:
                makers[method.name] = lambda m=method, s=shape: lstm.check_training(s, m).step
            stock, ours, dni = (m.name for m in (lstm.STOCK_STEP, lstm.OURS_STEP, lstm.DNI_STEP))
            pairs = {
                "nn.LSTM / ours": f"{stock} / {ours}",
                "nn.LSTM / DNI": f"{stock} / {dni}",
                "DNI / ours": f"{dni} / {ours}",
            }
            yield key, group(makers, floors[True], pairs)

    for shape in lstm.boundary_shapes():
        key = f"{shape} boundary"
        if wanted(key):
            makers = {
                method.name: lambda m=method, s=shape: (
                    lstm.check_window(s, m, backward=True).backward
                )
                for method in (lstm.OURS, lstm.DNI)
            }
            pairs = {"DNI / ours": f"{lstm.DNI.name} / {lstm.OURS.name}"}
            yield key, group(makers, None, pairs)

    if wanted("memory"):
        yield "memory", lstm.memory_curves()


#: What measures each suite, group by group.
SUITES: dict[str, Callable[[float, str | None], Iterator[tuple[str, dict[str, Any]]]]] = {
    "step": measure_step,
    "linear": measure_linear,
    "synthesizer": measure_synthesizer,
    "peak-memory": measure_memory,
    "gemm": measure_gemm,
    "lstm": measure_lstm,
}


def measure(suites: list[str], only: str | None, seconds: float, given: Path | None) -> None:
    """Measure and merge into the machine's files, or into the one that is given."""
    facts = device_facts()
    for suite in suites:
        path = given or stored.result_path(facts, suite)
        for key, group in SUITES[suite](seconds, only):
            results = stored.benchmarks(path, facts)
            stored.put(results, suite, key, group)
            stored.write(path, results)
            print(f"{suite} {key}", flush=True)
            for name, row in group.get("rows", {}).items():
                if "timing" in row:
                    floor = row.get("per_floor")
                    ratio = f" {floor.median:6.2f} x the floor" if floor else ""
                    print(f"  {name:45} {row['timing'].median * 1e3:9.3f} ms{ratio}")
        print(f"wrote {path}")


def errors(
    folder: str | None, only: str | None, epochs: int, seeds: int, path: Path | None, keep: bool
) -> None:
    """Train every row of the step table and keep its final test error.

    Compiled rows are left out: they are their eager rows' arithmetic.
    """
    facts = device_facts()
    path = path or stored.result_path(facts, "errors")
    data = loading.load("mnist" if folder else "digits", folder=folder)
    rows = [
        (case, rule, method)
        for case in step.CASES
        for rule in step.RULES
        for method in step.METHODS
        if not method.compiled and (not only or only in f"{case} {rule} {method.name}")
    ]
    done = stored.benchmarks(path, facts).get("errors", {}).get("rows", {})
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
                    for error in train_error(data, case, rule, method, epochs=epochs, seed=seed):
                        by_epoch.append(error)
                        progress.advance(task)
                    finals.append(by_epoch[-1])
                entry = {"errors": finals, "mean": sum(finals) / len(finals)}
            except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
                entry = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            results = stored.benchmarks(path, facts)
            section = results.body.setdefault("errors", {})
            section |= {
                "data": data.name,
                "epochs": epochs,
                "learning_rates": step.LEARNING_RATES,
                "synthesizer_rate": step.SYNTHESIZER_RATE,
                "date": facts["date"],
                "commit": facts["commit"],
            }
            section.setdefault("rows", {}).setdefault(key, {})[method.name] = entry
            stored.write(path, results)
            print(f"{key:16} {method.name:45} {entry.get('mean', entry.get('failed'))}", flush=True)
    print(f"wrote {path}")
