"""``fused-dni train pipeline``: the paper's network over several processes, by the ways of getting
a gradient to a stage.

The hidden layers are shared out in order over the stages, the head belongs to the last. Each
process has one thread, so on fewer cores than stages they share them; what is timed is each way's
training on its own, one after the other. Batches are functions of (seed, step), so that a run that
was interrupted and restarted goes on where its checkpoints end.
"""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import fused_dni as fd
from fused_dni.distributed import Checkpoints, Pipeline, PipelineError, Stage
from fused_dni.experiments import data, nets
from fused_dni.experiments.data import Dataset
from fused_dni.experiments.settings import Staged as Settings
from fused_dni.measure.baseline import facts, name_commit
from fused_dni.report.progress import Progress
from fused_dni.report.schema import Result

#: Points of a curve of the loss.
_POINTS = 60


def split(settings: Settings, features: int, classes: int, mode: str) -> list[Stage]:
    """Cut the network in stages, the same on every process."""
    network = nets.plain(features, settings.hidden, settings.depth, classes, seed=settings.seed)
    modules = list(network)
    layers = [nn.Sequential(*modules[3 * i : 3 * i + 3]) for i in range(settings.depth)]
    stages = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed + 1)
        for i in range(settings.stages):
            first, behind = (settings.depth * j // settings.stages for j in (i, i + 1))
            module, last = nn.Sequential(*layers[first:behind]), i == settings.stages - 1
            if last:
                module.append(modules[-1])
            size = settings.hidden
            given: dict[str, Any] = {}
            if mode == "decoupled" and not last:
                rank = min(settings.rank, size)
                given["synthesizer"] = fd.LinearSynthesizer(size, rank, classes)
            if mode == "local" and not last:
                given["local_loss"] = _LocalLoss(size, classes)
            stages.append(Stage(module, i, settings.stages, **given))
    return stages


class _LocalLoss(nn.Module):
    """A linear classifier on a stage's output."""

    def __init__(self, size: int, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(size, classes)

    def forward(self, h: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.head(h), target)


def batches(
    dataset: Dataset, settings: Settings, first: int, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of steps ``first`` to ``steps``: whole epochs, each in its own order."""
    images, labels = dataset.train.images, dataset.train.labels
    size = settings.batch_size
    each = len(labels) // size
    order, of = torch.empty(0, dtype=torch.int64), -1
    for step in range(first, steps):
        if step // each != of:
            of = step // each
            generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + of)
            order = torch.randperm(len(labels), generator=generator)
        rows = order[step % each * size :][:size]
        yield images[rows], labels[rows]


def _steps(dataset: Dataset, settings: Settings) -> int:
    each = len(dataset.train.labels) // settings.batch_size
    if not each:
        raise ValueError(
            f"batch_size={settings.batch_size} is more than the {len(dataset.train.labels)} rows "
            "of the training set"
        )
    return each * settings.epochs


def work(settings: Settings, mode: str, folder: str) -> dict[str, Any]:
    """Do one process's part of a run, under torchrun or :func:`train`.

    Returns:
        The last stage's curve of losses against seconds, and all stages' reports.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    dataset = data.load(settings.dataset, folder=settings.folder)
    steps, place = _steps(dataset, settings), Path(folder)
    stage = split(settings, dataset.features, dataset.classes, mode)[rank]
    optimizer = torch.optim.Adam(stage.parameters(), settings.lr, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    others: dict[str, Any] = {"scheduler": scheduler}
    schedule = None
    if stage.decoupled is not None:
        schedule = others["schedule"] = fd.Schedule(
            stage, warmup_steps=settings.warmup_steps, target_every=settings.target_every
        )
    curve: list[list[float]] = []
    waiting: list[tuple[float, Tensor]] = []
    with Pipeline(
        stage,
        loss=F.cross_entropy,
        mode=mode,
        targets=settings.targets if mode == "decoupled" else "bootstrapped",
        window=settings.window,
        lag=settings.lag,
    ) as pipeline:
        checkpoints = Checkpoints(
            place, pipeline, optimizers=[optimizer], others=others, every=settings.checkpoint_every
        )
        first = checkpoints.resume()
        began = time.perf_counter()
        for out in pipeline.run(batches(dataset, settings, first, steps)):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            if schedule is not None:
                schedule.step()
            checkpoints.step()
            if stage.is_last:
                assert out.loss is not None
                waiting.append((time.perf_counter() - began, out.loss))
                if pipeline.steps % max(1, steps // _POINTS) == 0:
                    mean = float(torch.stack([loss for _, loss in waiting]).mean())
                    curve.append([waiting[-1][0], mean])
                    waiting.clear()
                    (place / "progress").write_text(f"{pipeline.steps / steps}", encoding="ascii")
    torch.save(stage.state_dict(), place / f"trained-{rank}.pt")
    reports = pipeline.reports()
    dist.barrier()
    dist.destroy_process_group()
    return {"curve": curve, "stages": reports, "resumed_at": first}


def train(
    settings: Settings,
    folder: str,
    *,
    restarts: int = 0,
    progress: Progress | None = None,
    command: str | None = None,
) -> Result:
    """Train the network by each mode, and measure its error on the test set.

    Args:
        folder: for checkpoints and weights, a folder a mode; what is there is gone on with.
        restarts: how often all processes are started anew if one of them dies.

    Returns:
        The report, of kind "train pipeline".

    Raises:
        PipelineError: processes that failed, with what the first of them said.
        ValueError: settings that do not fit the data.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # A launcher that keeps its store over a restart keeps the addresses of the dead in it, and who
    # is started anew waits for them.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    progress = progress or Progress(enabled=False)
    dataset = data.load(settings.dataset, folder=settings.folder)
    steps = _steps(dataset, settings)
    found = facts(command)
    runs = []
    with _commits_named(found, Path(folder)):
        for mode in settings.modes:
            place = Path(folder) / mode
            place.mkdir(parents=True, exist_ok=True)
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=settings.stages,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                run_id=uuid.uuid4().hex,
                max_restarts=restarts,
                monitor_interval=0.2,
            )
            with progress, _Watched(place / "progress", mode, progress):
                try:
                    made = elastic_launch(config, work)(settings, mode, str(place))
                except ChildFailedError as problem:
                    _, failure = problem.get_first_failure()
                    raise PipelineError(f"mode {mode}: {_last_line(failure.message)}") from None
            last = made[settings.stages - 1]
            runs.append({"mode": mode, **last, "error": _error(settings, dataset, mode, place)})
    return Result(
        "train pipeline",
        settings=asdict(settings) | {"folder": None},
        facts=found,
        body={"steps": steps, "runs": runs},
    )


@contextmanager
def _commits_named(found: dict[str, Any], folder: Path) -> Iterator[None]:
    """Name among the facts the commits of all runs that have gone on from this folder, and this
    one's; the next one leaves it out again if it fails with nothing kept there."""
    kept, now = folder / "commits.txt", found["commit"]
    before = kept.read_text("utf-8") if kept.exists() else ""
    if before:
        found["commit"] = before
        name_commit(found, now)
    folder.mkdir(parents=True, exist_ok=True)
    kept.write_text(found["commit"] or "", "utf-8")
    there = _kept(folder)
    try:
        yield
    except BaseException:
        if _kept(folder) <= there:
            kept.write_text(before, "utf-8")
        raise


def _kept(folder: Path) -> set[tuple[Path, int]]:
    """List what stages have saved of their training, with its time."""
    saved = (*folder.glob("*/step-*/stage-*"), *folder.glob("*/trained-*.pt"))
    return {(path, path.stat().st_mtime_ns) for path in saved}


def _last_line(message: Any) -> str:
    """Return what an exception said, of what torch's launcher tells of it."""
    said = message.get("message", message) if isinstance(message, dict) else message
    with suppress(TypeError, ValueError, KeyError):
        said = json.loads(said)["message"]["message"]
    lines = str(said).strip().splitlines()
    return lines[-1] if lines else "a process died without a word"


def _error(settings: Settings, dataset: Dataset, mode: str, place: Path) -> float:
    stages = split(settings, dataset.features, dataset.classes, mode)
    h = dataset.test.images
    for i, stage in enumerate(stages):
        stage.load_state_dict(torch.load(place / f"trained-{i}.pt", weights_only=True))
        with torch.no_grad():
            h = stage.eval()(h)
    wrong = (h.argmax(1) != dataset.test.labels).double().mean()
    return math.nan if not bool(torch.isfinite(h).all()) else float(wrong)


class _Watched:
    """Shows how far processes say that they are."""

    def __init__(self, path: Path, name: str, progress: Progress) -> None:
        self.path, self.name, self.progress = path, name, progress
        self.over = Event()
        self.thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self.path.unlink(missing_ok=True)
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.over.wait(0.5):
            self._show()
        self._show()

    def _show(self) -> None:
        try:
            self.progress.update(self.name, float(self.path.read_text(encoding="ascii")))
        except (OSError, ValueError):
            return  # not there yet, or being written
