"""The arms of the table of delays: what a stage of each is, and the optimizers that rivals bring.

Formulas and sources: docs/delay.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_dni as fd
from fused_dni.distributed import Stage
from fused_dni.experiments import data
from fused_dni.experiments.delay_settings import MOMENTUM, Arm, Settings

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
        """Compute the loss, []."""
        found: Tensor = self._loss(self.linear(h), target)
        return found


def loss_of(settings: Settings) -> Any:
    """Return ``loss(output, target)``, a mean over the batch."""
    return F.mse_loss if settings.task == "reconstruction" else F.cross_entropy


def outputs(settings: Settings, dataset: data.Dataset) -> int:
    """Return the width of the last stage's output."""
    return dataset.features if settings.task == "reconstruction" else dataset.classes


def build(which: Arm, settings: Settings, dataset: data.Dataset, seed: int) -> list[Stage]:
    """Make the stages of an arm; their weights are a function of the seed, whatever the arm.

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
    """Make the optimizer of an arm, of all stages: what it does to one depends on no other.

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
