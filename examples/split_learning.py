"""Learn with the images on a client and the labels on a server, and count the bytes between them.

    torchrun --nproc-per-node 2 examples/split_learning.py --target-every 4
    torchrun --nproc-per-node 2 examples/split_learning.py --target-every 0   # plain split learning

The client has the images and a small bottom, the server the rest and the labels. In plain split
learning the client waits on every step for the gradient at its output. Here it predicts that
gradient, and the true one comes back on every k-th step. Up go the output and, as the target, the
numbers of the images.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import fused_dni as fd
from fused_dni.distributed import Pipeline, Stage

WIDTH, BATCH, TRAINED = 64, 64, 1500


def main(epochs: int = 20, target_every: int = 4) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    client = dist.get_rank() == 0
    digits = load_digits()
    images, labels = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    steps = epochs * (TRAINED // BATCH)

    torch.manual_seed(int(client))
    bottom = nn.Sequential(nn.Linear(64, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU())
    top = nn.Sequential(nn.Linear(WIDTH, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
    synthesizer = None
    if client and target_every:  # of h and the image: the client has no labels
        synthesizer = fd.LinearSynthesizer(WIDTH, context_features=64)
    stage = Stage(bottom if client else top, dist.get_rank(), 2, synthesizer=synthesizer)
    optimizer = torch.optim.Adam(stage.parameters(), lr=1e-3)
    schedule = None
    if synthesizer is not None:
        schedule = fd.Schedule(stage, warmup_steps=TRAINED // BATCH, target_every=target_every)

    def batches():
        for step in range(steps):
            rows = torch.randint(TRAINED, (BATCH,), generator=torch.Generator().manual_seed(step))
            yield images[rows], rows, images[rows] if target_every else None

    def loss(output, rows):  # on the server
        return F.cross_entropy(output, labels[rows])

    with Pipeline(stage, loss=loss, mode="decoupled" if target_every else "exact") as pipeline:
        for _ in pipeline.run(batches()):
            optimizer.step()
            optimizer.zero_grad()
            if schedule:
                schedule.step()
    # To test, the client's outputs go up once more.
    h = torch.empty(len(images), WIDTH)
    if client:
        with torch.no_grad():
            h = stage.eval()(images)
    dist.broadcast(h, 0)
    if not client:
        with torch.no_grad():
            wrong = (stage.eval()(h[TRAINED:]).argmax(1) != labels[TRAINED:]).float().mean()
        print(f"error on {len(labels) - TRAINED} images: {wrong:.1%}")
    up, down = (report["bytes"] for report in pipeline.reports())
    if client:
        each = 1024 * epochs
        print(f"KiB an epoch: up {up['sent_up'] / each:.0f}, down {down['sent_down'] / each:.0f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--target-every", type=int, default=4)
    main(**vars(parser.parse_args()))
