"""Small stages of a pipeline, and batches for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_dni as fd
from fused_dni.distributed import Stage

INPUTS, WIDTH, CLASSES, ROWS = 6, 8, 3, 5


def part(rank: int, world: int) -> nn.Sequential:
    """The layers of a stage."""
    last = rank == world - 1
    first = nn.Linear(INPUTS if rank == 0 else WIDTH, WIDTH)
    return nn.Sequential(first, nn.Tanh(), *([nn.Linear(WIDTH, CLASSES)] if last else []))


def local_loss(h: Tensor, target: Tensor) -> Tensor:
    """Of the mode "local"."""
    return F.cross_entropy(h[:, :CLASSES], target)


def stage(
    rank: int, world: int, mode: str = "decoupled", module: nn.Module | None = None, **options: Any
) -> Stage:
    """The stage of a rank; ``options`` are of a stage with a synthesizer."""
    torch.manual_seed(rank)
    module = part(rank, world) if module is None else module
    if rank == world - 1:
        return Stage(module, rank, world)
    if mode == "decoupled":
        options.setdefault("synthesizer", fd.LinearSynthesizer(WIDTH, context_features=CLASSES))
        return Stage(module, rank, world, **options)
    return Stage(module, rank, world, local_loss=local_loss if mode == "local" else None)


def batches(steps: int, rows: int = ROWS) -> Iterator[tuple[Tensor, Tensor]]:
    """Of (x, labels)."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        y = torch.randint(0, CLASSES, (rows,), generator=generator)
        yield torch.randn(rows, INPUTS, generator=generator), y
