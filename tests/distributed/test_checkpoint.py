"""Checkpoints: all stages behind the same step, and nothing half-written."""

from __future__ import annotations

import json
import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from ranks import ranks
from test_equality import advance, batches, differences, optimizer_of, schedules, split

import fused_dni as fd
from fused_dni.distributed import Checkpoints, Pipeline


def train(rank: int, world: int, folder: str, until: int, rule: str, mode: str = "exact",
          lose: int = 0):  # fmt: skip
    """Train up to a step, from where the folder's checkpoints end; what the stage is then."""
    stage = split(world, mode, rule)[rank]
    optimizers = [o for o in [optimizer_of([stage])] if o is not None]
    if rule != "none" and stage.decoupled is not None:
        optimizers.append(fd.FusedOptimizer(stage))
    plan = schedules([stage], 2, 0)
    with Pipeline(stage, loss=F.cross_entropy, mode=mode, lag=0) as pipeline:
        checkpoints = Checkpoints(
            folder, pipeline, optimizers=optimizers, every=3,
            others={str(i): s for i, s in enumerate(plan)},
        )  # fmt: skip
        if lose and rank == world - 1:  # it died before it had saved the last one
            last = sorted(checkpoints.folder.glob(f"step-*/stage-{rank}"))[-lose:]
            for path in last:
                shutil.rmtree(path)
        first = checkpoints.resume()
        for _ in pipeline.run(batches()[first:until]):
            advance(optimizers[0], plan)
            checkpoints.step()
        assert pipeline.steps == until
    return first, {k: v.detach().clone() for k, v in stage.state_dict().items()}


@pytest.mark.parametrize(("mode", "rule"), [("exact", "none"), ("decoupled", "none"),
                                            ("decoupled", "adam")])  # fmt: skip
@pytest.mark.parametrize("lose", [0, 1])
def test_resumed_is_uninterrupted(mode, rule, lose, tmp_path):
    """Without a lag nothing is on its way behind a step: a resumed run has the same bits."""
    options = {"rule": rule, "mode": mode}
    whole = ranks(partial(train, folder=str(tmp_path / "a"), until=12, **options), 2)
    folder = str(tmp_path / "b")
    ranks(partial(train, folder=folder, until=8, **options), 2)
    again = ranks(partial(train, folder=folder, until=12, lose=lose, **options), 2)
    assert [first for first, _ in again] == [6 - 3 * lose] * 2
    assert differences([s for _, s in again], [s for _, s in whole]) == 0.0


def test_unfinished_folders_do_not_count(tmp_path):
    run = partial(train, folder=str(tmp_path), until=7, rule="none")
    ranks(run, 2)
    saved = tmp_path / "step-00000006" / "stage-0"
    saved.rename(saved.with_name(".stage-0.part"))
    assert [first for first, _ in ranks(run, 2)] == [3, 3]
    assert sorted(p.name for p in (tmp_path / "step-00000006").iterdir()) == ["stage-0", "stage-1"]


def _refused(rank: int, world: int, folder: str) -> str:
    stage = split(world, "exact")[rank]
    with Pipeline(stage, loss=F.cross_entropy, mode="exact") as pipeline:
        with pytest.raises(ValueError) as problem:
            Checkpoints(folder, pipeline).resume()
        if stage.is_first:
            for _ in pipeline.run([]):
                pass
    return str(problem.value)


def test_another_split_is_refused(tmp_path):
    for i in range(2):
        place = tmp_path / "step-00000003" / f"stage-{i}"
        place.mkdir(parents=True)
        manifest = {"step": 3, "stage": i, "num_stages": 5}
        (place / "manifest.json").write_text(json.dumps(manifest))
    for text in ranks(partial(_refused, folder=str(tmp_path)), 2):
        assert "is of 5 stages, this pipeline has 2" in text


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_bad_every(every, tmp_path):
    with pytest.raises(ValueError, match="every must be an integer of at least 1"):
        Checkpoints(tmp_path, None, every=every)


def test_old_ones_are_removed(tmp_path):
    ranks(partial(train, folder=str(tmp_path), until=12, rule="none"), 2)
    for i in range(2):
        kept = sorted(p.parent.name for p in tmp_path.glob(f"step-*/stage-{i}"))
        assert kept[-1] == "step-00000012"
        assert torch.tensor([int(k.split("-")[1]) for k in kept]).diff().eq(3).all()
