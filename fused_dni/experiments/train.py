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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_dni as fd
from fused_dni.experiments import data, nets
from fused_dni.experiments.run import (
    VERSION,
    CheckpointError,
    Interrupted,
    Stop,
    fingerprint,
    plain,
    read_checkpoint,
    refuse_divergence,
    warmup_notes,
    write_checkpoint,
)
from fused_dni.measure import timing
from fused_dni.measure.baseline import stock_optimizer
from fused_dni.modules.base import DecoupledModule
from fused_dni.ops.types import INTERFACES
from fused_dni.report import text
from fused_dni.report.kinds.train import Outcome
from fused_dni.report.progress import Progress
from fused_dni.rules import SGD, Adam, AdamW, Rule

METHODS = ("backprop", "compiled", "fused", "cdni", "dni")
UPDATES: dict[str, Callable[..., Rule]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW}
#: Steps between two looks at the clock, the bars and the stop flag.
CHUNK = 20


@dataclass(frozen=True)
class Settings:
    """What a run is a function of. Defaults are those of MNIST; see :func:`defaults`.

    Attributes:
        dataset: ``digits`` or ``mnist``.
        methods: of ``backprop`` (stock modules, ``torch.optim`` with ``fused=True``), ``compiled``
            (the same under ``torch.compile``), ``fused`` (backprop on our kernels), ``cdni``
            (label-conditioned synthetic gradients) and ``dni`` (unconditioned).
        target_every: k of the (c)DNI runs, one run each; 0 for never after the warm-up.
        hidden: units of a hidden layer.
        depth: number of hidden layers.
        epochs: passes over the training set.
        batch_size: rows of a step.
        update: rule of the network: ``sgd`` (momentum 0.9), ``adam`` or ``adamw``.
        lr: its rate at the start; cosine to zero over the run.
        weight_decay: its weight decay.
        sg_lr: rate of the synthesizers at the start; the same cosine.
        warmup_steps: steps at the start in which layers use the true gradient and synthesizers
            only learn.
        rank: of the synthesizers; 0 for dense.
        interface: where they predict the gradient: ``output`` or ``preactivation``.
        seeds: one run of every method each.
        held_out: evaluate on the held-out part of the training set, not on the test set.
        backend: force a backend.
    """

    dataset: str = "mnist"
    methods: tuple[str, ...] = ("backprop", "fused", "cdni")
    target_every: tuple[int, ...] = (1, 4)
    hidden: int = 256
    depth: int = 3
    epochs: int = 8
    batch_size: int = 256
    update: str = "adam"
    lr: float = 3e-3
    weight_decay: float = 0.0
    sg_lr: float = 1.5e-3
    warmup_steps: int = 234
    rank: int = 16
    interface: str = "output"
    seeds: tuple[int, ...] = (0, 1, 2)
    held_out: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in METHODS:
                raise ValueError(text.unknown("method", method, METHODS))
        if not self.methods or not self.seeds:
            raise ValueError("at least one method and one seed are needed")
        if self.update not in UPDATES:
            raise ValueError(text.unknown("update", self.update, UPDATES))
        if self.interface not in INTERFACES:
            raise ValueError(text.unknown("interface", self.interface, INTERFACES))
        for name, low in (("hidden", 1), ("depth", 1), ("epochs", 1), ("batch_size", 2)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        for name in ("warmup_steps", "rank"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for k in self.target_every:
            if k < 0:
                raise ValueError(f"target_every must be at least 1 (0: never), got {k}")
        self.rule(self.lr)  # checks the rates
        self.rule(self.sg_lr)

    def rule(self, lr: float, weight_decay: float = 0.0) -> Rule:
        """The update rule at a rate."""
        if self.update == "sgd":
            return SGD(lr, momentum=0.9, weight_decay=weight_decay)
        return UPDATES[self.update](lr, weight_decay=weight_decay)

    def runs(self) -> list[str]:
        """Names of the runs of one seed, in the order of reports: ``cdni`` once for each k."""
        names = []
        for method in self.methods:
            if method in ("cdni", "dni"):
                names += [f"{method} k={k or 'never'}" for k in self.target_every]
            else:
                names.append(method)
        return list(dict.fromkeys(names))


#: What the datasets want different from MNIST's defaults. The digits are 42 times fewer.
PRESETS: dict[str, dict[str, Any]] = {
    "mnist": {},
    "digits": {"epochs": 25, "batch_size": 64, "warmup_steps": 44},
}


def defaults(dataset: str, **changes: Any) -> Settings:
    """Settings of a dataset, with ``changes`` where they are not None."""
    if dataset not in PRESETS:
        raise ValueError(text.unknown("dataset", dataset, PRESETS))
    given = {name: value for name, value in changes.items() if value is not None}
    return replace(Settings(dataset=dataset), **{**PRESETS[dataset], **given})


# -------------------------------------------------------------------------------------- trainers


class Trainer:
    """One network under one method: :meth:`step` is what gets timed."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    schedule: Any = None

    def __init__(self, name: str, seed: int) -> None:
        self.name = name
        self.seed = seed
        self.seconds = 0.0
        self.steps = 0
        self.history: list[dict[str, float]] = []

    def step(self, x: Tensor, y: Tensor) -> None:
        """One training step."""
        raise NotImplementedError

    def error(self, split: data.Split) -> float:
        """Share of wrong answers, in eval mode."""
        self.model.eval()
        wrong = 0
        with torch.no_grad():
            for x, y in zip(split.images.split(10_000), split.labels.split(10_000), strict=True):
                wrong += int((self.model(x).argmax(1) != y).sum())
        self.model.train()
        return wrong / len(split.labels)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a continuation needs."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "seconds": self.seconds,
            "steps": self.steps,
            "history": self.history,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.seconds = state["seconds"]
        self.steps = state["steps"]
        self.history = list(state["history"])


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
    ) -> None:
        super().__init__(name, seed)
        self.model = network.train()
        self._whole = any(
            isinstance(m, fd.FusedDNILinearCrossEntropyLoss) for m in network.modules()
        )
        self.optimizer = fd.FusedOptimizer(network)
        self.scheduler = _cosine(self.optimizer, steps)
        self.schedule = fd.Schedule(network, warmup_steps=warmup_steps, target_every=target_every)

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
    """The trainer of one run; ``name`` as :meth:`Settings.runs` gives it."""
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
        backend=settings.backend,
        seed=seed,
        loss=True,
    )
    if method == "fused":
        return FusedTrainer(name, seed, ours, total)
    target_every = None if every == "never" else int(every)
    return FusedTrainer(name, seed, ours, total, settings.warmup_steps, target_every)


def steps_per_epoch(settings: Settings, dataset: data.Dataset) -> int:
    """Whole batches in the training set.

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


def train(
    settings: Settings,
    dataset: data.Dataset,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    checkpoint_every: int | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Train every method with every seed.

    Args:
        settings: what to train.
        dataset: on what.
        checkpoint: folder of the checkpoint, written every 15 seconds, at every epoch's end and on
            Ctrl-C; None for none.
        resume: continue from it.
        checkpoint_every: steps between two checkpoints, instead of 15 seconds.
        progress: where to report.

    Raises:
        Interrupted: Ctrl-C.
        CheckpointError: the checkpoint cannot be read, is of another run, or cannot be written.
        ValueError: settings and data do not fit.
        RuntimeError: a network's parameters are not finite any more.
    """
    progress = progress or Progress(enabled=False)
    folder = None if checkpoint is None else Path(checkpoint)
    per_epoch = steps_per_epoch(settings, dataset)
    names = settings.runs()
    finished: list[dict[str, Any]] = []
    first_seed = first_epoch = first_turn = first_position = 0
    saved: dict[str, Any] = {}
    if resume:
        if folder is None:
            raise CheckpointError("--resume needs --checkpoint DIR")
        state = read_checkpoint(folder, settings)
        finished = state["finished"]
        first_seed, first_epoch, first_turn, first_position = state["position"]
        saved = state["trainers"]
        torch.set_rng_state(state["rng"])
        progress.line(
            f"resumed: seed {first_seed + 1} of {len(settings.seeds)}, "
            f"epoch {first_epoch + 1}, step {first_position}"
        )

    trainers: list[Trainer] = []
    last = time.monotonic()
    stop = Stop()

    def keep(position: tuple[int, int, int, int]) -> str:
        nonlocal last
        last = time.monotonic()
        if folder is None:
            return "nothing was kept (no --checkpoint DIR)"
        path = write_checkpoint(
            folder,
            {
                "version": VERSION,
                "settings": plain(asdict(settings)),
                "finished": finished,
                "position": list(position),
                "trainers": {t.name: t.state_dict() for t in trainers},
                "rng": torch.get_rng_state(),
            },
        )
        return f"{path} was kept; add --resume to continue from it"

    with stop.listening(), progress:
        for s in range(first_seed, len(settings.seeds)):
            seed = settings.seeds[s]
            trainers = [build(name, seed, settings, dataset) for name in names]
            for trainer in trainers:
                if trainer.name in saved:
                    trainer.load_state_dict(saved[trainer.name])
            saved = {}
            for epoch in range(first_epoch, settings.epochs):
                order = data.permutation(len(dataset.train.labels), seed, epoch)
                # Another method goes first in each epoch.
                turns = trainers[epoch % len(trainers) :] + trainers[: epoch % len(trainers)]
                for turn in range(first_turn, len(turns)):
                    trainer = turns[turn]
                    position = first_position
                    first_position = 0
                    while position < per_epoch:
                        count = min(CHUNK, per_epoch - position)
                        if checkpoint_every is not None:
                            count = min(count, checkpoint_every - position % checkpoint_every)
                        rows = data.batches(order, settings.batch_size, position)
                        start = time.perf_counter()
                        for _ in range(count):
                            trainer.step(*data.pick(dataset.train, next(rows)))
                        trainer.seconds += time.perf_counter() - start
                        trainer.steps += count
                        position += count
                        if position < per_epoch:
                            due = (
                                time.monotonic() - last > 15.0
                                if checkpoint_every is None
                                else position % checkpoint_every == 0
                            )
                            if stop.asked or (due and folder is not None):
                                kept = keep((s, epoch, turn, position))
                                if stop.asked:
                                    raise Interrupted(kept)
                            progress.update(
                                _label(trainer.name, settings, seed),
                                (epoch + position / per_epoch) / settings.epochs,
                            )
                    _evaluate(trainer, epoch, dataset, settings, progress)
                    if folder is not None or stop.asked:
                        kept = keep((s, epoch, turn + 1, 0))
                        if stop.asked:
                            raise Interrupted(kept)
                first_turn = 0
            first_epoch = 0
            for trainer in trainers:
                run: dict[str, Any] = {
                    "name": trainer.name,
                    "seed": seed,
                    "history": trainer.history,
                    "fingerprint": fingerprint(trainer.model),
                }
                if isinstance(trainer, StockTrainer) and trainer.compile_seconds:
                    run["compile_seconds"] = trainer.compile_seconds
                finished.append(run)
            if folder is not None:
                keep((s + 1, 0, 0, 0))
    order_of = {name: i for i, name in enumerate(names)}
    finished.sort(key=lambda run: (order_of[run["name"]], settings.seeds.index(run["seed"])))
    notes = warmup_notes(names, settings.warmup_steps, settings.epochs * per_epoch)
    return Outcome(settings, dataset.name, finished, per_epoch, notes=notes)


def _label(name: str, settings: Settings, seed: int) -> str:
    return f"{name:<14}" + (f" seed {seed}" if len(settings.seeds) > 1 else "")


def _evaluate(
    trainer: Trainer,
    epoch: int,
    dataset: data.Dataset,
    settings: Settings,
    progress: Progress,
) -> None:
    error = trainer.error(dataset.test)
    refuse_divergence(trainer.model, f"{trainer.name} diverged in epoch {epoch + 1}")
    trainer.history.append(
        {
            "epoch": epoch + 1,
            "steps": trainer.steps,
            "seconds": trainer.seconds,
            "error": error,
        }
    )
    progress.update(
        _label(trainer.name, settings, trainer.seed),
        (epoch + 1) / settings.epochs,
        f"error {100 * error:.2f} %, {trainer.seconds:.1f} s",
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
    """Seconds per step by piece, of stock backprop, fused backprop and cDNI; how, see
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
