"""Test errors: a row of the step's table, trained on real images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_dni.experiments import data as loading
from workloads.step import Case, Method, Training


def resampled(images: Tensor, features: int) -> Tensor:
    """Square images as rows of exactly ``features`` numbers, so that the network that is trained
    is the network that is timed: bilinear with antialiasing to the nearest rectangle."""
    side = math.isqrt(images.shape[1])
    if side * side != images.shape[1]:
        raise ValueError(f"images of {images.shape[1]} numbers are not square")
    if features < 1 or features & (features - 1):
        raise ValueError(f"features must be a power of two, got {features}")
    height = 2 ** (features.bit_length() // 2)
    size = (height, features // height)
    square = images.reshape(-1, 1, side, side)
    return F.interpolate(square, size, mode="bilinear", antialias=True).flatten(1).contiguous()


def train_error(
    data: Any, case: Case, rule_name: str, method: Method, *, epochs: int, seed: int
) -> Iterator[float]:
    """Train the configuration of a row on real images; yield the test error in % of each epoch.

    The rate of both the layers and the synthesizers falls to zero along a cosine, for all methods.
    """
    train = loading.Split(resampled(data.train.images, case.hidden), data.train.labels)
    test = loading.Split(resampled(data.test.images, case.hidden), data.test.labels)
    training = Training(case, rule_name, method, seed=seed)
    steps = epochs * (len(train.labels) // case.batch)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(training.optimizer, steps)
    for epoch in range(epochs):
        training.model.train()
        order = loading.permutation(len(train.labels), seed, epoch)
        for rows in loading.batches(order, case.batch):
            x, y = loading.pick(train, rows)
            training.step(x, y)
            scheduler.step()
        training.model.eval()
        with torch.no_grad():
            wrong = sum(
                int((training.model(x).argmax(1) != y).sum())
                for x, y in zip(test.images.split(1000), test.labels.split(1000), strict=True)
            )
        yield 100.0 * wrong / len(test.labels)
