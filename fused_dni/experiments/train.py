"""The training run behind ``fused-dni train``: the paper's network by several methods at once.

Methods take turns epoch by epoch in one process, so that a machine that slows down slows all of
them down; what is timed is the training step with the picking of its batch, and nothing else (no
evaluation, checkpoint or progress bar). All see the same initial weights and the same batches.

A run is a function of its settings: batches depend on (seed, epoch), weights on the seed. Killed at
any moment and resumed from its last checkpoint it continues bit by bit as if nothing had happened
(same machine, thread count and instruction set).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_dni as fd
from fused_dni.experiments import data, nets, run
from fused_dni.experiments.settings import Training as Settings
from fused_dni.measure import timing
from fused_dni.measure.baseline import stock_optimizer
from fused_dni.measure.verdict.result import Verdict
from fused_dni.modules.base import DecoupledModule
from fused_dni.report.kinds.train import Outcome
from fused_dni.report.progress import Progress
from fused_dni.report.schema import Result
from fused_dni.rules import Rule

# -------------------------------------------------------------------------------------- trainers


class Trainer(run.Trainer):
    """One network under one method: :meth:`step` is what gets timed."""

    KEPT = ("model", "optimizer", "scheduler", "schedule", "seconds", "steps", "history")
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    schedule: Any = None

    def __init__(self, name: str, seed: int) -> None:
        super().__init__(name, seed)
        self.steps = 0

    def step(self, x: Tensor, y: Tensor) -> None:
        """Train by one step."""
        raise NotImplementedError

    def error(self, split: data.Split) -> float:
        """Return the share of wrong answers, in eval mode."""
        self.model.eval()
        wrong = 0
        with torch.no_grad():
            for x, y in zip(split.images.split(10_000), split.labels.split(10_000), strict=True):
                wrong += int((self.model(x).argmax(1) != y).sum())
        self.model.train()
        return wrong / len(split.labels)


def _cosine(
    optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.CosineAnnealingLR:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, steps))


class StockTrainer(Trainer):
    """Backprop as everybody writes it, with the fused optimizer; optionally compiled."""

    def __init__(
        self, name: str, seed: int, network: nn.Module, rule: Rule, steps: int, sample: data.Split
    ) -> None:
        super().__init__(name, seed)
        self.model = network.train()
        self.optimizer = stock_optimizer(network, rule)
        self.scheduler = _cosine(self.optimizer, steps)
        self.compile_seconds = 0.0

        def loss(x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(network(x), y)

        self._loss: Callable[[Tensor, Tensor], Tensor] = loss
        if name == "compiled":
            self._loss = torch.compile(loss)
            # Compile now, outside of the clock, and put back what the trial moved.
            before = {key: value.clone() for key, value in network.state_dict().items()}
            start = time.perf_counter()
            for _ in range(2):
                self._loss(*sample).backward()
                self.optimizer.zero_grad()
            self.compile_seconds = time.perf_counter() - start
            network.load_state_dict(before)

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        self._loss(x, y).backward()
        self.optimizer.step()
        self.scheduler.step()


class FusedTrainer(Trainer):
    """Our layers, which update themselves: by exact gradients or by synthetic ones. The loss is
    theirs too where the head has it."""

    def __init__(
        self,
        name: str,
        seed: int,
        network: nn.Module,
        steps: int,
        warmup_steps: int = 0,
        target_every: int | None = 1,
        mix: float = 0.0,
        lessons: int = 1,
    ) -> None:
        super().__init__(name, seed)
        self.model = network.train()
        self._whole = any(
            isinstance(m, fd.FusedDNILinearCrossEntropyLoss) for m in network.modules()
        )
        self.optimizer = fd.FusedOptimizer(network)
        self.scheduler = _cosine(self.optimizer, steps)
        self.schedule = fd.Schedule(network, warmup_steps, target_every, mix, lessons=lessons)

    def step(self, x: Tensor, y: Tensor) -> None:
        with fd.condition_on(y):
            if self._whole:
                loss = self.model(x, target=y)
            else:
                loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.schedule.step()


def build(name: str, seed: int, settings: Settings, dataset: data.Dataset) -> Trainer:
    """Make the trainer of one run; ``name`` as :meth:`Training.runs` gives it."""
    network = nets.plain(
        dataset.features, settings.hidden, settings.depth, dataset.classes, seed=seed
    )
    rule = settings.rule(settings.lr, settings.weight_decay)
    total = settings.epochs * steps_per_epoch(settings, dataset)
    method, _, every = name.partition(" k=")
    if method in ("backprop", "compiled"):
        sample = data.Split(
            dataset.train.images[: settings.batch_size], dataset.train.labels[: settings.batch_size]
        )
        return StockTrainer(name, seed, network, rule, total, sample)
    ours = nets.fused(
        network,
        synthetic=method != "fused",
        update=rule,
        synthesizer_update=settings.rule(settings.sg_lr),
        rank=settings.rank or None,
        context_features=dataset.classes if method == "cdni" else 0,
        interface=settings.interface,
        synthesizer=(
            partial(fd.CrossEntropySynthesizer, context_features=dataset.classes)
            if settings.synthesizer == "cross-entropy"
            else None
        ),
        backend=settings.backend,
        seed=seed,
        loss=True,
    )
    if method == "fused":
        return FusedTrainer(name, seed, ours, total)
    target_every = None if every == "never" else int(every)
    more = (settings.warmup_steps, target_every, settings.mix, settings.lessons)
    return FusedTrainer(name, seed, ours, total, *more)


def steps_per_epoch(settings: Settings, dataset: data.Dataset) -> int:
    """Count whole batches in the training set.

    Raises:
        ValueError: there is not one.
    """
    steps = len(dataset.train.labels) // settings.batch_size
    if steps < 1:
        raise ValueError(
            f"batch_size {settings.batch_size} is larger than the training set "
            f"({len(dataset.train.labels)} images)"
        )
    return steps


# ------------------------------------------------------------------------------------------- run


#: Of each method, before anything is timed.
_WARM_STEPS = 3


class _Epochs(run.Turns[Trainer]):
    """Turns of an epoch each. Batches are functions of (seed, epoch), weights of the seed."""

    def __init__(self, settings: Settings, dataset: data.Dataset) -> None:
        super().__init__(settings, settings.runs(), settings.epochs, {})
        self.dataset, self.each = dataset, steps_per_epoch(settings, dataset)
        self._order = torch.empty(0)

    def build(self, seed: int) -> list[Trainer]:
        return [build(name, seed, self.settings, self.dataset) for name in self.names]

    def warm_up(self) -> None:
        """Do what a process does once, such as starting threads, before a clock runs: steps of
        trainers that are thrown away. ``compiled`` compiles ahead of its clock anyway."""
        rows = torch.arange(self.settings.batch_size)
        with torch.random.fork_rng(devices=[]):
            for name in self.names:
                if name != "compiled":
                    trainer = build(name, self.settings.seeds[0], self.settings, self.dataset)
                    for _ in range(_WARM_STEPS):
                        trainer.step(*data.pick(self.dataset.train, rows))

    def begin(self, trainer: Trainer, turn: int) -> int:
        self._order = data.permutation(len(self.dataset.train.labels), trainer.seed, turn)
        return (turn + 1) * self.each

    def position(self, trainer: Trainer) -> int:
        return trainer.steps

    def advance(self, trainer: Trainer, steps: int, goal: int) -> None:
        first = trainer.steps - (goal - self.each)
        rows = data.batches(self._order, self.settings.batch_size, first)
        for _ in range(min(steps, goal - trainer.steps)):
            trainer.step(*data.pick(self.dataset.train, next(rows)))
            trainer.steps += 1

    def evaluate(self, trainer: Trainer, turn: int) -> str:
        error = trainer.error(self.dataset.test)
        run.refuse_divergence(trainer.model, f"{trainer.name} diverged in epoch {turn + 1}")
        row = {"epoch": turn + 1, "steps": trainer.steps, "seconds": trainer.seconds}
        trainer.history.append({**row, "error": error})
        return f"error {100 * error:.2f} %"

    def finish(self, trainer: Trainer) -> dict[str, Any]:
        found = super().finish(trainer)
        if isinstance(trainer, StockTrainer) and trainer.compile_seconds:
            found["compile_seconds"] = trainer.compile_seconds
        return found


def train(
    settings: Settings,
    dataset: data.Dataset,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    checkpoint_every: int | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Train every method with every seed; for the arguments see :meth:`run.Turns.run`.

    Raises:
        Interrupted: Ctrl-C.
        CheckpointError: the checkpoint cannot be read, is of another run, or cannot be written.
        ValueError: settings and data do not fit.
        RuntimeError: a network's parameters are not finite any more.
    """
    turns = _Epochs(settings, dataset)
    turns.warm_up()
    finished = turns.run(checkpoint, resume, checkpoint_every, progress)
    steps = settings.epochs * turns.each
    notes = run.warmup_notes(settings.runs(), settings.warmup_steps, steps)
    commit = turns.made.get("commit")
    return Outcome(settings, dataset.name, finished, notes, turns.each, commit=commit)


def result(
    outcome: Outcome,
    command: str | None = None,
    verdict: Verdict | None = None,
    race: Result | None = None,
) -> Result:
    """Gather the whole report, with the verdict for its layers and a race under an expensive top,
    if there are any."""
    body: dict[str, Any] = {
        "dataset": outcome.data,
        "evaluated_on": "held-out part" if outcome.settings.held_out else "test set",
        "steps_per_epoch": outcome.steps_per_epoch,
        "summary": outcome.summary(),
        "runs": outcome.runs,
        "split": outcome.split,
    }
    if verdict is not None:
        body["verdict"] = verdict.report()
    if race is not None:
        body["race"] = race
    return Result(
        "train",
        facts=run.facts_of(outcome, command),
        settings=asdict(outcome.settings),
        notes=outcome.notes,
        body=body,
    )


# ----------------------------------------------------------------------------- where a step goes


SPLIT_METHOD = (
    "All pieces timed in one interleaved run on one resident batch, at a learning rate of 1e-6 so "
    "that nothing drifts. Measured alone: forward (hidden layers in training mode, no gradient), "
    "SG (the synthesizers' predictions as products of their own), rest (head, loss and its "
    "backward, optimizer and schedule bookkeeping, picking the batch). By difference of whole "
    "steps: targets = a step with targets less one without (dx, synthesizer update, their "
    "autograd); update = the rest of a step (of one without targets, for cDNI): the backward "
    "through activation and normalisation (but for an interface at the preactivation), the weight "
    "gradient and the rule, for backprop the whole backward. Inside one fused step the pieces "
    "share launches and caches, so a difference can come out below what the piece would cost alone."
)


def split_time(
    settings: Settings,
    dataset: data.Dataset,
    *,
    seconds: float = 4.0,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Measure seconds per step by piece, of stock backprop, fused backprop and cDNI; how, see
    :data:`SPLIT_METHOD`."""
    slow = replace(settings, lr=1e-6, sg_lr=1e-6, warmup_steps=0, epochs=1_000_000)
    rows = data.permutation(len(dataset.train.labels), 0, 0)[: settings.batch_size]
    x, y = data.pick(dataset.train, rows)
    trainers = {name: build(name, 0, slow, dataset) for name in ("backprop", "fused")}
    for every in ("1", "never"):
        trainers[f"cdni {every}"] = build(f"cdni k={every}", 0, slow, dataset)
    stock, ours = trainers["backprop"], build("cdni k=never", 0, slow, dataset)
    hidden_stock = nn.Sequential(*list(stock.model.children())[:-1])
    hidden = nn.Sequential(*list(ours.model.children())[:-1])
    head = list(build("fused", 0, slow, dataset).model.children())[-1]
    head_only = FusedTrainer("head", 0, head, 1_000_000)
    stock_head = StockTrainer(
        "head",
        0,
        list(nets.plain(dataset.features, settings.hidden, settings.depth, dataset.classes))[-1],
        slow.rule(1e-6),
        1_000_000,
        data.Split(x, y),
    )
    outputs: list[Tensor] = []
    with torch.no_grad(), fd.condition_on(y):
        h = x
        for layer in hidden:
            h = layer(h)
            outputs.append(h)
    top = outputs[-1].clone().requires_grad_()

    def forward(model: nn.Module) -> Callable[[], object]:
        def call() -> None:
            with torch.no_grad():
                model(x)

        return call

    def predict() -> None:
        with torch.no_grad():
            for layer, output in zip(hidden, outputs, strict=True):
                assert isinstance(layer, DecoupledModule)
                layer.predict(output, y, learns=False)

    timings = timing.compare(
        {
            **{name: _stepper(trainer, x, y) for name, trainer in trainers.items()},
            "forward": forward(hidden),
            "sg": predict,
            "head": _stepper(head_only, top, y),
            "stock forward": forward(hidden_stock),
            "stock head": _stepper(stock_head, top, y),
            "pick": lambda: data.pick(dataset.train, rows),
        },
        seconds=seconds,
        progress=progress,
    )
    t = {name: value.median for name, value in timings.items()}
    rest, stock_rest = t["head"] + t["pick"], t["stock head"] + t["pick"]
    pieces: dict[str, dict[str, float]] = {
        "backprop": {
            "forward": t["stock forward"],
            "sg": 0.0,
            "update": t["backprop"] - t["stock forward"] - t["stock head"],
            "targets": 0.0,
            "rest": stock_rest,
        },
        "fused": {
            "forward": t["forward"],
            "sg": 0.0,
            "update": t["fused"] - t["forward"] - t["head"],
            "targets": 0.0,
            "rest": rest,
        },
    }
    never = {
        "forward": t["forward"],
        "sg": t["sg"],
        "update": t["cdni never"] - t["forward"] - t["sg"] - t["head"],
        "rest": rest,
    }
    targets = t["cdni 1"] - t["cdni never"]
    for k in settings.target_every:
        pieces[f"cdni k={k or 'never'}"] = {**never, "targets": targets / k if k else 0.0}
    for parts in pieces.values():
        parts["total"] = sum(parts.values())
    return {
        "how": SPLIT_METHOD,
        "pieces": pieces,
        "timings": timings,
    }


def _stepper(trainer: Trainer, x: Tensor, y: Tensor) -> Callable[[], None]:
    return lambda: trainer.step(x, y)
