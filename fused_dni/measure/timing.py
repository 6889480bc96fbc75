"""Side-by-side measuring: interleaved candidates, medians with intervals, honest comparisons.

Two timings taken one after the other on a machine that also does other things differ for reasons
that have nothing to do with the code. So candidates are measured *together*: each round gives every
candidate one block of samples, in an order permuted anew for each round by a fixed seed, and two
candidates are compared by the ratios within rounds, which the drift of the machine leaves alone.

::

    timings = compare({"ours": ours, "theirs": theirs}, seconds=2.0)
    print(timings["ours"].median, timings["ours"].interval)
    print(differs(timings["ours"], timings["theirs"]))  # "faster", "slower" or "inconclusive"

Candidates are called without arguments; what they return is dropped. A candidate that trains goes
on training while it is timed: give each its own model.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fused_dni.measure.waiting import Stopwatch
from fused_dni.report.timings import MARGIN as MARGIN
from fused_dni.report.timings import Ratio as Ratio
from fused_dni.report.timings import Timing as Timing
from fused_dni.report.timings import combine as combine
from fused_dni.report.timings import differs as differs
from fused_dni.report.timings import ratio as ratio

Candidate = Callable[[], object]


@dataclass(frozen=True)
class Staged:
    """A candidate of which only the second half is timed: ``run(prepare())``.

    For what can be done only once to each thing prepared, like the backward of a graph, and for
    what is to find its caches as its predecessor leaves them. A sample lasts as long as the other
    candidates' do with both halves.
    """

    prepare: Callable[[], Any]
    run: Callable[[Any], object]

    def __call__(self) -> object:
        """Both halves, as warm-up does."""
        return self.run(self.prepare())


#: Shortest sample, in seconds: well above the clock's resolution and the cost of reading it.
MIN_SAMPLE = 200e-6
#: What a sample lasts at least: of a waiting thread nothing may be left, and ratios are made of it.
RESOLUTION = 1e-9
#: Shorter candidates are repeated to the length of the longest, up to this.
MAX_SAMPLE = 20e-3
#: Samples that a candidate gives in one round; a call before them, not timed, warms its caches.
BLOCK = 3
#: Fewest rounds of a run limited by ``seconds``: the least that gives a 95 % interval is six.
MIN_ROUNDS = 8
#: How many times ``seconds`` a run may last that was asked for a precision.
PATIENCE = 3.0

Clock = Callable[[Candidate, int, int], list[float]]


def _host_clock(watch: Stopwatch) -> Clock:
    """Samples on the host: (call, repeats, samples) -> seconds per call of each sample."""

    def sample(call: Candidate, repeats: int) -> float:
        if isinstance(call, Staged):
            spent = 0.0
            for _ in range(repeats):
                spent += watch.time(partial(call.run, call.prepare()))
            return max(spent, RESOLUTION) / repeats

        def run() -> None:
            for _ in range(repeats):
                call()

        return max(watch.time(run), RESOLUTION) / repeats

    return lambda call, repeats, samples: [sample(call, repeats) for _ in range(samples)]


def _cuda_clock(call: Candidate, repeats: int, samples: int) -> list[float]:
    if isinstance(call, Staged):
        return [_staged_events(call, repeats) / repeats for _ in range(samples)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(samples + 1)]
    marks[0].record()
    for mark in marks[1:]:
        for _ in range(repeats):
            call()
        mark.record()
    marks[-1].synchronize()
    spent = (a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks))
    return [max(seconds, RESOLUTION) / repeats for seconds in spent]


def _staged_events(call: Staged, repeats: int) -> float:
    """Seconds between events around ``run`` alone, summed over the repeats."""
    pairs = []
    for _ in range(repeats):
        given = call.prepare()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call.run(given)
        after.record()
        pairs.append((before, after))
    torch.cuda.synchronize()
    return sum(float(before.elapsed_time(after)) for before, after in pairs) / 1e3


def _calibrate(call: Candidate, clock: Clock, min_sample: float) -> float:
    """Seconds of a call, from samples long enough that reading the clock is no part of them."""
    count = 1
    while True:
        once = max(min(clock(call, count, 3)), 1e-9)
        wanted = max(1, math.ceil(min_sample / once))
        if wanted <= 2 * count:
            return once
        count = wanted


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection inside a sample: it would be charged to whoever is being timed."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def compare(
    candidates: Mapping[str, Candidate],
    *,
    seconds: float | None = None,
    rounds: int | None = None,
    precision: float | None = None,
    warmup: int = 3,
    min_sample: float = MIN_SAMPLE,
    block: int = BLOCK,
    min_rounds: int = MIN_ROUNDS,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Callable[[float], None] | None = None,
) -> dict[str, Timing]:
    """Measure all candidates together.

    Args:
        candidates: name -> callable without arguments.
        seconds: budget for the timed rounds of all candidates together; at least ``min_rounds``
            rounds are made whatever they take. Two seconds if neither limit is given.
        rounds: exact number of rounds, instead of ``seconds``.
        precision: go on beyond ``seconds``, to three times as long at most, until the interval of
            every candidate's ratio to the first one reaches no further than this share from its
            middle. It is the width that is looked at, never the outcome: to stop when a difference
            shows would find differences that are not there.
        warmup: calls of each candidate before anything is timed; at least one.
        min_sample: a sample lasts at least about this long; all last as long as the longest call
            (up to 20 ms), by repetition.
        block: samples that a candidate gives in each round.
        min_rounds: fewest rounds under ``seconds``.
        seed: of the order in which the candidates take their turns, permuted for every round.
        device: where the work runs; on ``cuda`` the samples are taken by events, on the host by
            the clock, less the time in which no core was free (:mod:`fused_dni.measure.waiting`).
        progress: called after every round with the fraction done, 0 to 1.

    Returns:
        One :class:`Timing` a candidate, in the order given.

    Raises:
        ValueError: no candidates, both limits, or a limit that is not positive.
    """
    if not candidates:
        raise ValueError("compare() needs at least one candidate")
    if seconds is not None and rounds is not None:
        raise ValueError("give compare() seconds or rounds, not both")
    if rounds is not None and rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if seconds is None:
        seconds = 2.0
    require_positive(seconds=seconds, precision=precision)
    with contextlib.closing(Stopwatch()) as watch:
        cuda = torch.device(device).type == "cuda"
        clock = _cuda_clock if cuda else _host_clock(watch)
        repeats = _repeats(candidates, clock, warmup, min_sample)
        run = _Run(candidates, clock, watch, repeats, block, random.Random(seed))
        start = time.perf_counter()
        done, look = 0, min_rounds
        while True:
            run.round()
            done += 1
            spent = time.perf_counter() - start
            if rounds is not None:
                fraction, over = done / rounds, done >= rounds
            else:
                fraction = min(spent / seconds, done / min_rounds, 1.0)
                over = spent >= seconds and done >= min_rounds
                if over and precision is not None and spent < PATIENCE * seconds:
                    over = done >= look and run.spread() <= precision
                    if done >= look:
                        look = done + max(1, done // 4)  # looking takes longer and longer
            if progress is not None:
                progress(1.0 if over else min(fraction, 0.99))  # more rounds, for precision
            if over:
                return run.timings()


def require_positive(**given: float | None) -> None:
    """Refuse numbers, by their arguments' names, that are not positive and finite.

    Raises:
        ValueError: one of them is not.
    """
    for name, value in given.items():
        if value is not None and not 0.0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value!r}")


def _repeats(
    candidates: Mapping[str, Candidate], clock: Clock, warmup: int, min_sample: float
) -> dict[str, int]:
    """Calls in a sample of each candidate, after warming it up."""
    calls: dict[str, float] = {}
    for name, call in candidates.items():
        for _ in range(max(1, warmup)):
            call()
        with _no_collection():
            # Both halves of a staged call: its samples are to last as long as the others'.
            whole = call.__call__ if isinstance(call, Staged) else call
            calls[name] = _calibrate(whole, clock, min_sample)
    # Samples of one length for all: where other work interrupts now and then, a long sample is
    # hit and a short one is not, and a median of short ones would look better than it is.
    length = max(min_sample, min(max(calls.values()), MAX_SAMPLE))
    return {name: max(1, round(length / once)) for name, once in calls.items()}


class _Run:
    """The rounds of one :func:`compare`."""

    def __init__(
        self,
        candidates: Mapping[str, Candidate],
        clock: Clock,
        watch: Stopwatch,
        repeats: dict[str, int],
        block: int,
        order: random.Random,
    ) -> None:
        self.candidates, self.clock, self.repeats, self.block = candidates, clock, repeats, block
        self.watch = watch
        self.waited = dict.fromkeys(candidates, 0.0)
        self.shuffle = order.shuffle
        self.order = list(candidates)
        self.samples: dict[str, list[float]] = {name: [] for name in candidates}
        self.medians: dict[str, list[float]] = {name: [] for name in candidates}

    def round(self) -> None:
        """Take a block of samples of each candidate, in a new order."""
        self.shuffle(self.order)
        gc.collect(0)
        with _no_collection():
            for name in self.order:
                call = self.candidates[name]
                call()
                before = self.watch.waited
                taken = self.clock(call, self.repeats[name], self.block)
                self.waited[name] += self.watch.waited - before
                self.samples[name] += taken
                self.medians[name].append(statistics.median(taken))

    def spread(self) -> float:
        """Say how far the interval of a ratio to the first candidate reaches, as a share of its
        middle; the worst of them."""
        found = list(self.timings().values())
        ratios = [ratio(other, found[0]) for other in found[1:]]
        return max(((r.high - r.low) / 2.0 / r.median for r in ratios), default=0.0)

    def timings(self) -> dict[str, Timing]:
        """Say what has been measured so far."""
        found = {}
        for name, samples in self.samples.items():
            repeats, waited = self.repeats[name], self.waited[name]
            share = waited / (waited + repeats * sum(samples))
            rounds = tuple(self.medians[name])
            found[name] = Timing.of(name, samples, rounds, repeats, share)
        return found


def gemm_floor(
    shapes: Sequence[tuple[int, int, int]],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Candidate:
    """Return the matrix products that no training step of these layers can avoid, alone.

    For each ``(rows, in_features, out_features)``: the forward product ``[N, I] @ [I, O]`` and the
    weight gradient's ``[O, N] @ [N, I]``, by ``torch.mm(out=)`` on contiguous operands of their
    own. Put it in the same :func:`compare` as the steps it is the floor of.
    """
    sizes = []
    for rows, inputs, outputs in shapes:
        sizes += [(rows, inputs, outputs, 1), (outputs, rows, inputs, 1)]
    return products(sizes, dtype, device)


def products(
    sizes: Sequence[tuple[int, int, int, int]],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Candidate:
    """Return matrix products [n, k] @ [k, m], each so many times, one after the other, by
    ``torch.mm(out=)`` on contiguous operands of their own; ``sizes`` holds (n, k, m, times)."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    made = [(make(n, k), make(k, m), make(n, m), times) for n, k, m, times in sizes]

    def floor() -> None:
        with torch.no_grad():
            for a, b, out, times in made:
                for _ in range(times):
                    torch.mm(a, b, out=out)

    return floor


def lstm_floor(
    steps: int,
    batch: int,
    inputs: int,
    hidden: int,
    layers: int = 1,
    *,
    backward: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Candidate:
    """Return the matrix products that no window of an LSTM can avoid, alone.

    For each layer: the input projection, as one product over the window, and T recurrent products,
    one after the other; with ``backward`` T products of the gates' gradients with the recurrent
    weight, one after the other, and, as one product over the window each, the gradients of both
    weights and of the layer's input. By ``torch.mm(out=)`` on contiguous operands of their own.
    """
    rows, gates = steps * batch, 4 * hidden
    sizes = []
    for features in (inputs, *(hidden,) * (layers - 1)):  # the first reads the inputs
        sizes += [(rows, features, gates, 1), (batch, hidden, gates, steps)]
        if backward:
            sizes.append((batch, gates, hidden, steps))
            sizes += [(gates, rows, size, 1) for size in (features, hidden)]
            sizes.append((rows, gates, features, 1))
    return products(sizes, dtype, device)


#: What :func:`peak_memory` measures, for reports.
PEAK_MEMORY_CPU = (
    "peak bytes held from torch's CPU allocator during a step, above parameters, optimizer state "
    "and inputs (torch.profiler memory events; scratch that a backend keeps for itself is not seen)"
)
PEAK_MEMORY_CUDA = (
    "peak bytes held from torch's CUDA allocator during a step, above what was held before it"
)


def memory_is(device: torch.device) -> str:
    """Say what :func:`peak_memory` measures on a device."""
    return PEAK_MEMORY_CUDA if device.type == "cuda" else PEAK_MEMORY_CPU


def peak_memory(step: Candidate, device: str | torch.device = "cpu") -> int:
    """Peak bytes that ``step`` holds above what outlives it: activations, gradients, scratch.

    Measured, not computed. CPU: the allocation and release events of torch's allocator, recorded
    by ``torch.profiler`` over two consecutive steps after a warm one; the second step's peak
    counts, in which the release of everything the first one left (gradients, say) is known too.
    What lives from before both steps (parameters, moments, inputs) is not counted. CUDA:
    ``torch.cuda.max_memory_allocated``.
    """
    step()
    gc.collect()  # what somebody left behind is not to be freed, and counted, in between
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)

    middle = 0

    def twice() -> None:
        nonlocal middle
        step()
        middle = time.time_ns()
        step()

    held = peak = 0
    for when, size in allocations(twice):
        if when >= middle:
            peak = max(peak, held)
        held += size
    return max(peak, held)


def allocations(run: Callable[[], object]) -> list[tuple[int, int]]:
    """Run once and record what torch's CPU allocator gives out and takes back meanwhile.

    Returns:
        Pairs of a time (ns, the clock of ``time.time_ns``) and bytes, negative where they are
        released, in order of time. The release of what lived before the run is left out, whose size
        the profiler does not know: it may take an address for one that an earlier recording
        handed out, and report that one's size.
    """
    from torch._C._profiler import _EventType
    from torch.profiler import ProfilerActivity, profile

    with _quiet_stderr(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            run()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    pending = list(recorded.profiler.kineto_results.experimental_event_tree())
    found = []
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == _EventType.Allocation:
            found.append(
                (event.start_time_ns, event.extra_fields.alloc_size, event.extra_fields.ptr)
            )
    known: dict[int, int] = {}
    kept = []
    for when, size, address in sorted(found):
        if size > 0:
            known[address] = size
        elif known.pop(address, None) is None:
            continue
        kept.append((when, size))
    return kept


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Drop the profiler's native notices, which go to file descriptor 2, past ``sys.stderr``."""
    try:
        kept = os.dup(2)
    except OSError:
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
