"""Recipes of synthetic gradients at equal steps: error by how many steps with targets there are.

Every row is the same network, from the same weights and on the same batches, beside backprop on our
kernels and a gradient that is held between two exact ones. Nothing is timed.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_dni as fd
from fused_dni.experiments import data, nets
from fused_dni.experiments.recipe_settings import BASES, PLAIN, Settings, recipe, what
from fused_dni.experiments.rival_trainers import StaleTrainer, advance
from fused_dni.experiments.run import Job, Keep, Say, do_jobs, plain, refuse_divergence
from fused_dni.experiments.settings import rule_of
from fused_dni.experiments.train import FusedTrainer, Trainer, _cosine
from fused_dni.measure.baseline import facts
from fused_dni.report.progress import Progress
from fused_dni.report.schema import Result, resumed

#: How often a run says how far it is.
REPORTS = 20


# ------------------------------------------------------------------ synthesizers of recipes alone


class Critic(nn.Module):
    """The gradient at h of a learned cross-entropy ``gain * CE(h U.T + u, y)``: one U for both
    sides, where :class:`fused_dni.CrossEntropySynthesizer` has two."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.context_features = classes
        self.logits = nn.Linear(features, classes)
        self.gain = nn.Parameter(torch.zeros(features))

    def forward(self, h: Tensor, context: Tensor) -> Tensor:
        """Predict kappa times the gradient [N, O] from h [N, O] and labels [N]."""
        wrong = self.logits(h).softmax(1) - F.one_hot(context, self.context_features)
        out: Tensor = (wrong @ self.logits.weight) * self.gain
        return out


class Averaged(nn.Module):
    """Predicts by a running average of a synthesizer, which is what learns."""

    def __init__(self, synthesizer: nn.Module, keep: float = 0.9) -> None:
        super().__init__()
        self.context_features = synthesizer.context_features
        self.live, self.keep = synthesizer, keep
        self.average = copy.deepcopy(synthesizer).requires_grad_(False)

    def forward(self, h: Tensor, context: Tensor) -> Tensor:
        """Predict; where it will learn from the error, by the synthesizer as it is."""
        if not torch.is_grad_enabled():
            averaged: Tensor = self.average(h, context)
            return averaged
        with torch.no_grad():
            for mean, now in zip(self.average.parameters(), self.live.parameters(), strict=True):
                mean.lerp_(now, 1.0 - self.keep)
        out: Tensor = self.live(h, context)
        return out


class Clipped(nn.Module):
    """A synthesizer that a row teaches by no more than the mean row's error."""

    def __init__(self, synthesizer: nn.Module) -> None:
        super().__init__()
        self.context_features = synthesizer.context_features
        self.live = synthesizer

    def forward(self, h: Tensor, context: Tensor) -> Tensor:
        """Predict."""
        out: Tensor = self.live(h, context)
        if out.requires_grad:
            out.register_hook(_clip_rows)
        return out


def _clip_rows(error: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(error, dim=1, keepdim=True)
    clipped: Tensor = error * (norms.mean() / norms.clamp(min=1e-30)).clamp(max=1.0)
    return clipped


def _synthesizer(parts: dict[str, Any], classes: int, size: int) -> nn.Module:
    kind = parts["synthesizer"]
    rank = None if parts["rank"] is None else min(parts["rank"], size)
    if kind == "cross-entropy":
        return fd.CrossEntropySynthesizer(size, classes)
    if kind == "critic":
        return Critic(size, classes)
    if kind == "mlp":
        return fd.MLPSynthesizer(size, 64, context_features=classes)
    linear = fd.LinearSynthesizer(size, rank, classes)
    if kind == "averaged":
        return Averaged(linear)
    return Clipped(linear) if kind == "clipped" else linear


# ----------------------------------------------------------------------------------------- trainers


class MuonTrainer(Trainer):
    """Our layers without rules: Muon steps the hidden weights, and Adam all else."""

    def __init__(
        self, name: str, seed: int, network: nn.Sequential, steps: int, lr: float, sg_lr: float,
        schedule: fd.Schedule,
    ) -> None:  # fmt: skip
        super().__init__(name, seed)
        self.model, self.schedule = network.train(), schedule
        layers = list(network)[:-1]
        hidden = [p for m in layers for n, p in m.named_parameters() if n == "weight"]
        taught = [p for n, p in network.named_parameters() if "synthesizer" in n]
        known = {id(p) for p in (*hidden, *taught)}
        others = [p for p in network.parameters() if id(p) not in known]
        groups: list[dict[str, Any]] = [{"params": others}, {"params": taught, "lr": sg_lr}]
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(hidden, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.Adam(groups, lr=lr),
        ]
        self._schedulers = [_cosine(optimizer, steps) for optimizer in self._optimizers]

    def step(self, x: Tensor, y: Tensor) -> None:
        with fd.condition_on(y):
            F.cross_entropy(self.model(x), y).backward()
        for optimizer, scheduler in zip(self._optimizers, self._schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        self.schedule.step()


def build(
    name: str, k: int, seed: int, settings: Settings, dataset: data.Dataset, each: int
) -> Trainer:
    """Make the trainer of a row; ``each`` is the number of steps of an epoch."""
    steps = settings.epochs * each
    network = nets.plain(
        dataset.features, settings.hidden, settings.depth, dataset.classes, seed=seed
    )
    parts = dict(PLAIN) if name in BASES else recipe(name)
    decay = 0.01 if parts["update"] == "adamw" else None
    muon = parts["update"] == "muon"
    rate, sg_rate = parts["rate"] * settings.lr, parts["sg_share"] * settings.sg_lr
    rule = None if muon else rule_of(parts["update"], rate, decay)
    if name == "stale":
        return StaleTrainer(name, seed, network, rule, steps, every=k)
    synthetic = name != "backprop"
    ours = nets.fused(
        network,
        synthetic=synthetic,
        update=rule,
        synthesizer_update=None if muon else rule_of("adam", sg_rate),
        synthesizer=partial(_synthesizer, parts, dataset.classes),
        seed=seed,
    )
    if not synthetic:
        return FusedTrainer(name, seed, ours, steps)
    warmup = round(parts["warmup"] * settings.warmup * each)
    mix, lessons = parts["mix"], parts["lessons"]
    if muon:
        schedule = fd.Schedule(ours, warmup, k, mix)
        return MuonTrainer(name, seed, ours, steps, rate, sg_rate, schedule)
    made = FusedTrainer(name, seed, ours, steps, warmup, k, mix, lessons)
    if parts["automatic"]:
        bounds = (max(1, k // 2), 2 * k)
        made.schedule = fd.Schedule(
            ours, warmup, "auto", mix, bounds=bounds, cost_ratio=float(k), lessons=lessons
        )
    return made


# ---------------------------------------------------------------------------------------------- run


def compare(
    settings: Settings,
    dataset: data.Dataset,
    *,
    previous: Result | None = None,
    keep: Keep | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> Result:
    """Train every row at every k with every seed.

    Args:
        settings: what to compare.
        dataset: on what.
        previous: an unfinished report of the same settings, to be continued.
        keep: called with the report whenever a run is finished.
        progress: where to report.
        command: for the report.

    Returns:
        The report, of kind ``recipes``: ``rows`` (what each is) and ``runs`` (a row a run: name, k
        (None for backprop), seed, ``error`` in the end, ``exact``: the share of steps that made
        true gradients, warm-up included).

    Raises:
        ValueError: settings and data do not fit, or ``previous`` is of other settings.
        RuntimeError: a network diverged.
        Interrupted: Ctrl-C; finished runs have been kept.
    """
    each = len(dataset.train.labels) // settings.batch_size
    if each < 1:
        raise ValueError(
            f"batch_size {settings.batch_size} is larger than the training set "
            f"({len(dataset.train.labels)} images)"
        )
    names = (*BASES, *settings.recipes)
    body: dict[str, Any] = {
        "dataset": dataset.name,
        "evaluated_on": "held-out part" if settings.held_out else "test set",
        "rows": {name: what(name) for name in names},
        "runs": [],
        "finished": False,
    }
    asked = Result("recipes", facts=facts(command), settings=plain(asdict(settings)), body=body)
    report = resumed(previous, asked)
    runs: list[tuple[int, int | None, str]] = [
        (seed, None if name == "backprop" else k, name)
        for seed in settings.seeds
        for name in names
        for k in settings.target_every
    ]
    runs = list(dict.fromkeys(runs))
    done = {(run["seed"], run["k"], run["name"]) for run in report["runs"]}
    jobs = [
        Job(
            f"{name}{'' if k is None else f' k={k}'} seed {seed}",
            report["runs"],
            partial(_run, name, k, seed, settings, dataset, each),
        )
        for seed, k, name in runs
        if (seed, k, name) not in done
    ]
    progress = progress or Progress(enabled=False)
    with progress:
        do_jobs(report, jobs, len(runs), keep, progress)
    return report


def _run(
    name: str,
    k: int | None,
    seed: int,
    settings: Settings,
    dataset: data.Dataset,
    each: int,
    say: Say,
) -> dict[str, Any]:
    trainer = build(name, k or 1, seed, settings, dataset, each)
    steps, exact = settings.epochs * each, 0
    for epoch in range(settings.epochs):
        order = data.permutation(len(dataset.train.labels), seed, epoch)
        for rows in data.batches(order, settings.batch_size):
            held = isinstance(trainer, StaleTrainer) and trainer.repeats()
            exact += trainer.schedule.target if trainer.schedule is not None else not held
            advance(trainer, dataset.train, rows)
            trainer.steps += 1
            if trainer.steps % max(1, steps // REPORTS) == 0:
                say(trainer.steps / steps)
    refuse_divergence(trainer.model, f"{name} diverged")
    return {
        "name": name,
        "k": k,
        "seed": seed,
        "error": trainer.error(dataset.test),
        "exact": exact / steps,
    }
