"""Which arms the table of rivals has, and how each is built."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from fused_dni.experiments import data, nets
from fused_dni.experiments.rival_trainers import (
    DelayedTrainer,
    FeedbackTrainer,
    GraphTrainer,
    InBackwardTrainer,
    LocalTrainer,
    StaleTrainer,
)
from fused_dni.experiments.run import preset
from fused_dni.experiments.train import UPDATES, FusedTrainer, StockTrainer, Trainer
from fused_dni.measure.verdict.candidates import first_line
from fused_dni.report import text
from fused_dni.rules import SGD, Rule

#: What a step of each kind is; kinds with ``-K`` are followed by a number.
KINDS: dict[str, str] = {
    "backprop": "stock backprop, torch.optim with fused=True",
    "compiled": "stock backprop, forward and loss under torch.compile",
    "graph": "stock backprop, the whole step replayed as a CUDA graph",
    "in-backward": "stock backprop, a torch.optim optimizer a parameter, stepped in the backward",
    "fused": "backprop on our kernels, each layer updated where its gradient is made",
    "stale-K": "a gradient on every K-th step (our kernels, torch.optim), applied again in between "
    "without forward or backward",
    "delayed": "each update by the gradient of the step before (our kernels, torch.optim)",
    "local": "decoupled greedy learning: a linear classifier a layer, no gradient between layers "
    "(our kernels)",
    "feedback": "direct feedback alignment: the error at the logits through fixed random matrices "
    "(our kernels)",
    "cdni-K": "synthetic gradients conditioned on labels, synthesizers trained on every K-th step",
    "cdni-z-K": "synthetic gradients at the preactivation, conditioned on labels, synthesizers "
    "trained on every K-th step",
}
#: They compute the same step, so that one rate is right for all.
EXACT = ("backprop", "compiled", "graph", "in-backward", "fused")
SYNTHETIC = ("cdni-K", "cdni-z-K")
#: On a GPU a ``graph`` is among them.
DEFAULT_ARMS = (
    *("backprop", "compiled", "in-backward", "fused"),
    *("stale-4", "delayed", "local", "feedback"),
    *("cdni-1", "cdni-4", "cdni-z-1", "cdni-z-4"),
)
#: Rates at the start, with Adam; docs/rivals.md says how they were found.
RATES = {
    "exact": 3e-3,
    "stale-K": 1e-3,
    "delayed": 3e-3,
    "local": 1e-2,
    "feedback": 1e-2,
    "cdni-K": 3e-3,
    "cdni-z-K": 3e-3,
}
#: The synthesizers' rate as a share of the layers'.
SYNTHESIZER_SHARE = 0.5


class Arm(NamedTuple):
    """An arm: its kind, of :data:`KINDS`, and K (0 where there is none)."""

    kind: str
    every: int

    @property
    def name(self) -> str:
        """As it is asked for and reported."""
        return self.kind.replace("-K", f"-{self.every}")

    @property
    def what(self) -> str:
        """What its step is."""
        every = "" if self.every == 1 else f" {ordinal(self.every)}"
        return KINDS[self.kind].replace(" K-th", every)

    @property
    def family(self) -> str:
        """Arms of one family share a rate where none was tuned."""
        return "exact" if self.kind in EXACT else self.kind

    def phases(self, warmup: float) -> dict[str, float]:
        """The kinds of steps that a run has, and the share of each.

        Args:
            warmup: share of the steps in which synthesizers only learn.
        """
        k = self.every
        if self.kind == "stale-K":
            shares = {"compute": 1 / k, "repeat": 1 - 1 / k}
        elif self.kind in SYNTHETIC:
            rest = 1 - warmup
            shares = {"warm-up": warmup, "target": rest / k, "no target": rest * (1 - 1 / k)}
        else:
            shares = {"step": 1.0}
        return {phase: share for phase, share in shares.items() if share > 0}


def ordinal(number: int) -> str:
    """``1st``, ``2nd``, ``11th``."""
    teens = number % 100 in (11, 12, 13)
    return f"{number}{'th' if teens else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"


def arm(name: str) -> Arm:
    """The arm of that name.

    Raises:
        ValueError: there is none.
    """
    found = re.fullmatch(r"(.+)-([1-9]\d*)", name)
    if found and f"{found[1]}-K" in KINDS:
        return Arm(f"{found[1]}-K", int(found[2]))
    if name in KINDS and not name.endswith("-K"):
        return Arm(name, 0)
    raise ValueError(text.unknown("arm", name, KINDS) + " (K: a whole number from 1 on)")


@dataclass(frozen=True)
class Settings:
    """What the table of rivals is a function of, the machine aside.

    Attributes:
        dataset: ``digits`` or ``mnist``.
        arms: names of arms.
        seconds_per_run: wall-clock that every run is given.
        hidden: units of a hidden layer.
        depth: number of hidden layers.
        batch_size: rows of a step.
        update: ``sgd`` (momentum 0.9), ``adam`` or ``adamw``.
        lr: rate of all arms at the start, cosine to zero; None for each arm's own.
        warmup: share of a run in which cDNI's layers use the true gradient and synthesizers only
            learn.
        rank: of the synthesizers; 0 for dense.
        seeds: one run of every arm each.
        backend: force a backend of our kernels.
        device: where to run.

    Raises:
        ValueError: an unknown name, or a number out of range.
    """

    dataset: str = "mnist"
    arms: tuple[str, ...] = DEFAULT_ARMS
    seconds_per_run: float = 5.0
    hidden: int = 256
    depth: int = 3
    batch_size: int = 256
    update: str = "adam"
    lr: float | None = None
    warmup: float = 0.1
    rank: int = 16
    seeds: tuple[int, ...] = (1, 2, 3)
    backend: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.arms or not self.seeds:
            raise ValueError("at least one arm and one seed are needed")
        for name in self.arms:
            arm(name)
        if "graph" in self.arms and torch.device(self.device).type != "cuda":
            raise ValueError(
                f"arm 'graph' is a CUDA graph and needs device cuda, got {self.device!r}"
            )
        for name, low in (("hidden", 1), ("depth", 1), ("batch_size", 2), ("rank", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not 0.0 < self.seconds_per_run < math.inf:
            raise ValueError(
                f"seconds_per_run must be positive and finite, got {self.seconds_per_run}"
            )
        if not 0.0 <= self.warmup < 1.0:
            raise ValueError(f"warmup must be at least 0 and below 1, got {self.warmup}")
        if self.update not in UPDATES:
            raise ValueError(text.unknown("update", self.update, UPDATES))
        self.rule(self.lr or 0.0)

    def rule(self, lr: float) -> Rule:
        """The update rule at a rate."""
        return SGD(lr, momentum=0.9) if self.update == "sgd" else UPDATES[self.update](lr)

    def rate(self, which: Arm) -> float:
        """The rate of an arm for which none was tuned.

        Raises:
            ValueError: rates are known for Adam alone.
        """
        if self.lr is not None:
            return self.lr
        if self.update != "adam":
            raise ValueError(f"no rates are known for {self.update}: give --lr, or --tune")
        return RATES[which.family]

    def network(self, dataset: data.Dataset, seed: int) -> nn.Sequential:
        """The stock network that every arm of a seed starts from."""
        made = nets.plain(dataset.features, self.hidden, self.depth, dataset.classes, seed=seed)
        return made.to(self.device)


#: What the datasets want different from MNIST's defaults. The digits are 42 times fewer.
PRESETS: dict[str, dict[str, Any]] = {
    "mnist": {},
    "digits": {"batch_size": 64, "seconds_per_run": 1.5},
}


def defaults(dataset: str, **changes: Any) -> Settings:
    """Settings of a dataset, with ``changes`` where they are not None."""
    if changes.get("arms") is None and str(changes.get("device")).startswith("cuda"):
        changes["arms"] = (*DEFAULT_ARMS[:2], "graph", *DEFAULT_ARMS[2:])
    return preset(Settings(dataset=dataset), PRESETS, changes)


def build(
    which: Arm,
    seed: int,
    settings: Settings,
    dataset: data.Dataset,
    steps: int,
    rule: Rule,
    synthesizer_rule: Rule | None = None,
    phase: str = "",
) -> Trainer:
    """The trainer of an arm.

    Args:
        which: the arm.
        seed: of the weights, auxiliary classifiers and feedback matrices.
        settings: the rest.
        dataset: on the settings' device.
        steps: over which the rate falls to zero.
        rule: of the network.
        synthesizer_rule: of synthesizers; as ``rule`` if None.
        phase: one of :meth:`Arm.phases` in which every step is to be; the arm's own sequence if
            empty.
    """
    network = settings.network(dataset, seed)
    name = which.name
    first = data.Split(*(part[: settings.batch_size] for part in dataset.train))
    if which.kind in ("backprop", "compiled"):
        if which.kind == "compiled":
            torch.compiler.reset()  # else the ninth network of one process would run uncompiled
        try:
            return StockTrainer(name, seed, network, rule, steps, first)
        except Exception as error:  # whatever a compiler may raise
            if which.kind == "backprop":
                raise
            raise ValueError(
                f"torch.compile does not work here ({first_line(error)}): leave the arm "
                "'compiled' out"
            ) from error
    if which.kind == "graph":
        return GraphTrainer(name, seed, network, rule, steps, first)
    if which.kind == "in-backward":
        return InBackwardTrainer(name, seed, network, rule, steps)
    backend = settings.backend
    if which.kind == "stale-K":
        every = {"compute": 1, "repeat": 1_000_000_000}.get(phase, which.every)
        return StaleTrainer(name, seed, network, rule, steps, every=every, backend=backend)
    if which.kind == "delayed":
        return DelayedTrainer(name, seed, network, rule, steps, backend=backend)
    if which.kind == "local":
        return LocalTrainer(name, seed, network, rule, steps, backend)
    if which.kind == "feedback":
        return FeedbackTrainer(name, seed, network, rule, steps, backend)
    synthetic = which.kind in SYNTHETIC
    ours = nets.fused(
        network,
        synthetic=synthetic,
        update=rule,
        synthesizer_update=synthesizer_rule,
        rank=settings.rank or None,
        context_features=dataset.classes if synthetic else 0,
        interface="preactivation" if which.kind == "cdni-z-K" else "output",
        backend=backend,
        seed=seed,
    ).to(settings.device)
    warmup_steps = min(round(settings.warmup * steps), steps - 1) if synthetic else 0
    every_or_never: int | None = max(1, which.every)
    if phase in ("warm-up", "target", "no target"):
        warmup_steps = steps if phase == "warm-up" else 0
        every_or_never = None if phase == "no target" else 1
    return FusedTrainer(name, seed, ours, steps, warmup_steps, every_or_never)
