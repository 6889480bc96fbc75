"""An autoencoder that is to look right to a frozen network."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

import fused_dni as fd
from fused_dni.experiments import data

from .arms import Between, Racer, squared_error

BATCH = 64


@lru_cache
def digits() -> tuple[Tensor, Tensor]:
    """MNIST's images, [N, 784] from 0 to 1: for training, and held out."""
    found = data.load(folder=os.environ.get("MNIST", "mnist"))
    low, high = found.train.images.aminmax()
    train, apart = ((s.images - low) / (high - low) for s in (found.train, found.test))
    return train, apart[:512]


class Frozen(nn.Module):
    """Features of a convolutional network that is not trained: [N, 784] to [N, F]."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(
                nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
                nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
                nn.Conv2d(64, 64, 3, padding=1),
            )  # fmt: skip
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        made: Tensor = self.layers(images.view(-1, 1, 28, 28)).flatten(1)
        return made


class Autoencoder(Racer):
    """The autoencoder in training.

    Args:
        synthesizer: makes one.
        every, between: see :class:`Racer`; the surrogate is the squared error of pixels.
    """

    def __init__(
        self,
        seed: int,
        synthesizer: Callable[[], nn.Module] | None = None,
        every: int | None = None,
        between: Between = "prediction",
    ) -> None:
        torch.manual_seed(seed)
        self.train, self.apart = digits()
        self.critic = Frozen()
        inner = nn.Sequential(
            nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 32),
            nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 784), nn.Sigmoid(),
        )  # fmt: skip
        super().__init__(inner, synthesizer() if synthesizer else None, every, between)
        self.lower = [torch.optim.Adam(self.bottom.parameters(), 1e-3)]

    def batch(self) -> Tensor:
        return self.train[torch.randint(len(self.train), (BATCH,))]

    def below(self, batch: Tensor) -> Tensor:
        made: Tensor = (
            self.bottom(batch) if self.schedule is None else self.bottom(batch, context=batch)
        )
        return made

    def above(self, h: Tensor, batch: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.critic(batch)
        return (self.critic(h) - wanted).square().sum(1).mean()

    def surrogate(self, h: Tensor, batch: Tensor) -> Tensor:
        return squared_error(h, batch).mean()

    def loss(self) -> float:
        with torch.no_grad():
            return float(self.above(self.inner(self.apart), self.apart))


def dense() -> nn.Module:
    return fd.LinearSynthesizer(784, None, 784)


def difference() -> nn.Module:
    return fd.DifferenceSynthesizer(784)


def gain() -> nn.Module:
    """The surrogate's gradient, as much of it as is learned."""
    return fd.SurrogateSynthesizer(784, squared_error)


def perceptual() -> dict[str, Callable[[int], Autoencoder]]:
    """Backprop, a surrogate made by hand, and synthetic gradients of several forms."""
    digits()
    arm = partial(partial, Autoencoder)
    return {
        "backprop": Autoencoder,
        "full steps only k=8": arm(synthesizer=difference, every=8, between="dropped"),
        "held gradient k=8": arm(every=8, between="held"),
        "by hand k=8": arm(every=8, between="surrogate"),
        "by hand k=16": arm(every=16, between="surrogate"),
        "DNI k=8, dense": arm(synthesizer=dense, every=8),
        "DNI k=8": arm(synthesizer=difference, every=8),
        "DNI k=16": arm(synthesizer=difference, every=16),
        "DNI k=8, surrogate": arm(synthesizer=gain, every=8),
        "DNI k=16, surrogate": arm(synthesizer=gain, every=16),
    }
