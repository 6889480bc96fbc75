"""Activation memory of a training step: deep networks."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

import fused_dni as fd
from workloads.step import DNI_1, STOCK, Case, Training, batches

DEPTHS = (1, 2, 4, 8, 16, 32, 64)
CASE = Case(1024, 128)


def step(method: str, depth: int) -> Callable[[], object]:
    """One training step of a deep network: ``stock``, ``deferred`` or ``immediate`` DNI."""
    container = {"immediate": fd.DecoupledSequential}.get(method, nn.Sequential)
    training = Training(
        CASE,
        "sgd",
        STOCK if method == "stock" else DNI_1,
        depth=depth,
        container=container,
        lr=1e-4,
    )
    training.scramble_synthesizers(scale=1e-3)
    x, y = batches(CASE)[0]
    return lambda: training.step(x, y)
