"""Does the instrument tell the truth? Differences and segments are planted, and verdicts counted.

    .venv/bin/python bench/planted.py [--runs 10] [--seconds 2] [--busy 0] [--only PART ...]

prints JSON with the counts. ``differences``: a candidate with 15 % more work, with 15 % less, and
with the same, so many runs each. ``segments``: modules of which it is known whether synthetic
gradients pay there. ``sums``: parts of a step against the whole. ``tops``: under tops that cost 2,
10 and 50 times what is below them, the mean step over whole cycles against b + s + (τ + m)/k.
``contention``: how much a step on all cores slows down when another process wants one of them, ours
against stock's. With ``--busy N`` so many processes compete for the cores meanwhile. Exit status 1
if a bound is broken.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from fused_dni.measure import timing
from fused_dni.measure.baseline import facts
from fused_dni.measure.options import THREADS
from fused_dni.measure.verdict import Verdict, verdict, verdict_top
from fused_dni.measure.verdict.segments import conv
from fused_dni.report.files import as_json
from fused_dni.report.progress import Progress
from fused_dni.report.schema import Result, save
from workloads import step

#: What is planted, and of ten runs how many are to be called rightly; none the other way round.
PLANTED = {"slower": 1.15, "faster": 1 / 1.15, "inconclusive": 1.0}
RIGHT = 0.9
PARTS = ("differences", "segments", "sums", "tops", "contention")
OPPOSITE = {"slower": "faster", "faster": "slower"}
#: Products that a planted candidate's work is made of, more or fewer of them.
PRODUCTS = 40
#: How many times as much as what is below planted tops cost, and how often they are run.
DEAR = (2, 10, 50)
CYCLES = (2, 4, 8, 16)
#: A mean step over whole cycles is to be the formula's within this share.
FORMULA = 0.10
#: Turns, of idle and of contended steps, and how much more than stock's ours may slow down.
TURNS = 6
SLOWER = 1.10


def _rotation(features: int, seed: int) -> Tensor:
    """Return an orthogonal matrix [features, features]: a product with it changes no norm."""
    drawn = torch.randn(features, features, generator=torch.Generator().manual_seed(seed))
    orthogonal, _ = torch.linalg.qr(drawn)
    return orthogonal


class Heavy(nn.Module):
    """A function without parameters whose backward is far dearer than its forward.

    It is the identity; its backward takes ``products`` matrix products to find that out.
    """

    def __init__(self, features: int, products: int) -> None:
        super().__init__()
        self.products = products
        self.register_buffer("rotation", _rotation(features, 4))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = _Heavy.apply(x, self.rotation, self.products)
        return made


class _Heavy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Tensor, products: int) -> Tensor:
        ctx.rotation, ctx.products = rotation, products
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        turned = gradient
        for i in range(ctx.products):  # there and back
            turned = turned @ (ctx.rotation if i % 2 else ctx.rotation.t())
        return turned if ctx.products % 2 == 0 else gradient, None, None


class Dear(nn.Module):
    """A frozen top of so many matrix products forward and as many backward."""

    def __init__(self, features: int, products: int) -> None:
        super().__init__()
        self.products = products
        self.register_buffer("rotation", _rotation(features, 5))

    def forward(self, h: Tensor, wanted: Tensor) -> Tensor:
        away = h - wanted
        for _ in range(self.products):
            away = away @ self.rotation
        return away.square().mean()


class Expectation:
    """A planted segment and what its verdict has to say.

    Args:
        make: the segment.
        interface: where.
        synthesizer: which.
        k: targets on every k-th step, None for never.
        allowed: what DNI may be called against backprop on the same kernels.
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        interface: str,
        synthesizer: str,
        k: int | None,
        allowed: tuple[str, ...],
    ) -> None:
        self.make, self.interface, self.synthesizer = make, interface, synthesizer
        self.k, self.allowed = k, allowed

    def measure(self, rows: int, features: int, seconds: float, backend: str | None) -> str:
        """Say what the verdict says: ``faster``, ``slower`` or ``inconclusive``."""
        torch.manual_seed(0)
        found = verdict(
            self.make(),
            torch.randn(rows, features),
            interface=self.interface,
            synthesizer=self.synthesizer,
            target_every=(self.k,),
            seconds=seconds,
            parts=False,
            compile=False,
            backend=backend,
        )
        return against_fused(found, self.k)


def against_fused(found: Verdict, k: int | None) -> str:
    """Return the first variant against backprop on the same kernels."""
    variant = found.variants[0]
    return timing.differs(variant.cycle(k), found.timings[variant.base])


def segments(features: int = 64, products: int = 60) -> dict[str, Expectation]:
    """Return the planted segments, for inputs of so many features."""

    def linear() -> nn.Linear:
        return nn.Linear(features, features)

    def heavy() -> Heavy:
        return Heavy(features, products)

    no_gain = ("slower", "inconclusive")
    return {
        "a heavy backward in front, no targets": Expectation(
            lambda: nn.Sequential(heavy(), linear()), "output", "rank4", None, ("faster",)
        ),
        "a heavy backward behind, interface at the output": Expectation(
            lambda: nn.Sequential(linear(), heavy()), "output", "dense", None, no_gain
        ),
        "a heavy backward behind, interface at the preactivation": Expectation(
            lambda: nn.Sequential(linear(), heavy()), "preactivation", "rank4", None, ("faster",)
        ),
        "a bare narrow layer, dense synthesizer, k = 1": Expectation(
            linear, "output", "dense", 1, no_gain
        ),
    }


def planted_difference(word: str, seconds: float, seed: int) -> str:
    """Say what a comparison says of a candidate with so much more or less work."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(64, 64, generator=generator)
    out = torch.empty(64, 64)

    def work(products: int) -> timing.Candidate:
        def call() -> None:
            for _ in range(products):
                torch.mm(a, a, out=out)

        return call

    ours = round(PRODUCTS * PLANTED[word])
    found = timing.compare(
        {"theirs": work(PRODUCTS), "ours": work(ours)}, seconds=seconds, precision=0.02, seed=seed
    )
    return timing.differs(found["ours"], found["theirs"])


def sums(seconds: float) -> list[dict[str, Any]]:
    """Parts of a composed step against the step."""
    segment = conv()
    found = verdict(
        segment.module,
        segment.sample,
        context_features=segment.classes,
        target_every=(1, None),
        compile=False,
        seconds=seconds,
    )
    made: list[dict[str, Any]] = found.report()["parts"]["sums"]
    return [row for row in made if row["composed"]]


def tops(seconds: float, rows: int = 128, features: int = 512) -> dict[str, dict[str, Any]]:
    """Mean steps over whole cycles under planted tops, over what the formula says."""

    def measure(products: int) -> Result:
        torch.manual_seed(0)
        x = torch.randn(rows, features)
        made = verdict_top(
            nn.Linear(features, features),
            Dear(features, products),
            (x, x),
            synthesizer="difference",
            target_every=CYCLES,
            seconds=seconds,
        )
        return made.report()

    tried = 10
    unit = measure(tried)["top over bottom"].median / tried
    found = {}
    for times in DEAR:
        made = measure(max(1, round(times / unit)))
        (variant,) = made["variants"]
        found[str(times)] = {
            "top over bottom": made["top over bottom"],
            "measured over predicted": {
                k: cycle["measured over predicted"] for k, cycle in variant["cycles"].items()
            },
        }
    return found


def contention(seconds: float) -> dict[str, dict[str, float]]:
    """Mean milliseconds of a network's step on all cores, with nothing else to do for them and with
    one process more than cores, by method."""
    case = step.CASES[0]
    methods = (step.STOCK, step.OURS, step.DNI_4)
    steps = {m.name: step.stepper(step.prepared(case, "sgd", m)) for m in methods}
    taken: dict[str, dict[int, list[float]]] = {name: {0: [], 1: []} for name in steps}
    for _ in range(TURNS):
        for others in (0, 1):
            with busy(others):
                for name, call in steps.items():
                    end = time.perf_counter() + seconds / TURNS
                    while (start := time.perf_counter()) < end:
                        call()
                        taken[name][others].append(time.perf_counter() - start)
    milliseconds = {
        name: {others: 1e3 * fmean(found) / step.CYCLE for others, found in turns.items()}
        for name, turns in taken.items()
    }
    return {
        name: {"idle": found[0], "contended": found[1], "slowdown": found[1] / found[0]}
        for name, found in milliseconds.items()
    }


# ------------------------------------------------------------------------------------- the command


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """Other work on the machine, meanwhile."""
    workers = [multiprocessing.Process(target=_spin, daemon=True) for _ in range(processes)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _spin() -> None:
    while True:
        sum(range(10_000))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=10, help="of each planted difference (10)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of one comparison (2)")
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="competing processes (0)")
    parser.add_argument("--threads", type=int, default=1, help="(1)")
    parser.add_argument("--only", nargs="+", choices=PARTS)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too")
    args = parser.parse_args(argv)
    try:
        THREADS.check("--threads", args.threads, args.threads)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(args.threads)
    wanted = args.only or PARTS
    progress = Progress()
    body: dict[str, Any] = {"busy": args.busy, "runs": args.runs}
    failures: list[str] = []
    with busy(args.busy), progress:
        if "differences" in wanted:
            body["differences"] = {}
            for i, word in enumerate(PLANTED):
                counts: Counter[str] = Counter()
                for run in range(args.runs):
                    progress.update("differences", (i + run / args.runs) / len(PLANTED))
                    counts[planted_difference(word, args.seconds, run)] += 1
                body["differences"][word] = dict(counts)
                if counts[word] < RIGHT * args.runs:
                    failures.append(f"{word}: right in {counts[word]} of {args.runs}")
                if counts[OPPOSITE.get(word, "")]:
                    failures.append(f"{word}: called the opposite")
            progress.update("differences", 1.0)
        if "segments" in wanted:
            body["segments"] = {}
            planted = segments()
            for i, (name, expectation) in enumerate(planted.items()):
                progress.update("segments", i / len(planted))
                said = expectation.measure(128, 64, args.seconds, None)
                body["segments"][name] = {"said": said, "allowed": list(expectation.allowed)}
                if said not in expectation.allowed:
                    failures.append(f"{name}: {said}")
            progress.update("segments", 1.0)
        if "sums" in wanted:
            progress.update("sums", 0.0)
            body["sums"] = sums(5 * args.seconds)
            failures += [
                f"{row['step']}: sum over step {row['sum over step'].median:.2f}"
                for row in body["sums"]
                if not row["agrees"]
            ]
            progress.update("sums", 1.0)
        if "tops" in wanted:
            progress.update("tops", 0.0)
            body["tops"] = tops(2 * args.seconds)
            failures += [
                f"a top of {times} times, k = {k}: off by {100 * off:+.0f} %"
                for times, row in body["tops"].items()
                for k, ratio in row["measured over predicted"].items()
                if abs(off := ratio.median - 1.0) > FORMULA
            ]
            progress.update("tops", 1.0)
        if "contention" in wanted:
            progress.update("contention", 0.0)
            torch.set_num_threads(os.cpu_count() or 1)
            body["contention"] = contention(5 * args.seconds)
            torch.set_num_threads(args.threads)
            stock = body["contention"][step.STOCK.name]["slowdown"]
            failures += [
                f"{name} slows down by {row['slowdown']:.2f}, stock by {stock:.2f}"
                for name, row in body["contention"].items()
                if row["slowdown"] > SLOWER * stock
            ]
            progress.update("contention", 1.0)
    body["failures"] = failures
    report = Result("planted", facts=facts(), body=body)
    print(as_json(report), end="")
    if args.out is not None:
        save(args.out, report)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
