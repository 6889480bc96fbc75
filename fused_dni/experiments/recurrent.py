"""The recurrent runs behind ``fused-dni train charlm``, ``copy``, ``repeat-copy`` and ``rows``.

An LSTM between an encoding and a linear head, trained in windows of T steps by several arms side by
side: ``backprop`` (``nn.LSTM``, truncated backprop), ``fused`` (the same on our kernels), ``dni``
and ``dni+aux`` (of ``rows`` some more: :mod:`fused_dni.experiments.rows`). All arms of a seed start
from the same weights, see the same data in the same order and the same amount of it. They take
turns in one process, so that a machine that slows down slows all of them down; what is timed is the
training alone.

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
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_dni as fd
from fused_dni.backends.common.windows import state_rows
from fused_dni.experiments import future, run, sequences
from fused_dni.experiments.ablation import Altered
from fused_dni.experiments.characters import Text, streams
from fused_dni.experiments.data import Dataset
from fused_dni.experiments.rows import RowsTrainer
from fused_dni.experiments.settings import Arm
from fused_dni.experiments.settings import Recurrent as Settings
from fused_dni.experiments.windowed import OneHot, State, Trainer, build_net
from fused_dni.measure import timing
from fused_dni.report.kinds.recurrent import COST_LEVEL, Outcome
from fused_dni.report.progress import Progress
from fused_dni.report.schema import Result

#: Streams that the validation text is read in, each from a zero state.
VALIDATION_STREAMS = 16
#: Steps of the validation text that are read in one call.
VALIDATION_WINDOW = 256

#: What a task is trained on, if anything is to be read for it.
Source = Text | Dataset | None


class CharacterTrainer(Trainer):
    """Next-character prediction on contiguous streams, the state carried from window to window.

    A pass reads every stream to its end; the next one starts from a zero state.
    """

    def __init__(self, arm: Arm, seed: int, settings: Settings, source: Text) -> None:
        classes, size = source.classes, settings.embedding

        def encode() -> nn.Module:
            return nn.Embedding(classes, size) if size else OneHot(classes)

        net = build_net(arm, settings, seed, encode, size or classes, classes)
        super().__init__(arm, seed, settings, net)
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
        logits, state = self.model(window, self.carried, ended)
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
        """Measure bits per character on the validation part, the state carried through its streams.

        An unknown character costs the unknown symbol and its naming (see
        :mod:`fused_dni.experiments.characters`).
        """
        self.model.eval()
        nats, state = 0.0, None
        unknown = 0
        inputs, targets = self.validation[:-1], self.validation[1:]
        with torch.no_grad():
            for start in range(0, len(inputs), VALIDATION_WINDOW):
                piece = slice(start, start + VALIDATION_WINDOW)
                logits, state = self.model(inputs[piece], state)
                target = targets[piece].flatten()
                nats += float(F.cross_entropy(logits.flatten(0, 1), target, reduction="sum"))
                unknown += int((target == len(self.source.symbols)).sum())
        self.model.train()
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

        twin = self.model.twin()
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
        if self.carried is not None and isinstance(self.model.lstm, fd.FusedDNILSTM):
            self.model.lstm.remember(self.carried)


class CopyTrainer(Trainer):
    """Copy and repeat-copy under a curriculum: every step is one batch of episodes, cut into
    windows. Windows before the output phase have no loss: they are closed at their boundary."""

    def __init__(self, arm: Arm, seed: int, settings: Settings) -> None:
        sizes = sequences.channels(settings.task, settings.width)
        super().__init__(arm, seed, settings, build_net(arm, settings, seed, nn.Identity, *sizes))
        self.curriculum = sequences.Curriculum(
            settings.task, settings.threshold, settings.smoothing
        )

    @property
    def total(self) -> int:
        return self.settings.amount

    def draw(self, seed: int) -> sequences.Episodes:
        """Draw episodes of the curriculum's present shape."""
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
        inputs, _, counted = episodes
        length, batch = inputs.shape[:2]
        cuts = [0, *range(first, length, self.arm.window), length]
        total = torch.zeros(())
        state: State | None = None
        told = self.synthesizer(self.arm.window)
        truth: list[State] = []
        if isinstance(told, Altered) and told.change == "true":
            losses = self.losses(episodes)
            _, _, truth = future.full_backprop(self.model.twin(), inputs, losses, cuts)
        for k, (start, stop) in enumerate(itertools.pairwise(cuts)):
            if isinstance(told, Altered):
                told.truth = state_rows(*truth[k]) if k < len(truth) else None
            ended = None
            if stop == length and self.arm.synthetic:
                ended = torch.ones(batch, dtype=torch.bool)
            logits, state = self.model(inputs[start:stop], state, ended)
            loss = None
            if stop > counted:
                loss = self.losses(episodes)(logits, start)
                total += loss.detach()
                loss = loss / self.settings.divisor(self.arm)
            self.backward(loss, state)
            state = (state[0].detach(), state[1].detach())
        count = (length - counted) * batch
        self.note(total, count)
        return float(total) / (count * math.log(2.0))

    def losses(self, episodes: sequences.Episodes) -> Callable[[Tensor, int], Tensor]:
        """Return what sums the losses, in nats a bit, of a window's outputs from a step on."""
        _, targets, counted = episodes

        def summed(logits: Tensor, start: int) -> Tensor:
            begin = min(max(counted - start, 0), len(logits))
            wanted = targets[start + begin : start + len(logits)]
            nats = F.binary_cross_entropy_with_logits(logits[begin:], wanted, reduction="sum")
            return nats / targets.shape[2]

        return summed

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
        episodes = self.draw(-1 - self.seed)
        if window >= len(episodes.inputs):
            return None
        return future.future_gradient(
            self.model.twin(),
            episodes.inputs,
            self.losses(episodes),
            window,
            synthesizer=self.synthesizer(window),
            target_scale=self.settings.target_scale,
        )

    def fitted(self) -> float:
        """Return how well the best linear function of the state predicts at this arm's boundaries
        (:func:`future.fitted_row_cosine`), true gradients bounded by row as targets are; NaN where
        there is no boundary."""
        rows, gradients = [], []
        net, bound = self.model.twin(), self.settings.target_clip
        for batch in range(future.FITTED):
            episodes = self.draw(-1 - self.seed - batch)
            first, length = 1 + batch % self.arm.window, len(episodes.inputs)
            cuts = [0, *range(first, length, self.arm.window), length]
            found = future.full_backprop(net, episodes.inputs, self.losses(episodes), cuts)
            rows += [state_rows(*state) for state in found[1]]
            gradients += [state_rows(*gradient) for gradient in found[2]]
        if not rows:
            return math.nan
        wanted = torch.cat(gradients) * self.settings.target_scale
        if bound:
            wanted *= bound / wanted.norm(dim=1, keepdim=True).clamp_min(bound)
        return future.fitted_row_cosine(torch.cat(rows), wanted)

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "level": self.curriculum.level,
            "error": self.curriculum.error,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.curriculum.level, self.curriculum.error = state["level"], state["error"]


def build(arm: Arm, seed: int, settings: Settings, source: Source) -> Trainer:
    """Make the trainer of an arm; ``source`` is a text for charlm, images for rows.

    Raises:
        ValueError: a text too short for the windows and the batch, or images that are.
    """
    if settings.task == "rows":
        if not isinstance(source, Dataset):
            raise ValueError("rows needs images")
        return RowsTrainer(arm, seed, settings, source)
    if settings.task != "charlm":
        return CopyTrainer(arm, seed, settings)
    if not isinstance(source, Text):
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
    source: Source = None,
    *,
    seconds: float = 4.0,
    progress: Callable[[float], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure peak memory and time of a piece of training, by arm, from untrained nets.

    The piece is what lies between two updates, in a text and of images; a batch of episodes at
    level :data:`COST_LEVEL` of the curriculum, in a copy task. Times are interleaved (see
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


def _piece(arm: Arm, settings: Settings, source: Source) -> timing.Candidate:
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


class _Evaluations(run.Turns[Trainer]):
    """Turns from an evaluation to the next."""

    def __init__(self, settings: Settings, source: Source) -> None:
        self.arms, self.source = settings.arms(), source
        names = [arm.name for arm in self.arms]
        super().__init__(settings, names, settings.evaluations, _described(source))

    def build(self, seed: int) -> list[Trainer]:
        return [build(arm, seed, self.settings, self.source) for arm in self.arms]

    def begin(self, trainer: Trainer, turn: int) -> int:
        return trainer.total * (turn + 1) // self.turns

    def position(self, trainer: Trainer) -> int:
        return trainer.position

    def advance(self, trainer: Trainer, steps: int, goal: int) -> None:
        for _ in range(steps):
            if trainer.position < goal:
                trainer.step()

    def evaluate(self, trainer: Trainer, turn: int) -> str:
        what = f"{trainer.name} diverged before evaluation {turn + 1}"
        run.refuse_divergence(trainer.model, what)
        row: dict[str, Any] = trainer.evaluate()
        row |= {"seconds": trainer.seconds, "updates": trainer.updates}
        if self.settings.probe and trainer.arm.synthetic:
            row["prediction"] = trainer.probe(trainer.arm.window)
        trainer.history.append(row)
        if "error" in row and "solved" not in row:
            return f"error {row['error']:.2%}"
        return f"{row['bits']:.3f} bits" if "bits" in row else f"solved {row['solved']:.0f}"

    def finish(self, trainer: Trainer) -> dict[str, Any]:
        arm = {"method": trainer.arm.method, "window": trainer.arm.window}
        found = super().finish(trainer) | arm
        if self.settings.probe:
            probed = (trainer.probe(window) for window in future.WINDOWS)
            found["future"] = [row for row in probed if row is not None]
            if isinstance(trainer, CopyTrainer) and trainer.arm.synthetic:
                found["fitted_row_cosine"] = trainer.fitted()
        return found


def train(
    settings: Settings,
    source: Source = None,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    checkpoint_every: int | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Train every arm with every seed, ``source`` as for :func:`build`; for the other arguments
    see :meth:`run.Turns.run`.

    Raises:
        Interrupted: Ctrl-C.
        CheckpointError: the checkpoint cannot be read, is of another run, or cannot be written.
        ValueError: settings and text do not fit.
        RuntimeError: a network's parameters are not finite any more.
    """
    turns = _Evaluations(settings, source)
    finished = turns.run(checkpoint, resume, checkpoint_every, progress)
    commit = turns.made.get("commit")
    notes = _notes(settings, source, finished)
    return Outcome(settings, turns.data, finished, notes, commit=commit)


def result(outcome: Outcome, command: str | None = None) -> Result:
    """Gather the whole report."""
    return Result(
        f"train {outcome.settings.task}",
        facts=run.facts_of(outcome, command),
        settings=asdict(outcome.settings),
        memory_is=timing.PEAK_MEMORY_CPU,
        notes=outcome.notes,
        body={
            "data": outcome.data,
            "summary": outcome.summary(),
            "costs": outcome.costs,
            "runs": outcome.runs,
            "memory_curve": outcome.memory_curve,
        },
    )


def _described(source: Source) -> dict[str, Any]:
    if source is None:
        return {}
    if isinstance(source, Dataset):
        return {
            "name": source.name,
            "train_images": len(source.train.labels),
            "evaluated_on": "held-out part" if source.held_out else "test set",
            "images": len(source.test.labels),
        }
    return {
        "name": source.name,
        "train_characters": len(source.train),
        "validation_characters": len(source.validation),
        "symbols": len(source.symbols),
        "unknown": source.unknown,
    }


def _notes(settings: Settings, source: Source, finished: list[dict[str, Any]]) -> list[str]:
    notes = []
    if isinstance(source, Text) and source.unknown:
        notes.append(
            f"{source.unknown} of {len(source.validation)} validation characters do not occur in "
            f"the training part: each costs the unknown symbol and {source.unknown_bits:.1f} bits "
            "that name it among the rest of Unicode"
        )
    if settings.task in sequences.TASKS:
        notes.append(
            f"solved: the running error over batches fell below {settings.threshold:g} bits per "
            "bit to be written (guessing costs 1)"
        )
        for arm in settings.arms():
            last = [of["history"][-1] for of in finished if of["name"] == arm.name]
            longest = max(
                sequences.steps(settings.task, int(row["length"]), int(row["repeats"]))
                for row in last
            )
            if longest <= arm.window and arm.window not in settings.long:
                notes.append(
                    f"{arm.name}: the longest episodes had {longest} steps, no more than a window: "
                    "hardly anything was truncated, or predicted"
                )
    steps = {
        arm.name: -(-max(1, settings.amount // settings.batch_size) // arm.window)
        for arm in settings.arms()
        if arm.synthetic and settings.task == "charlm"
    }
    for name, windows in steps.items():
        notes += run.warmup_notes([name], round(settings.warmup * windows), windows)
    return notes
