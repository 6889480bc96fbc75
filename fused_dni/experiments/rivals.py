"""The rivals at one table: time a step, memory, and error at equal wall-clock.

First every arm is held against its formula; then the steps of all arms are timed together; then
each run gets as many steps as fit into the wall-clock at the measured time a step, with the rate
falling to zero over exactly those. So the error that is compared depends on how long steps take on
a quiet machine, and not on who else ran beside which arm. What each run really took is reported
beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_dni.experiments import data, rival_gate
from fused_dni.experiments.rival_arms import (
    EXACT,
    SYNTHETIC,
    Arm,
    Settings,
    arm,
)
from fused_dni.experiments.rival_trainers import StaleTrainer, advance, build, network_of
from fused_dni.experiments.run import Job, Keep, Say, do_jobs, plain, refuse_divergence
from fused_dni.experiments.train import Trainer
from fused_dni.measure import timing
from fused_dni.measure.baseline import facts
from fused_dni.measure.timing import Timing
from fused_dni.measure.verdict.candidates import TIMING_RATE, at_rate, spread
from fused_dni.measure.verdict.errors import GateError
from fused_dni.report.progress import Progress
from fused_dni.report.schema import Result, resumed
from fused_dni.rules import SGD

#: Rates that :func:`tune` tries.
GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
#: Wall-clock of a run of :func:`tune`, as a share of that of a run.
TUNING_SHARE = 0.5
#: How often a run is evaluated, its end included.
EVALUATIONS = 10
#: Steps over which a rate is as good as constant.
ENDLESS = 1_000_000_000
#: Batches on which an arm may show that it follows its formula. The derivative of ReLU jumps at
#: zero, so on one batch in some hundred rounding decides it differently in float32 and float64.
GATE_TRIES = 3


def compare(
    settings: Settings,
    dataset: data.Dataset,
    *,
    seconds: float = 10.0,
    tuned: bool = False,
    previous: Result | None = None,
    keep: Keep | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> Result:
    """Measure all arms and train each with every seed.

    Args:
        settings: what to compare.
        dataset: on what.
        seconds: budget for timing all arms together.
        tuned: choose each arm's rate on the held-out part of the training set first.
        previous, keep, progress, command: see :class:`fused_dni.report.schema.Experiment`; times
            and rates of a previous report are taken over as its runs are.

    Returns:
        The report, of kind ``rivals``: ``gate`` (deviation from the formula by arm, in parts of the
        tolerance), ``arms`` (a row an arm: time, ratios, memory, steps, rate), ``tuning`` (error by
        arm and rate) and ``runs`` (a row a run: ``history`` of steps and errors, ``seconds`` that
        its steps really took).

    Raises:
        GateError: an arm does not compute what its formula says.
        ValueError: settings and data do not fit, or ``previous`` is of others.
    """
    progress = progress or Progress(enabled=False)
    arms = [arm(name) for name in settings.arms]
    trained_on = held_out(dataset).train if tuned else dataset.train
    if len(trained_on.labels) < settings.batch_size:
        raise ValueError(
            f"batch_size {settings.batch_size} is larger than the training set "
            f"({len(trained_on.labels)} images{' without the held-out part' * tuned})"
        )
    body = {"digest": dataset.digest()}
    asked = Result("rivals", settings=plain(asdict(settings)), body=body)
    report = resumed(previous, asked)
    if report is not asked and bool(report.get("tuning")) != tuned:
        raise ValueError(
            f"the report that is to be continued is {'not tuned' if tuned else 'tuned'}: go on "
            f"{'without' if tuned else 'with'} --tune, or begin another"
        )
    if not tuned:
        for which in arms:
            settings.rate(which)  # what is not known shows before anything runs
    dataset = dataset.to(settings.device)
    with progress:
        if report is asked:
            report = _measured(settings, arms, dataset, seconds, tuned, progress, command)
        rows = {row["name"]: row for row in report["arms"]}
        done = {(run["name"], run["seed"]) for run in report["runs"]}
        jobs = [
            Job(
                f"{which.name:<12} seed {seed}",
                report["runs"],
                partial(
                    train,
                    which,
                    seed,
                    replace(settings, lr=rows[which.name]["rate"]),
                    dataset,
                    rows[which.name]["steps"],
                ),
            )
            for seed in settings.seeds
            for which in arms
            if (which.name, seed) not in done
        ]
        do_jobs(report, jobs, len(settings.seeds) * len(arms), keep, progress)
    return report


def _measured(
    settings: Settings,
    arms: list[Arm],
    dataset: data.Dataset,
    seconds: float,
    tuned: bool,
    progress: Progress,
    command: str | None,
) -> Result:
    """Make the report up to the runs."""
    gate = checked(settings, arms, dataset, partial(progress.update, "checking"))
    rows = costs(settings, arms, dataset, seconds, partial(progress.update, "timing"))
    tuning = tune(settings, arms, dataset, rows, progress) if tuned else []
    for which, row in zip(arms, rows, strict=True):
        row["rate"] = _best(which, tuning) if tuned else settings.rate(which)
    return Result(
        "rivals",
        facts=facts(command, settings.device),
        settings=plain(asdict(settings)),
        memory_is=timing.memory_is(torch.device(settings.device)),
        body={
            "dataset": dataset.name,
            "digest": dataset.digest(),
            "gate": gate,
            "arms": rows,
            "tuning": tuning,
            "runs": [],
            "finished": False,
        },
    )


def checked(
    settings: Settings,
    arms: list[Arm],
    dataset: data.Dataset,
    say: Say = lambda fraction: None,
) -> dict[str, float]:
    """Measure how far each arm is from its formula, in parts of the tolerance.

    cDNI is held against backprop, during its warm-up: predictions are what it is compared for.
    """
    rule = SGD(1.0)
    network = network_of(settings, dataset, 0)
    found: dict[str, float] = {}
    for i, which in enumerate(arms):
        say(i / len(arms))
        phase = "warm-up" if which.kind in SYNTHETIC else ""
        for attempt in range(GATE_TRIES):
            trainer = build(which, 0, settings, dataset, ENDLESS, rule, phase=phase)
            order = _rows(settings, dataset, attempt)
            rows = torch.stack([next(order) for _ in range(rival_gate.steps_to_check(trainer))])
            try:
                found[which.name] = rival_gate.check(trainer, network, dataset.train, rows)
                break
            except GateError:
                if attempt + 1 == GATE_TRIES:
                    raise
    say(1.0)
    return found


def _rows(settings: Settings, dataset: data.Dataset, seed: int) -> Iterator[Tensor]:
    """Yield batch after batch, epoch after epoch: the same ones for all arms."""
    count, epoch = len(dataset.train.labels), 0
    while True:
        order = data.permutation(count, seed, epoch).to(settings.device)
        yield from data.batches(order, settings.batch_size)
        epoch += 1


# ------------------------------------------------------------------------------------------- cost


def costs(
    settings: Settings, arms: list[Arm], dataset: data.Dataset, seconds: float, say: Say
) -> list[dict[str, Any]]:
    """Time a step and memory of every arm, measured together, and the steps that fit."""
    rows = next(_rows(settings, dataset, 0))
    rule = at_rate(settings.rule(TIMING_RATE), TIMING_RATE)
    steps: dict[tuple[str, str], Callable[[], None]] = {}
    compiling: dict[str, float] = {}
    for which in arms:
        for phase in which.phases(settings.warmup):
            if (which.kind, phase) in steps:  # cdni-1 and cdni-4 are made of the same steps
                continue
            trainer = build(which, 0, settings, dataset, ENDLESS, rule, rule, phase)
            spread(trainer.model)
            if isinstance(trainer, StaleTrainer) and phase == "repeat":
                advance(trainer, dataset.train, rows)
            if took := getattr(trainer, "compile_seconds", 0.0):
                compiling[which.name] = took
            steps[which.kind, phase] = _candidate(trainer, dataset.train, rows)
    timings = timing.compare(
        {f"{kind} {phase}": step for (kind, phase), step in steps.items()},
        seconds=seconds,
        device=settings.device,
        progress=say,
    )
    memory = {key: timing.peak_memory(step, settings.device) for key, step in steps.items()}
    whole: dict[str, Timing] = {}
    for which in arms:
        shares = which.phases(settings.warmup)
        parts = [(share, timings[f"{which.kind} {phase}"]) for phase, share in shares.items()]
        whole[which.name] = timing.combine(which.name, parts)
    return [
        {
            "name": which.name,
            "what": which.what,
            "time": whole[which.name],
            "phases": {
                phase: timings[f"{which.kind} {phase}"].median
                for phase in which.phases(settings.warmup)
            },
            "against": {
                base: timing.ratio(whole[which.name], whole[base])
                for base in ("backprop", "fused")
                if base in whole and base != which.name
            },
            "memory": max(memory[which.kind, phase] for phase in which.phases(settings.warmup)),
            "compile_seconds": compiling.get(which.name),
            "steps": max(1, int(settings.seconds_per_run / whole[which.name].median)),
        }
        for which in arms
    ]


def _candidate(trainer: Trainer, split: data.Split, rows: Tensor) -> Callable[[], None]:
    return lambda: advance(trainer, split, rows)


# ---------------------------------------------------------------------------------------- training


def tune(
    settings: Settings,
    arms: list[Arm],
    dataset: data.Dataset,
    rows: list[dict[str, Any]],
    progress: Progress,
) -> list[dict[str, Any]]:
    """Try every rate of :data:`GRID` on the held-out part, in :data:`TUNING_SHARE` of the
    wall-clock, with the first seed.

    The exact arms compute the same step: backprop on our kernels is tried for all of them, or the
    first of them if it is not there.

    Returns:
        Rows of ``name``, ``rate``, ``error`` on the held-out part, ``diverged``.
    """
    apart = held_out(dataset)
    exact = [which for which in arms if which.kind in EXACT]
    tried = [which for which in arms if which.kind not in EXACT]
    tried = [*[which for which in exact if which.kind == "fused"][:1], *tried]
    if exact and tried[:1] != [Arm("fused", 0)]:
        tried.insert(0, exact[0])
    steps = {row["name"]: max(1, int(TUNING_SHARE * row["steps"])) for row in rows}
    jobs = [(which, rate) for which in tried for rate in GRID]
    found = []
    for i, (which, rate) in enumerate(jobs):
        progress.update("tuning", i / len(jobs), f"{which.name} at {rate:g}")
        run = train(which, settings.seeds[0], replace(settings, lr=rate), apart, steps[which.name])
        end = run["history"][-1]
        found.append(
            {
                "name": which.name,
                "family": which.family,
                "rate": rate,
                "error": end["error"],
                "diverged": run["diverged"],
            }
        )
    progress.update("tuning", 1.0)
    return found


def held_out(dataset: data.Dataset) -> data.Dataset:
    """Take the training part alone, its last sixth for evaluation."""
    train, apart = data.hold_out(dataset.train, dataset.name)
    return data.Dataset(dataset.name, train, apart, dataset.classes, held_out=True)


def _best(which: Arm, tuning: list[dict[str, Any]]) -> float:
    """Choose the rate of least error; of the exact arms, that of the one that was tried."""
    same = [row for row in tuning if row["name"] == which.name]
    same = same or [row for row in tuning if row["family"] == which.family]
    return float(min(same, key=lambda row: (row["diverged"], row["error"]))["rate"])


def train(
    which: Arm,
    seed: int,
    settings: Settings,
    dataset: data.Dataset,
    steps: int,
    say: Say = lambda fraction: None,
) -> dict[str, Any]:
    """Do one run of ``steps`` steps; ``settings.lr`` is its rate."""
    assert settings.lr is not None
    rule = settings.rule(settings.lr)
    learner = settings.rule(settings.share * settings.lr)
    trainer = build(which, seed, settings, dataset, steps, rule, learner)
    batches = _rows(settings, dataset, seed)
    for until in sorted({steps - i * steps // EVALUATIONS for i in range(EVALUATIONS)}):
        start = time.perf_counter()
        for _ in range(until - trainer.steps):
            advance(trainer, dataset.train, next(batches))
        if dataset.train.labels.is_cuda:
            torch.cuda.synchronize()
        trainer.seconds += time.perf_counter() - start
        trainer.steps = until
        trainer.history.append({"steps": until, "error": trainer.error(dataset.test)})
        say(until / steps)
    diverged = False
    try:
        refuse_divergence(trainer.model, which.name)
    except RuntimeError:  # a result too, and no reason to lose the other arms
        diverged = True
    return {
        "name": which.name,
        "seed": seed,
        "steps": steps,
        "seconds": trainer.seconds,
        "history": trainer.history,
        "diverged": diverged,
    }
