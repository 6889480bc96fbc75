"""What every training run of these experiments needs: checkpoints, and a stop at a step's end."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_dni.measure.errors import Interrupted as Interrupted
from fused_dni.report.progress import Progress

Keep = Callable[[dict[str, Any]], None]
Say = Callable[[float], None]
CHECKPOINT = "train.pt"
VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint is absent, broken or of another run; the message says which."""


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers: equal only if every bit is."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def refuse_divergence(model: nn.Module, what: str) -> None:
    """Raise RuntimeError, ``what`` first, if a parameter or buffer is not finite."""
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
            raise RuntimeError(f"{what} ({name} is not finite): use a smaller --lr or --sg-lr")


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
    saved, wanted = state["settings"], plain(asdict(settings))
    differing = [
        f"{name} {saved.get(name)!r} there, {wanted[name]!r} now"
        for name in wanted
        if saved.get(name) != wanted[name]
    ]
    if differing:
        raise CheckpointError(f"{path} is of another run: {'; '.join(differing)}")
    return state


def plain(value: Any) -> Any:
    """Tuples to lists, as JSON and ``weights_only`` reading have them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def begun(
    previous: dict[str, Any] | None, settings: Any, begin: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Return the report to go on with: ``previous`` if there is one, a new one otherwise.

    Raises:
        ValueError: ``previous`` is of other settings.
    """
    if previous is None:
        return begin()
    if previous["settings"] != plain(asdict(settings)):
        raise ValueError("the report that is to be continued is of other settings")
    return previous


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
    report: dict[str, Any], jobs: Sequence[Job], total: int, keep: Keep | None, progress: Progress
) -> None:
    """Do what is left of ``total`` jobs, add the runs to the report, and set ``finished`` in it.

    Args:
        keep: called with the report whenever a run is finished.

    Raises:
        Interrupted: Ctrl-C; finished runs have been kept.
    """
    keep = keep or (lambda _: None)
    keep(report)
    stop = Stop()
    done = total - len(jobs)
    with stop.listening():
        for job in jobs:

            def say(fraction: float, job: Job = job, done: int = done) -> None:
                if fraction < 1.0:
                    progress.update(job.label, fraction)
                if stop.asked:
                    raise Interrupted(f"{done} of {total} runs were finished")

            run = job.work(say)
            error = run["error"] if "error" in run else run["history"][-1]["error"]
            progress.update(job.label, 1.0, f"error {100 * error:.2f} %")
            job.into.append(run)
            done += 1
            report["finished"] = done == total
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
