"""What every training run of these experiments needs: checkpoints, and a stop at a step's end."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fused_dni.measure.baseline import facts, name_commit
from fused_dni.measure.errors import Interrupted as Interrupted
from fused_dni.report.outcome import Outcome
from fused_dni.report.progress import Progress
from fused_dni.report.schema import Keep as Keep
from fused_dni.report.schema import Result, resumed

Say = Callable[[float], None]
CHECKPOINT = "train.pt"
VERSION = 1
#: Steps between two looks at the clock, the bars and the stop flag.
CHUNK = 20
T = TypeVar("T", bound="Trainer")


class CheckpointError(ValueError):
    """A checkpoint is absent, broken or of another run; the message says which."""


def fingerprint(model: nn.Module) -> str:
    """Hash all parameters and buffers by SHA-256: equal only if every bit is."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def refuse_divergence(model: nn.Module, what: str) -> None:
    """Raise RuntimeError, ``what`` first, if a parameter or buffer is not finite."""
    if name := _not_finite(model):
        raise RuntimeError(f"{what} ({name} is not finite): use a smaller --lr or --sg-lr")


def diverged(model: nn.Module) -> bool:
    """Say whether a parameter or buffer is not finite."""
    return bool(_not_finite(model))


def _not_finite(model: nn.Module) -> str:
    """Return the name of the first parameter or buffer that is not finite, or none."""
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
            return name
    return ""


def write_checkpoint(folder: Path, state: dict[str, Any]) -> Path:
    """Write ``folder/train.pt`` so that a reader sees the old one or the new one, never half."""
    path = folder / CHECKPOINT
    partial = folder / f".{CHECKPOINT}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as out:
            torch.save(state, out)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def read_checkpoint(folder: Path, settings: Any) -> dict[str, Any]:
    """Read ``folder/train.pt`` and check that it belongs to these settings (a dataclass).

    Raises:
        CheckpointError: absent, unreadable, of another version or of other settings.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: start without --resume")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling makes of arbitrary bytes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path} is damaged or not a checkpoint: {reason}") from error
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise CheckpointError(f"{path} is not a checkpoint of this version ({VERSION})")
    # What a file does not name is younger than the file, and was as it is by default.
    saved = {**plain({f.name: f.default for f in fields(settings)}), **state["settings"]}
    wanted = plain(asdict(settings))
    differing = [
        f"{name} {saved[name]!r} there, {wanted[name]!r} now"
        for name in wanted
        if saved[name] != wanted[name]
    ]
    if differing:
        raise CheckpointError(f"{path} is of another run: {'; '.join(differing)}")
    return state


def plain(value: Any) -> Any:
    """Make tuples lists, as JSON and ``weights_only`` reading have them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def begun(
    kind: str,
    settings: Any,
    previous: Result | None,
    command: str | None,
    device: str = "cpu",
    memory_is: str = "",
    **parts: Any,
) -> Result:
    """Return the report that an experiment goes on with: the previous one, or one of these parts.

    Raises:
        ValueError: the previous one is of other settings.
    """
    empty = Result(
        kind,
        facts=facts(command, device),
        settings=plain(asdict(settings)),
        memory_is=memory_is,
        body={**parts, "finished": False},
    )
    return resumed(previous, empty)


def facts_of(outcome: Outcome, command: str | None) -> dict[str, Any]:
    """Gather the facts of a report of training, with the commits of all its runs."""
    found = facts(command)
    return found | {"commit": outcome.commit or found["commit"]}


class Job(NamedTuple):
    """A run that a report is to have.

    Attributes:
        label: in progress.
        into: the runs of the report that it is added to.
        work: makes it; called with a function that is told which part of it is done, and that stops
            it on Ctrl-C.
    """

    label: str
    into: list[dict[str, Any]]
    work: Callable[[Say], dict[str, Any]]


def do_jobs(
    report: Result, jobs: Sequence[Job], total: int, keep: Keep | None, progress: Progress
) -> None:
    """Do what is left of ``total`` jobs, add the runs to the report, set ``finished`` in it, and
    name this commit among its facts, beside those that earlier runs are of.

    Args:
        keep: called with the report whenever a run is finished.

    Raises:
        Interrupted: Ctrl-C; finished runs have been kept.
    """
    keep = keep or (lambda _: None)
    keep(report)
    stop = Stop()
    done = total - len(jobs)
    commit = facts()["commit"]  # of what is loaded now
    with stop.listening():
        for job in jobs:

            def say(fraction: float, job: Job = job, done: int = done) -> None:
                if fraction < 1.0:
                    progress.update(job.label, fraction)
                if stop.asked:
                    raise Interrupted(f"{done} of {total} runs were finished")

            run = job.work(say)
            error = run["history"][-1]["error"] if "history" in run else run.get("error")
            progress.update(job.label, 1.0, "" if error is None else f"error {100 * error:.2f} %")
            job.into.append(run)
            name_commit(report.facts, commit)
            done += 1
            report.body["finished"] = done == total
            keep(report)


def warmup_notes(names: Sequence[str], warmup_steps: int, steps: int) -> list[str]:
    """Say which runs never used a synthetic gradient, as the warm-up was as long as they were."""
    synthetic = [name for name in names if name.startswith(("cdni", "dni"))]
    if not synthetic or warmup_steps < steps:
        return []
    return [
        f"All {steps} steps of {', '.join(synthetic)} were warm-up, on true gradients: their "
        "errors are those of backprop, and say nothing of synthetic gradients. A shorter warm-up "
        "or a longer run would."
    ]


class Stop:
    """Ctrl-C asks; the loop answers between two steps. A second Ctrl-C does not wait."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take Ctrl-C inside the block, in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


class Trainer:
    """One network under one method, that takes turns with others in :class:`Turns`.

    Attributes:
        KEPT: what a continuation needs: attributes that have a state dict, or are plain data.
        model: what is trained.
        name, seed: of the run.
        seconds: that its steps took.
        history: a row a turn.
    """

    KEPT: ClassVar[tuple[str, ...]] = ("optimizer", "schedule", "seconds", "history")
    model: nn.Module

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.seed, self.seconds = name, seed, 0.0
        self.history: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a continuation needs."""
        kept = {name: getattr(self, name) for name in self.KEPT}
        return {name: v.state_dict() if hasattr(v, "state_dict") else v for name, v in kept.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        for name in self.KEPT:
            here = getattr(self, name)
            if hasattr(here, "load_state_dict"):
                here.load_state_dict(state[name])
            else:
                setattr(self, name, state[name])


class Turns(Generic[T]):
    """Training of several methods side by side: seed by seed, in turns, so that a machine that
    slows down slows all of them down. What is timed is the training alone.

    Killed at any moment and resumed from its last checkpoint it continues bit by bit (same machine,
    thread count and instruction set).

    Args:
        settings: with ``seeds``.
        names: of the methods, in the order of reports.
        turns: of each method and seed.
        data: what is said of the data in checkpoints.

    Attributes:
        made: the commits that training was of, this one and those before it, by ``commit``.
    """

    def __init__(
        self, settings: Any, names: Sequence[str], turns: int, data: dict[str, Any]
    ) -> None:
        self.settings, self.names, self.turns, self.data = settings, names, turns, data
        self.made: dict[str, Any] = {}

    def build(self, seed: int) -> list[T]:
        """Make the trainers of a seed."""
        raise NotImplementedError

    def begin(self, trainer: T, turn: int) -> int:
        """Prepare a turn and return the position that it ends at."""
        raise NotImplementedError

    def position(self, trainer: T) -> int:
        """Return how far it is."""
        raise NotImplementedError

    def advance(self, trainer: T, steps: int, goal: int) -> None:
        """Train by so many steps, but not beyond ``goal``."""
        raise NotImplementedError

    def evaluate(self, trainer: T, turn: int) -> str:
        """Add a row to its history, and return what to say of it."""
        raise NotImplementedError

    def finish(self, trainer: T) -> dict[str, Any]:
        """Return the run for the report."""
        return {
            "name": trainer.name,
            "seed": trainer.seed,
            "history": trainer.history,
            "fingerprint": fingerprint(trainer.model),
        }

    def _resumed(self, folder: Path | None) -> tuple[list[dict[str, Any]], int, dict[str, Any]]:
        """Return finished runs, the number of the seed in training, and its trainers' states."""
        if folder is None:
            raise CheckpointError("--resume needs --checkpoint DIR")
        kept = read_checkpoint(folder, self.settings)
        if kept.get("data", self.data) != self.data:
            raise CheckpointError(f"the checkpoint in {folder} is of other data: {kept['data']}")
        name_commit(self.made, kept.get("commit"))  # absent from older files
        if "position" not in kept:
            return kept["finished"], kept["seed"], kept["trainers"]
        # Of 0.1.0's train: seed, epoch, turn, step. Behind a seed's end the trainers are its own.
        seed, *rest = kept["position"]
        return kept["finished"], seed, kept["trainers"] if any(rest) else {}

    def run(
        self,
        checkpoint: str | os.PathLike[str] | None,
        resume: bool,
        checkpoint_every: int | None,
        progress: Progress | None,
    ) -> list[dict[str, Any]]:
        """Train all, and return the finished runs.

        Args:
            checkpoint: folder of the checkpoint, written every 15 seconds, at the end of a turn and
                on Ctrl-C; None for none.
            resume: continue from it.
            checkpoint_every: steps between two checkpoints, instead of 15 seconds.
            progress: where to report.

        Raises:
            Interrupted: Ctrl-C.
            CheckpointError: the checkpoint cannot be read, is of another run, or cannot be written.
        """
        progress = progress or Progress(enabled=False)
        folder = None if checkpoint is None else Path(checkpoint)
        seeds = self.settings.seeds
        finished, first, saved = self._resumed(folder) if resume else ([], 0, {})
        if resume:
            progress.line(f"resumed: {len(finished)} runs were finished")
        commit = facts()["commit"]
        trainers: list[T] = []
        last = time.monotonic()
        stop = Stop()

        def keep(seed: int) -> None:
            nonlocal last
            last = time.monotonic()
            kept = "nothing was kept (no --checkpoint DIR)"
            if folder is not None:
                state = {
                    "version": VERSION,
                    "settings": plain(asdict(self.settings)),
                    "data": self.data,
                    "commit": self.made.get("commit"),
                    "finished": finished,
                    "seed": seed,
                    "trainers": {trainer.name: trainer.state_dict() for trainer in trainers},
                }
                path = write_checkpoint(folder, state)
                kept = f"{path} was kept; add --resume to continue from it"
            if stop.asked:
                raise Interrupted(kept)

        with stop.listening(), progress:
            for s in range(first, len(seeds)):
                trainers = self.build(seeds[s])
                for trainer in trainers:
                    if trainer.name in saved:
                        trainer.load_state_dict(saved[trainer.name])
                saved = {}
                for turn in range(self.turns):
                    order = turn % len(trainers)  # another one goes first in each turn
                    for trainer in trainers[order:] + trainers[:order]:
                        if len(trainer.history) > turn:
                            continue
                        label = f"{trainer.name:<14}"
                        label += f" seed {trainer.seed}" if len(seeds) > 1 else ""
                        goal = self.begin(trainer, turn)
                        name_commit(self.made, commit)
                        while (start := self.position(trainer)) < goal:
                            steps = CHUNK
                            if checkpoint_every is not None:
                                steps = min(steps, checkpoint_every - start % checkpoint_every)
                            began = time.perf_counter()
                            self.advance(trainer, steps, goal)
                            trainer.seconds += time.perf_counter() - began
                            now = self.position(trainer)
                            if checkpoint_every is None:
                                due = time.monotonic() - last > 15.0
                            else:
                                due = now // checkpoint_every > start // checkpoint_every
                            if stop.asked or (due and folder is not None):
                                keep(s)
                            if now < goal:
                                progress.update(label, now / goal * (turn + 1) / self.turns)
                        note = self.evaluate(trainer, turn)
                        note = f"{note}, {trainer.seconds:.1f} s"
                        progress.update(label, (turn + 1) / self.turns, note)
                        if folder is not None or stop.asked:
                            keep(s)
                finished += [self.finish(trainer) for trainer in trainers]
                trainers = []
                if folder is not None:
                    keep(s + 1)
        places = {name: i for i, name in enumerate(self.names)}
        finished.sort(key=lambda run: (places[run["name"]], seeds.index(run["seed"])))
        return finished
