"""Train one model over several processes in which no stage waits for a backward.

    torchrun --nproc-per-node 2 examples/pipeline.py
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nproc-per-node 2 --max-restarts 3 \\
        examples/pipeline.py --checkpoint runs/pipeline

The variable: else restarted processes wait for the addresses of the dead, which torchrun keeps.
Over hosts: the same with torchrun's --nnodes, --rdzv-backend c10d and --rdzv-endpoint.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import fused_dni as fd
from fused_dni.distributed import Checkpoints, Pipeline, Stage

WIDTH, CLASSES, BATCH = 128, 10, 64


def segment(inputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU())


def main(steps: int = 600, checkpoint: str = "") -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, world = dist.get_rank(), dist.get_world_size()
    digits = load_digits()
    x, y = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)

    torch.manual_seed(rank)
    module, synthesizer = segment(64 if rank == 0 else WIDTH), None
    if rank == world - 1:
        module.append(nn.Linear(WIDTH, CLASSES))  # the last stage has the loss's own gradient
    else:
        synthesizer = fd.LinearSynthesizer(WIDTH, rank=16, context_features=CLASSES)
    stage = Stage(module, rank, world, synthesizer=synthesizer)
    optimizer = torch.optim.Adam(stage.parameters(), lr=1e-3)
    schedule = fd.Schedule(stage, warmup_steps=40, target_every=4) if synthesizer else None

    def batches(first: int):
        for step in range(first, steps):  # a function of the step: a restart goes on with it
            rows = torch.randint(len(y), (BATCH,), generator=torch.Generator().manual_seed(step))
            yield x[rows], y[rows]

    with Pipeline(stage, loss=F.cross_entropy, window=4) as pipeline:
        others = {"schedule": schedule} if schedule else {}
        kept = (
            Checkpoints(checkpoint, pipeline, optimizers=[optimizer], others=others)
            if checkpoint
            else None
        )
        first = kept.resume() if kept else 0
        for out in pipeline.run(batches(first)):
            optimizer.step()
            optimizer.zero_grad()
            if schedule:
                schedule.step()
            if kept:
                kept.step()
            if out.loss is not None and (out.step + 1) % 200 == 0:
                print(f"step {out.step + 1}: loss {out.loss:.3f}", flush=True)
    for report in pipeline.reports():  # of all stages, on every rank
        if rank == 0:
            age = report["age"]["mean"]
            late = "" if age is None else f", targets {age:.1f} steps late"
            print(
                f"stage {report['stage']}: at work {report['busy'] / report['seconds']:.0%}{late}"
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--checkpoint", default="", help="folder; empty for none")
    main(**vars(parser.parse_args()))
