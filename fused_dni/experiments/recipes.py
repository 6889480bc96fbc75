"""Recipes of synthetic gradients at equal steps: error by how many steps with targets there are.

Every row is the same network, from the same weights and on the same batches, beside backprop on our
kernels and a gradient that is held between two exact ones. Nothing is timed.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_dni as fd
from fused_dni.experiments import data, nets
from fused_dni.experiments.recipe_settings import BASES, PLAIN, Settings, recipe, what
from fused_dni.experiments.rival_trainers import StaleTrainer, advance
from fused_dni.experiments.run import Job, Keep, Say, begun, diverged, do_jobs
from fused_dni.experiments.settings import rule_of
from fused_dni.experiments.train import FusedTrainer, Trainer, _cosine
from fused_dni.report.progress import Progress
from fused_dni.report.schema import Result

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


class HiddenMuon(torch.optim.Optimizer):
    """Muon for the hidden weights of a network of ours, and Adam for all else, synthesizers at
    a rate of their own."""

    def __init__(self, network: nn.Module, lr: float, sg_lr: float) -> None:
        layers = list(network.children())[:-1]
        hidden = [p for m in layers for n, p in m.named_parameters() if n == "weight"]
        taught = [p for n, p in network.named_parameters() if "synthesizer" in n]
        known = {id(p) for p in (*hidden, *taught)}
        others = [p for p in network.parameters() if id(p) not in known]
        groups: list[dict[str, Any]] = [{"params": others}, {"params": taught, "lr": sg_lr}]
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(hidden, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.Adam([group for group in groups if group["params"]], lr=lr),
        ]
        super().__init__([*hidden, *others, *taught], {})
        # A scheduler's rates are theirs.
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step both."""
        for part in self._parts:
            part.step()


class MuonTrainer(Trainer):
    """Our layers without rules, by :class:`HiddenMuon`."""

    def __init__(
        self, name: str, seed: int, network: nn.Sequential, steps: int, lr: float, sg_lr: float
    ) -> None:
        super().__init__(name, seed)
        self.model = network.train()
        self.optimizer = HiddenMuon(network, lr, sg_lr)
        self.scheduler = _cosine(self.optimizer, steps)

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        with fd.condition_on(y):
            F.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()
        self.scheduler.step()
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
    lr, sg_lr = settings.lr, parts["sg_share"] * settings.sg_lr
    muon = settings.update == "muon"
    decay = 0.01 if settings.update == "adamw" else None
    rule = rule_of("adam" if muon else settings.update, lr, decay)
    if name == "stale":
        held = StaleTrainer(name, seed, network, rule, steps, every=k)
        if muon:
            held.optimizer = HiddenMuon(held.model, lr, sg_lr)
            held.scheduler = _cosine(held.optimizer, steps)
        return held
    synthetic = name != "backprop"
    ours = nets.fused(
        network,
        synthetic=synthetic,
        update=None if muon else rule,
        synthesizer_update=None if muon else rule_of("adam", sg_lr),
        synthesizer=partial(_synthesizer, parts, dataset.classes),
        seed=seed,
    )
    warmup = round(parts["warmup"] * settings.warmup * each) if synthetic else 0
    more: dict[str, Any] = {"mix": parts["mix"], "lessons": parts["lessons"]}
    every: Any = k if synthetic else 1
    if parts["automatic"]:
        every = "auto"
        more |= {"bounds": (max(1, k // 2), 2 * k), "cost_ratio": float(k)}
    made = (
        MuonTrainer(name, seed, ours, steps, lr, sg_lr)
        if muon
        else FusedTrainer(name, seed, ours, steps)
    )
    made.schedule = fd.Schedule(ours, warmup, every, **more)  # in the place of the trainer's own
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
        previous, keep, progress, command: see :class:`fused_dni.report.schema.Experiment`.

    Returns:
        The report, of kind ``recipes``: ``rows`` (what each is) and ``runs`` (a row a run: name, k
        (None for backprop), seed, ``error`` in the end, ``diverged``, ``exact``: the share of
        steps that made true gradients, warm-up included).

    Raises:
        ValueError: settings and data do not fit.
    """
    each = len(dataset.train.labels) // settings.batch_size
    if each < 1:
        raise ValueError(
            f"batch_size {settings.batch_size} is larger than the training set "
            f"({len(dataset.train.labels)} images)"
        )
    names = (*BASES, *settings.recipes)
    report = begun(
        *("recipes", settings, previous, command),
        dataset=dataset.name,
        evaluated_on="held-out part" if settings.held_out else "test set",
        rows={name: what(name) for name in names},
        runs=[],
    )
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
    return {
        "name": name,
        "k": k,
        "seed": seed,
        "error": trainer.error(dataset.test),
        "diverged": diverged(trainer.model),
        "exact": exact / steps,
    }
