"""Data that a small network learns: ten clusters, a training and a test part."""

from __future__ import annotations

import torch

from fused_dni.experiments import data


def clusters(train: int = 96, test: int = 40, features: int = 10) -> data.Dataset:
    """Rows around ten centres, called the digits."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, features, generator=generator) * 2
    labels = torch.randint(10, (train + test,), generator=generator)
    images = centres[labels] + torch.randn(train + test, features, generator=generator)
    return data.Dataset(
        "digits",
        data.Split(images[:train], labels[:train]),
        data.Split(images[train:], labels[train:]),
    )
