"""One Linear-BatchNorm-ReLU layer with its update: candidates, their gate and their floor."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fused_dni as fd
from fused_dni.measure import timing
from workloads import CLASSES, RANK, agree


class Shape(NamedTuple):
    """Rows, inputs and outputs of one layer."""

    rows: int
    inputs: int
    outputs: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.inputs}x{self.outputs}"


SHAPES = (Shape(64, 256, 256), Shape(256, 784, 256), Shape(128, 512, 512), Shape(128, 1024, 1024))


def parts(shape: Shape, dtype: torch.dtype) -> tuple[nn.Linear, nn.BatchNorm1d]:
    """Return the stock layer and norm that all candidates begin as."""
    torch.manual_seed(0)
    linear = nn.Linear(shape.inputs, shape.outputs, bias=False).to(dtype)
    return linear, nn.BatchNorm1d(shape.outputs).to(dtype)


@lru_cache(maxsize=8)
def layer_data(shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x, the gradient that arrives at h, and labels."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape.rows, shape.inputs, generator=generator)
    g = torch.randn(shape.rows, shape.outputs, generator=generator) / shape.rows
    labels = torch.randint(0, CLASSES, (shape.rows,), generator=generator)
    return x.to(dtype), g.to(dtype), labels


class Layer:
    """One Linear-BatchNorm-ReLU with its SGD update, given the gradient g that arrives at h.

    Args:
        kind: ``eager``, ``compiled``, ``ours`` (backprop on our kernels) or ``dni``.
        dx: whether the gradient at x is made too; for DNI that is a target step, on which the
            synthesizer is trained as well.
    """

    def __init__(
        self,
        shape: Shape,
        kind: str,
        dx: bool,
        *,
        backend: str | None = None,
        dtype: torch.dtype = torch.float32,
        lr: float = 1e-4,
    ) -> None:
        self.kind, self.dx = kind, dx
        x, self.g, self.labels = layer_data(shape, dtype)
        self.x = x.clone().requires_grad_(dx)
        linear, norm = parts(shape, dtype)
        self.optimizer: torch.optim.Optimizer | None = None
        self.layer: nn.Module
        if kind in ("eager", "compiled"):
            self.layer = nn.Sequential(linear, norm, nn.ReLU())
            self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=lr, fused=True)
        else:
            options: dict[str, Any] = {"synthesizer": None}
            if kind == "dni":
                rank = min(RANK, shape.outputs)
                synthesizer = fd.LinearSynthesizer(shape.outputs, rank, CLASSES).to(dtype)
                with torch.no_grad():
                    torch.manual_seed(1)
                    for p in (synthesizer.weight, synthesizer.context_weight):
                        p.copy_(torch.randn(p.shape) * 0.1)
                options = {"synthesizer": synthesizer}
            self.layer = fd.FusedDNILinear.from_linear(
                linear, norm, "relu", update=fd.SGD(lr), backend=backend, **options
            )
            # The phase is set once: k = 1, or never a target.
            fd.Schedule(self.layer, target_every=1 if dx else None)
        self.forward: Callable[..., Tensor] = self.layer
        if kind == "compiled":
            self.forward = torch.compile(self.layer, fullgraph=True, dynamic=False)

    def step(self) -> None:
        """Forward, backward from g, update."""
        if self.dx:
            self.x.grad = None
        if self.kind == "dni":
            h = self.forward(self.x, self.labels)
            if h.requires_grad:
                h.backward(self.g)
            return
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        self.forward(self.x).backward(self.g)
        if self.optimizer is not None:
            self.optimizer.step()


def check_layer(shape: Shape, kind: str, dx: bool, backend: str | None = None) -> None:
    """One step against float64: weight movement, batch-norm movement, dx. See
    :func:`workloads.step.check_step`.

    Raises:
        Disagreement: they differ by more than float32 explains.
    """
    candidate = Layer(shape, kind, dx, backend=backend, lr=1.0)
    exact_kind, exact_backend = ("dni", "reference") if kind == "dni" else ("eager", None)
    twin = Layer(shape, exact_kind, dx, backend=exact_backend, dtype=torch.float64, lr=1.0)
    movements = []
    for layer in (candidate, twin):
        before = {name: _of(p) for name, p in _plain(layer.layer).items()}
        layer.step()
        moved = {n: _of(p) - before[n] for n, p in _plain(layer.layer).items()}
        movements.append(moved | ({"dx": layer.x.grad} if dx else {}))
    agree(f"{kind} {backend or ''} {shape}", *movements, 1e-3)


def _of(p: Tensor) -> Tensor:
    return p.detach().double().clone()


def _plain(layer: nn.Module) -> dict[str, Tensor]:
    if isinstance(layer, nn.Sequential):
        return {"weight": layer[0].weight, "scale": layer[1].weight, "shift": layer[1].bias}
    return {"weight": layer.weight, "scale": layer.norm.weight, "shift": layer.norm.bias}


def products(shape: Shape, dx: bool, forward_only: bool = False) -> timing.Candidate:
    """Return the products that cannot be avoided: forward, weight gradient, and dx if asked for."""
    n, i, o = shape
    backward = [] if forward_only else [(o, n, i, 1), *[(n, o, i, 1)] * dx]
    return timing.products([(n, i, o, 1), *backward])
