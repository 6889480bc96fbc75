"""The kernels' matrix products against torch's, each as a layer uses it.

forward  h = x W^T                      torch: ``F.linear``
update   W <- W - lr delta^T x          torch: ``Tensor.addmm_`` on W, one product in place
dx       dx = delta W                   torch: ``torch.mm``; ours within the layer's backward
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

import fused_dni as fd
from fused_dni.backends.cpu import CpuBackend
from fused_dni.ops.types import LinearConfig, LinearGradients, LinearTensors, Saved
from fused_dni.rules import RuleState
from workloads import RATE
from workloads.linear import Shape

ROWS = (1, 8, 32, 64, 128, 256, 1024)
FEATURES = (64, 256, 512, 1024, 2048)
PRODUCTS = ("forward", "update", "dx")


class Products:
    """One shape's operands and, by name, both ways to each product."""

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.float32) -> None:
        n, i, o = shape
        self.x, self.delta = torch.randn(n, i, dtype=dtype), torch.randn(n, o, dtype=dtype)
        self.weight = nn.Parameter(torch.randn(o, i, dtype=dtype) / i**0.5, requires_grad=True)
        self.layer = LinearTensors(self.weight)
        self.rule = RuleState(fd.SGD(RATE)).tensors((self.weight, None, None, None))
        self.backend = CpuBackend()

    def ours(self, product: str) -> Callable[[], object]:
        x, layer, config = self.x, self.layer, LinearConfig()
        if product == "forward":
            return lambda: self.backend.linear_forward(x, layer, config, False, False)[0]
        if product == "update":
            gradients = LinearGradients(self.delta)
            return lambda: self.backend.linear_update_(x, gradients, layer, self.rule)
        delta, saved = self.delta, Saved()
        return lambda: (
            self.backend.linear_backward(
                delta, x, delta, saved, layer, config, False, True, False
            ).x
        )

    def torch(self, product: str) -> Callable[[], object]:
        x, delta, weight = self.x, self.delta, self.weight.detach()
        if product == "forward":
            return lambda: F.linear(x, weight)
        if product == "update":
            delta_t = delta.t()
            return lambda: weight.addmm_(delta_t, x, alpha=-RATE)
        return lambda: torch.mm(delta, weight)

    def check(self, product: str) -> None:
        """Both ways against float64: nothing is timed that is wrong."""
        wide = {
            k: t.detach().double() for k, t in vars(self).items() if isinstance(t, torch.Tensor)
        }
        terms = {"forward": ("x", "weight"), "update": ("delta", "x"), "dx": ("delta", "weight")}
        a, b = (wide[name] for name in terms[product])
        a = a.t() if product == "update" else a
        b = b.t() if product == "forward" else b
        bound = 8 * torch.finfo(self.x.dtype).eps * (a.shape[1] * (a * a) @ (b * b)).sqrt()
        exact = a @ b
        for run in (self.ours(product), self.torch(product)):
            got = run()
            if product == "update":
                before = wide["weight"]
                wide["weight"] = self.weight.detach().double()
                error = (before - RATE * exact - wide["weight"]).abs()
                # torch adds block after block of a deep product to W, rounding it each time
                allowed = RATE * bound + 8 * torch.finfo(self.x.dtype).eps * before.abs().max()
            else:
                assert isinstance(got, torch.Tensor)
                error, allowed = (got.double() - exact).abs(), bound
            assert bool((error <= allowed).all()), (product, float(error.max()))
