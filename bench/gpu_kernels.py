"""Our kernels on a GPU, against what they have to beat.

    python bench/gpu_kernels.py OUT/kernels.json [--part layer] [--rows cuda] [--seconds 300]
    python bench/gpu_kernels.py --profile             what ncu and compute-sanitizer look at
    python bench/gpu_kernels.py --under-ncu FILE.csv  the same under ncu
    python bench/gpu_kernels.py --ncu FILE.csv        what ncu saw, as a table
    python bench/gpu_kernels.py OUT/kernels.json --backends
                                                      both backends' times, as a table for `auto`
    python bench/gpu_kernels.py ALL.json --join A.json B.json
                                                      results of two calls as one

A candidate is checked against float64 before it is timed (:mod:`workloads.gpu`); one that fails is
in the results with that reason and no figure. Each is checked, timed beside the floor and kept
before the next is built, cheap ones first; then all of a group are measured together
(``fused_dni.measure.timing.compare``: interleaved rounds, medians, CUDA events), which replaces
those figures and gives the ratios. The file, and a text with the same name beside it, are rewritten
after every figure, the groups that matter most come first, and when the time is up the rest is
left out.
The CUDA backend's rows stand beside those of Triton's. Where it was not built they hold the reason.
A kernel that takes the device with it ends the process with status 4: ``--resume`` goes on behind
the candidate whose kernel it was, and leaves out what is done.
``--device cpu --tiny`` runs the same code in Triton's interpreter and, where
FUSED_DNI_CUDA_EMULATION names it, in our host emulation, on sizes that only show that it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from fused_dni.kernels import lstm, tuning
from fused_dni.kernels.common import grid_barrier
from fused_dni.kernels.launch import Launch

import stored
from fused_dni.backends.cuda import calls as cuda_calls
from fused_dni.backends.triton import lstm as triton_lstm
from fused_dni.measure.profile import ncu
from fused_dni.ops import measured, registry
from fused_dni.report import text
from fused_dni.report.kinds import profile as profile_report
from fused_dni.report.schema import Result
from gpu_baselines import NoTimeLeftError, driver, graphed
from groups import compared, device_facts, gather
from pages.cells import grid_of, interval
from workloads import gpu as w
from workloads import within

Maker = Callable[[], Callable[[], object]]
#: Names, and what measures and keeps the group of that name.
Groups = Iterator[tuple[str, Callable[[], None]]]

#: Candidates by what builds them, in the order of what that costs.
ROWS = ("cuda", "triton", "compiled", "autotuned")
#: Exit status: a kernel left the device unusable to this process.
LOST = 4

# Rows of a layer's table. All are replays of CUDA graphs but for those that say eager.
DNI = "DNI"
DNI_EAGER = "DNI, eager"
DNI_CUDA = "DNI, CUDA"
INSIDE, INSIDE_CUDA = "DNI at the preactivation", "DNI at the preactivation, CUDA"
ONE, SEVERAL = "DNI, one launch", "DNI, several launches"
BACKPROP = "backprop, our kernels"
BACKPROP_CUDA = "backprop, CUDA kernels"
STOCK = "stock"
STOCK_EAGER = "stock, eager"
COMPILED = "stock, compiled"
AUTOTUNED = "stock, max-autotune"
AUTOTUNED_EAGER = "stock, max-autotune, its own graphs"
SYNTHESIZER = "synthesizer's update"
SYNTHESIZER_CUDA = "synthesizer's update, CUDA"

# Rows of a window's table.
CUDNN, CUDNN_EAGER = "nn.LSTM", "nn.LSTM, eager"
CUDNN_FP16 = "nn.LSTM, fp16"  # the only dtype for which PyTorch takes cuDNN's persistent kernels
OURS, OURS_EAGER, OURS_CUDA = "ours", "ours, eager", "ours, CUDA"
STEPWISE = "ours, a launch a step"

#: Batch and width, those that the project promises something about first.
SIZES = ((128, 1024), (4096, 4096), (64, 256), (128, 256), (512, 1024), (1024, 2048))
#: Sizes at which the slow compiler mode is tried too, and seconds that a compiler is given.
AUTOTUNE = SIZES[:1]
COMPILE_LIMIT = 90.0
#: Sizes of the further rows (dx, Adam, float32, tf32) and of those whose data are not in the cache.
FURTHER = SIZES[:2]
COLD = ((128, 1024), (512, 1024), (1024, 2048))
#: At most so many layers are gone round to keep data out of the cache.
MOST_LAYERS = 64

#: Precisions and sizes of the smoke test: a tile and several, clusters and the grid.
SMOKE = ("bf16", "fp16", "tf32", "fp32")
SMOKE_LAYERS = ((8, 16), (128, 256))
SMOKE_WINDOWS = ((4, 16, 3), (16, 64, 8), (16, 256, 8))

#: Grid barriers of a decoupled step in one CUDA launch, where a tile holds all rows and so their
#: statistics: before the synthesizer's reduction, before the gradient and before the update.
STEP_BARRIERS = 3

#: Hidden units up to which an LSTM of ours is to keep up with cuDNN's.
PROMISED_HIDDEN = 640
#: The point at which others publish figures (FlashRNN's repository).
LONG_WINDOW = (16, 768, 1024)
WINDOWS = [
    (b, h, t)
    for widths in ((256, 512, PROMISED_HIDDEN), (768, 1024))
    for t in (128, 1024, 32)
    for h in widths
    for b in (16, 64)
]
WINDOWS.remove(LONG_WINDOW)
WINDOWS.insert(6, LONG_WINDOW)
#: Steps up to which a launch a step is tried.
STEPWISE_STEPS = 128


class LostError(RuntimeError):
    """A kernel has left the device unusable to this process."""


class Run:
    """Where to measure, what of it, how large, until when, and what was found so far.

    Attributes:
        rows: the candidates, by what builds them.
        only: the groups, by their keys; all if empty.
        resume: what is in the results already is not measured again.
        text: where the figures are kept as text.
    """

    def __init__(
        self,
        path: Path | None,
        device: str,
        backend: str,
        seconds: float,
        tiny: bool,
        rows: Sequence[str] = ROWS,
        only: Sequence[str] = (),
        resume: bool = False,
        text: Path | None = None,
    ) -> None:
        self.path = path
        self.text = path.with_suffix(".txt") if text is None and path is not None else text
        self.device = torch.device(device, 0) if device == "cuda" else torch.device(device)
        self.backend, self.tiny = backend, tiny
        self.rows, self.only, self.resume = rows, only, resume
        self.deadline = time.monotonic() + seconds
        self.results = stored.benchmarks(path)
        self.failed = False

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def limits(self, seconds: float) -> dict[str, Any]:
        """Say how long a group is measured, and where."""
        if self.tiny:
            return {"rounds": 1, "block": 1, "warmup": 1, "device": self.device}
        return {"seconds": seconds, "device": self.device}

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def has(self, part: str, key: str) -> bool:
        """Say whether a group is not to be measured again."""
        done = self.group(part, key).get("done", ())
        failed = f"{part} {key}" in self.results.get("failed", {})
        return self.resume and (failed or set(self.rows) <= set(done))

    def group(self, part: str, key: str) -> dict[str, Any]:
        """Say what is known of it so far."""
        found: dict[str, Any] = self.results.get(f"gpu-{part}", {}).get(key, {})
        return found

    def keep(self, part: str, key: str, found: dict[str, Any]) -> None:
        """Join what was found of a group to the results, and put those into their file."""
        if not self.results.facts:
            self.results.facts.update(facts(self))
        group = joined(self.group(part, key), found)
        stored.put(self.results, f"gpu-{part}", key, group)
        self.save()
        for name, row in found.get("rows", {}).items():
            if "timing" in row:
                print(f"{part} {key}: {name}: {row['timing'].median * 1e6:.4g} us", flush=True)

    def fail(self, what: str, reason: str) -> None:
        """Put a reason into the results instead."""
        self.failed = True
        self.results.body.setdefault("failed", {})[what] = reason
        print(f"{what}: {reason}", file=sys.stderr, flush=True)
        self.save()

    def save(self) -> None:
        """Write the results, and their figures as text. Where there is no room for them they are
        tried again with the next figure, and stand in what was printed."""
        assert self.path is not None and self.text is not None
        try:
            stored.write(self.path, self.results)
            self.text.write_text(summary(self.results) + "\n", encoding="utf-8")
        except OSError as error:
            self.failed = True
            print(f"{self.path} cannot be written: {error.strerror}", file=sys.stderr, flush=True)

    def replayed(self, steps: list[Callable[[], object]]) -> Callable[[], object]:
        """All steps, one after the other, as one CUDA graph (on a CPU as they are)."""
        call = repeated(steps)
        if not self.cuda:
            return call
        replay = graphed(call)

        def again(held: Callable[[], None] = call) -> None:  # a graph does not hold its tensors
            replay()

        return again


def joined(group: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Two measurements of one group as one. The later figure counts, and any more than none."""
    merged = group | found
    for part in ("rows", "ratios", "tiles", "grids"):
        if part in group or part in found:
            merged[part] = {**group.get(part, {}), **found.get(part, {})}
    for name, row in group.get("rows", {}).items():
        if "timing" in row and "timing" not in merged["rows"][name]:
            merged["rows"][name] = row
    for part in ("order", "done"):
        merged[part] = list(dict.fromkeys([*group.get(part, []), *found.get(part, [])]))
    return merged


def repeated(steps: list[Callable[[], object]]) -> Callable[[], None]:
    """All steps, one after the other."""

    def call() -> None:
        for step in steps:
            step()

    return call


def facts(run: Run) -> dict[str, Any]:
    """Say what the figures hold for."""
    found = device_facts() | {"triton": triton.__version__}
    if run.cuda:
        properties = torch.cuda.get_device_properties(run.device)
        found |= {
            "gpu": properties.name,
            "driver": driver(),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "bandwidth": bandwidth(run),
        }
    return found


def bandwidth(run: Run) -> float:
    """Bytes a second of a large copy, those read and those written."""
    there = torch.empty(2**28 if run.cuda else 2**16, device=run.device).normal_()
    here = torch.empty_like(there)
    taken = compared({"copy": lambda: here.copy_(there)}, {}, **run.limits(0.1))
    return 2.0 * there.nbytes / taken["rows"]["copy"]["timing"].median


# ----------------------------------------------------------------------------------- one layer


def layer_cases(run: Run) -> Iterator[tuple[w.Case, bool]]:
    """Yield the cases in the order of their weight, and whether data are kept out of the cache."""
    if run.tiny:
        yield w.Case(8, 16), False
        yield w.Case(8, 16, "fp32", "adam", True), True
        return
    for size in SIZES:
        yield w.Case(*size), False
    for size in FURTHER:
        yield w.Case(*size, dx=True), False
        yield w.Case(*size, rule="adam"), False
        for precision in ("tf32", "fp32"):
            yield w.Case(*size, precision=precision), False
    for size in COLD:
        yield w.Case(*size), True


def layer_groups(run: Run) -> Groups:
    """Yield the groups of the decoupled step of one layer, one a case."""
    for case, cold in layer_cases(run):
        key = f"{case}, cold" if cold else str(case)
        yield key, lambda key=key, case=case, cold=cold: layer_group(run, key, case, cold)


class Candidates:
    """Makers of one group's candidates: each checks what ``make(case, device)`` makes, then builds
    what is timed, a call of which is ``count`` steps: of one layer (or window), whose data stay in
    the cache, or ``cold``, of as many of their own (``make(case, device, seed=)``).

    ``tiles`` are the choices that were made on the way, but for forced ones.
    """

    def __init__(
        self, run: Run, check: Callable[..., None], case: Any, count: int = 1, cold: bool = False
    ) -> None:
        self.run, self.check, self.case, self.count, self.cold = run, check, case, count, cold
        self.tiles: dict[tuning.Choice, Any] = {}

    def steps(self, make: Callable[..., Any], name: str = "step") -> list[Callable[[], object]]:
        """Check, then so many steps (or other methods) to be called one after the other."""
        device = self.run.device
        with tuning.recording() as found:
            self.check(make, self.case, device)
        self.tiles |= found
        if self.cold:
            return [getattr(make(self.case, device, seed=i), name) for i in range(self.count)]
        return [getattr(make(self.case, device), name)] * self.count

    def replay(self, make: Callable[..., Any], name: str = "step") -> Maker:
        return lambda: self.run.replayed(self.steps(make, name))

    def eager(self, make: Callable[..., Any]) -> Maker:
        return lambda: repeated(self.steps(make))

    def compiled(self, maker: Maker) -> Maker:
        """Given up if compiling takes too long."""

        def made() -> Callable[[], object]:
            with within(COMPILE_LIMIT):
                return maker()

        return made

    def forced(
        self, ops: tuple[str, ...], change: Callable[[tuning.Choice, Any], Any], maker: Maker
    ) -> Maker:
        """With other tiles than chosen: ``change(choice, tiles)``. Behind one that chooses freely.

        Raises, when made:
            RuntimeError: nothing was chosen: the backend has no tiles.
        """

        def made() -> Callable[[], object]:
            with contextlib.ExitStack() as forced:
                chosen = {choice: t for choice, t in self.tiles.items() if choice.op in ops}
                if not chosen:
                    raise RuntimeError(f"no tiles are chosen for {' or '.join(ops)}")
                for choice, tiles in chosen.items():
                    forced.enter_context(tuning.using(choice.op, change(choice, tiles)))
                return maker()

        return made

    def record(self) -> dict[str, Any]:
        """Record the choices, for the results."""
        return {choice.op: tiles._asdict() for choice, tiles in self.tiles.items()}


def layer_group(run: Run, key: str, case: w.Case, cold: bool) -> None:
    """All ways to take one step."""
    torch._dynamo.reset()
    count = steps_a_call(run, case, cold)
    main = case == w.Case(case.batch, case.hidden) and not cold
    floor = f"floor: {3 if case.dx else 2} products by torch"
    c = Candidates(run, w.check_layer, case, count, cold)

    def ours(kind: type[w.Layer], backend: str = run.backend) -> Callable[..., w.Layer]:
        return lambda case, device, **options: kind(case, device, backend, **options)

    def stock(mode: str | None) -> Callable[..., w.Layer]:
        return lambda case, device, **options: w.Stock(case, device, mode, **options)

    def launched(launches: str) -> Callable[[tuning.Choice, Any], Any]:
        def change(choice: tuning.Choice, tiles: Any) -> Any:
            return tiles._replace(
                launches=launches, descriptors=tiles.descriptors and launches == "several"
            )

        return change

    makers: dict[str, Maker] = {
        floor: lambda: run.replayed(
            [w.products(case, run.device, seed) for seed in range(count)]
            if cold
            else [w.products(case, run.device)] * count
        ),
        STOCK: c.replay(stock(None)),
        DNI_CUDA: c.replay(ours(w.Decoupled, "cuda")),
    }
    if "cuda" in run.rows:
        makers[BACKPROP_CUDA] = c.replay(ours(w.Backprop, "cuda"))
        if main:
            makers[INSIDE_CUDA] = c.replay(ours(w.Inside, "cuda"))
            makers[SYNTHESIZER_CUDA] = c.replay(ours(w.SynthesizerUpdate, "cuda"))
            makers[STOCK_EAGER] = c.eager(stock(None))
    if {"triton", "compiled", "autotuned"} & {*run.rows}:
        makers[DNI] = c.replay(ours(w.Decoupled))
    if "triton" in run.rows:
        makers[BACKPROP] = c.replay(ours(w.Backprop))
        if main:
            for name, launches in ((ONE, "one"), (SEVERAL, "several")):
                makers[name] = c.forced(
                    ("linear_step",), launched(launches), c.replay(ours(w.Decoupled))
                )
            makers[INSIDE] = c.replay(ours(w.Inside))
            makers[SYNTHESIZER] = c.replay(ours(w.SynthesizerUpdate))
            makers[DNI_EAGER] = c.eager(ours(w.Decoupled))
    if "compiled" in run.rows and not run.tiny:
        makers[COMPILED] = c.compiled(c.replay(stock("default")))
    if "autotuned" in run.rows and main and (case.batch, case.hidden) in AUTOTUNE and not run.tiny:
        makers[AUTOTUNED] = c.compiled(c.replay(stock("max-autotune-no-cudagraphs")))
        makers[AUTOTUNED_EAGER] = c.compiled(c.eager(stock("max-autotune")))
    theirs = (STOCK, COMPILED, AUTOTUNED, AUTOTUNED_EAGER)
    pairs = over(DNI, *theirs, BACKPROP, ONE, SEVERAL, INSIDE)
    pairs |= over(DNI_CUDA, *theirs, BACKPROP_CUDA, DNI, INSIDE_CUDA)
    pairs[f"{SYNTHESIZER} / CUDA"] = f"{SYNTHESIZER} / {SYNTHESIZER_CUDA}"
    with w.arithmetic(case.precision):
        timed(
            *(run, "layer", key, makers, pairs),
            floor=floor,
            steps=count,
            about=lambda: {"bytes": case.bytes(), "tiles": c.record()},
        )


def over(base: str, *others: str) -> dict[str, str]:
    """Return the ratios of others to a base, under names of their own."""
    return {ratio: ratio for ratio in (f"{other} / {base}" for other in others)}


def steps_a_call(run: Run, case: w.Case, cold: bool) -> int:
    """Enough that launching the graph is no part of a step; ``cold``: layers of three times the
    cache together.

    Raises:
        ValueError: so many layers of this size are not made.
    """
    if run.tiny:
        return 2 if cold else 1
    if not cold:
        return 4 if case.hidden >= 2048 else 20
    cache = torch.cuda.get_device_properties(run.device).L2_cache_size
    count = max(2, math.ceil(3 * cache / case.bytes()))
    if count > MOST_LAYERS:
        raise ValueError(f"{count} layers of {case} would be needed to leave the cache")
    return count


def timed(
    run: Run,
    part: str,
    key: str,
    makers: dict[str, Maker],
    pairs: dict[str, str],
    *,
    about: Callable[[], dict[str, Any]],
    floor: str | None = None,
    steps: int = 1,
) -> None:
    """Check, build, time (beside the floor) and keep one candidate of a group after the other, then
    all in rounds. ``about()`` is what else is kept.

    Raises:
        LostError: a kernel left the device unusable; which candidate's it was is kept.
        NoTimeLeftError: before all of them were done.
        RuntimeError: not even the floor runs.
    """
    fatal = {n for n, row in run.group(part, key).get("rows", {}).items() if row.get("fatal")}
    candidates: dict[str, Callable[[], object]] = {}
    for name, make in makers.items():
        if run.resume and name in fatal:
            continue
        if candidates and run.late():
            raise NoTimeLeftError(f"no time left in {key} for {name}")
        made, failures = gather({name: lambda make=make: taken(run, make)})
        if name == floor and failures:
            raise RuntimeError(f"not even the floor runs: {failures[name]}")
        beside = made if floor is None or not made else {floor: (candidates | made)[floor]} | made
        found = compared(beside, failures, floor=floor, steps=steps, **run.limits(0.2))
        is_lost = bool(failures) and lost(run)
        if is_lost:
            found["rows"][name]["fatal"] = True
        run.keep(part, key, found | about())
        if is_lost:
            raise LostError(f"{key}: {name}: {failures[name]}")
        candidates |= made
    if run.late():
        raise NoTimeLeftError(f"no time left in {key} for rounds of all candidates")
    found = compared(candidates, {}, floor=floor, steps=steps, against=pairs, **run.limits(1.5))
    run.keep(part, key, found | about() | {"done": list(run.rows)})


def taken(run: Run, make: Maker) -> Callable[[], object]:
    """Return a candidate that was called once: what a kernel does to the device shows here."""
    call = make()
    call()
    if run.cuda:
        torch.cuda.synchronize(run.device)
    return call


def lost(run: Run) -> bool:
    """Say whether a kernel has left the device unusable to this process."""
    try:
        if run.cuda:
            torch.cuda.synchronize(run.device)
    except RuntimeError:
        return True
    return False


# ---------------------------------------------------------------------------------------- LSTM


def window_cases(run: Run) -> Iterator[w.WindowCase]:
    """Yield the points in the order of their weight."""
    if run.tiny:
        yield w.WindowCase(4, 16, 3, "fp32")
        return
    for window in WINDOWS:
        yield w.WindowCase(*window)
    for window in WINDOWS:
        yield w.WindowCase(*window, "fp32")


def window_groups(run: Run) -> Groups:
    """Forward and backward of a window, a group a point; no compiler has a candidate there."""
    for case in window_cases(run) if {"cuda", "triton"} & {*run.rows} else ():
        yield str(case), lambda case=case: window_group(run, case)


def window_group(run: Run, case: w.WindowCase) -> None:
    """``nn.LSTM`` and ours, forward and backward; forward alone beside it."""
    floor = "floor: products by torch"
    dtype = w.operand(case.precision)
    c = Candidates(run, w.check_window, case)

    def stock(case: w.WindowCase, device: torch.device) -> w.Window:
        return w.StockWindow(case, device, w.operand(case.precision))

    def ours(case: w.WindowCase, device: torch.device) -> w.Window:
        return w.OurWindow(case, device, dtype, run.backend)

    def in_cuda(case: w.WindowCase, device: torch.device) -> w.Window:
        return w.OurWindow(case, device, dtype, "cuda")

    makers: dict[str, Maker] = {
        floor: lambda: run.replayed([w.window_floor(case, run.device)]),
        CUDNN: c.replay(stock),
        OURS_CUDA: c.replay(in_cuda),
        f"{CUDNN}, forward": c.replay(stock, "forward"),
        f"{OURS_CUDA}, forward": c.replay(in_cuda, "forward"),
    }
    if "cuda" in run.rows:
        if case.precision == "bf16":
            half = Candidates(run, w.check_window, case._replace(precision="fp16"))
            makers[CUDNN_FP16] = half.replay(stock)
            makers[f"{CUDNN_FP16}, forward"] = half.replay(stock, "forward")
        makers[CUDNN_EAGER] = c.eager(stock)
    if "triton" in run.rows:
        makers[OURS] = c.replay(ours)
        makers[f"{OURS}, forward"] = c.replay(ours, "forward")
        makers[OURS_EAGER] = c.eager(ours)
        if case.steps <= STEPWISE_STEPS:
            makers[STEPWISE] = c.forced(
                ("lstm_forward", "lstm_backward"), step_by_step, c.replay(ours)
            )
    pairs = over(OURS, CUDNN, STEPWISE) | over(OURS_EAGER, CUDNN_EAGER)
    pairs |= over(OURS_CUDA, CUDNN, CUDNN_FP16, OURS)
    pairs |= {
        "forward": f"{CUDNN}, forward / {OURS}, forward",
        "forward, CUDA": f"{CUDNN}, forward / {OURS_CUDA}, forward",
        "forward, fp16, CUDA": f"{CUDNN_FP16}, forward / {OURS_CUDA}, forward",
    }
    with w.arithmetic(case.precision):
        timed(
            *(run, "lstm", str(case), makers, pairs),
            floor=floor,
            about=lambda: {"steps": case.steps, "tiles": c.record()},
        )


def step_by_step(choice: tuning.Choice, tiles: Any) -> Any:
    """Return the tiles of a window for a launch a step."""
    return lstm.step_tiles(*choice.shape, triton_lstm.machine(choice.device))


# -------------------------------------------------------------------------------------- floors


@triton.jit
def barriers_kernel(state, programs, rounds):
    """``rounds`` grid barriers and nothing else."""
    for _ in range(rounds):
        grid_barrier(state, programs)


def triton_barriers(state: torch.Tensor, programs: int, rounds: int) -> Callable[[], object]:
    """Return a cooperative launch of ``programs`` that meet ``rounds`` times; ``state`` is int32
    [1]."""
    return Launch(
        barriers_kernel,
        (programs,),
        {"state": state, "programs": programs, "rounds": rounds},
        {"num_warps": 4, "launch_cooperative_grid": True},
    ).run


def floor_groups(run: Run) -> Groups:
    """Say what no kernel of ours can be faster than, whatever it does."""
    if {"cuda", "triton"} & {*run.rows}:
        yield "barrier", lambda: barrier_group(run)


def cuda_barriers(state: torch.Tensor, blocks: int, rounds: int) -> Callable[[], object]:
    """Do as :func:`triton_barriers`, with the CUDA kernels."""
    registry.get("cuda")  # or why not
    call = cuda_calls.extension().grid_barriers
    stated = cuda_calls.described(state)
    return lambda: call((blocks, rounds, 1, stated, cuda_calls.stream(state.device)))


#: What each backend's floor is called: its launch of nothing, and a barrier of its blocks.
FLOORS = {"Triton": ("launch", "barrier"), "CUDA": ("CUDA launch", "CUDA barrier")}


def barrier_group(run: Run) -> None:
    """Say what cannot be had for less: a launch of nothing, and a meeting of all programs
    (blocks)."""
    most = torch.cuda.get_device_properties(run.device).multi_processor_count if run.cuda else 1
    grids = sorted({1, 8, 32, 64, most, 2 * most}) if run.cuda else [1]
    launches, rounds = (2, 2) if run.tiny else (50, 100)
    state = torch.zeros(1, dtype=torch.int32, device=run.device)

    def name(backend: str, programs: int, meetings: int) -> str:
        return f"{backend}: {programs} programs, {meetings} barriers"

    plans = {"CUDA": cuda_barriers, "Triton": triton_barriers}
    makers: dict[str, Maker] = {}
    for backend, bare in plans.items():
        if backend.lower() in run.rows:
            for programs, meetings in itertools.product(grids, (0, rounds)):
                makers[name(backend, programs, meetings)] = partial(
                    lambda bare, p, m: run.replayed([bare(state, p, m)] * launches),
                    *(bare, programs, meetings),
                )

    def found() -> dict[str, Any]:
        rows = run.group("floors", "barrier").get("rows", {})
        of_grids: dict[str, dict[str, float]] = {}
        for programs in grids:
            of_grid = of_grids[str(programs)] = {}
            for backend, (launch, barrier) in FLOORS.items():
                names = [name(backend, programs, m) for m in (0, rounds)]
                taken = [median(rows, n) for n in names]
                if None not in taken:
                    of_grid[launch], of_grid[barrier] = taken[0], (taken[1] - taken[0]) / rounds
        return {"grids": of_grids}

    try:
        timed(run, "floors", "barrier", makers, {}, steps=launches, about=dict)
    finally:
        if run.group("floors", "barrier"):
            run.keep("floors", "barrier", found())


# --------------------------------------------------------------------------------------- smoke


def smoke_groups(run: Run) -> Groups:
    """Say whether kernels end, leave the barrier's word as they have to, and are right, in a few
    seconds: of each backend the barrier, then a step and a window in each precision."""
    barriers = {"cuda": cuda_barriers, "triton": triton_barriers}
    for backend, bare in barriers.items():
        if backend not in run.rows:
            continue
        yield f"{backend}: barrier", partial(smoke, run, f"{backend}: barrier", check_word, bare)
        for precision in SMOKE[:1] if run.tiny else SMOKE:
            for what, check in (("step", check_step), ("window", check_window)):
                key = f"{backend}: {what} {precision}"
                yield key, partial(smoke, run, key, check, backend, precision)


def smoke(run: Run, key: str, check: Callable[..., None], *given: Any) -> None:
    """Check, then keep that it was right."""
    start = time.monotonic()
    check(run, *given)
    run.keep("smoke", key, {"seconds": time.monotonic() - start, "done": list(run.rows)})
    print(f"smoke {key}: right", flush=True)


def check_word(run: Run, bare: Callable[[torch.Tensor, int, int], Callable[[], object]]) -> None:
    """Meetings of grids of several sizes leave no arrivals in the word.

    Raises:
        Disagreement: they do.
    """
    state = torch.zeros(1, dtype=torch.int32, device=run.device)
    most = torch.cuda.get_device_properties(run.device).multi_processor_count if run.cuda else 1
    for programs in (1, most, 1):
        bare(state, programs, 3)()
        left = int(state.item()) & 0x7FFFFFFF
        if left:
            raise w.Disagreement(f"3 barriers of {programs} programs left {left} in their word")


def check_step(run: Run, backend: str, precision: str) -> None:
    """Check a decoupled step, of one tile and of several, against float64."""
    for size in SMOKE_LAYERS[:1] if run.tiny else SMOKE_LAYERS:
        with w.arithmetic(precision):
            w.check_layer(
                lambda case, device, **options: w.Decoupled(case, device, backend, **options),
                w.Case(*size, precision),
                run.device,
            )


def check_window(run: Run, backend: str, precision: str) -> None:
    """Check a window, forward and backward, against float64."""
    for size in SMOKE_WINDOWS[:1] if run.tiny else SMOKE_WINDOWS:
        with w.arithmetic(precision):
            w.check_window(
                lambda case, device: w.OurWindow(case, device, w.operand(case.precision), backend),
                w.WindowCase(*size, precision),
                run.device,
            )


PARTS: dict[str, Callable[[Run], Groups]] = {
    "smoke": smoke_groups,
    "layer": layer_groups,
    "floors": floor_groups,
    "lstm": window_groups,
}


def measure(run: Run, parts: list[str]) -> None:
    """Measure the groups of the parts, each on its own: one that raises is recorded, the others go
    on.

    Raises:
        LostError: a kernel left the device unusable.
    """
    for part in parts:
        run.results.get("failed", {}).pop(part, None)
        begun = False
        for key, group in PARTS[part](run):
            if (run.only and key not in run.only) or run.has(part, key):
                continue
            what = f"{part} {key}"
            if begun and run.late():
                run.fail(part, f"no time left for {key}")
                break
            begun = True
            run.results.get("failed", {}).pop(what, None)
            try:
                group()
            except LostError:
                raise
            except NoTimeLeftError as error:
                run.fail(part, str(error))
                break
            except Exception as error:
                traceback.print_exc()
                run.fail(what, f"{type(error).__name__}: {error}".splitlines()[0])
                if lost(run):
                    raise LostError(what) from error


# ------------------------------------------------------------------------ profilers, sanitizers


def profile(run: Run) -> None:
    """Each main op of the backend once, between the marks that ``ncu --profile-from-start off``
    looks for."""
    sizes = [(16, 32)] if run.tiny else [(128, 1024), (4096, 4096)]
    windows = [(4, 16, 3)] if run.tiny else [(16, 256, 16), (16, 1024, 16)]
    steps: dict[str, Callable[[], object]] = {}
    for batch, hidden in sizes:
        for kind in (w.Decoupled, w.Backprop, w.SynthesizerUpdate):
            layer: Any = kind(w.Case(batch, hidden), run.device, run.backend)
            steps[f"{kind.__name__} {batch}/{hidden}"] = layer.step
    for size in windows:
        case = w.WindowCase(*size)
        dtype = w.operand(case.precision)
        steps[f"LSTM {case}"] = w.OurWindow(case, run.device, dtype, run.backend).step
    for name, step in steps.items():
        step()  # compiles, and makes what is made once
        if run.cuda:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        step()
        if run.cuda:
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
        print(f"{run.backend}: {name}", flush=True)


def ncu_table(written: str) -> str:
    """Return the output of ``ncu --csv --page raw`` as a table, a row a kernel and launch shape."""
    kernels = ncu.read(written)
    if not kernels:
        return "ncu reported no kernel"
    return text.table(profile_report.HEADER, profile_report.rows(kernels))


# ------------------------------------------------------------------------------------- summary


def median(rows: dict[str, Any], name: str) -> float | None:
    """Find a row's time, seconds; None if it was not measured."""
    row = rows.get(name, {})
    return row["timing"].median if "timing" in row else None


def summary(results: Mapping[str, Any]) -> str:
    """Return the figures as text, those that decide most at the end."""
    lines: list[str] = []
    facts = results.get("facts", {})
    lines.append(
        f"{facts.get('gpu', facts.get('device', 'nothing measured'))}, "
        f"torch {facts.get('torch')}, Triton {facts.get('triton')}, commit {facts.get('commit')}"
    )
    for part in ("floors", "lstm", "layer"):
        groups = results.get(f"gpu-{part}", {})
        for key, group in reversed(groups.items()):
            lines.append(f"\n{part} {key}")
            rows = []
            for name in group["order"]:
                row = group["rows"][name]
                if "failed" in row:
                    rows.append([name, row["failed"], ""])
                    continue
                ratio = row.get("per_floor")
                taken = f"{row['timing'].median * 1e6:.4g}"
                rows.append([name, taken, f"{ratio.median:.2f}" if ratio else ""])
            lines.append(text.table(["candidate", "us", "x floor"], rows))
            for label, ratio in group["ratios"].items():
                lines.append(f"{label}: {interval(ratio)}")
    if results.get("gpu-smoke"):
        lines.append("\nright: " + ", ".join(results["gpu-smoke"]))
    for part, reason in results.get("failed", {}).items():
        lines.append(f"FAILED {part}: {reason}")
    lines += promises(results)
    return "\n".join(lines)


def promises(results: Mapping[str, Any]) -> list[str]:
    """Say what the project promises of a GPU, and what was measured."""
    layers = results.get("gpu-layer", {})
    small, large = (str(w.Case(*size)) for size in SIZES[:2])

    def ratio(group: dict[str, Any], label: str) -> str:
        found = group.get("ratios", {}).get(label)
        return "not measured" if found is None else interval(found)

    lines = []
    for dni, backprop in ((DNI, BACKPROP), (DNI_CUDA, BACKPROP_CUDA)):
        for other in (STOCK, AUTOTUNED_EAGER, AUTOTUNED, backprop):
            wanted = "" if other == backprop else " (at least 2)"
            found = ratio(layers.get(small, {}), f"{other} / {dni}")
            lines.append(f"{small}: {other} / {dni}{wanted}: {found}")
    label = f"{DNI} / {DNI_CUDA}"
    lines.append(f"{small}: {label} (at least 1): {ratio(layers.get(small, {}), label)}")
    launch, barrier = cuda_floors(results)
    row = layers.get(small, {}).get("rows", {}).get(DNI_CUDA, {})
    if "timing" in row and launch is not None and barrier is not None:
        floor = launch + STEP_BARRIERS * barrier
        lines.append(
            f"{small}: {DNI_CUDA}: {row['timing'].median * 1e6:.3g} us; a launch and "
            f"{STEP_BARRIERS} bare barriers: {floor * 1e6:.3g} us"
        )
    row = layers.get(large, {}).get("rows", {}).get(DNI, {})
    found = f"{row['per_floor'].median:.2f}" if "per_floor" in row else "not measured"
    lines.append(f"{large}: DNI / its two products (at most 1.5): {found}")

    windows = results.get("gpu-lstm", {})
    label = f"{CUDNN} / {OURS_CUDA}"
    for window in WINDOWS:
        case = w.WindowCase(*window)
        group = windows.get(str(case))
        if group is None:
            continue
        wanted = " (at least 1)" if case.hidden <= PROMISED_HIDDEN else ""
        line = f"{case}: {label}{wanted}: {ratio(group, label)}"
        row = group["rows"].get(OURS_CUDA, {})
        if "timing" in row:
            line += f"; {row['timing'].median / case.steps * 1e6:.3g} us a step"
            if barrier is not None:
                line += f", its 2 bare barriers {2 * barrier * 1e6:.3g}"
        lines.append(line)
    if not windows:
        lines.append(f"LSTM: {label}: not measured")
    return lines


def backend_table(results: Mapping[str, Any]) -> measured.Table:
    """Gather the times of both backends where both were measured: of layers whose data are in the
    cache, with SGD and without dx, and of windows."""
    arithmetic = {"bf16": "bfloat16", "fp32": "float32-ieee", "tf32": "float32-tf32"}
    architecture = f"sm_{results['facts']['capability'].replace('.', '')}"
    kinds = {"layer": ("linear", DNI, DNI_CUDA), "lstm": ("lstm", OURS, OURS_CUDA)}
    table: measured.Table = {}
    for part, (op, triton_row, cuda_row) in kinds.items():
        for key, group in results.get(f"gpu-{part}", {}).items():
            sizes, precision, *more = key.split()
            taken = [median(group["rows"], name) for name in (cuda_row, triton_row)]
            if None in taken or more not in ([], ["sgd"]):
                continue
            batch, hidden, *steps = map(int, sizes.split("/"))
            asked = (*steps, batch, hidden, hidden)
            entry = measured.Entry(op, architecture, arithmetic[precision], asked)
            table[entry] = dict(zip(measured.BACKENDS, taken, strict=True))
    return table


def cuda_floors(results: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Seconds of a bare CUDA launch and of a barrier, with a block a multiprocessor."""
    found, (launch, barrier) = grid_of(results), FLOORS["CUDA"]
    return found.get(launch), found.get(barrier)


def join(path: Path, others: list[Path]) -> str | None:
    """Write the results of several calls as one, or return why they do not belong together."""
    whole: dict[str, Any] = {}
    known: dict[str, Any] = {}
    for other in others:
        found = stored.benchmarks(other)
        results, known = found.body, known or found.facts
        for fact in ("gpu", "driver", "torch", "commit"):
            ours, theirs = (facts.get(fact) for facts in (known, found.facts))
            if ours != theirs:
                return f"{other} is of {fact} {theirs}, {others[0]} of {ours}: they are not joined"
        merged = whole | results
        for part in {*whole, *results}:
            if part.startswith("gpu-"):
                before, after = whole.get(part, {}), results.get(part, {})
                keys = dict.fromkeys([*before, *after])
                merged[part] = {k: joined(before.get(k, {}), after.get(k, {})) for k in keys}
            elif part in ("baselines", "failed"):
                merged[part] = whole.get(part, {}) | results.get(part, {})
        whole = merged
    stored.write(path, Result("benchmarks", facts=known, body=whole))
    return None


def parser() -> argparse.ArgumentParser:
    """Return the command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, nargs="?", help="JSON to write")
    parser.add_argument("--part", action="append", choices=tuple(PARTS))
    parser.add_argument("--rows", action="append", choices=ROWS, help="candidates (all)")
    parser.add_argument("--only", action="append", metavar="KEY", help="groups (all)")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--resume", action="store_true", help="leave out what is in the file")
    parser.add_argument("--text", type=Path, help="where the figures are kept as text")
    parser.add_argument("--profile", action="store_true", help="run each op once, time nothing")
    parser.add_argument("--under-ncu", type=Path, metavar="CSV", help="--profile under ncu")
    parser.add_argument("--ncu", type=Path, metavar="CSV", help="print what ncu wrote")
    parser.add_argument("--backends", action="store_true", help="print the table of backends")
    parser.add_argument("--join", type=Path, nargs="+", metavar="JSON", help="write these as one")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backend", help="of the rows without a name (triton); --profile: alone")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes: does it run at all")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    line = parser()
    given = line.parse_args(arguments)
    if given.under_ncu is not None:
        profiled = [sys.executable, __file__, "--profile"]
        options = [*ncu.OPTIONS, "--profile-from-start", "off", "--log-file", given.under_ncu]
        os.execvp("ncu", ["ncu", *map(str, options), *profiled])
    if given.ncu is not None:
        print(ncu_table(given.ncu.read_text(encoding="utf-8")))
        return 0
    if given.file is None and not given.profile:
        line.error("which file?")
    if given.backends:
        print(measured.text(backend_table(stored.benchmarks(given.file))), end="")
        return 0
    if given.join:
        reason = join(given.file, given.join)
        if reason is not None:
            print(reason, file=sys.stderr)
        return 0 if reason is None else 1
    if given.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: torch.cuda.is_available() is false", file=sys.stderr)
        return 3
    both = given.profile and given.backend is None
    failed = False
    for backend in ("triton", "cuda") if both else (given.backend or "triton",):
        try:
            if given.profile or backend != "triton":
                registry.get(backend)
        except (ValueError, RuntimeError) as error:
            print(error, file=sys.stderr)
            failed = True
            continue
        run = Run(
            *(given.file, given.device, backend, given.seconds, given.tiny),
            *(given.rows or ROWS, given.only or (), given.resume, given.text),
        )
        if given.profile:
            profile(run)
            continue
        try:
            measure(run, given.part or list(PARTS))
        except LostError as error:
            print(f"{error}: the device is lost to this process", file=sys.stderr)
            return LOST
        failed = run.failed
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
