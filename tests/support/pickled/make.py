"""Train small models and pickle them whole, with what becomes of them when training goes on.

    python tests/support/pickled/make.py FILE

``0.1.0.pt.gz`` beside this file was written by commit 6f88877: what it holds must still load, and
go on as it did there.
"""

from __future__ import annotations

import copy
import gzip
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fused_dni as fd

STEPS = 3


def models() -> dict[str, nn.Module]:
    """A model of each kind of module, with and without rules."""
    labelled: dict[str, Any] = {"activation": "relu", "context_features": 3}
    return {
        "rules": nn.Sequential(
            fd.FusedDNILinear(6, 5, normalization="batch", update=fd.Adam(1e-2), **labelled),
            fd.FusedDNILinear(
                5, 5, normalization="layer", activation="gelu", interface="preactivation",
                update=fd.SGD(0.1, momentum=0.9),
            ),
            fd.FusedDNILinear(5, 3, synthesizer=None, update=fd.AdamW(1e-2)),
        ),
        "no rules": nn.Sequential(
            fd.FusedDNILinear(6, 5, normalization="batch", **labelled),
            fd.Decoupled(nn.Linear(5, 3), fd.DiagonalSynthesizer(3)),
        ),
        "container": fd.DecoupledSequential(
            fd.FusedDNILinear(6, 5, update=fd.SGD(0.1)),
            nn.ReLU(),
            fd.FusedDNILinear(5, 3, synthesizer=fd.MLPSynthesizer(3), update=fd.SGD(0.1)),
        ),
        "lstm": fd.FusedDNILSTM(6, 3, 2, auxiliary=True, update=fd.AdamW(1e-2)),
        "cell": fd.FusedDNILSTMCell(6, 3),
    }  # fmt: skip


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int) -> None:
    """Take ``STEPS`` steps, on batches that are numbered from ``first``."""
    state = None
    for number in range(first, first + STEPS):
        made = torch.Generator().manual_seed(number)
        x = torch.randn(4, 8, 6, generator=made)  # [T, B, I]
        y = torch.randint(0, 3, (8,), generator=made)
        optimizer.zero_grad()
        with fd.condition_on(y):
            if isinstance(model, fd.FusedDNILSTM):
                output, state = model(x, state)
                h = output[-1]
            elif isinstance(model, fd.FusedDNILSTMCell):
                for step in x:
                    state = model(step, state)
                h = state[0]
                following = model.boundary(state)
            else:
                h = model(x[0])
            loss = F.cross_entropy(h, y)
        loss.backward()
        optimizer.step()
        if isinstance(model, fd.FusedDNILSTMCell):
            state = following


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """As the models' users have it."""
    ruled = any(getattr(m, "update", None) is not None for m in model.modules())
    return fd.FusedOptimizer(model) if ruled else torch.optim.Adam(model.parameters(), lr=1e-2)


def main(path: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    written: dict[str, Any] = {"models": {}}
    for name, model in models().items():
        optimizer = optimizer_of(model)
        train(model, optimizer, 0)
        kept = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
        train(model, optimizer, 100)
        written["models"][name] = {
            "model": kept[0],
            "state": kept[0].state_dict(),
            "optimizer": kept[1],
            "after": model.state_dict(),
        }
    with gzip.open(path, "wb") as file:
        torch.save(written, file)


if __name__ == "__main__":
    main(sys.argv[1])
