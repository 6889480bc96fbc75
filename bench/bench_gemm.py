"""The kernels' matrix products against torch's, each as a layer uses it.

forward  h = x W^T                      torch: ``F.linear``
update   W <- W - lr delta^T x          torch: ``Tensor.addmm_`` on W, one product in place
dx       dx = delta W                   torch: ``torch.mm``; ours within the layer's backward

Under pytest the suite's tables; ``python bench/bench_gemm.py`` measures every shape interleaved and
prints where torch's product would be the faster one (the crossover).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fused_dni as fd
import workloads as w
from fused_dni.backends.cpu import CpuBackend
from fused_dni.measure import timing
from fused_dni.ops.types import LinearConfig, LinearGradients, LinearTensors, Saved
from fused_dni.rules import RuleState

ROWS = (1, 8, 32, 64, 128, 256, 1024)
FEATURES = (64, 256, 512, 1024, 2048)
PRODUCTS = ("forward", "update", "dx")
LR = 1e-6


class Products:
    """One shape's operands and, by name, both ways to each product."""

    def __init__(self, shape: w.Shape, dtype: torch.dtype = torch.float32) -> None:
        n, i, o = shape
        self.x, self.delta = torch.randn(n, i, dtype=dtype), torch.randn(n, o, dtype=dtype)
        self.weight = nn.Parameter(torch.randn(o, i, dtype=dtype) / i**0.5, requires_grad=True)
        self.layer = LinearTensors(self.weight)
        self.rule = RuleState(fd.SGD(LR)).tensors((self.weight, None, None, None))
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
            return lambda: weight.addmm_(delta_t, x, alpha=-LR)
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
                error = (before - LR * exact - wide["weight"]).abs()
                # torch adds block after block of a deep product to W, rounding it each time
                allowed = LR * bound + 8 * torch.finfo(self.x.dtype).eps * before.abs().max()
            else:
                assert isinstance(got, torch.Tensor)
                error, allowed = (got.double() - exact).abs(), bound
            assert bool((error <= allowed).all()), (product, float(error.max()))


@pytest.mark.parametrize("shape", w.SHAPES, ids=str)
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("who", ["torch", "ours"])
def bench_product(timed, shape, product, who):
    products = Products(shape)
    timed(
        f"Are our products as fast as torch's? {product} {shape}",
        lambda: getattr(products, who)(product),
        lambda: products.check(product),
    )


def crossover(
    seconds: float, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[int, int, dict[str, tuple[float, float]]]]:
    """Measure shape by shape: rows, features, and by product GFLOP/s of torch and of ours."""
    for features in FEATURES:
        for rows in ROWS:
            products = Products(w.Shape(rows, features, features), dtype)
            work = 2e-9 * rows * features * features
            rates: dict[str, tuple[float, float]] = {}
            for product in PRODUCTS:
                products.check(product)
                taken = timing.compare(
                    {"torch": products.torch(product), "ours": products.ours(product)},
                    seconds=seconds,
                )
                rates[product] = (work / taken["torch"].median, work / taken["ours"].median)
            yield rows, features, rates


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.2, help="a product and shape")
    parser.add_argument("--float64", action="store_true")
    options = parser.parse_args()
    kind = torch.float64 if options.float64 else torch.float32
    print(f"GFLOP/s, torch / ours (ratio); {kind}, {torch.get_num_threads()} threads")
    with torch.no_grad():
        for rows, features, rates in crossover(options.seconds, kind):
            cells = [f"{p} {t:.0f} / {o:.0f} ({o / t:.2f})" for p, (t, o) in rates.items()]
            print(f"{rows:5} x {features:5}:  " + "   ".join(cells), flush=True)
