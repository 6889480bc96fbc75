"""Pipelines of real processes: a stage each, and the ways to train them together.

The model is ``stages`` times eight blocks Linear-BatchNorm-ReLU of 512 features, with a head and
cross-entropy on the last; a batch of 256 rows is 512 KiB between two stages. All processes draw the
same weights and batches from a seed, so nothing but activations and gradients is sent.

A way is a :class:`Mode`: its ``start`` makes a :class:`Trainer`, whose ``train(steps)`` makes that
many training steps, this process's share of them. Those that claim exact gradients are checked
against the whole model in one process before they are timed (:func:`check`).
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import pipelining

import fused_dni as fd
from fused_dni import distributed
from workloads import CLASSES, RANK, Disagreement

#: Batches that training goes round.
POOL = 8
#: Of plain SGD, for all ways the same.
LEARNING_RATE = 0.05
#: Of Adam, for what is beside the model: synthesizers and local classifiers.
SYNTHESIZER_RATE = 3e-3
#: Steps of a check: what is sent early, and what is kept from a step to the next, is seen in three.
CHECKED = 3


class Setting(NamedTuple):
    """The model and its batch."""

    stages: int
    blocks: int = 8
    features: int = 512
    batch: int = 256


@dataclass
class Clock:
    """Stretches a stage's work to a set time by sleeping, so that a machine with fewer cores than
    stages can stand for one with enough.

    Attributes:
        forward, backward: seconds of a stage's pass over a whole batch; 0 for what it takes.
        wanted, over: seconds that work was to take so far, and by which it took longer.
    """

    forward: float = 0.0
    backward: float = 0.0
    wanted: float = 0.0
    over: float = 0.0

    @contextlib.contextmanager
    def stretched(self, seconds: float) -> Iterator[None]:
        """Make what is inside take that long at least."""
        start = time.monotonic()
        yield
        self.fill(start, seconds)

    def fill(self, start: float, seconds: float) -> None:
        """Sleep until work that began at ``start`` has taken that long."""
        left = start + seconds - time.monotonic()
        if left > 0:
            time.sleep(left)
        if seconds:
            self.wanted += seconds
            self.over += max(0.0, -left)


@dataclass
class Place:
    """Where a process stands: its rank is its stage's number, and the group is the mode's own."""

    setting: Setting
    rank: int
    clock: Clock
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether the data comes in here."""
        return self.rank == 0

    @property
    def last(self) -> bool:
        """Whether the loss is here."""
        return self.rank == self.setting.stages - 1


class Trainer:
    """Trains what a process has of the model.

    Attributes:
        parts: its pieces of the model, whose layers keep their names in the whole.
        losses: of every step, where the loss is.
    """

    def __init__(self, parts: list[nn.Sequential]) -> None:
        self.parts = parts
        self.losses: list[float] = []
        self.optimizer = sgd([p for part in parts for p in part.parameters()])
        self._step = 0

    def train(self, steps: int) -> None:
        """Make so many steps; every process is asked for as many."""
        for left in reversed(range(steps)):
            self.optimizer.zero_grad()
            self.step(self._step, last=left == 0)
            self.optimizer.step()
            self._step += 1

    def step(self, number: int, *, last: bool) -> None:
        """Leave the gradients of one batch in the parameters; ``last`` of this call of train."""
        raise NotImplementedError


@dataclass(frozen=True)
class Mode:
    """A way to train the stages.

    Attributes:
        start: makes the process's trainer.
        microbatches: that a batch is cut into.
        pieces: consecutive parts of the model that a process has.
        exact: its gradients are those of the whole model.
        most: stages that it can have.
    """

    start: Callable[[Place, Mode], Trainer]
    microbatches: int = 1
    pieces: int = 1
    exact: bool = True
    most: int = 64


# ------------------------------------------------------------------------------ model and batches


def whole(setting: Setting) -> nn.Sequential:
    """The model; a layer is a module of its own. No bias in front of batch normalisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for _ in range(setting.stages * setting.blocks):
            layers.append(nn.Linear(setting.features, setting.features, bias=False))
            layers += [nn.BatchNorm1d(setting.features), nn.ReLU()]
        layers.append(nn.Linear(setting.features, CLASSES))
        return nn.Sequential(*layers)


def cut(setting: Setting, pieces: int) -> list[nn.Sequential]:
    """The model in equal pieces; the last has the head too."""
    model = whole(setting)
    blocks, rest = divmod(setting.stages * setting.blocks, pieces)
    if rest:
        raise ValueError(f"{setting.stages} x {setting.blocks} blocks do not make {pieces} pieces")
    bounds = [3 * blocks * piece for piece in range(pieces)] + [len(model)]
    return [model[start:end] for start, end in itertools.pairwise(bounds)]


@lru_cache(maxsize=4)
def batches(setting: Setting) -> list[tuple[Tensor, Tensor]]:
    """Inputs [batch, features] and labels [batch]."""
    draw = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(setting.batch, setting.features, generator=draw),
            torch.randint(CLASSES, (setting.batch,), generator=draw),
        )
        for _ in range(POOL)
    ]


def batch(setting: Setting, number: int) -> tuple[Tensor, Tensor]:
    """The batch of a step."""
    return batches(setting)[number % POOL]


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of every way."""
    return torch.optim.SGD(parameters, lr=LEARNING_RATE, fused=True)


# ---------------------------------------------------------------------------------------- the gate


def _state(part: nn.Module, before: dict[str, Tensor]) -> dict[tuple[str, str], Tensor]:
    """Gradients, changes of parameters, and buffers, by kind and name."""
    found = {}
    for name, parameter in part.named_parameters():
        assert parameter.grad is not None
        found["gradient", name] = parameter.grad.double()
        found["change", name] = parameter.detach().double() - before[name].double()
    for name, buffer in part.named_buffers():
        found["buffer", name] = buffer.double()
    return found


@lru_cache(maxsize=8)
def alone(
    setting: Setting, microbatches: int, dtype: torch.dtype
) -> tuple[dict[tuple[str, str], Tensor], list[float]]:
    """What :data:`CHECKED` steps of the whole model in this process leave, and their losses."""
    model = whole(setting).to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer, losses = sgd(list(model.parameters())), []
    for number in range(CHECKED):
        optimizer.zero_grad()
        x, labels = batch(setting, number)
        losses.append(0.0)
        for part, wanted in zip(
            x.to(dtype).chunk(microbatches), labels.chunk(microbatches), strict=True
        ):
            loss = F.cross_entropy(model(part), wanted) / microbatches
            loss.backward()
            losses[-1] += loss.item()
        optimizer.step()
    return _state(model, before), losses


def check(trainer: Trainer, place: Place, mode: Mode) -> dict[str, float]:
    """Make the first steps, and compare what they leave with the whole model's in one process.

    What is compared is, over all of this process's gradients, changes of parameters, buffers or
    losses, the distance to float64's, relative to their size. The single process in float32 has one
    too, by its own rounding; that of other sums in another order may be four times as large.

    Returns:
        The distances, by kind.

    Raises:
        Disagreement: one is too large.
    """
    before = whole(place.setting).state_dict()
    trainer.train(CHECKED)
    if not mode.exact:
        return {}
    exact, exact_losses = alone(place.setting, mode.microbatches, torch.float64)
    single, single_losses = alone(place.setting, mode.microbatches, torch.float32)
    found: dict[tuple[str, str], Tensor] = {}
    for part in trainer.parts:
        found |= _state(part, before)
    if trainer.losses:
        found["loss", ""] = torch.tensor(trainer.losses, dtype=torch.float64)
        exact = exact | {("loss", ""): torch.tensor(exact_losses, dtype=torch.float64)}
        single = single | {("loss", ""): torch.tensor(single_losses, dtype=torch.float64)}
    distances = {}
    for kind in dict.fromkeys(kind for kind, _ in found):
        keys = [key for key in found if key[0] == kind]

        def distance(of: dict[tuple[str, str], Tensor], keys: Any = keys) -> float:
            size = sum(exact[key].square().sum() for key in keys)
            return float((sum((of[key] - exact[key]).square().sum() for key in keys) / size).sqrt())

        distances[kind] = distance(found)
        allowed = 4 * max(distance(single), torch.finfo(torch.float32).eps)
        if not distances[kind] <= allowed:
            raise Disagreement(
                f"{kind}s of rank {place.rank} are {distances[kind]:.1e} from the single process's "
                f"in float64; {allowed:.1e} is allowed"
            )
    return distances


# ------------------------------------------------------------------- torch.distributed.pipelining


class _Stage(pipelining.PipelineStage):
    """A stage whose passes the clock stretches: what a schedule calls, without what it sends."""

    clock: Clock
    share: float  # of a batch's pass through all that a process has

    def forward_one_chunk(self, *args: Any, **options: Any) -> Any:
        with self.clock.stretched(self.clock.forward * self.share):
            return super().forward_one_chunk(*args, **options)

    def backward_one_chunk(
        self, chunk: int, loss: Any = None, full_backward: bool = True, **options: Any
    ) -> None:
        # Zero-bubble schedules take the gradients of inputs and of weights apart: each half.
        half = 1.0 if full_backward else 0.5
        with self.clock.stretched(self.clock.backward * self.share * half):
            super().backward_one_chunk(chunk, loss, full_backward, **options)

    def backward_weight_one_chunk(self, *args: Any, **options: Any) -> None:
        with self.clock.stretched(self.clock.backward * self.share * 0.5):
            super().backward_weight_one_chunk(*args, **options)


class Scheduled(Trainer):
    """PyTorch's own pipeline under one of its schedules.

    Shapes are given: what infers them from a batch that it makes up would shift the statistics of
    batch normalisation.
    """

    def __init__(self, place: Place, mode: Mode, *, schedule: str) -> None:
        setting = place.setting
        kind = pipelining.schedules.get_schedule_class(schedule)
        pieces = setting.stages * mode.pieces
        mine = [place.rank] if mode.pieces == 1 else [place.rank, pieces - 1 - place.rank]
        modules = cut(setting, pieces)
        super().__init__([modules[index] for index in mine])
        self._setting, self._feeds, self._ends = setting, 0 in mine, pieces - 1 in mine
        rows = setting.batch // mode.microbatches
        stages = []
        for index in mine:
            inside = torch.empty(rows, setting.features, requires_grad=index > 0)
            width = CLASSES if index == pieces - 1 else setting.features
            stage = _Stage(
                modules[index],
                index,
                pieces,
                torch.device("cpu"),
                input_args=inside,
                output_args=torch.empty(rows, width, requires_grad=True),
                group=place.group,
            )
            stage.clock, stage.share = place.clock, 1 / (mode.microbatches * mode.pieces)
            stages.append(stage)
        given = stages if mode.pieces > 1 else stages[0]
        self._schedule = kind(given, mode.microbatches, loss_fn=F.cross_entropy)

    def step(self, number: int, *, last: bool) -> None:
        x, labels = batch(self._setting, number)
        losses: list[Tensor] = []
        self._schedule.step(
            *([x] if self._feeds else []),
            target=labels if self._ends else None,
            losses=losses if self._ends else None,
            return_outputs=False,
        )
        if self._ends:
            self.losses.append(float(torch.stack(losses).detach().mean()))


# ---------------------------------------------------------------------------- plain sends, posted


class _Inbox:
    """Receives from one neighbour, posted a step before they are needed.

    A gloo send travels when the receiver's notice that it has room has arrived, so a receive that
    is posted when it is needed costs a latency more. Two sets of buffers: that of a step is posted
    again when the next step begins.
    """

    def __init__(self, place: Place, source: int, microbatches: int) -> None:
        setting = place.setting
        shape = (2, microbatches, setting.batch // microbatches, setting.features)
        self._source, self._group = source, place.group
        self._buffers = torch.empty(shape)
        self._works: dict[int, list[Any]] = {}

    def post(self, number: int) -> None:
        """Post the receives of a step, unless they are."""
        if number not in self._works:
            self._works[number] = [
                dist.irecv(buffer, self._source, self._group)
                for buffer in self._buffers[number % 2]
            ]

    def take(self, number: int, microbatch: int) -> Tensor:
        """Wait for one. It is overwritten two steps later."""
        self._works[number][microbatch].wait()
        return self._buffers[number % 2][microbatch]

    def close(self, number: int) -> None:
        """End a step that has taken all."""
        del self._works[number]


class Posted(Trainer):
    """Exact gradients by plain sends and receives, the receives posted early.

    Args:
        in_flight: whether a stage has only so many microbatches under way as there are stages from
            it on (1F1B); else all go forward first (GPipe), which needs more memory and, on a long
            line, waits less.
    """

    def __init__(self, place: Place, mode: Mode, *, in_flight: bool) -> None:
        part = cut(place.setting, place.setting.stages)[place.rank]
        super().__init__([part])
        self._part, self._place, self._count = part, place, mode.microbatches
        self._ahead = min(
            mode.microbatches, place.setting.stages - place.rank if in_flight else 1 << 30
        )
        # Activations from the one before, gradients from the one behind.
        self._activations = (
            None if place.first else _Inbox(place, place.rank - 1, mode.microbatches)
        )
        self._gradients = None if place.last else _Inbox(place, place.rank + 1, mode.microbatches)
        self._inboxes = [box for box in (self._activations, self._gradients) if box is not None]
        self._sent: list[tuple[Any, Tensor]] = []

    def step(self, number: int, *, last: bool) -> None:
        sent, self._sent = self._sent, []
        for inbox in self._inboxes:
            inbox.post(number)
            if not last:
                inbox.post(number + 1)
        x, labels = batch(self._place.setting, number)
        data = list(zip(x.chunk(self._count), labels.chunk(self._count), strict=True))
        under_way: list[tuple[Tensor, Tensor]] = []
        total, forwards = 0.0, 0
        for microbatch in range(self._count):
            while forwards < min(self._count, self._ahead + microbatch):
                given, out = self._forward(number, forwards, *data[forwards])
                under_way.append((given, out))
                if self._place.last:
                    total += float(out.detach())
                forwards += 1
            self._backward(number, microbatch, *under_way[microbatch])
        for inbox in self._inboxes:
            inbox.close(number)
        if self._place.last:
            self.losses.append(total)
        for work, _ in sent if not last else sent + self._sent:
            work.wait()
        if last:
            self._sent.clear()

    def _forward(
        self, number: int, microbatch: int, x: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The stage's input and output, or its share of the loss."""
        clock = self._place.clock
        if self._activations is not None:
            x = self._activations.take(number, microbatch).detach().requires_grad_()
        with clock.stretched(clock.forward / self._count):
            out: Tensor = self._part(x)
            if self._place.last:
                out = F.cross_entropy(out, labels) / self._count
        if not self._place.last:
            self._send(out.detach(), self._place.rank + 1)
        return x, out

    def _backward(self, number: int, microbatch: int, x: Tensor, out: Tensor) -> None:
        clock = self._place.clock
        given = None if self._gradients is None else self._gradients.take(number, microbatch)
        with clock.stretched(clock.backward / self._count):
            out.backward(given)
        if x.grad is not None:
            self._send(x.grad, self._place.rank - 1)

    def _send(self, tensor: Tensor, to: int) -> None:
        # Nothing is copied: the tensor is kept as it is until it has gone.
        self._sent.append((dist.isend(tensor, to, self._place.group), tensor))


class Unlinked(Trainer):
    """A stage that has its input and its gradient at hand: what no waiting would give."""

    def __init__(self, place: Place, mode: Mode) -> None:
        part = cut(place.setting, place.setting.stages)[place.rank]
        super().__init__([part])
        self._part, self._place = part, place
        self._gradient = batch(place.setting, 0)[0] / place.setting.batch

    def step(self, number: int, *, last: bool) -> None:
        clock, (x, labels) = self._place.clock, batch(self._place.setting, number)
        x = x.detach().requires_grad_(not self._place.first)
        with clock.stretched(clock.forward):
            out = self._part(x)
            if self._place.last:
                out = F.cross_entropy(out, labels)
        with clock.stretched(clock.backward):
            out.backward(None if self._place.last else self._gradient)


# ------------------------------------------------------------------------- fused_dni.distributed


class _LocalLoss(nn.Module):
    """A linear classifier on a stage's output."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.head = nn.Linear(features, CLASSES)

    def forward(self, h: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(h), labels)


class Distributed(Trainer):
    """:class:`fused_dni.distributed.Pipeline` in one of its modes.

    A stage's prediction, update and local loss come with its passes, in the time that the clock
    gives these; what trains a synthesizer when a target arrives comes on top.

    Args:
        kind: the mode.
        target_every: of the mode "decoupled": steps on which a gradient comes back.
    """

    #: Messages on their way over a link: enough for 100 ms one way and steps of 15 ms.
    WINDOW = 16

    def __init__(self, place: Place, mode: Mode, *, kind: str, target_every: int = 1) -> None:
        setting = place.setting
        part = cut(setting, setting.stages)[place.rank]
        super().__init__([part])
        given: dict[str, Any] = {}
        if kind == "decoupled" and not place.last:
            given["synthesizer"] = fd.LinearSynthesizer(setting.features, RANK, CLASSES)
        if kind == "local" and not place.last:
            given["local_loss"] = _LocalLoss(setting.features)
        stage = distributed.Stage(part, place.rank, setting.stages, **given)
        known = {id(parameter) for parameter in part.parameters()}
        others = [p for p in stage.parameters() if id(p) not in known]
        self._others = torch.optim.Adam(others, lr=SYNTHESIZER_RATE, fused=True) if others else None
        self._schedule = (
            fd.Schedule(stage, target_every=target_every) if "synthesizer" in given else None
        )
        self._place = place
        self._pipeline = distributed.Pipeline(
            stage, loss=F.cross_entropy, mode=kind, window=self.WINDOW
        )
        self._stretch(kind not in ("exact", "stale") or place.last)

    def _stretch(self, at_once: bool) -> None:
        """Put the clock around the worker's two halves of a step; ``at_once``: the backward is in
        the first one."""
        clock, worker = self._place.clock, self._pipeline.worker
        begin, settle = worker.begin, worker.settle

        def stretched_begin(*args: Any) -> Any:
            with clock.stretched(clock.forward + (clock.backward if at_once else 0.0)):
                return begin(*args)

        def stretched_settle(step: int) -> Any:
            start, before = time.monotonic(), len(worker._flights)
            made = settle(step)
            clock.fill(start, clock.backward * (before - len(worker._flights)))
            return made

        worker.begin, worker.settle = stretched_begin, stretched_settle  # type: ignore[method-assign]

    def step(self, number: int, *, last: bool) -> None:
        if self._others is not None:
            self._others.zero_grad()
        out = self._pipeline.step(
            *(batch(self._place.setting, number) if self._place.first else ())
        )
        assert out is not None
        if self._others is not None:
            self._others.step()
        if self._schedule is not None:
            self._schedule.step()
        if self._place.last:
            assert out.loss is not None
            self.losses.append(float(out.loss))


def _ours(kind: str, **options: Any) -> Mode:
    return Mode(partial(Distributed, kind=kind, **options), exact=kind == "exact")


def _torch(schedule: str, microbatches: int, **options: Any) -> Mode:
    return Mode(partial(Scheduled, schedule=schedule), microbatches, **options)


#: By the name that is printed; the number is that of microbatches.
MODES: dict[str, Mode] = {
    "no link: a stage alone": Mode(Unlinked, exact=False),
    "torch GPipe 1": _torch("GPipe", 1),
    "torch GPipe 4": _torch("GPipe", 4),
    # 1F1B takes no fewer microbatches than there are stages.
    "torch 1F1B 2": _torch("1F1B", 2, most=2),
    "torch 1F1B 4": _torch("1F1B", 4, most=4),
    "torch ZBV 4": _torch("ZBVZeroBubble", 4, pieces=2),
    "posted GPipe 1": Mode(partial(Posted, in_flight=False)),
    "posted GPipe 4": Mode(partial(Posted, in_flight=False), 4),
    "posted 1F1B 4": Mode(partial(Posted, in_flight=True), 4),
    "ours, exact": _ours("exact"),
    "ours, stale": _ours("stale"),
    "ours, local losses": _ours("local"),
    "ours, decoupled, k=1": _ours("decoupled"),
    "ours, decoupled, k=4": _ours("decoupled", target_every=4),
}
