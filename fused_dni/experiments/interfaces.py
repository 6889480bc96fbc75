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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

import fused_dni as fd
from fused_dni.experiments import data, nets
from fused_dni.experiments.run import plain, preset, refuse_divergence
from fused_dni.experiments.train import FusedTrainer
from fused_dni.measure.baseline import facts
from fused_dni.report.kinds.interfaces import named
from fused_dni.report.progress import Progress
from fused_dni.report.schema import Result
from fused_dni.rules import Adam

#: How often a run reports its progress.
REPORTS = 20
#: Share of the steps, at the end, over which predictions are compared with what arrived.
LAST = 0.1


@dataclass(frozen=True)
class Settings:
    """What the experiment is a function of.

    Attributes:
        dataset: ``digits`` or ``mnist``.
        depths: numbers of hidden layers, each with an interface behind every layer.
        every: interfaces behind every so many layers, in the deepest network; 1 for every layer.
        steps: training steps of every network.
        batches: over which the comparison with the true gradient is averaged.
        hidden: units of a hidden layer.
        batch_size: rows of a step.
        lr: Adam's rate at the start, cosine to zero.
        sg_lr: that of the synthesizers, likewise.
        warmup: share of the steps in which layers use the true gradient and synthesizers only
            learn.
        rank: of the synthesizers; 0 for dense.
        seeds: one run of every network each.
        backend: force a backend.

    Raises:
        ValueError: a number out of range.
    """

    dataset: str = "mnist"
    depths: tuple[int, ...] = (1, 2, 4, 8)
    every: tuple[int, ...] = (1, 2, 4)
    steps: int = 1000
    batches: int = 10
    hidden: int = 256
    batch_size: int = 256
    lr: float = 3e-3
    sg_lr: float = 1.5e-3
    warmup: float = 0.1
    rank: int = 16
    seeds: tuple[int, ...] = (1, 2, 3)
    backend: str | None = None

    def __post_init__(self) -> None:
        for name in ("depths", "every", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"at least one number is needed in {name}")
        for name in ("depths", "every"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must hold numbers from 1 on, got {getattr(self, name)}")
        deepest = max(self.depths)
        for every in self.every:
            if deepest % every:
                raise ValueError(
                    f"every must divide the largest depth, {deepest}, so that the topmost layer "
                    f"has an interface, got {every}"
                )
        for name, low in (
            ("steps", 1),
            ("batches", 1),
            ("hidden", 1),
            ("batch_size", 2),
            ("rank", 0),
        ):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not 0.0 <= self.warmup < 1.0:
            raise ValueError(f"warmup must be at least 0 and below 1, got {self.warmup}")
        Adam(self.lr)  # checks the rates
        Adam(self.sg_lr)

    def networks(self) -> list[tuple[int, int]]:
        """Depth and spacing of the interfaces (0: none, backprop) of every network."""
        deepest = max(self.depths)
        spaced = [(depth, 1) for depth in self.depths]
        spaced += [(deepest, every) for every in self.every]
        return list(dict.fromkeys([*((depth, 0) for depth in self.depths), *spaced]))


#: What the datasets want different from MNIST's defaults.
PRESETS: dict[str, dict[str, Any]] = {"mnist": {}, "digits": {"batch_size": 64, "steps": 500}}


def defaults(dataset: str, **changes: Any) -> Settings:
    """Settings of a dataset, with ``changes`` where they are not None."""
    return preset(Settings(dataset=dataset), PRESETS, changes)


def measure(
    settings: Settings,
    dataset: data.Dataset,
    *,
    progress: Progress | None = None,
    command: str | None = None,
) -> Result:
    """Train every network with every seed and look at its gradients.

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
    rows: list[dict[str, Any]] = [
        {"depth": depth, "every": every, "runs": []} for depth, every in settings.networks()
    ]
    with progress:
        for seed in settings.seeds:
            for row in rows:
                name = f"{named(row['depth'], row['every'])}, seed {seed}"

                def say(fraction: float, name: str = name) -> None:
                    progress.update(name, fraction)

                row["runs"].append(_run(row["depth"], row["every"], seed, settings, dataset, say))
    return Result(
        "interfaces",
        facts=facts(command),
        settings=plain(asdict(settings)),
        body={"dataset": dataset.name, "networks": rows},
    )


def _run(
    depth: int,
    every: int,
    seed: int,
    settings: Settings,
    dataset: data.Dataset,
    say: Callable[[float], None],
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
    """Batch after batch, epoch after epoch: the same ones for all networks of a seed."""
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
    """The predictions of each interface against the true gradient, over the next batches."""
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
    """None for what JSON has no number for: the cosine with a gradient that is zero."""
    return value if math.isfinite(value) else None
