"""Accuracy when the gradient is late: a network in stages, each gradient so many steps late over
each cut, by synthetic gradients and by what else does not wait.

Nothing is timed: all arms are trained in one process by :class:`fused_dni.distributed.Twin`, which
computes what a pipeline of processes computes at that delay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fused_dni as fd
from fused_dni.distributed import Stage, Twin
from fused_dni.experiments import data
from fused_dni.experiments.delay_arms import UpdateFeedback, build, loss_of, optimizer_of
from fused_dni.experiments.delay_settings import KINDS, Arm, Settings, arm
from fused_dni.experiments.rival_arms import ordinal
from fused_dni.experiments.rivals import held_out
from fused_dni.experiments.run import Job, Keep, Say, begun, do_jobs
from fused_dni.experiments.train import _cosine
from fused_dni.report.progress import Progress
from fused_dni.report.schema import Result

#: Length of a run that chooses a rate, as a share of a run's.
TUNING_SHARE = 0.4
#: How often a run says how far it is.
REPORTS = 20


def compare(
    settings: Settings,
    dataset: data.Dataset,
    *,
    previous: Result | None = None,
    keep: Keep | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> Result:
    """Train every arm at every lag with every seed.

    Args:
        settings: what to compare.
        dataset: on what.
        previous, keep, progress, command: see :class:`fused_dni.report.schema.Experiment`.

    Returns:
        The report, of kind ``delay``: ``tuning`` (error on the held-out part by family, lag and
        rate) and ``runs`` (a row a run: name, lag (None where it changes nothing), seed, rate,
        ``error`` (share of images misclassified, or of variance not reconstructed), ``diverged``,
        and ``cosines``, by cut, of predictions with the targets that came for them).

    Raises:
        ValueError: settings and data do not fit.
    """
    progress = progress or Progress(enabled=False)
    if len(held_out(dataset).train.labels) < settings.batch_size:
        raise ValueError(
            f"batch_size {settings.batch_size} is larger than the training set without its "
            "held-out part"
        )
    named = {name: _what(arm(name)) for name in settings.arms}
    given = (settings, previous, command)
    report = begun("delay", *given, dataset=dataset.name, arms=named, tuning=[], runs=[])
    arms = [arm(name) for name in settings.arms]
    runs = [
        (seed, lag if which.late else None, which)
        for lag in settings.lags
        for seed in settings.seeds
        for which in arms
    ]
    runs = list(dict.fromkeys(runs))
    done = {(run["seed"], run["lag"], run["name"]) for run in report["runs"]}

    def job(seed: int, lag: int | None, which: Arm) -> Job:
        def work(say: Say) -> dict[str, Any]:
            # In front of the runs that need it.
            rate = _rate(which, lag, settings, dataset, report, keep, say)
            return train(which, lag, seed, settings, dataset, rate, say=say)

        late = "" if lag is None else f" lag {lag}"
        return Job(f"{which.name}{late} seed {seed}", report["runs"], work)

    jobs = [job(*run) for run in runs if (*run[:2], run[2].name) not in done]
    with progress:
        do_jobs(report, jobs, len(runs), keep, progress)
    return report


def _what(which: Arm) -> str:
    if which.family != "cdni":
        return KINDS[which.name]
    said = KINDS["cdni-R" if which.conditioned else "cdni-R-unconditioned"]
    if which.targets == "true":
        said = said.replace("; Adam", f", {KINDS['cdni-R-true']}")
    every = (
        "" if which.every == 1 else f", synthesizers trained on every {ordinal(which.every)} step"
    )
    return said.replace("; Adam", f"{every}; Adam")


def _rate(
    which: Arm,
    lag: int | None,
    settings: Settings,
    dataset: data.Dataset,
    report: Result,
    keep: Keep | None,
    say: Say,
) -> float:
    """Choose the rate of least error on the held-out part, in shorter runs of the family."""
    if len(settings.rates) == 1:
        return settings.rates[0]
    tried = [t for t in report["tuning"] if (t["family"], t["lag"]) == (which.family, lag)]
    for rate in settings.rates:
        if rate in [row["rate"] for row in tried]:
            continue
        run = train(
            which,
            lag,
            settings.seeds[0],
            settings,
            held_out(dataset),
            rate,
            share=TUNING_SHARE,
            say=say,
        )
        row = {"name": which.name, "family": which.family, "lag": lag, "rate": rate}
        row |= {name: run[name] for name in ("error", "diverged")}
        tried.append(row)
        report["tuning"].append(row)
        if keep is not None:
            keep(report)
    return float(min(tried, key=lambda row: (row["diverged"], row["error"]))["rate"])


def train(
    which: Arm,
    lag: int | None,
    seed: int,
    settings: Settings,
    dataset: data.Dataset,
    rate: float,
    *,
    share: float = 1.0,
    say: Say = lambda fraction: None,
) -> dict[str, Any]:
    """Train one arm once.

    Args:
        which: the arm.
        lag: of its gradients, in steps; None where it changes nothing.
        seed: of weights and batches, the same for all arms.
        settings, dataset: as in :func:`compare`.
        rate: of the optimizer at the start.
        share: of the settings' epochs that the run is long.
        say: called with the part of the run that is done.

    Returns:
        A row of ``runs``, see :func:`compare`.
    """
    stages = build(which, settings, dataset, seed)
    loss = loss_of(settings)
    cuts = reversed(range(settings.stages))  # above each
    lags = [(lag or 0) * (n if settings.each_cut and which.relayed else 1) for n in cuts]
    options = {"targets": which.targets} if which.mode == "decoupled" else {}
    twin = Twin(stages, loss=loss, mode=which.mode, lag=lags, **options)
    optimizer = optimizer_of(which, stages, rate, settings.share)
    count = len(dataset.train.labels)
    steps = max(1, round(share * settings.epochs * (count // settings.batch_size)))
    inner = optimizer.optimizer if isinstance(optimizer, UpdateFeedback) else optimizer
    scheduler = _cosine(inner, steps)
    warmup = round(settings.warmup * steps)
    waiting = Twin(stages, loss=loss, mode="exact") if which.family == "stale-warm" else twin
    schedules = [
        fd.Schedule(stage, warmup, which.every) for stage in stages if stage.decoupled is not None
    ]
    step = epoch = 0
    while step < steps:
        order = data.permutation(count, seed, epoch)
        for rows in data.batches(order, settings.batch_size):
            if step == steps:
                break
            x, y = data.pick(dataset.train, rows)
            goal = x if settings.task == "reconstruction" else y
            (waiting if step < warmup else twin).step(
                x, goal, goal if which.conditioned else torch.zeros_like(y)
            )
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            for schedule in schedules:
                schedule.step()
            step += 1
            if step % max(1, steps // REPORTS) == 0:
                say(step / steps)
        epoch += 1
    finite = all(bool(torch.isfinite(p).all()) for stage in stages for p in stage.parameters())
    return {
        "name": which.name,
        "lag": lag,
        "seed": seed,
        "rate": rate,
        "error": error(stages, settings, dataset.test),
        "diverged": not finite,
        "cosines": [_cosine_of(w.ages.report()) for w in twin.workers if w.mailbox is not None],
    }


def _cosine_of(ages: dict[str, Any]) -> float | None:
    """Return that of predictions with what came for them, at the one age that they had."""
    rows = ages["by_age"]
    found: float | None = rows[-1]["cosine"] if rows else None
    return found


@torch.no_grad()
def error(stages: list[Stage], settings: Settings, split: data.Split) -> float:
    """Measure the share of images misclassified, or of their variance not reconstructed."""
    for stage in stages:
        stage.eval()
    wrong = 0.0
    for x, y in zip(split.images.split(2000), split.labels.split(2000), strict=True):
        h: Tensor = x
        for stage in stages:
            h = stage(h)
        if settings.task == "reconstruction":
            wrong += float((h - x).square().sum())
        else:
            wrong += float((h.argmax(1) != y).sum())
    for stage in stages:
        stage.train()
    if settings.task != "reconstruction":
        return wrong / len(split.labels)
    mean = split.images.mean(0)
    return wrong / float((split.images - mean).square().sum())
