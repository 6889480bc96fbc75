"""An autoencoder under an expensive top: how its images look to a convolutional network.

The network is frozen and costs many times what learns. By synthetic gradients it is run on every
k-th step alone, the loss included; so it is by hand, with the error of pixels in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fused_dni.experiments.data import DataError, Dataset
from fused_dni.modules.decoupled import Decoupled
from fused_dni.modules.local import backward_local
from fused_dni.schedule import Schedule
from fused_dni.synthesizers import DifferenceSynthesizer

BATCH, RATE, WARMUP = 64, 1e-3, 50
#: Images that the loss is looked at on.
HELD_OUT = 512


class Critic(nn.Module):
    """Features of a convolutional network that is not trained: [N, side^2] to [N, F].

    Args:
        side: of the images.
        channels: of the first convolution; the others have twice as many.
    """

    def __init__(self, side: int, channels: int = 32) -> None:
        super().__init__()
        self.side = side
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(
                nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(),
                nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1), nn.ReLU(),
                nn.Conv2d(2 * channels, 2 * channels, 3, padding=1),
            )  # fmt: skip
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        made: Tensor = self.layers(images.view(-1, 1, self.side, self.side)).flatten(1)
        return made


class Images:
    """Images as rows from 0 to 1, and the network that looks at them.

    Args:
        dataset: square images.
        channels: of the critic.

    Raises:
        DataError: images that are not square.
    """

    def __init__(self, dataset: Dataset, channels: int = 32) -> None:
        side = math.isqrt(dataset.features)
        if side * side != dataset.features:
            raise DataError(f"the images of {dataset.name} are not square: {dataset.features}")
        low, high = dataset.train.images.aminmax()
        self.train, apart = ((s.images - low) / (high - low) for s in (dataset.train, dataset.test))
        self.apart = apart[:HELD_OUT]
        self.critic = Critic(side, channels)

    @property
    def features(self) -> int:
        """Pixels of an image."""
        return int(self.train.shape[1])

    def loss(self, h: Tensor, x: Tensor) -> Tensor:
        """How far images are from others, as the critic sees both."""
        with torch.no_grad():
            wanted = self.critic(x)
        found: Tensor = (self.critic(h) - wanted).square().sum(1).mean()
        return found


class Autoencoder:
    """The autoencoder in training: an arm of a race.

    Args:
        images: what it is trained on.
        seed: of its parameters and batches.
        synthesizer: makes one; None for backprop.
        every: targets on every so-manieth step.
        by_hand: the error of pixels stands for the loss on the other steps.
    """

    def __init__(
        self,
        images: Images,
        seed: int,
        synthesizer: Callable[[], nn.Module] | None = None,
        every: int = 1,
        by_hand: bool = False,
    ) -> None:
        torch.manual_seed(seed)
        self.images, self.every, self.by_hand, self.steps = images, every, by_hand, 0
        n = images.features
        inner = nn.Sequential(
            nn.Linear(n, 256), nn.ReLU(), nn.Linear(256, 32),
            nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, n), nn.Sigmoid(),
        )  # fmt: skip
        self.bottom: nn.Module = inner
        self.schedule: Schedule | None = None
        if synthesizer is not None:
            self.bottom = Decoupled(inner, synthesizer())
            self.schedule = Schedule(self.bottom, warmup_steps=WARMUP, target_every=every, mix=1.0)
        self.optimizer = torch.optim.Adam(self.bottom.parameters(), RATE)

    def step(self) -> None:
        """Train on a batch."""
        x = self.images.train[torch.randint(len(self.images.train), (BATCH,))]
        self.optimizer.zero_grad()
        if self.schedule is not None:
            h = self.bottom(x, context=x)
            if self.schedule.target:
                self.images.loss(h, x).backward()
            else:
                backward_local(h)
            self.schedule.step()
        elif self.by_hand and self.steps >= WARMUP and self.steps % self.every:
            (self.bottom(x) - x).square().sum(1).mean().backward()
        else:
            self.images.loss(self.bottom(x), x).backward()
        self.optimizer.step()
        self.steps += 1

    def loss(self) -> float:
        """The loss on what is held out."""
        self.bottom.eval()
        with torch.no_grad():
            found = float(self.images.loss(self.bottom(self.images.apart), self.images.apart))
        self.bottom.train()
        return found


def arms(images: Images) -> dict[str, Callable[[int], Autoencoder]]:
    """Backprop, synthetic gradients, and a surrogate made by hand."""

    def synthesizer() -> nn.Module:
        return DifferenceSynthesizer(images.features)

    return {
        "backprop": lambda seed: Autoencoder(images, seed),
        "DNI k=8": lambda seed: Autoencoder(images, seed, synthesizer, 8),
        "by hand k=8": lambda seed: Autoencoder(images, seed, every=8, by_hand=True),
    }
