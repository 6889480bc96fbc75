"""What the tables are made from: the workloads, measured group by group, and rows' test errors.

What was measured is merged into the machine's results (:mod:`stored`), so that single groups can be
measured again.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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


Makers = dict[str, Callable[[], Callable[[], object]]]


class Group(NamedTuple):
    """What is measured together, or by itself alone.

    Attributes:
        key: its name among those of its suite.
        makers: candidates by name.
        floor: name of the candidate that times are held against.
        options: more of :func:`groups.compared`.
        share: of the seconds of a group.
        alone: measures it otherwise, from the seconds.
    """

    key: str
    makers: Makers = {}  # noqa: RUF012 - never written to
    floor: str | None = None
    options: dict[str, Any] = {}  # noqa: RUF012 - never written to
    share: float = 1.0
    alone: Callable[[float], dict[str, Any]] | None = None

    def measure(self, seconds: float) -> dict[str, Any]:
        """Check, build and time the candidates."""
        if self.alone is not None:
            return self.alone(seconds)
        torch._dynamo.reset()
        candidates, failures = gather(self.makers)
        return compared(
            candidates, failures, floor=self.floor, seconds=self.share * seconds, **self.options
        )


def step_groups() -> Iterator[Group]:
    """Yield the groups of the table of the whole network, one a case and rule."""
    k_1, k_4 = step.DNI_1.name, step.DNI_4.name
    against = {
        "DNI k=4 / backprop on our kernels": f"{k_4} / {step.OURS.name}",
        "our backprop / stock eager": f"{step.OURS.name} / {step.STOCK.name}",
        "DNI k=4 / stock eager": f"{k_4} / {step.STOCK.name}",
        "DNI k=4 / stock autotuned": f"{k_4} / {step.AUTOTUNED.name}",
        "DNI k=1 / stock eager": f"{k_1} / {step.STOCK.name}",
        "DNI k=1 / stock compiled": f"{k_1} / {step.COMPILED.name}",
    }
    # Where nothing multiplies bfloat16, stock layers take many times what they take in float32.
    methods = [method for method in step.METHODS if _cpu.bf16() or not method.bf16]
    for case, rule in itertools.product(step.CASES, step.RULES):
        products = [(case.batch, case.hidden, case.hidden)] * step.DEPTH * step.CYCLE
        makers: Makers = {FLOOR: partial(timing.gemm_floor, products)}
        if _cpu.bf16():
            makers[FLOOR_BF16] = partial(timing.gemm_floor, products, torch.bfloat16)
        makers |= {method.name: partial(_network, case, rule, method) for method in methods}
        yield Group(f"{case} {rule}", makers, FLOOR, {"steps": step.CYCLE, "against": against})


def _network(case: Any, rule: str, method: step.Method) -> Callable[[], object]:
    return step.stepper(step.prepared(case, rule, method))


def linear_groups() -> Iterator[Group]:
    """Yield the groups of one layer's step, with and without dx."""
    for shape, dx in itertools.product(linear.SHAPES, (False, True)):
        floor = f"floor: {3 if dx else 2} products by torch"
        makers: Makers = {floor: partial(linear.products, shape, dx)}
        for kind in ("eager", "compiled"):
            makers[f"stock {kind}"] = partial(_layer, shape, kind, dx)
        for backend in backends():
            for kind, label in (("ours", "backprop"), ("dni", "DNI")):
                makers[f"{label}, {backend}"] = partial(_layer, shape, kind, dx, backend)
        yield Group(f"{shape} {'with' if dx else 'without'} dx", makers, floor)


def _layer(shape: Any, kind: str, dx: bool, backend: str | None = None) -> Callable[[], object]:
    linear.check_layer(shape, kind, dx, backend)
    return linear.Layer(shape, kind, dx, backend=backend).step


def synthesizer_groups() -> Iterator[Group]:
    """Yield the groups of each kind of synthesizer's prediction and update; the floor is the dense
    product."""
    floor = "floor of dense: 1 product by torch"
    for case, what in itertools.product(step.CASES, ("predict", "update")):
        shape = linear.Shape(case.batch, case.hidden, case.hidden)
        makers: Makers = {floor: partial(linear.products, shape, False, forward_only=True)}
        for backend, kind in itertools.product(backends(), synthesizer.KINDS):
            makers[f"{kind}, {backend}"] = partial(_synthesizer, kind, case, backend, what)
        yield Group(f"{case} {what}", makers, floor)


def _synthesizer(kind: str, case: Any, backend: str, what: str) -> Callable[[], object]:
    synthesizer.check_synthesizer(kind, case, backend)
    made = synthesizer.SynthesizerStep(kind, case, backend)
    return made.predict if what == "predict" else partial(made.update, made.predict())


def memory_groups() -> Iterator[Group]:
    """Yield peak memory of a step by depth, measured, in bytes."""

    def curves(seconds: float) -> dict[str, Any]:
        return {
            "what": timing.PEAK_MEMORY_CPU,
            "batch": memory.CASE.batch,
            "hidden": memory.CASE.hidden,
            "depths": list(memory.DEPTHS),
            **{
                method: [timing.peak_memory(memory.step(method, d)) for d in memory.DEPTHS]
                for method in ("stock", "deferred", "immediate")
            },
        }

    yield Group("curve", alone=curves)


def gemm_groups() -> Iterator[Group]:
    """Yield products of the kernels against torch's over shapes, GFLOP/s."""

    def rates(seconds: float) -> dict[str, Any]:
        each_one = seconds / (len(gemm.FEATURES) * len(gemm.ROWS) * len(gemm.PRODUCTS))
        with torch.no_grad():
            return {"gflops": [list(row) for row in crossover(max(each_one, 0.1))]}

    yield Group("crossover", alone=rates)


def lstm_groups() -> Iterator[Group]:
    """Yield the groups of the LSTM: cell, window, training step, boundary, memory. Each takes a
    tenth of the seconds, but at least eight rounds."""
    floors = {False: "floor: forward products by torch", True: "floor: products by torch"}

    def group(key: str, makers: Makers, floor: str | None, against: dict[str, str]) -> Group:
        return Group(key, makers, floor, {"against": against, "block": 1}, 0.1)

    for shape, backward in itertools.product(lstm.cell_shapes(), (False, True)):
        makers: Makers = {
            floors[backward]: partial(lstm.floor, shape, backward),
            "nn.LSTMCell": partial(_cell, shape, False, backward),
            "ours": partial(_cell, shape, True, backward),
        }
        key = f"{shape.batch}/{shape.hidden} cell {'forward+backward' if backward else 'forward'}"
        yield group(key, makers, floors[backward], {"nn.LSTMCell / ours": "nn.LSTMCell / ours"})

    pairs = {
        f"{other.name} / ours": f"{other.name} / {lstm.OURS.name}"
        for other in (lstm.STOCK, lstm.NATIVE, lstm.UNROLLED_LOOP)
    }
    stock, ours, dni = (m.name for m in (lstm.STOCK_STEP, lstm.OURS_STEP, lstm.DNI_STEP))
    training = {
        "nn.LSTM / ours": f"{stock} / {ours}",
        "nn.LSTM / DNI": f"{stock} / {dni}",
        "DNI / ours": f"{dni} / {ours}",
    }
    for shape in lstm.SHAPES:
        for what in ("forward", "forward, for a backward", "forward+backward"):
            backward = what == "forward+backward"
            makers = {floors[backward]: partial(lstm.floor, shape, backward)}
            for method in lstm.WINDOW_METHODS:
                if method.synthesizer and what == "forward":
                    continue  # nothing is predicted there: it is ours
                if method.compiled and not backward:
                    continue  # compiling takes longer than all else
                makers[method.name] = partial(_window, shape, method, what)
            yield group(f"{shape} {what}", makers, floors[backward], pairs)
        makers = {floors[True]: partial(lstm.floor, shape, True)}
        makers |= {method.name: partial(_training, shape, method) for method in lstm.STEP_METHODS}
        yield group(f"{shape} training step", makers, floors[True], training)

    for shape in lstm.boundary_shapes():
        makers = {
            method.name: partial(_window, shape, method, "forward+backward")
            for method in (lstm.OURS, lstm.DNI)
        }
        pair = {"DNI / ours": f"{lstm.DNI.name} / {lstm.OURS.name}"}
        yield group(f"{shape} boundary", makers, None, pair)
    yield Group("memory", alone=lambda seconds: lstm.memory_curves())


def _cell(shape: lstm.Shape, ours: bool, backward: bool) -> Callable[[], object]:
    made = lstm.check_cell(shape, ours, backward=backward)
    return made.backward if backward else made.forward


def _window(shape: lstm.Shape, method: lstm.Method, what: str) -> Callable[[], object]:
    made = lstm.check_window(shape, method, backward=what == "forward+backward")
    return {"forward": made.infer, "forward+backward": made.backward}.get(what, made.forward)


def _training(shape: lstm.Shape, method: Any) -> Callable[[], object]:
    return lstm.check_training(shape, method).step


#: What measures each suite, group by group.
SUITES: dict[str, Callable[[], Iterator[Group]]] = {
    "step": step_groups,
    "linear": linear_groups,
    "synthesizer": synthesizer_groups,
    "peak-memory": memory_groups,
    "gemm": gemm_groups,
    "lstm": lstm_groups,
}


def measure(suites: list[str], only: str | None, seconds: float, given: Path | None) -> None:
    """Measure and merge into the machine's files, or into the one that is given."""
    facts = device_facts()
    for suite in suites:
        path = given or stored.result_path(facts, suite)
        for group in SUITES[suite]():
            if only is not None and only not in group.key:
                continue
            found = group.measure(seconds)
            results = stored.benchmarks(path, facts)
            stored.put(results, suite, group.key, found)
            stored.write(path, results)
            print(f"{suite} {group.key}", flush=True)
            for name, row in found.get("rows", {}).items():
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
