"""The network of Jaderberg et al. 2016 (section 3.1): hidden layers of Linear, BatchNorm, ReLU.

:func:`plain` builds it from stock modules; :func:`fused` takes such a network, weights included, to
our layers. The linear maps have no bias: batch normalisation would subtract it again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

import fused_dni as fd
from fused_dni.rules import Rule


def plain(features: int, hidden: int, depth: int, classes: int, *, seed: int = 0) -> nn.Sequential:
    """Make ``depth`` hidden layers of ``hidden`` units and a linear head, drawn from ``seed``.

    The global random generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules: list[nn.Module] = []
        for i in range(depth):
            modules.append(nn.Linear(features if i == 0 else hidden, hidden, bias=False))
            modules += [nn.BatchNorm1d(hidden), nn.ReLU()]
        modules.append(nn.Linear(hidden if depth else features, classes))
    return nn.Sequential(*modules)


def fused(
    network: nn.Sequential,
    *,
    synthetic: bool | Collection[int],
    update: Rule | None,
    synthesizer_update: Rule | None = None,
    rank: int | None = 16,
    context_features: int = 0,
    interface: str = "output",
    synthesizer: Callable[[int], nn.Module] | None = None,
    backend: str | None = None,
    seed: int = 0,
    loss: bool = False,
) -> nn.Sequential:
    """Take a network to fused layers, which update themselves by ``update`` (None: an optimizer
    updates them).

    With ``synthetic`` each hidden layer gets a linear synthesizer of the given rank (None: dense),
    or what ``synthesizer`` makes for its width, or those do whose numbers (from 0) are given; of
    the others, and of the head in any case, the gradient is exact and applied in the backward.
    ``interface`` is where it is predicted: at the "output" or at the "preactivation".

    With ``loss`` the head has the cross-entropy in it, and the network is called with the targets:
    ``network(x, target=y)``. Not where ``synthetic`` names layers.
    """
    if loss and not isinstance(synthetic, bool):
        raise ValueError("loss needs a DecoupledSequential: synthetic must be True or False")
    network = copy.deepcopy(network)
    children = list(network)
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        for i in range(0, len(children) - 1, 3):
            linear, norm = children[i], children[i + 1]
            assert isinstance(linear, nn.Linear) and isinstance(norm, nn.BatchNorm1d)
            size = linear.out_features
            made = None
            decoupled = synthetic if isinstance(synthetic, bool) else i // 3 in synthetic
            if decoupled:
                low = None if rank is None else min(rank, size)
                made = (
                    fd.LinearSynthesizer(size, low, context_features)
                    if synthesizer is None
                    else synthesizer(size)
                )
            layers.append(
                fd.FusedDNILinear.from_linear(
                    linear,
                    norm,
                    "relu",
                    synthesizer=made,
                    update=update,
                    synthesizer_update=synthesizer_update if decoupled else None,
                    interface=interface if decoupled else "output",
                    backend=backend,
                )
            )
        head = children[-1]
        assert isinstance(head, nn.Linear)
        options: dict[str, Any] = {"update": update, "backend": backend}
        if loss:
            layers.append(fd.FusedDNILinearCrossEntropyLoss.from_linear(head, **options))
        else:
            layers.append(fd.FusedDNILinear.from_linear(head, synthesizer=None, **options))
    if isinstance(synthetic, bool):  # a run of layers of one kind, which it takes in one call
        return fd.DecoupledSequential(*layers)
    return nn.Sequential(*layers)
