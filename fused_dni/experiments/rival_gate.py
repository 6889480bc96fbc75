"""Rivals must compute what they claim before their times and errors go into a table.

Each arm makes one step of SGD at rate 1 (two, where the second uses a gradient again or late),
which moves every parameter by the gradient that the arm used; what it should be comes from the
arm's formula, written down here in plain PyTorch and float64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_dni as fd
from fused_dni.experiments import data
from fused_dni.experiments.rival_trainers import (
    DelayedTrainer,
    FeedbackTrainer,
    LocalTrainer,
    StaleTrainer,
    advance,
)
from fused_dni.experiments.train import Trainer
from fused_dni.measure.verdict.errors import GateError


def check(trainer: Trainer, network: nn.Sequential, split: data.Split, rows: Tensor) -> float:
    """Hold the first steps of ``trainer`` against its formula.

    Args:
        trainer: new, at SGD of rate 1 without momentum, on the weights of ``network``; trained.
        network: the stock network; left as it is.
        split: data.
        rows: of the batches of the first steps, one row of indices each.

    Returns:
        The largest deviation of a parameter, in parts of the tolerance.

    Raises:
        GateError: it is larger than the tolerance.
    """
    before = values(trainer)
    batches = [data.pick(split, picked) for picked in rows]
    moves = formula(trainer, copy.deepcopy(network).double(), batches)
    for picked in rows:
        advance(trainer, split, picked)
    # Rounding of a sum grows with the root of its length, and every layer adds its own, forward
    # and backward. The subtraction rounds at the weight's size.
    eps = torch.finfo(torch.float32).eps
    matrices = [p for p in before if p.dim() > 1]
    length = max(rows.shape[1], *(p.shape[1] for p in matrices))
    share = 8.0 * (1 + len(matrices)) * eps * math.sqrt(length)
    worst = 0.0
    for was, now, move in zip(before, values(trainer), moves, strict=True):
        wrong = (was - move - now).abs().max().item()
        allowed = share * move.abs().max().item() + 4 * eps * was.abs().max().item()
        worst = max(worst, wrong / allowed if allowed else (math.inf if wrong else 0.0))
    if not worst <= 1.0:
        raise GateError(
            f"no comparison: {trainer.name} deviates from its formula by {worst:.3g} times the "
            "tolerance, so it must not be compared"
        )
    return worst


def steps_to_check(trainer: Trainer) -> int:
    """Say how many steps show what is particular to this arm."""
    if isinstance(trainer, StaleTrainer):
        return min(2, trainer.every)
    if isinstance(trainer, DelayedTrainer):
        return 1 + trainer.delay + bool(trainer.c)  # the first update has none before it
    return 1


def values(trainer: Trainer) -> list[Tensor]:
    """Copy in float64 all parameters but those of synthesizers: the network's in the order of
    the stock network, then those of auxiliary classifiers."""
    modules: list[nn.Module] = [trainer.model]
    if isinstance(trainer, LocalTrainer):
        modules.append(trainer.helpers)
    learners = {
        id(p)
        for module in modules
        for part in module.modules()
        if isinstance(part, fd.Synthesizer)
        for p in part.parameters()
    }
    return [p.detach().double() for m in modules for p in m.parameters() if id(p) not in learners]


def formula(
    trainer: Trainer, network: nn.Sequential, batches: Sequence[data.Split]
) -> list[Tensor]:
    """Compute by how much the first ``len(batches)`` steps should lower each parameter.

    Args:
        trainer: gives method and constants (delay, feedback matrices, auxiliary classifiers).
        network: the stock network in float64.
        batches: one a step.
    """
    corrected = isinstance(trainer, DelayedTrainer) and trainer.c > 0.0
    # With g of the first batch and g' of the second, both at the first weights: g, then
    # g' + c (g' - g), which for c = 1 is 2 g' together.
    first = batches[1 if corrected else 0]
    x, y = first.images.double(), first.labels
    if isinstance(trainer, LocalTrainer):
        return _local(network, [_plain(module) for module in trainer.helpers.children()], x, y)
    if isinstance(trainer, FeedbackTrainer):
        return _feedback(network, [matrix.double() for matrix in trainer.feedback], x, y)
    gradients = torch.autograd.grad(F.cross_entropy(network(x), y), list(network.parameters()))
    # Stale: the first gradient in every step so far; delayed: in the last one alone.
    times = len(batches) if isinstance(trainer, StaleTrainer) else 1 + corrected
    return [times * g for g in gradients]


def _segments(network: nn.Sequential) -> Iterator[nn.Sequential]:
    """Yield hidden layers: Linear, BatchNorm and ReLU each."""
    parts = list(network)
    return (nn.Sequential(*parts[i : i + 3]) for i in range(0, len(parts) - 1, 3))


def _plain(module: Any) -> nn.Linear:
    linear: nn.Linear = copy.deepcopy(module).to_linear().double()
    return linear


def _local(
    network: nn.Sequential, helpers: Sequence[nn.Linear], x: Tensor, y: Tensor
) -> list[Tensor]:
    head = network[-1]
    of_layers: list[Tensor] = []
    of_classifiers: list[Tensor] = []
    h = x
    for segment, classifier in zip(_segments(network), [*helpers, head], strict=True):
        h = segment(h.detach())
        own = list(segment.parameters())
        made = torch.autograd.grad(
            F.cross_entropy(classifier(h), y), [*own, *classifier.parameters()]
        )
        of_layers += made[: len(own)]
        of_classifiers += made[len(own) :]
    # The head belongs to the network, the auxiliary classifiers follow it.
    return [*of_layers, *of_classifiers[-2:], *of_classifiers[:-2]]


def _feedback(
    network: nn.Sequential, matrices: Sequence[Tensor], x: Tensor, y: Tensor
) -> list[Tensor]:
    with torch.no_grad():
        # In training mode, as the step: batch statistics.
        logits = copy.deepcopy(network)(x)
        error = (logits.softmax(1) - F.one_hot(y, logits.shape[1])) / len(y)
    gradients: list[Tensor] = []
    h = x
    for segment, matrix in zip(_segments(network), matrices, strict=True):
        h = segment(h.detach())
        gradients += torch.autograd.grad(h, list(segment.parameters()), error @ matrix)
    head = network[-1]
    logits = head(h.detach())
    gradients += torch.autograd.grad(F.cross_entropy(logits, y), list(head.parameters()))
    return gradients
