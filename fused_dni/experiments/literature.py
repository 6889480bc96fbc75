"""The tables of Jaderberg et al. 2016 (arXiv 1608.05343) on MNIST, with this library's layers.

Every run is a function of its settings and its seed: weights and batches are the same for all arms
of a seed. Nothing is timed; what an arm needs is counted in steps and updates.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fused_dni as fd
from fused_dni.experiments import data, literature_clocks, train
from fused_dni.experiments.literature_settings import Run, Settings, every, exact_steps
from fused_dni.experiments.run import Job, Keep, Say, begun, diverged, do_jobs
from fused_dni.experiments.settings import Training
from fused_dni.report.progress import Progress
from fused_dni.report.schema import Result


def reproduce(
    settings: Settings,
    dataset: data.Dataset,
    *,
    previous: Result | None = None,
    keep: Keep | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> Result:
    """Train all arms of the tables with every seed.

    Args:
        settings: which tables, and how.
        dataset: on what.
        previous, keep, progress, command: see :class:`fused_dni.report.schema.Experiment`.

    Returns:
        The report, of kind ``literature``. ``runs`` has a row a run: ``table``, ``name``, ``size``
        (hidden layers; of ``clocks`` the window T), ``seed``, ``error`` at the end, ``diverged``,
        ``history`` (a row an evaluation) and, of the recipe, ``exact`` (the share of exact steps)
        and ``every`` (k).

    Raises:
        ValueError: settings and data do not fit.
    """
    progress = progress or Progress(enabled=False)
    train.steps_per_epoch(_training(settings, settings.depth), dataset)  # refuses a batch too large
    where = "held-out part" if dataset.held_out else "test set"
    given = (settings, previous, command)
    report = begun("literature", *given, dataset=dataset.name, evaluated_on=where, runs=[])
    done = {tuple(run[name] for name in Run._fields) for run in report["runs"]}
    all_runs = settings.runs()
    jobs = [
        Job(
            f"{run.table} {run.size} {run.name}, seed {run.seed}",
            report["runs"],
            partial(_run, run, settings, dataset),
        )
        for run in all_runs
        if run not in done
    ]
    with progress:
        do_jobs(report, jobs, len(all_runs), keep, progress)
    return report


def _training(settings: Settings, depth: int) -> Training:
    """Make the settings by which ``fused-dni train`` builds the same networks."""
    return Training(
        dataset=settings.dataset,
        hidden=settings.hidden,
        batch_size=settings.batch_size,
        depth=depth,
        epochs=settings.epochs,
        lr=settings.lr,
        sg_lr=settings.sg_lr,
        rank=settings.rank,
    )


def _run(run: Run, settings: Settings, dataset: data.Dataset, say: Say) -> dict[str, Any]:
    of_run = run._asdict()
    if run.table == "clocks":
        made = literature_clocks.train(run.name, run.size, run.seed, settings, dataset, say)
        return {**of_run, **made}
    training = _training(settings, run.size)
    steps = settings.epochs * train.steps_per_epoch(training, dataset)
    warmup = round(settings.warmup * steps)
    counted: dict[str, Any] = {}
    build = partial(train.build, seed=run.seed, dataset=dataset)
    if run.name in ("none", "backprop"):
        trainer = build("fused", settings=training)
        if run.name == "none":
            for layer in list(trainer.model.children())[:-1]:
                layer.requires_grad_(False)
    elif run.name == "dni":  # dense: nothing but h to predict from
        trainer = build("dni k=1", settings=replace(training, warmup_steps=warmup, rank=0))
    else:
        k = 1
        recipe: dict[str, Any] = {}
        if run.name.startswith("recipe"):
            k = every(float(run.name.split()[1]), warmup, steps)
            counted = {"every": k, "exact": exact_steps(k, warmup, steps) / steps}
            recipe = {part: getattr(settings, part) for part in ("synthesizer", "lessons", "mix")}
        elif run.name == "cdni-cross-entropy":
            recipe = {"synthesizer": "cross-entropy"}
        chosen = replace(training, warmup_steps=warmup, **recipe)
        trainer = build(f"cdni k={k}", settings=chosen)
        if run.name == "sparse":
            trainer = _Sparse(trainer, settings.probability)
        elif run.name == "unlocked":
            trainer = _Unlocked(trainer, dataset.features, settings, steps)
    epochs(trainer, training, dataset, say)
    found = {"error": trainer.history[-1]["error"], "diverged": diverged(trainer.model)}
    return {**of_run, **found, **counted, "history": trainer.history}


def epochs(trainer: train.Trainer, settings: Training, dataset: data.Dataset, say: Say) -> None:
    """Train for the settings' epochs, with an evaluation behind each."""
    count = len(dataset.train.labels)
    steps = settings.epochs * train.steps_per_epoch(settings, dataset)
    for epoch in range(settings.epochs):
        order = data.permutation(count, trainer.seed, epoch)
        for rows in data.batches(order, settings.batch_size):
            trainer.step(*data.pick(dataset.train, rows))
            trainer.steps += 1
            if trainer.steps % 20 == 0:
                say(trainer.steps / (steps + 1))
        trainer.history.append({"steps": trainer.steps, "error": trainer.error(dataset.test)})


class _Sparse(train.FusedTrainer):
    """A network whose layers, behind the warm-up, are updated at random, each for itself, and send
    the layer below a target in those steps alone."""

    def __init__(self, made: train.Trainer, probability: float) -> None:
        train.Trainer.__init__(self, made.name, made.seed)
        self.model, self.optimizer, self.scheduler = made.model, made.optimizer, made.scheduler
        self.schedule = made.schedule
        self._layers = list(self.model.children())
        self._draw, self._probability = random.Random(made.seed), probability

    def step(self, x: Tensor, y: Tensor) -> None:
        phase = self.schedule.phase()
        probability = 1.0 if phase.warmup else self._probability
        active = [self._draw.random() < probability for _ in self._layers]
        for layer, moves, above in zip(self._layers, active, [*active[1:], True], strict=True):
            assert isinstance(layer, fd.modules.base.DecoupledModule)
            for parameter in layer.local_parameters():
                if parameter is not None:
                    parameter.requires_grad_(moves)
            layer.phase = replace(phase, target=above)
        with fd.condition_on(y):
            loss = self.model(x, target=y)
        if loss.requires_grad:
            loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.schedule.step()


class _Chain(nn.Module):
    """Layers one behind the other; all but the first have predicted inputs."""

    def __init__(self, first: nn.Module, rest: list[fd.SyntheticInput]) -> None:
        super().__init__()
        self.first, self.rest = first, nn.ModuleList(rest)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        h = self.first(x)
        for layer in self.rest[:-1]:
            h = layer(h, source=x)
        more = {} if target is None else {"target": target}
        out: Tensor = self.rest[-1](h, source=x, **more)
        return out


class _Unlocked(train.FusedTrainer):
    """A network in which every layer but the first takes a prediction of its input, made from the
    image by one hidden layer."""

    def __init__(self, made: train.Trainer, features: int, settings: Settings, steps: int) -> None:
        first, *rest = made.model.children()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(made.seed + 2)
            wrapped = [
                fd.SyntheticInput(
                    layer,
                    nn.Sequential(
                        nn.Linear(features, settings.input_hidden, bias=False),
                        nn.BatchNorm1d(settings.input_hidden),
                        nn.ReLU(),
                        nn.Linear(settings.input_hidden, settings.hidden),
                        nn.ReLU(),
                    ),
                )
                for layer in rest
            ]
        warmup = made.schedule.warmup_steps
        super().__init__(made.name, made.seed, _Chain(first, wrapped), steps, warmup, 1)
        parameters = [p for layer in wrapped for p in layer.model.parameters()]
        self.inputs = torch.optim.Adam(parameters, settings.lr)
        self.inputs_scheduler = train._cosine(self.inputs, steps)

    def step(self, x: Tensor, y: Tensor) -> None:
        self.inputs.zero_grad()
        super().step(x, y)
        self.inputs.step()
        self.inputs_scheduler.step()
