"""What a map is made of: its points, and what all its points have in common."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from fused_dni.measure.options import KS, MAP_SECONDS
from fused_dni.measure.verdict.forms import LINEAR_NAMES, check_name
from fused_dni.ops.types import INTERFACES
from fused_dni.report import text
from fused_dni.rules import SGD, Rule


@dataclass(frozen=True)
class Point:
    """One layer to measure: Linear, BatchNorm, ReLU, as wide at its input as at its output.

    Attributes:
        batch: rows, from 2 on (batch normalisation needs two).
        width: features.
        synthesizer: ``dense``, ``diagonal`` or ``rankR``.
        interface: ``output`` or ``preactivation``.
    """

    batch: int
    width: int
    synthesizer: str
    interface: str = "output"

    @property
    def key(self) -> str:
        """Its name among the points of a map."""
        return f"{self.batch}x{self.width} {self.synthesizer} {self.interface}"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return dict(vars(self))


@dataclass(frozen=True)
class Settings:
    """What all points of a map share; points of other settings are never mixed with them.

    Attributes:
        device: where layers are measured.
        dtype: of activations and parameters.
        update: rule of layers and synthesizers; its rate is replaced while timing.
        context_features: classes that synthesizers are conditioned on.
        ks: targets on every k-th step, for each k; None is never.
        backend: of our kernels; None for the first that can serve.
        seconds: budget of the timed rounds of one point; a busy machine gets up to three times as
            long.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    update: Rule = field(default_factory=SGD)
    context_features: int = 10
    ks: tuple[int | None, ...] = KS
    backend: str | None = None
    seconds: float = MAP_SECONDS

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "where": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "update": repr(self.update),
            "context_features": self.context_features,
            "ks": list(self.ks),
            "backend": self.backend,
            "seconds": self.seconds,
        }


def make_grid(
    batches: Iterable[int],
    widths: Iterable[int],
    synthesizers: Iterable[str] = LINEAR_NAMES,
    interfaces: Iterable[str] = INTERFACES[:1],
) -> list[Point]:
    """All points over these, the cheapest first, each once.

    Raises:
        ValueError: a batch below 2, a width below 1, an unknown synthesizer or interface.
    """
    points = [
        Point(*chosen)
        for chosen in itertools.product(
            dict.fromkeys(batches),
            dict.fromkeys(widths),
            dict.fromkeys(synthesizers),
            dict.fromkeys(interfaces),
        )
    ]
    for point in points:
        if point.batch < 2:
            raise ValueError(f"a batch must have at least 2 rows, got {point.batch}")
        if point.width < 1:
            raise ValueError(f"a width must be at least 1, got {point.width}")
        check_name(point.synthesizer, torch.empty(point.batch, point.width, device="meta"))
        if point.interface not in INTERFACES:
            raise ValueError(text.unknown("interface", point.interface, INTERFACES))
    return sorted(points, key=lambda point: point.batch * point.width**2)
