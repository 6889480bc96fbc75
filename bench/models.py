"""Whole models to take advice on, as factories of (module, sample, loss).

``fused-dni advise bench.models:mlp`` from the repository root; likewise ``convnet`` and
``lstm_lm``. The losses close over their targets, drawn once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Example = tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]

CLASSES = 10


def _cross_entropy(*shape: int, classes: int = CLASSES) -> Callable[[Tensor], Tensor]:
    """Return the mean cross entropy to classes drawn at random, one for each of [shape] rows."""
    target = torch.randint(classes, shape)

    def loss(output: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, -2), target.flatten())

    return loss


def mlp(width: int = 512, depth: int = 4, batch: int = 128) -> Example:
    """``depth`` hidden layers of Linear, BatchNorm and ReLU on rows of 784, and a head."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    inputs = 784
    for _ in range(depth):
        layers += [nn.Linear(inputs, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
        inputs = width
    module = nn.Sequential(*layers, nn.Linear(inputs, CLASSES))
    return module, torch.randn(batch, 784), _cross_entropy(batch)


def convnet(channels: int = 32, size: int = 32, batch: int = 32) -> Example:
    """Three blocks of Conv, BatchNorm, ReLU and pooling on RGB images, and a head of two layers."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    inputs = 3
    for outputs in (channels, 2 * channels, 2 * channels):
        layers += [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
        inputs = outputs
    features = inputs * (size // 8) ** 2
    module = nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(features, 256), nn.ReLU(), nn.Linear(256, CLASSES)
    )
    return module, torch.randn(batch, 3, size, size), _cross_entropy(batch)


class LanguageModel(nn.Module):
    """Embedding, LSTM and a linear layer over symbols. Each call is the next window of a stream:
    the state goes on from call to call, cut in between."""

    def __init__(self, symbols: int, features: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, features)
        self.lstm = nn.LSTM(features, hidden)
        self.head = nn.Linear(hidden, symbols)
        self._state: tuple[Tensor, Tensor] | None = None

    def forward(self, window: Tensor) -> Tensor:
        """Scores of the next symbol [T, B, symbols] for symbols int64 [T, B]."""
        output, (h, c) = self.lstm(self.embedding(window), self._state)
        self._state = h.detach(), c.detach()
        scores: Tensor = self.head(output)
        return scores


def lstm_lm(
    symbols: int = 96, features: int = 64, hidden: int = 256, window: int = 16, batch: int = 32
) -> Example:
    """Return a language model on windows of random symbols."""
    torch.manual_seed(0)
    module = LanguageModel(symbols, features, hidden)
    sample = torch.randint(symbols, (window, batch))
    return module, sample, _cross_entropy(window, batch, classes=symbols)
