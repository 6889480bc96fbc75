"""An autoencoder under an expensive top: how its images look to a convolutional network.

The network is frozen and costs many times what learns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from fused_dni.experiments.data import DataError, Dataset
from fused_dni.experiments.tops import Between, Every, Racer, squared_error
from fused_dni.synthesizers import DifferenceSynthesizer

BATCH, RATE = 64, 1e-3
#: Images that the loss is looked at on.
HELD_OUT = 512


class Critic(nn.Module):
    """Features of a convolutional network that is not trained: images [N, 1, S, S] to [N, F]."""

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
        made: Tensor = self.layers(images).flatten(1)
        return made


class Images:
    """Images as rows from 0 to 1.

    Args:
        dataset: square ones.

    Attributes:
        train: [N, S * S], for training; apart: held out; side: S.

    Raises:
        DataError: images that are not square.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.side = math.isqrt(dataset.features)
        if self.side**2 != dataset.features:
            raise DataError(
                f"the images of {dataset.name} are not square, of {dataset.features} pixels"
            )
        low, high = dataset.train.images.aminmax()
        self.train, apart = ((s.images - low) / (high - low) for s in (dataset.train, dataset.test))
        self.apart = apart[:HELD_OUT]


class Autoencoder(Racer):
    """The autoencoder in training.

    Args:
        images: what it is trained on.
        seed: of its parameters and batches.
        synthesizer: makes one.
        every, between: see :class:`Racer`; the surrogate is the squared error of pixels.
    """

    def __init__(
        self,
        images: Images,
        seed: int,
        synthesizer: Callable[[], nn.Module] | None = None,
        every: Every = None,
        between: Between = "prediction",
    ) -> None:
        torch.manual_seed(seed)
        self.images, n = images, images.side**2
        self.critic = Critic()
        inner = nn.Sequential(
            nn.Linear(n, 256), nn.ReLU(), nn.Linear(256, 32),
            nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, n), nn.Sigmoid(),
        )  # fmt: skip
        super().__init__(inner, synthesizer() if synthesizer else None, every, between)
        self.lower = [torch.optim.Adam(self.bottom.parameters(), RATE)]

    def batch(self) -> Tensor:
        train = self.images.train
        return train[torch.randint(len(train), (BATCH,))]

    def below(self, batch: Tensor) -> Tensor:
        context = {} if self.schedule is None else {"context": batch}
        made: Tensor = self.bottom(batch, **context)
        return made

    def above(self, h: Tensor, batch: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self._seen(batch)
        return (self._seen(h) - wanted).square().sum(1).mean()

    def _seen(self, images: Tensor) -> Tensor:
        made: Tensor = self.critic(images.view(-1, 1, self.images.side, self.images.side))
        return made

    def surrogate(self, h: Tensor, batch: Tensor) -> Tensor:
        return squared_error(h, batch).mean()

    def loss(self) -> float:
        apart = self.images.apart
        with torch.no_grad():
            return float(self.above(self.inner(apart), apart))


def arms(images: Images) -> dict[str, Callable[[int], Autoencoder]]:
    """Make the arms: backprop, synthetic gradients, and by hand the error of pixels in between."""
    synthesizer = partial(DifferenceSynthesizer, images.side**2)
    return {
        "backprop": partial(Autoencoder, images),
        "DNI k=8": partial(Autoencoder, images, synthesizer=synthesizer, every=8),
        "by hand k=8": partial(Autoencoder, images, every=8, between="surrogate"),
    }
