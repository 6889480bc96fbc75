"""Races under an expensive top: `fused-dni race bench.races:words`, in the repository's root.

words        a word language model whose softmax costs more than its LSTM; CORPUS=FILE, a text
perceptual   an autoencoder under a loss of frozen convolutional features; MNIST=DIR

On steps without targets nothing above the interface is run, the loss included.
"""

from __future__ import annotations

import gzip
import os
import re
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_dni as fd
from fused_dni.experiments import data

WARMUP = 50
RATE = 2e-3


def scheduled(bottom: nn.Module, every: int) -> fd.Schedule:
    """Targets on every so-manieth step, which use the true gradient."""
    return fd.Schedule(bottom, warmup_steps=WARMUP, target_every=every, mix=1.0)


# ------------------------------------------------------------------------------------- word model

CLASSES, WIDTH, STEPS, BATCH = 10_000, 128, 8, 32
SAMPLES = 200
# Rate of the head, of 1, 2, 4 and 8 times RATE (the sampled one: of 1, 2 and 4) that which was best
# after 20 s with one seed.
HEAD_RATE, SAMPLED_HEAD_RATE = 8 * RATE, 4 * RATE


@lru_cache
def corpus(classes: int) -> tuple[Tensor, Tensor]:
    """The words of CORPUS as numbers, the rarest as one: rows of BATCH streams, the last tenth
    apart."""
    path = os.environ.get("CORPUS")
    if path is None:
        raise ValueError("CORPUS is not set: the path of a text, plain or gzipped")
    raw = Path(path).read_bytes()
    raw = gzip.decompress(raw) if path.endswith(".gz") else raw
    words = re.findall(r"[a-z']+|[^\sa-z']", raw.decode("utf-8", "replace").lower())
    known = {w: i for i, (w, _) in enumerate(Counter(words).most_common(classes - 1))}
    numbers = torch.tensor([known.get(word, classes - 1) for word in words])
    cut = len(numbers) * 9 // 10
    parts = [part[: len(part) // BATCH * BATCH] for part in (numbers[:cut], numbers[cut:])]
    train, apart = (part.view(BATCH, -1).t() for part in parts)  # [T, B]
    return train, apart


class Below(nn.Module):
    """Embedding and LSTM: words [T, B] and a state to [T, B, H] and the next state."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, width, sparse=True)
        self.lstm = nn.LSTM(width, width)

    def forward(self, words: Tensor, state: Any = None) -> Any:
        return self.lstm(self.embedding(words), state)


class Words:
    """A word model in training.

    Args:
        every: targets on every so-manieth step; None for backprop.
        sampled: cross entropy over SAMPLES classes that are drawn by frequency, and the label's.
    """

    def __init__(self, seed: int, every: int | None = None, sampled: bool = False) -> None:
        torch.manual_seed(seed)
        self.train, self.apart = corpus(CLASSES)
        self.below = Below(CLASSES, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.position = 0
        self.state: Any = None
        self.sampled = sampled
        self.schedule: fd.Schedule | None = None
        self.bottom: nn.Module = self.below
        dense = list(self.below.lstm.parameters())
        if every is not None:
            synthesizer = fd.SoftmaxSynthesizer(self.head)
            self.bottom = fd.Decoupled(self.below, synthesizer)
            self.schedule = scheduled(self.bottom, every)
            dense += list(synthesizer.parameters())
        self.optimizers = [
            torch.optim.Adam(dense, RATE),
            torch.optim.Adam(self.head.parameters(), SAMPLED_HEAD_RATE if sampled else HEAD_RATE),
            torch.optim.SparseAdam(list(self.below.embedding.parameters()), RATE),
        ]
        if sampled:
            counts = torch.bincount(self.train.flatten(), minlength=CLASSES).double() + 1.0
            self.share = counts / counts.sum()

    def step(self) -> None:
        if self.position + STEPS + 1 > len(self.train):
            self.position, self.state = 0, None
        window = self.train[self.position : self.position + STEPS + 1]
        self.position += STEPS
        x, y = window[:-1], window[1:].contiguous()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        if self.schedule is None:
            h, state = self.bottom(x, self.state)
            self.state = tuple(t.detach() for t in state)
            self._loss(h, y).backward()
        else:
            h, self.state = self.bottom(x, self.state, context=y)
            if self.schedule.target:
                self._loss(h, y).backward()
            else:
                fd.backward_local(h)
            self.schedule.step()
        for optimizer in self.optimizers:
            optimizer.step()

    def _loss(self, h: Tensor, y: Tensor) -> Tensor:
        rows, labels = h.flatten(0, 1), y.flatten()
        if not self.sampled:
            return F.cross_entropy(self.head(rows), labels)
        drawn = torch.multinomial(self.share, SAMPLES, replacement=True)
        # Logits less the logarithm of how often a class is drawn (Bengio & Senecal 2003); a class
        # that is drawn by chance and is the label is left out.
        correction = (self.share * SAMPLES).log().float()
        own = (rows * self.head.weight[labels]).sum(1) + self.head.bias[labels]
        others = F.linear(rows, self.head.weight[drawn], self.head.bias[drawn]) - correction[drawn]
        others = others.masked_fill(labels.unsqueeze(1) == drawn, -1e9)
        logits = torch.cat([(own - correction[labels]).unsqueeze(1), others], 1)
        return F.cross_entropy(logits, torch.zeros_like(labels))

    def loss(self) -> float:
        state: Any = None
        total, windows = 0.0, 0
        with torch.no_grad():
            for at in range(0, min(len(self.apart) - 1, 320) - 40, 40):
                h, state = self.below(self.apart[at : at + 40], state)
                y = self.apart[at + 1 : at + 41]
                total += float(F.cross_entropy(self.head(h.flatten(0, 1)), y.flatten()))
                windows += 1
        return total / windows


def words() -> dict[str, Callable[[int], Words]]:
    """The full softmax, the same on every 4th and 8th step, and a sampled one."""
    corpus(CLASSES)  # what is missing shows at once
    return {
        "backprop": Words,
        "DNI k=4": lambda seed: Words(seed, every=4),
        "DNI k=8": lambda seed: Words(seed, every=8),
        "sampled softmax": lambda seed: Words(seed, sampled=True),
    }


# -------------------------------------------------------------------------------- perceptual loss


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


class Autoencoder:
    """An autoencoder that is to look right to a frozen network.

    Args:
        synthesizer: makes one; None for backprop.
        every: targets on every so-manieth step.
        by_hand: on the other steps the squared error of pixels stands for the loss.
    """

    def __init__(
        self,
        seed: int,
        synthesizer: Callable[[], nn.Module] | None = None,
        every: int = 1,
        by_hand: bool = False,
    ) -> None:
        torch.manual_seed(seed)
        self.train, self.apart = digits()
        self.critic = Frozen()
        inner = nn.Sequential(
            nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 32),
            nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 784), nn.Sigmoid(),
        )  # fmt: skip
        self.bottom: nn.Module = inner
        self.schedule: fd.Schedule | None = None
        if synthesizer is not None:
            self.bottom = fd.Decoupled(inner, synthesizer())
            self.schedule = scheduled(self.bottom, every)
        self.every, self.by_hand, self.steps = every, by_hand, 0
        self.optimizer = torch.optim.Adam(self.bottom.parameters(), 1e-3)

    def _loss(self, h: Tensor, x: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.critic(x)
        return (self.critic(h) - wanted).square().sum(1).mean()

    def step(self) -> None:
        x = self.train[torch.randint(len(self.train), (64,))]
        self.optimizer.zero_grad()
        if self.schedule is not None:
            h = self.bottom(x, context=x)
            if self.schedule.target:
                self._loss(h, x).backward()
            else:
                fd.backward_local(h)
            self.schedule.step()
        elif self.by_hand and self.steps >= WARMUP and self.steps % self.every:
            (self.bottom(x) - x).square().sum(1).mean().backward()
        else:
            self._loss(self.bottom(x), x).backward()
        self.optimizer.step()
        self.steps += 1

    def loss(self) -> float:
        self.bottom.eval()
        with torch.no_grad():
            found = float(self._loss(self.bottom(self.apart), self.apart))
        self.bottom.train()
        return found


def perceptual() -> dict[str, Callable[[int], Autoencoder]]:
    """Backprop, synthetic gradients of two forms, and a surrogate made by hand."""
    digits()

    def dense() -> nn.Module:
        return fd.LinearSynthesizer(784, None, 784)

    def difference() -> nn.Module:
        return fd.DifferenceSynthesizer(784)

    return {
        "backprop": Autoencoder,
        "DNI k=8, dense": lambda seed: Autoencoder(seed, dense, 8),
        "DNI k=8": lambda seed: Autoencoder(seed, difference, 8),
        "DNI k=16": lambda seed: Autoencoder(seed, difference, 16),
        "by hand k=8": lambda seed: Autoencoder(seed, every=8, by_hand=True),
    }
