"""``Checkpoints``: all stages as they were behind the same step, though they stop at none."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from fused_dni.distributed.pipeline import Pipeline

_STEP = re.compile(r"step-(\d+)")
_MANIFEST = "manifest.json"


class Stateful(Protocol):
    """What has a state beside the stage and its optimizers: a scheduler, a Schedule."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state: the same keys at all times."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Take it over."""
        ...


class Checkpoints:
    """Save each stage behind the same steps, and go on from the last that all stages have.

    Behind step s each stage saves itself when it gets there; as messages come in order, what it has
    then is made of the first s steps alone. Targets that are on their way are not saved: a resumed
    stage learns nothing from the steps whose targets it would have got, and nothing twice. The
    files are those of ``torch.distributed.checkpoint``, a folder a stage, which has its name only
    when it is complete: ``folder/step-00000400/stage-1``. Hosts need no common file system.

    On every rank::

        checkpoints = Checkpoints("runs/a", pipeline, optimizers=[optimizer], every=100)
        first = checkpoints.resume()  # 0 in a fresh folder
        for out in pipeline.run(batches_from(first)):
            optimizer.step()
            optimizer.zero_grad()
            checkpoints.step()

    Args:
        folder: of this run; made if it is not there.
        pipeline: whose stage and step are saved.
        optimizers: over the stage's parameters, also a :class:`fused_dni.FusedOptimizer`.
        others: by name what else has a ``state_dict``: schedulers, a :class:`fused_dni.Schedule`.
        every: steps between two checkpoints, 1 or more; the same on all ranks.

    Raises:
        ValueError: ``every`` is less than 1.
        OSError: the folder cannot be made.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        pipeline: Pipeline,
        *,
        optimizers: list[torch.optim.Optimizer] | None = None,
        others: Mapping[str, Stateful] | None = None,
        every: int = 100,
    ) -> None:
        if type(every) is not int or every < 1:
            raise ValueError(f"every must be an integer of at least 1, got {every!r}")
        self.folder, self.pipeline, self.every = Path(folder), pipeline, every
        self.optimizers, self.others = list(optimizers or ()), dict(others or {})
        self.folder.mkdir(parents=True, exist_ok=True)
        # By so many a stage may be ahead of another, which the last one they share lies behind.
        ahead = (2 * pipeline.window + 1) * pipeline.world
        self._keep = 2 + math.ceil(ahead / every)

    def step(self) -> None:
        """Save this stage, if its last step is one to be saved; to be called behind every step,
        when the optimizers have run."""
        if self.pipeline.steps % self.every == 0:
            self._save()

    def resume(self) -> int:
        """Load the last checkpoint that all stages have, into the stage, the optimizers and the
        others (mutated); later ones are removed. Every rank must call this, before its first step.

        Returns:
            The number of steps behind it, where the data is to go on; 0 if there is none.

        Raises:
            ValueError: a checkpoint of another number of stages, or whose contents do not fit.
        """
        pipeline = self.pipeline
        own = self._saved()
        found = pipeline.exchange({"steps": own[-64:]})
        common = set(own).intersection(*(card["steps"] for card in found))
        step = max(common, default=0)
        if step:
            self._load(step)
        for late in own:
            if late > step:
                shutil.rmtree(self._place(late))
        pipeline.steps = step
        return step

    def _place(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}" / f"stage-{self.pipeline.rank}"

    def _saved(self) -> list[int]:
        """Return the steps of which this stage has a checkpoint, in order."""
        found = []
        for path in self.folder.iterdir():
            named = _STEP.fullmatch(path.name)
            if named and (self._place(int(named[1])) / _MANIFEST).is_file():
                found.append(int(named[1]))
        return sorted(found)

    def _state(self) -> dict[str, Any]:
        stage = self.pipeline.stage
        return {
            "stage": get_model_state_dict(stage),
            "optimizers": {
                str(i): get_optimizer_state_dict(stage, optimizer)
                for i, optimizer in enumerate(self.optimizers)
            },
            "others": {name: other.state_dict() for name, other in self.others.items()},
            "rng": torch.get_rng_state(),
        }

    def _save(self) -> None:
        step = self.pipeline.steps
        place = self._place(step)
        partial = place.with_name(f".{place.name}.part")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's, about a checkpoint of one process
            state_dict_saver.save(self._state(), checkpoint_id=partial, no_dist=True)
        manifest = {"step": step, "stage": self.pipeline.rank, "num_stages": self.pipeline.world}
        with (partial / _MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(manifest, file)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(place, ignore_errors=True)
        partial.rename(place)
        for old in self._saved()[: -self._keep]:
            shutil.rmtree(self._place(old))
            with suppress(OSError):  # other stages' are in it, or one of them was sooner
                self._place(old).parent.rmdir()

    def _load(self, step: int) -> None:
        place = self._place(step)
        manifest = json.loads((place / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["num_stages"] != self.pipeline.world:
            raise ValueError(
                f"the checkpoint in {place} is of {manifest['num_stages']} stages, this pipeline "
                f"has {self.pipeline.world}"
            )
        state = self._state()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                state_dict_loader.load(state, checkpoint_id=place, no_dist=True)
            except CheckpointException as problem:
                raise ValueError(
                    f"the checkpoint in {place} does not fit this stage: {problem}"
                ) from problem
        stage = self.pipeline.stage
        set_model_state_dict(stage, state["stage"])
        for i, optimizer in enumerate(self.optimizers):
            set_optimizer_state_dict(stage, optimizer, state["optimizers"][str(i)])
        for name, other in self.others.items():
            other.load_state_dict(state["others"][name])
        torch.set_rng_state(state["rng"])
