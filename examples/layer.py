"""A layer replaced: ``nn.Linear``, its normalisation and activation by ``FusedDNILinear``.

Two networks of the same size on the same data, in the same loop: one learns by backprop, the
other's hidden layer from synthetic gradients, with the labels as the synthesizers' context.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import fused_dni as fd

CLASSES = 10


def stock() -> nn.Module:
    hidden = (nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU())
    return nn.Sequential(*hidden, nn.Linear(128, CLASSES))


def decoupled() -> nn.Module:
    options = {"normalization": "batch", "activation": "relu", "context_features": CLASSES}
    return nn.Sequential(fd.FusedDNILinear(64, 128, **options), nn.Linear(128, CLASSES))


def train(model: nn.Module, steps: int) -> float:
    """Train, and return the error on data that were not trained on."""
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, 64, generator=draw)

    def batch(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.randint(0, CLASSES, (rows,), generator=draw)
        return centres[y] + 2.0 * torch.randn(rows, 64, generator=draw), y

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        x, y = batch(128)
        optimizer.zero_grad()
        with fd.condition_on(y):  # changes nothing in a model without decoupled layers
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    model.eval()
    x, y = batch(2000)
    return (model(x).argmax(1) != y).float().mean().item()


def main(steps: int = 300) -> dict[str, float]:
    errors = {}
    for name, make in (("backprop", stock), ("synthetic gradients", decoupled)):
        torch.manual_seed(0)
        errors[name] = train(make(), steps)
        print(f"{name}: error {errors[name]:.1%} after {steps} steps")
    return errors


if __name__ == "__main__":
    main()
