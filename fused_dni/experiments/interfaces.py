"""How far synthetic gradients are from the true ones, by depth: each interface's target is made by
the interface above it, so errors add up on the way down.

Networks of several depths are trained by label-conditioned DNI for the same number of steps. Then
the synthetic gradient of each layer is held against the true gradient of the whole network
(:func:`fused_dni.diagnostics`), averaged over training batches. Beside them stand networks of the
largest depth with fewer interfaces, and backprop of every depth, on the same kernels and batches.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

import fused_dni as fd
from fused_dni.experiments import data, nets
from fused_dni.experiments.run import Job, Keep, Say, begun, do_jobs, refuse_divergence
from fused_dni.experiments.settings import Interfaces as Settings
from fused_dni.experiments.train import FusedTrainer
from fused_dni.report.kinds.interfaces import named
from fused_dni.report.progress import Progress
from fused_dni.report.schema import Result
from fused_dni.rules import Adam

#: How often a run reports its progress.
REPORTS = 20
#: Share of the steps, at the end, over which predictions are compared with what arrived.
LAST = 0.1


def measure(
    settings: Settings,
    dataset: data.Dataset,
    *,
    previous: Result | None = None,
    keep: Keep | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> Result:
    """Train every network with every seed and look at its gradients.

    Args:
        settings: what to compare.
        dataset: on what.
        previous, keep, progress, command: see :class:`fused_dni.report.schema.Experiment`.

    Returns:
        The report, of kind ``interfaces``. ``networks`` has a row a network: ``depth``, ``every``
        (layers an interface; 0 for backprop) and ``runs``, one a seed, with the ``error`` on the
        test set and ``layers``: for each layer with an interface its number (from 1, at the input),
        ``above`` (how many interfaces are between it and the loss), ``true_cosine`` and
        ``true_norm_ratio`` (|synthetic| / |true|) against the true gradient, and
        ``arrived_cosine`` against what arrived in the last tenth of the training; None where a
        gradient was zero.

    Raises:
        ValueError: settings and data do not fit.
        RuntimeError: a network diverged.
    """
    progress = progress or Progress(enabled=False)
    if len(dataset.train.labels) < settings.batch_size:
        raise ValueError(
            f"batch_size {settings.batch_size} is larger than the training set "
            f"({len(dataset.train.labels)} images)"
        )
    networks = [
        {"depth": depth, "every": every, "runs": []} for depth, every in settings.networks()
    ]
    given = (settings, previous, command)
    report = begun("interfaces", *given, dataset=dataset.name, networks=networks)
    rows = report["networks"]
    jobs = [
        Job(
            f"{named(row['depth'], row['every'])}, seed {seed}",
            row["runs"],
            partial(_run, row["depth"], row["every"], seed, settings, dataset),
        )
        for seed in settings.seeds
        for row in rows
        if seed not in [run["seed"] for run in row["runs"]]
    ]
    with progress:
        do_jobs(report, jobs, len(settings.seeds) * len(rows), keep, progress)
    return report


def _run(
    depth: int,
    every: int,
    seed: int,
    settings: Settings,
    dataset: data.Dataset,
    say: Say,
) -> dict[str, Any]:
    network = nets.plain(dataset.features, settings.hidden, depth, dataset.classes, seed=seed)
    decoupled = range(every - 1, depth, every) if every else ()
    ours = nets.fused(
        network,
        synthetic=decoupled,
        update=Adam(settings.lr),
        synthesizer_update=Adam(settings.sg_lr),
        rank=settings.rank or None,
        context_features=dataset.classes,
        backend=settings.backend,
        seed=seed,
    )
    warmup_steps = min(round(settings.warmup * settings.steps), settings.steps - 1)
    trainer = FusedTrainer(
        named(depth, every), seed, ours, settings.steps, warmup_steps if every else 0
    )
    batches = _batches(settings, dataset, seed)
    report_every = max(1, settings.steps // REPORTS)
    for step, batch in enumerate(itertools.islice(batches, settings.steps)):
        if every and step == settings.steps - max(1, round(LAST * settings.steps)):
            fd.diagnostics(trainer.model, reset=True)
        trainer.step(*batch)
        if step % report_every == 0:
            say(step / settings.steps)
    refuse_divergence(trainer.model, f"{trainer.name} diverged")
    layers = _compared(trainer, settings, batches, list(decoupled)) if every else []
    say(1.0)
    return {"seed": seed, "error": trainer.error(dataset.test), "layers": layers}


def _batches(settings: Settings, dataset: data.Dataset, seed: int) -> Iterator[data.Split]:
    """Yield batch after batch, epoch after epoch: the same ones for all networks of a seed."""
    for epoch in itertools.count():
        order = data.permutation(len(dataset.train.labels), seed, epoch)
        for rows in data.batches(order, settings.batch_size):
            yield data.pick(dataset.train, rows)


def _compared(
    trainer: FusedTrainer,
    settings: Settings,
    batches: Iterator[data.Split],
    decoupled: list[int],
) -> list[dict[str, Any]]:
    """Compare the predictions of each interface with the true gradient, over the next batches."""
    found = []
    for batch in itertools.islice(batches, settings.batches):

        def loss(x: Tensor = batch.images, y: Tensor = batch.labels) -> Tensor:
            with fd.condition_on(y):
                return F.cross_entropy(trainer.model(x), y)

        found.append(fd.diagnostics(trainer.model, loss))
    rows: list[dict[str, Any]] = []
    for above, layer in enumerate(reversed(decoupled)):
        key = str(layer)
        row = {
            "layer": layer + 1,
            "above": above,
            "arrived_cosine": _number(found[0][key]["cosine"]),
        }
        for name in ("true_cosine", "true_norm_ratio"):
            row[name] = _number(statistics.fmean(batch[key][name] for batch in found))
        rows.append(row)
    return rows[::-1]


def _number(value: float) -> float | None:
    """Return None for what JSON has no number for: the cosine with a gradient that is zero."""
    return value if math.isfinite(value) else None
