"""The recurrent runs behind ``fused-dni train charlm``, ``copy`` and ``repeat-copy``.

An LSTM between an encoding and a linear head, trained in windows of T steps by several arms side by
side: ``backprop`` (``nn.LSTM``, truncated backprop), ``fused`` (the same on our kernels), ``dni``
and ``dni+aux``. All arms of a seed start from the same weights, see the same data in the same order
and the same amount of it. They take turns in one process, so that a machine that slows down slows
all of them down; what is timed is the training alone.

The loss of a window is the sum over its steps and rows, divided by B and by the steps between two
updates: a step weighs the same whether its window is whole or, at the end of a text or an episode,
shorter. What the loss divides by is the target scale.

A run is a function of its settings and the data: killed at any moment and resumed from its last
checkpoint it continues bit by bit (same machine, thread count and instruction set).
"""

from __future__ import annotations

import itertools
import math
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
from fused_dni.experiments import future, sequences
from fused_dni.experiments.characters import Text, streams
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
from fused_dni.report import text
from fused_dni.report.kinds.recurrent import COST_LEVEL, Outcome
from fused_dni.report.progress import Progress

TASKS = ("charlm", *sequences.TASKS)
METHODS = ("backprop", "fused", "dni", "dni+aux")
SYNTHESIZERS = ("default", "linear", "mlp")
#: Steps between two looks at the clock, the bars and the stop flag.
CHUNK = 20
#: Streams that the validation text is read in, each from a zero state.
VALIDATION_STREAMS = 16
#: Steps of the validation text that are read in one call.
VALIDATION_WINDOW = 256


State = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Arm:
    """A method at a window."""

    method: str
    window: int

    @property
    def name(self) -> str:
        """As it stands in reports."""
        return f"{self.method} T={self.window}"

    @property
    def synthetic(self) -> bool:
        """Whether it predicts gradients."""
        return self.method.startswith("dni")


@dataclass(frozen=True)
class Settings:
    """What a run is a function of, besides the text. Defaults are charlm's; see :func:`defaults`.

    Attributes:
        task: ``charlm``, ``copy`` or ``repeat-copy``.
        methods: of :data:`METHODS`.
        windows: T of all methods, one arm each.
        long: T of truncated backprop alone, to measure the gap by.
        hidden, layers: of the LSTM.
        batch_size: rows: parallel streams of the text, or episodes.
        lr: Adam's rate.
        exact_lr: that of the arms without synthetic gradients, if another suits them; 0 for lr.
        sg_lr: rate of synthesizer and auxiliary head.
        cosine: both rates fall to zero along a cosine; constant otherwise.
        clip: bound of the norm of the gradient of all parameters but the synthesizer's; 0 for none.
        synthesizer: ``default`` (the module's), ``linear`` (dense) or ``mlp``.
        sg_hidden: hidden units of ``mlp``.
        sg_scale: factor on the synthetic gradient.
        target_clip: bound of the norm, row by row, of the synthesizer's target; 0 for none.
        warmup: share of the run, at its start, in which synthesizers learn and nothing is injected.
            Not for the copy tasks: windows without a loss would teach them that nothing matters.
        target_scale: the regression's target is so many times the gradient of the loss summed over
            steps and rows.
        amount: what every arm sees: characters (charlm), or batches of episodes.
        update_every: charlm: steps of the streams between two updates, gradients being summed over
            the windows in between; 0 for an update after every window. Without it a long window
            means few updates, and arms differ in more than their gradients.
        evaluations: points of the curves.
        seeds: one run of every arm each.
        probe: compare predictions with true gradients at every evaluation, and measure at the end
            what truncation leaves out (see :mod:`fused_dni.experiments.future`).
        backend: force a backend.
        embedding: charlm: size of the embedding; 0 for one-hot.
        validation: charlm: share of the text at its end that is validated on.
        width: copy tasks: bits of a symbol.
        threshold: copy tasks: running error, in bits per bit, below which a length is solved.
        smoothing: copy tasks: weight of the newest batch in the running error.
        offset: copy tasks: the first window of an episode has a random length in 1..T, so that no
            symbol always falls on the same side of a boundary.
    """

    task: str = "charlm"
    methods: tuple[str, ...] = ("fused", "dni", "dni+aux")
    windows: tuple[int, ...] = (8,)
    long: tuple[int, ...] = (40,)
    hidden: int = 256
    layers: int = 1
    batch_size: int = 32
    lr: float = 2e-3
    exact_lr: float = 0.0
    sg_lr: float = 1e-4
    cosine: bool = True
    clip: float = 1.0
    synthesizer: str = "default"
    sg_hidden: int = 256
    sg_scale: float = 0.3
    target_clip: float = 0.0
    warmup: float = 0.3
    target_scale: float = 1.0
    amount: int = 10_000_000
    update_every: int = 0
    evaluations: int = 20
    seeds: tuple[int, ...] = (0,)
    probe: bool = False
    backend: str | None = None
    embedding: int = 64
    validation: float = 0.05
    width: int = 8
    threshold: float = 0.15
    smoothing: float = 0.1
    offset: bool = True

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(text.unknown("task", self.task, TASKS))
        for method in self.methods:
            if method not in METHODS:
                raise ValueError(text.unknown("method", method, METHODS))
        if self.synthesizer not in SYNTHESIZERS:
            raise ValueError(text.unknown("synthesizer", self.synthesizer, SYNTHESIZERS))
        if not self.methods or not self.windows or not self.seeds:
            raise ValueError("at least one method, one window and one seed are needed")
        sizes = ("hidden", "layers", "batch_size", "sg_hidden", "amount", "evaluations", "width")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for window in (*self.windows, *self.long):
            if window < 1:
                raise ValueError(f"a window must have at least 1 step, got {window}")
        for name in ("lr", "exact_lr", "sg_lr", "clip", "sg_scale", "target_clip"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and at least 0, got {getattr(self, name)}")
        if not 0.0 < self.target_scale < math.inf:
            raise ValueError(f"target_scale must be positive, got {self.target_scale}")
        for name in ("embedding", "update_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0.0 <= self.warmup <= 1.0 or (self.warmup and self.task != "charlm"):
            raise ValueError(
                f"warmup must lie in [0, 1], and be 0 for copy tasks, got {self.warmup}"
            )
        for name in ("threshold", "smoothing"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in (0, 1], got {getattr(self, name)}")

    def divisor(self, arm: Arm) -> int:
        """What the loss of a window, summed over its steps and rows, is divided by."""
        return max(arm.window, self.update_every) * self.batch_size

    def arms(self) -> list[Arm]:
        """The arms of one seed, in the order of reports; the long windows last."""
        made = [Arm(method, window) for window in self.windows for method in self.methods]
        exact = [method for method in self.methods if not method.startswith("dni")] or ["fused"]
        made += [Arm(method, window) for window in self.long for method in exact]
        return list(dict.fromkeys(made))


#: What the tasks want different from charlm's defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "charlm": {},
    "copy": {
        "windows": (4,),
        "long": (),
        "hidden": 128,
        "batch_size": 32,
        "lr": 1e-3,
        "exact_lr": 3e-4,
        "clip": 0.25,
        "sg_lr": 1e-4,
        "synthesizer": "linear",
        "sg_scale": 1.0,
        "target_clip": 1.0,
        "warmup": 0.0,
        "cosine": False,
        "amount": 12_000,
        "width": 1,
        "evaluations": 100,
        "seeds": (0, 1, 2),
    },
}
PRESETS["repeat-copy"] = PRESETS["copy"]


def defaults(task: str, **changes: Any) -> Settings:
    """Settings of a task, with ``changes`` where they are not None."""
    if task not in PRESETS:
        raise ValueError(text.unknown("task", task, PRESETS))
    given = {name: value for name, value in changes.items() if value is not None}
    return Settings(task=task, **{**PRESETS[task], **given})


# ---------------------------------------------------------------------------------------- networks


class OneHot(nn.Module):
    """Indices [...] to rows [..., classes]."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, index: Tensor) -> Tensor:
        return F.one_hot(index, self.classes).float()


class SequenceNet(nn.Module):
    """Encoding, LSTM, linear head: [T, B, ...] and a state to [T, B, outputs] and the next one."""

    def __init__(self, encode: nn.Module, lstm: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.encode = encode
        self.lstm = lstm
        self.head = head

    def forward(
        self, window: Tensor, state: State | None, ended: Tensor | None = None
    ) -> tuple[Tensor, State]:
        options = {} if ended is None else {"end_of_sequence": ended}
        output, state = self.lstm(self.encode(window), state, **options)
        return self.head(output), state

    def twin(self) -> SequenceNet:
        """The same on ``nn.LSTM``, sharing the parameters."""
        lstm = self.lstm.to_lstm() if isinstance(self.lstm, fd.FusedDNILSTM) else self.lstm
        return SequenceNet(self.encode, lstm, self.head)


def plain_net(settings: Settings, classes: int, seed: int) -> SequenceNet:
    """On ``nn.LSTM``, initialised from ``seed``; the global random generator is left alone.

    Args:
        classes: number of symbols of the text; 0 for a copy task.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encode: nn.Module = nn.Identity()
        if classes:
            outputs, inputs = classes, settings.embedding or classes
            encode = nn.Embedding(classes, inputs) if settings.embedding else OneHot(classes)
        else:
            inputs, outputs = sequences.channels(settings.task, settings.width)
        lstm = nn.LSTM(inputs, settings.hidden, settings.layers)
        return SequenceNet(encode, lstm, nn.Linear(settings.hidden, outputs))


def build_net(arm: Arm, settings: Settings, classes: int, seed: int) -> SequenceNet:
    """The network of an arm: the same weights for every arm of a seed."""
    net = plain_net(settings, classes, seed)
    if arm.method == "backprop":
        return net
    options: dict[str, Any] = {"synthesizer": None, "backend": settings.backend}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        if arm.synthetic:
            options |= {
                "synthesizer": _synthesizer(settings),
                "sg_scale": settings.sg_scale,
                "max_target_norm": settings.target_clip or None,
                "auxiliary": arm.method == "dni+aux",
                "target_scale": settings.target_scale * settings.divisor(arm),
            }
        assert isinstance(net.lstm, nn.LSTM)
        return SequenceNet(net.encode, fd.FusedDNILSTM.from_lstm(net.lstm, **options), net.head)


def _synthesizer(settings: Settings) -> nn.Module | str:
    features = 2 * settings.layers * settings.hidden
    if settings.synthesizer == "linear":
        return fd.LinearSynthesizer(features)
    if settings.synthesizer == "mlp":
        return fd.MLPSynthesizer(features, settings.sg_hidden)
    return "default"


# ---------------------------------------------------------------------------------------- trainers


class Trainer:
    """One network under one arm. ``position`` counts what ``settings.amount`` limits, by rows."""

    def __init__(self, arm: Arm, seed: int, settings: Settings, net: SequenceNet) -> None:
        self.arm, self.seed, self.settings = arm, seed, settings
        self.net = net.train()
        own = {id(p) for p in net.twin().parameters()}
        self.trained = [p for p in net.parameters() if id(p) in own]
        heads = [p for p in net.parameters() if id(p) not in own]
        rate = settings.lr if arm.synthetic else settings.exact_lr or settings.lr
        groups: list[dict[str, Any]] = [{"params": self.trained, "lr": rate}]
        if heads:
            groups.append({"params": heads, "lr": settings.sg_lr})
        for group in groups:
            group["initial_lr"] = group["lr"]
        self.optimizer = torch.optim.Adam(groups, fused=True)
        self.schedule: fd.Schedule | None = None
        if arm.synthetic:
            windows = -(-self.total // arm.window)
            self.schedule = fd.Schedule(self.net, warmup_steps=round(settings.warmup * windows))
        self.seconds = 0.0
        self.position = 0
        self.updates = 0
        self.history: list[dict[str, float]] = []
        #: Sum of the training loss in bits and what it was summed over, since the last evaluation.
        self._bits = self._count = 0.0

    @property
    def total(self) -> int:
        """Where ``position`` ends."""
        raise NotImplementedError

    def step(self) -> None:
        """The next piece of training: a window of a text, a batch of episodes."""
        raise NotImplementedError

    def evaluate(self) -> dict[str, float]:
        """What a point of the curve shows, besides time."""
        raise NotImplementedError

    def probe(self, window: int) -> dict[str, Any] | None:
        """True gradients at boundaries of windows of ``window`` steps; None where an episode has
        no boundary. With the prediction beside it if that is the arm's own window."""
        raise NotImplementedError

    def backward(self, loss: Tensor | None, state: State, update: bool = True) -> None:
        """Backward of a window, from its loss and from what is predicted at its end; an update."""
        if loss is not None:
            loss.backward()
        elif self.arm.synthetic:
            fd.backward_boundary(state)
        else:
            return  # nothing arrives: there is no gradient
        if self.schedule is not None:
            self.schedule.step()
        if not update:
            return
        if self.settings.clip:
            nn.utils.clip_grad_norm_(self.trained, self.settings.clip)
        if self.settings.cosine:
            factor = 0.5 * (1.0 + math.cos(math.pi * self.position / self.total))
            for group in self.optimizer.param_groups:
                group["lr"] = factor * group["initial_lr"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1

    def note(self, nats: Tensor, count: int) -> None:
        """Keep a training loss for the curve."""
        self._bits += float(nats.detach()) / math.log(2.0)
        self._count += count

    def train_bits(self) -> float:
        """Mean training loss since the last call, bits."""
        bits, count = self._bits, self._count
        self._bits = self._count = 0.0
        return bits / count if count else math.nan

    def synthesizer(self, window: int) -> nn.Module | None:
        """What predicts at the boundaries of these windows, if anything."""
        if not self.arm.synthetic or window != self.arm.window:
            return None
        assert isinstance(self.net.lstm, fd.FusedDNILSTM)
        return self.net.lstm.synthesizer

    def state_dict(self) -> dict[str, Any]:
        """Everything that a continuation needs."""
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "seconds": self.seconds,
            "position": self.position,
            "updates": self.updates,
            "history": self.history,
            "sums": [self._bits, self._count],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.seconds, self.position = state["seconds"], state["position"]
        self.updates, self.history = state["updates"], list(state["history"])
        self._bits, self._count = state["sums"]


class CharacterTrainer(Trainer):
    """Next-character prediction on contiguous streams, the state carried from window to window.

    A pass reads every stream to its end; the next one starts from a zero state.
    """

    def __init__(self, arm: Arm, seed: int, settings: Settings, source: Text) -> None:
        super().__init__(arm, seed, settings, build_net(arm, settings, source.classes, seed))
        self.source = source
        self.stream = streams(source.train, settings.batch_size)  # [S + 1, B]
        self.validation = streams(
            source.validation, min(VALIDATION_STREAMS, len(source.validation) // 2)
        )
        self.carried: State | None = None

    @property
    def total(self) -> int:
        return max(1, self.settings.amount // self.settings.batch_size)

    def step(self) -> None:
        span = len(self.stream) - 1
        start = self.position % span
        length = min(self.arm.window, span - start, self.total - self.position)
        last = start + length == span
        window = self.stream[start : start + length]
        batch = window.shape[1]
        ended = None
        if last and self.arm.synthetic:
            ended = torch.ones(batch, dtype=torch.bool)
        logits, state = self.net(window, self.carried, ended)
        target = self.stream[start + 1 : start + length + 1]
        nats = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")
        done = self.position + length
        every = self.settings.update_every or 1
        due = done // every > self.position // every or done == self.total
        self.backward(nats / self.settings.divisor(self.arm), state, due)
        self.note(nats, length * batch)
        self.carried = None if last else (state[0].detach(), state[1].detach())
        self.position = done

    def evaluate(self) -> dict[str, float]:
        return {
            "characters": float(self.position * self.settings.batch_size),
            "bits": self.validate(),
            "train_bits": self.train_bits(),
        }

    def validate(self) -> float:
        """Bits per character on the validation part, the state carried through each of its streams.

        An unknown character costs the unknown symbol and its naming (see
        :mod:`fused_dni.experiments.characters`).
        """
        self.net.eval()
        nats, state = 0.0, None
        unknown = 0
        inputs, targets = self.validation[:-1], self.validation[1:]
        with torch.no_grad():
            for start in range(0, len(inputs), VALIDATION_WINDOW):
                piece = slice(start, start + VALIDATION_WINDOW)
                logits, state = self.net(inputs[piece], state)
                target = targets[piece].flatten()
                nats += float(F.cross_entropy(logits.flatten(0, 1), target, reduction="sum"))
                unknown += int((target == len(self.source.symbols)).sum())
        self.net.train()
        bits = nats / math.log(2.0) + unknown * self.source.unknown_bits
        return bits / targets.numel()

    def probe(self, window: int) -> dict[str, Any] | None:
        span = future.CARRIED + future.REGION + future.HORIZON
        piece = self.validation[: span + 1]
        if len(piece) < span + 1:
            raise ValueError(
                f"the probe reads {span} characters of each of {piece.shape[1]} validation "
                f"streams, but they have {len(piece) - 1}: use a longer text or --validation"
            )

        def losses(logits: Tensor, start: int) -> Tensor:
            target = piece[future.CARRIED + start + 1 :][: len(logits)]
            return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")

        twin = self.net.twin()
        with torch.no_grad():
            _, state = twin(piece[: future.CARRIED], None)
        return future.future_gradient(
            twin,
            piece[future.CARRIED : -1],
            losses,
            window,
            state=state,
            horizon=future.HORIZON,
            synthesizer=self.synthesizer(window),
            target_scale=self.settings.target_scale,
        )

    def state_dict(self) -> dict[str, Any]:
        carried = None if self.carried is None else list(self.carried)
        return {**super().state_dict(), "carried": carried}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        carried = state["carried"]
        self.carried = None if carried is None else (carried[0], carried[1])
        if self.carried is not None and isinstance(self.net.lstm, fd.FusedDNILSTM):
            self.net.lstm.remember(self.carried)


class CopyTrainer(Trainer):
    """Copy and repeat-copy under a curriculum: every step is one batch of episodes, cut into
    windows. Windows before the output phase have no loss: they are closed at their boundary."""

    def __init__(self, arm: Arm, seed: int, settings: Settings) -> None:
        super().__init__(arm, seed, settings, build_net(arm, settings, 0, seed))
        self.curriculum = sequences.Curriculum(
            settings.task, settings.threshold, settings.smoothing
        )

    @property
    def total(self) -> int:
        return self.settings.amount

    def draw(self, seed: int) -> sequences.Episodes:
        """Episodes of the curriculum's present shape."""
        c, s = self.curriculum, self.settings
        return sequences.draw(s.task, c.length, c.repeats, s.batch_size, s.width, seed)

    def step(self) -> None:
        seed = self.seed * 1_000_003 + self.position
        first = self.arm.window
        if self.settings.offset:
            generator = torch.Generator().manual_seed(seed)
            first = int(torch.randint(1, first + 1, (), generator=generator))
        self.curriculum.update(self.train_on(self.draw(seed), first))
        self.position += 1

    def train_on(self, episodes: sequences.Episodes, first: int) -> float:
        """Train on a batch of episodes, whose first window has ``first`` steps; return its mean
        error, bits per bit."""
        inputs, targets, counted = episodes
        length, batch = inputs.shape[:2]
        cuts = [0, *range(first, length, self.arm.window), length]
        total = torch.zeros(())
        state: State | None = None
        for start, stop in itertools.pairwise(cuts):
            ended = None
            if stop == length and self.arm.synthetic:
                ended = torch.ones(batch, dtype=torch.bool)
            logits, state = self.net(inputs[start:stop], state, ended)
            loss = None
            if stop > counted:
                begin = max(counted - start, 0)
                loss = (
                    F.binary_cross_entropy_with_logits(
                        logits[begin:], targets[start + begin : stop], reduction="sum"
                    )
                    / targets.shape[2]
                )
                total += loss.detach()
                loss = loss / self.settings.divisor(self.arm)
            self.backward(loss, state)
            state = (state[0].detach(), state[1].detach())
        count = (length - counted) * batch
        self.note(total, count)
        return float(total) / (count * math.log(2.0))

    def evaluate(self) -> dict[str, float]:
        return {
            "steps": float(self.position),
            "solved": float(self.curriculum.solved()),
            "length": float(self.curriculum.length),
            "repeats": float(self.curriculum.repeats),
            "error": self.curriculum.error,
            "train_bits": self.train_bits(),
        }

    def probe(self, window: int) -> dict[str, Any] | None:
        inputs, targets, counted = self.draw(-1 - self.seed)
        if window >= len(inputs):
            return None

        def losses(logits: Tensor, start: int) -> Tensor:
            begin = min(max(counted - start, 0), len(logits))
            return F.binary_cross_entropy_with_logits(
                logits[begin:], targets[start + begin : start + len(logits)], reduction="sum"
            ) / float(targets.shape[2])

        return future.future_gradient(
            self.net.twin(),
            inputs,
            losses,
            window,
            synthesizer=self.synthesizer(window),
            target_scale=self.settings.target_scale,
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "level": self.curriculum.level,
            "error": self.curriculum.error,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.curriculum.level, self.curriculum.error = state["level"], state["error"]


def build(arm: Arm, seed: int, settings: Settings, source: Text | None) -> Trainer:
    """The trainer of an arm; ``source`` for charlm alone.

    Raises:
        ValueError: a text too short for the windows and the batch.
    """
    if settings.task != "charlm":
        return CopyTrainer(arm, seed, settings)
    if source is None:
        raise ValueError("charlm needs a text")
    rows = len(source.train) // settings.batch_size
    if rows < arm.window + 1:
        raise ValueError(
            f"{source.name} has {len(source.train)} characters to train on: too short for "
            f"{settings.batch_size} streams of at least one window of {arm.window} "
            f"({settings.batch_size * (arm.window + 1)}); use a smaller --batch-size or window"
        )
    if len(source.validation) < 2:
        raise ValueError(f"{source.name} has {len(source.validation)} characters to validate on")
    return CharacterTrainer(arm, seed, settings, source)


def costs(
    settings: Settings,
    source: Text | None = None,
    *,
    seconds: float = 4.0,
    progress: Callable[[float], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Peak memory and time of a piece of training, by arm, from untrained nets.

    The piece is what lies between two updates, in a text; a batch of episodes at level
    :data:`COST_LEVEL` of the curriculum, in a copy task. Times are interleaved (see
    :func:`fused_dni.measure.timing.compare`), so that nothing that happened during the training is
    in them.

    Returns:
        By arm ``peak_memory`` (bytes, :func:`fused_dni.measure.timing.peak_memory`), ``timing``
        (seconds a piece) and ``units``, the characters or steps of a piece.
    """
    endless = replace(settings, amount=1 << 50, lr=1e-6, sg_lr=1e-6)
    pieces = {arm.name: _piece(arm, endless, source) for arm in settings.arms()}
    held = {name: timing.peak_memory(piece) for name, piece in pieces.items()}
    timings = timing.compare(pieces, seconds=seconds, progress=progress)
    return {
        arm.name: {
            "peak_memory": held[arm.name],
            "timing": timings[arm.name],
            "units": settings.divisor(arm) if settings.task == "charlm" else 1,
        }
        for arm in settings.arms()
    }


def _piece(arm: Arm, settings: Settings, source: Text | None) -> timing.Candidate:
    trainer = build(arm, settings.seeds[0], settings, source)
    if isinstance(trainer, CopyTrainer):
        trainer.curriculum.level = COST_LEVEL
        episodes = trainer.draw(0)
        return lambda: trainer.train_on(episodes, arm.window)

    def update() -> None:
        before = trainer.updates
        while trainer.updates == before:
            trainer.step()

    return update


# --------------------------------------------------------------------------------------------- run


def train(
    settings: Settings,
    source: Text | None = None,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    checkpoint_every: float = 15.0,
    progress: Progress | None = None,
) -> Outcome:
    """Train every arm with every seed.

    Args:
        settings: what to train.
        source: the text, for charlm.
        checkpoint: folder of the checkpoint, written every 15 seconds, at every evaluation and on
            Ctrl-C; None for none.
        resume: continue from it.
        checkpoint_every: seconds between two checkpoints.
        progress: where to report.

    Raises:
        Interrupted: Ctrl-C.
        CheckpointError: the checkpoint cannot be read, is of another run, or cannot be written.
        ValueError: settings and text do not fit.
        RuntimeError: a network's parameters are not finite any more.
    """
    progress = progress or Progress(enabled=False)
    folder = None if checkpoint is None else Path(checkpoint)
    arms = settings.arms()
    described = _described(source)
    finished: list[dict[str, Any]] = []
    first_seed = 0
    saved: dict[str, Any] = {}
    if resume:
        if folder is None:
            raise CheckpointError("--resume needs --checkpoint DIR")
        kept = read_checkpoint(folder, settings)
        if kept["data"] != described:
            raise CheckpointError(f"the checkpoint in {folder} is of another text: {kept['data']}")
        finished, first_seed, saved = kept["finished"], kept["seed"], kept["trainers"]
    trainers: list[Trainer] = []
    last = time.monotonic()
    stop = Stop()

    def keep(seed: int) -> str:
        nonlocal last
        last = time.monotonic()
        if folder is None:
            return "nothing was kept (no --checkpoint DIR)"
        path = write_checkpoint(
            folder,
            {
                "version": VERSION,
                "settings": plain(asdict(settings)),
                "data": described,
                "finished": finished,
                "seed": seed,
                "trainers": {t.arm.name: t.state_dict() for t in trainers},
            },
        )
        return f"{path} was kept; add --resume to continue from it"

    with stop.listening(), progress:
        for s in range(first_seed, len(settings.seeds)):
            seed = settings.seeds[s]
            trainers = [build(arm, seed, settings, source) for arm in arms]
            for trainer in trainers:
                if trainer.arm.name in saved:
                    trainer.load_state_dict(saved[trainer.arm.name])
            saved = {}
            for turn in range(settings.evaluations):
                order = turn % len(trainers)  # another arm goes first in each turn
                for trainer in trainers[order:] + trainers[:order]:
                    if len(trainer.history) > turn:
                        continue
                    goal = trainer.total * (turn + 1) // settings.evaluations
                    while trainer.position < goal:
                        start = time.perf_counter()
                        for _ in range(CHUNK):
                            if trainer.position < goal:
                                trainer.step()
                        trainer.seconds += time.perf_counter() - start
                        due = folder is not None and time.monotonic() - last > checkpoint_every
                        if stop.asked or due:
                            kept_as = keep(s)
                            if stop.asked:
                                raise Interrupted(kept_as)
                        if trainer.position < trainer.total:
                            done = trainer.position / trainer.total
                            progress.update(_label(trainer, settings), done)
                    _evaluate(trainer, turn, progress)
                    if folder is not None or stop.asked:
                        kept_as = keep(s)
                        if stop.asked:
                            raise Interrupted(kept_as)
            finished += [_finish(trainer, settings) for trainer in trainers]
            trainers = []
            if folder is not None:
                keep(s + 1)
    order_of = {arm.name: i for i, arm in enumerate(arms)}
    finished.sort(key=lambda run: (order_of[run["name"]], settings.seeds.index(run["seed"])))
    return Outcome(settings, described, finished, notes=_notes(settings, source))


def _described(source: Text | None) -> dict[str, Any]:
    if source is None:
        return {}
    return {
        "name": source.name,
        "train_characters": len(source.train),
        "validation_characters": len(source.validation),
        "symbols": len(source.symbols),
        "unknown": source.unknown,
    }


def _notes(settings: Settings, source: Text | None) -> list[str]:
    notes = []
    if source is not None and source.unknown:
        notes.append(
            f"{source.unknown} of {len(source.validation)} validation characters do not occur in "
            f"the training part: each costs the unknown symbol and {source.unknown_bits:.1f} bits "
            "that name it among the rest of Unicode"
        )
    if settings.task != "charlm":
        notes.append(
            f"solved: the running error over batches fell below {settings.threshold:g} bits per "
            "bit to be written (guessing costs 1)"
        )
    steps = {
        arm.name: -(-max(1, settings.amount // settings.batch_size) // arm.window)
        for arm in settings.arms()
        if arm.synthetic and settings.task == "charlm"
    }
    for name, windows in steps.items():
        notes += warmup_notes([name], round(settings.warmup * windows), windows)
    return notes


def _label(trainer: Trainer, settings: Settings) -> str:
    seed = f" seed {trainer.seed}" if len(settings.seeds) > 1 else ""
    return f"{trainer.arm.name:<14}{seed}"


def _evaluate(trainer: Trainer, turn: int, progress: Progress) -> None:
    refuse_divergence(trainer.net, f"{trainer.arm.name} diverged before evaluation {turn + 1}")
    row: dict[str, Any] = trainer.evaluate()
    row |= {"seconds": trainer.seconds, "updates": trainer.updates}
    if trainer.settings.probe and trainer.arm.synthetic:
        row["prediction"] = trainer.probe(trainer.arm.window)
    trainer.history.append(row)
    note = f"{row['bits']:.3f} bits" if "bits" in row else f"solved {row['solved']:.0f}"
    progress.update(
        _label(trainer, trainer.settings),
        (turn + 1) / trainer.settings.evaluations,
        f"{note}, {trainer.seconds:.1f} s",
    )


def _finish(trainer: Trainer, settings: Settings) -> dict[str, Any]:
    run: dict[str, Any] = {
        "name": trainer.arm.name,
        "method": trainer.arm.method,
        "window": trainer.arm.window,
        "seed": trainer.seed,
        "history": trainer.history,
        "fingerprint": fingerprint(trainer.net),
    }
    if settings.probe:
        found = (trainer.probe(window) for window in future.WINDOWS)
        run["future"] = [row for row in found if row is not None]
    return run
