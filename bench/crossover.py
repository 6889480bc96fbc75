"""Where torch's matrix products are faster than the kernels', shape by shape.

    python bench/crossover.py [--seconds 0.2] [--float64]

Every product of every shape, both ways interleaved, as a layer uses it (:mod:`workloads.gemm`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from fused_dni.measure import timing
from workloads import gemm
from workloads.linear import Shape


def crossover(
    seconds: float, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[int, int, dict[str, tuple[float, float]]]]:
    """Measure shape by shape: rows, features, and by product GFLOP/s of torch and of ours."""
    for features in gemm.FEATURES:
        for rows in gemm.ROWS:
            products = gemm.Products(Shape(rows, features, features), dtype)
            work = 2e-9 * rows * features * features
            rates: dict[str, tuple[float, float]] = {}
            for product in gemm.PRODUCTS:
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
