"""An autoencoder that is to look right to a frozen network: the arms."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache, partial

from torch import nn

import fused_dni as fd
from fused_dni.experiments import data
from fused_dni.experiments.perceptual import Autoencoder, Images
from fused_dni.experiments.tops import squared_error


@lru_cache
def images() -> Images:
    """MNIST's."""
    return Images(data.load(folder=os.environ.get("MNIST", "mnist")))


def dense() -> nn.Module:
    return fd.LinearSynthesizer(784, None, 784)


def difference() -> nn.Module:
    return fd.DifferenceSynthesizer(784)


def gain() -> nn.Module:
    """Return the surrogate's gradient, as much of it as is learned."""
    return fd.SurrogateSynthesizer(784, squared_error)


def perceptual() -> dict[str, Callable[[int], Autoencoder]]:
    """Backprop, a surrogate made by hand, and synthetic gradients of several forms."""
    arm = partial(partial, Autoencoder, images())
    return {
        "backprop": arm(),
        "full steps only k=8": arm(synthesizer=difference, every=8, between="dropped"),
        "held gradient k=8": arm(every=8, between="held"),
        "by hand k=8": arm(every=8, between="surrogate"),
        "by hand k=16": arm(every=16, between="surrogate"),
        "DNI k=8, dense": arm(synthesizer=dense, every=8),
        "DNI k=8": arm(synthesizer=difference, every=8),
        "DNI k=16": arm(synthesizer=difference, every=16),
        "DNI auto": arm(synthesizer=difference, every="auto"),
        "DNI k=8, surrogate": arm(synthesizer=gain, every=8),
        "DNI k=16, surrogate": arm(synthesizer=gain, every=16),
        "DNI auto, surrogate": arm(synthesizer=gain, every="auto"),
    }
