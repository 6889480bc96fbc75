"""The arms of the table of delays: what a stage of each is, and the optimizers that rivals bring.

Formulas and sources: docs/delay.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_dni as fd
from fused_dni.distributed import Stage
from fused_dni.experiments import data
from fused_dni.experiments.run import preset
from fused_dni.report import text

#: What each arm is; R is a rank, ``dense`` or ``mlp``, K a number of steps.
KINDS: dict[str, str] = {
    "backprop": "each stage waits for its gradient; Adam",
    "stale": "late gradients, applied as they are; Adam",
    "stale-warm": "the same, behind a warm-up in which stages wait as those of cDNI do",
    "nesterov": "late gradients; NAdam with momentum 0.99 for the look-ahead",
    "feedback": "late gradients; Adam, whose updates u are applied as u + (u - the one before)",
    "local": "a linear head a stage, no gradient between stages; Adam",
    "cdni-R": "synthetic gradients conditioned on what the loss is given; Adam",
    "cdni-R-every-K": "the same, synthesizers trained on every K-th step",
    "cdni-R-unconditioned": "synthetic gradients conditioned on the stage's output alone; Adam",
}
#: What the stage's gradient is made of, as ``fused_dni.distributed`` names it.
MODES = {"backprop": "exact", "local": "local", "cdni": "decoupled"}
TASKS = ("classification", "frozen-top", "reconstruction")
DEFAULT_ARMS = ("backprop", "stale", "nesterov", "feedback", "local", "cdni-16")
#: Of NAdam: momentum raised, as its authors do for late gradients (arXiv 2505.01099).
MOMENTUM = 0.99


class Arm(NamedTuple):
    """An arm.

    Attributes:
        name: as it is asked for and reported.
        family: arms of one family share a rate.
        synthesizer: a rank, "dense", "mlp" or, of arms without one, empty.
        every: synthesizers are trained on every so many steps.
        conditioned: whether they are given the target.
    """

    name: str
    family: str
    synthesizer: str = ""
    every: int = 1
    conditioned: bool = True

    @property
    def mode(self) -> str:
        """Of :class:`fused_dni.distributed.Twin`."""
        return MODES.get(self.family, "stale")

    @property
    def late(self) -> bool:
        """Whether a lag changes anything."""
        return self.mode in ("stale", "decoupled")


def arm(name: str) -> Arm:
    """The arm of that name.

    Raises:
        ValueError: there is none.
    """
    found = re.fullmatch(r"cdni-([1-9]\d*|dense|mlp)(?:-every-([1-9]\d*))?(-unconditioned)?", name)
    if found:
        return Arm(name, "cdni", found[1], int(found[2] or 1), found[3] is None)
    if name in KINDS and not name.startswith("cdni"):
        return Arm(name, name)
    raise ValueError(
        text.unknown("arm", name, KINDS) + " (R: a rank, dense or mlp; K: a whole number from 1 on)"
    )


@dataclass(frozen=True)
class Settings:
    """What the table of delays is a function of.

    Attributes:
        dataset: ``digits`` or ``mnist``.
        task: ``classification``; ``frozen-top``, the same with a last stage that stays as it was
            drawn, so that what the others make has to suit it; or ``reconstruction`` of the image
            through a layer of ``code`` units in the middle.
        arms: names of arms.
        lags: steps by which gradients are late over each cut.
        stages: number of stages, of as many hidden layers each (the first ones one more).
        hidden: units of a hidden layer.
        depth: number of hidden layers.
        code: units of the layer that a reconstruction goes through.
        batch_size: rows of a step.
        epochs: of a run.
        rates: Adam's at the start, cosine to zero. Of several the best on the held-out part of the
            training set is taken, by arm and lag.
        share: the synthesizers' rate as a share of it.
        warmup: share of a run, at its start, in which the stages of cDNI and stale-warm wait for
            their gradient, and synthesizers only learn.
        max_norm: bound of a synthetic gradient's Frobenius norm; None for none.
        seeds: one run of every arm and lag each.

    Raises:
        ValueError: an unknown name, or a number out of range.
    """

    dataset: str = "mnist"
    task: str = "classification"
    arms: tuple[str, ...] = DEFAULT_ARMS
    lags: tuple[int, ...] = (1, 5, 20)
    stages: int = 2
    hidden: int = 256
    depth: int = 4
    code: int = 16
    batch_size: int = 256
    epochs: int = 6
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    share: float = 0.5
    warmup: float = 0.167
    max_norm: float | None = None
    seeds: tuple[int, ...] = (1, 2, 3)

    def __post_init__(self) -> None:
        for name in ("arms", "lags", "rates", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} must hold one at least")
        for one in self.arms:
            arm(one)
        if self.task not in TASKS:
            raise ValueError(text.unknown("task", self.task, TASKS))
        for name, low in (
            *(("stages", 2), ("hidden", 1), ("code", 1), ("batch_size", 2), ("epochs", 1)),
            ("depth", self.stages),
        ):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if min(self.lags) < 0:
            raise ValueError(f"lags must be 0 or more, got {min(self.lags)}")
        if not 0.0 <= self.warmup < 1.0:
            raise ValueError(f"warmup must be at least 0 and below 1, got {self.warmup}")
        if self.share <= 0.0 or min(self.rates) <= 0.0:
            raise ValueError("share and rates must be positive")


#: What the datasets want different from MNIST's defaults.
PRESETS: dict[str, dict[str, Any]] = {"mnist": {}, "digits": {"batch_size": 32, "epochs": 10}}
#: For a look, in seconds.
QUICK: dict[str, Any] = {
    "hidden": 32,
    "epochs": 3,
    "lags": (1, 5),
    "rates": (3e-3,),
    "seeds": (1,),
}


def defaults(dataset: str, quick: bool = False, **changes: Any) -> Settings:
    """Settings of a dataset, with ``changes`` where they are not None."""
    given = {name: value for name, value in changes.items() if value is not None}
    return preset(Settings(dataset=dataset), PRESETS, {**(QUICK if quick else {}), **given})


# ------------------------------------------------------------------------------------------ stages


class Head(nn.Module):
    """A local loss: that of the task, of a linear map of the stage's output.

    Args:
        features: of the output.
        outputs: of the task.
        loss: ``loss(output, target)``.
    """

    def __init__(self, features: int, outputs: int, loss: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(features, outputs)
        self._loss = loss

    def forward(self, h: Tensor, target: Tensor) -> Tensor:
        """The loss, []."""
        found: Tensor = self._loss(self.linear(h), target)
        return found


def loss_of(settings: Settings) -> Any:
    """``loss(output, target)``, a mean over the batch."""
    return F.mse_loss if settings.task == "reconstruction" else F.cross_entropy


def outputs(settings: Settings, dataset: data.Dataset) -> int:
    """Width of the last stage's output."""
    return dataset.features if settings.task == "reconstruction" else dataset.classes


def build(which: Arm, settings: Settings, dataset: data.Dataset, seed: int) -> list[Stage]:
    """The stages of an arm; their weights are a function of the seed, whatever the arm.

    The global random generator is left as it was.
    """
    widths = [settings.hidden] * settings.depth
    if settings.task == "reconstruction":
        widths[settings.depth // 2] = settings.code
    sizes = list(pairwise([dataset.features, *widths]))
    goal = outputs(settings, dataset)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[list[nn.Module]] = [
            [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU()] for a, b in sizes
        ]
        head = nn.Linear(widths[-1], goal)
        stages, end = [], 0
        for i in range(settings.stages):
            begin, end = end, end + (settings.depth - i - 1) // settings.stages + 1
            module = nn.Sequential(*(m for layer in layers[begin:end] for m in layer))
            options: dict[str, Any] = {}
            if i == settings.stages - 1:
                module.append(head)
                module.requires_grad_(settings.task != "frozen-top")
            elif which.mode == "decoupled":
                # Stages are always given a context: one that is the same for all rows says nothing.
                conditions = goal if which.conditioned else 1
                options["synthesizer"] = _synthesizer(which, widths[end - 1], conditions)
                options["max_norm"] = settings.max_norm
            elif which.mode == "local":
                options["local_loss"] = Head(widths[end - 1], goal, loss_of(settings))
            stages.append(Stage(module, i, settings.stages, **options))
    return stages


def _synthesizer(which: Arm, features: int, conditions: int) -> nn.Module:
    if which.synthesizer == "mlp":
        return fd.MLPSynthesizer(features, context_features=conditions)
    rank = None if which.synthesizer == "dense" else min(int(which.synthesizer), features)
    return fd.LinearSynthesizer(features, rank, conditions)


# -------------------------------------------------------------------------------------- optimizers


class UpdateFeedback:
    """An optimizer whose updates are corrected for a delay: where it would make ``x - u``, this
    makes ``x - u - c * (u - u_before)``, with u_before its update in the step before (u in the
    first). After arXiv 2606.30634, which has one step of delay.

    Args:
        optimizer: makes the updates.
        c: share of the difference.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, c: float = 1.0) -> None:
        self.optimizer, self.c = optimizer, c
        self._before: dict[Tensor, Tensor] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's."""
        return self.optimizer.param_groups

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters that have a gradient (mutated)."""
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        at = [p.clone() for p in moved]
        self.optimizer.step()
        for p, x in zip(moved, at, strict=True):
            update = x - p
            before = self._before.get(p, update)
            p.sub_(update - before, alpha=self.c)
            self._before[p] = update

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad()


def optimizer_of(
    which: Arm, stages: Iterable[Stage], rate: float, share: float
) -> torch.optim.Optimizer | UpdateFeedback:
    """The optimizer of an arm, of all stages: what it does to one does not depend on others.

    Args:
        which: the arm.
        stages: whose parameters.
        rate: of the layers.
        share: of it, the synthesizers' rate.
    """
    synthesizers: list[nn.Parameter] = []
    for stage in stages:
        if stage.decoupled is not None:
            assert stage.decoupled.synthesizer is not None
            synthesizers += stage.decoupled.synthesizer.parameters()
    apart = {id(p) for p in synthesizers}
    layers = [p for stage in stages for p in stage.parameters() if id(p) not in apart]
    groups: list[dict[str, Any]] = [{"params": layers, "lr": rate}]
    if synthesizers:
        groups.append({"params": synthesizers, "lr": share * rate})
    if which.family == "nesterov":
        return torch.optim.NAdam(groups, betas=(MOMENTUM, 0.999))
    adam = torch.optim.Adam(groups, fused=True)
    return UpdateFeedback(adam) if which.family == "feedback" else adam
