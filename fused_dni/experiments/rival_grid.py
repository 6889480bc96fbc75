"""The rivals over widths, depths and budgets: runs of equal steps, and what a step takes.

First every arm is held against its formula in the smallest network. Runs are functions of the
settings alone, whatever else the machine does meanwhile; what depends on the clock, the time a
step, is measured at the end, for each network all arms together. Who is ahead at equal wall-clock
is read off both (:mod:`fused_dni.report.kinds.rival_grid`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fused_dni.experiments import data, rivals
from fused_dni.experiments.rival_arms import EXACT, Arm, Grid, arm
from fused_dni.experiments.run import Job, Keep, Say, begun, do_jobs
from fused_dni.measure import timing
from fused_dni.measure.baseline import facts
from fused_dni.report.progress import Progress
from fused_dni.report.schema import Result

#: Backprop's longest run, in parts of the largest budget.
BEYOND = 1.5
#: Width, depth, budget, seed.
Place = tuple[int, int, int, int]


def compare(
    settings: Grid,
    dataset: data.Dataset,
    *,
    seconds: float = 5.0,
    previous: Result | None = None,
    keep: Keep | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> Result:
    """Train every arm in every network with every budget and seed, then time the steps.

    Args:
        settings: what to compare.
        dataset: on what.
        seconds: budget for timing all arms of a network together.
        previous, keep, progress, command: see :class:`fused_dni.report.schema.Experiment`.

    Returns:
        The report, of kind ``rivals grid``: ``tuning`` (error on the held-out part by arm and
        rate), ``runs`` (as those of ``rivals``, and their ``width``, ``depth``, ``budget`` and
        ``rate``), ``exact`` (the arms by backprop's step), ``trained`` (whose runs stand for all of
        these) and ``networks``
        (a row a width and depth, with its ``arms`` as in ``rivals`` and their ``gate``).

    Raises:
        GateError: an arm does not compute what its formula says.
        ValueError: settings and data do not fit, or ``previous`` is of others.
    """
    progress = progress or Progress(enabled=False)
    if len(rivals.held_out(dataset).train.labels) < settings.batch_size:
        raise ValueError(
            f"batch_size {settings.batch_size} is larger than the training set without its "
            "held-out part"
        )
    report = begun(
        *("rivals grid", settings, previous, command, settings.device),
        memory_is=timing.memory_is(torch.device(settings.device)),
        dataset=dataset.name,
        digest=dataset.digest(),
        trained=settings.trained()[0].name,
        exact=[name for name in settings.arms if arm(name).kind in EXACT],
        tuning=[],
        networks=[],
        runs=[],
    )
    dataset = dataset.to(settings.device)
    jobs = list(_jobs(settings, dataset, seconds, report, keep))
    cells = len(settings.widths) * len(settings.depths)
    runs = (len(settings.trained()) * len(settings.budgets) + 1) * len(settings.seeds)
    with progress:
        if not report["runs"]:  # what an arm lacks shows before hours of the others
            smallest = settings.cell(min(settings.widths), min(settings.depths))
            arms = [arm(name) for name in settings.arms]
            rivals.checked(smallest, arms, dataset, partial(progress.update, "checking"))
        do_jobs(report, jobs, cells * (runs + 1), keep, progress)
    return report


def _jobs(
    settings: Grid, dataset: data.Dataset, seconds: float, report: Result, keep: Keep | None
) -> Iterator[Job]:
    """Yield what is left to do: the smallest networks first, times last."""
    cells = [(w, d) for w in sorted(settings.widths) for d in sorted(settings.depths)]
    done = {
        (run["width"], run["depth"], run["budget"], run["seed"], run["name"])
        for run in report["runs"]
    }
    first = settings.trained()[0]
    plan = [
        (width, depth, budget, seed, which)
        for width, depth in cells
        for budget in settings.budgets
        for seed in settings.seeds
        for which in settings.trained()
    ]
    # What backprop has in the time of arms whose steps are longer.
    beyond = math.ceil(BEYOND * max(settings.budgets))
    plan += [
        (*cell, beyond, seed, first) for cell, seed in itertools.product(cells, settings.seeds)
    ]
    for width, depth, budget, seed, which in plan:
        if (width, depth, budget, seed, which.name) in done:
            continue

        def work(
            say: Say, which: Arm = which, place: Place = (width, depth, budget, seed)
        ) -> dict[str, Any]:
            rate = _rate(which, settings, dataset, report, keep, say)
            return _run(which, place, settings, dataset, rate, say)

        label = f"{which.name:<12} {width} x {depth}, {budget}x, seed {seed}"
        yield Job(label, report["runs"], work)
    timed = {(row["width"], row["depth"]) for row in report["networks"]}
    for width, depth in cells:
        if (width, depth) not in timed:
            work_of = partial(_time, width, depth, settings, dataset, seconds)
            yield Job(f"timing {width} x {depth}", report["networks"], work_of)


def _run(
    which: Arm,
    place: Place,
    settings: Grid,
    dataset: data.Dataset,
    rate: float,
    say: Say,
) -> dict[str, Any]:
    """Do a run. Repeated gradients read no batch: an arm that repeats each K times has K times as
    many steps."""
    width, depth, budget, seed = place
    steps = settings.steps * budget * (which.every if which.kind == "stale-K" else 1)
    cell = replace(settings.cell(width, depth), lr=rate)
    run = rivals.train(which, seed, cell, dataset, steps, say)
    return {**run, "width": width, "depth": depth, "budget": budget, "rate": rate}


def _rate(
    which: Arm,
    settings: Grid,
    dataset: data.Dataset,
    report: Result,
    keep: Keep | None,
    say: Say,
) -> float:
    """Choose an arm's rate of least error on the held-out part."""
    if len(settings.rates) == 1:
        return settings.rates[0]
    tried = [row for row in report["tuning"] if row["name"] == which.name]
    place = min(settings.widths), min(settings.depths), 1, 0
    for rate in settings.rates:
        if rate not in [row["rate"] for row in tried]:
            run = _run(which, place, settings, rivals.held_out(dataset), rate, say)
            row = {"name": which.name, "rate": rate, "error": run["history"][-1]["error"]}
            tried.append({**row, "diverged": run["diverged"]})
            report["tuning"].append(tried[-1])
            if keep is not None:
                keep(report)
    return float(min(tried, key=lambda row: (row["diverged"], row["error"]))["rate"])


def _time(
    width: int, depth: int, settings: Grid, dataset: data.Dataset, seconds: float, say: Say
) -> dict[str, Any]:
    """Hold a network's arms against their formulas, and time their steps."""
    cell, arms = settings.cell(width, depth), [arm(name) for name in settings.arms]
    gate = rivals.checked(cell, arms, dataset)
    # One machine, and all arms in turns: so `facts` of another day would say nothing.
    rows = rivals.costs(cell, arms, dataset, seconds, say)
    for row in rows:
        del row["steps"]
    where = facts(None, settings.device)
    return {"width": width, "depth": depth, "gate": gate, "arms": rows, "facts": where}
