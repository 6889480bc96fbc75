"""The kernels' matrix products against torch's, each as a layer uses it."""

from __future__ import annotations

import pytest

from workloads import gemm, linear


@pytest.mark.parametrize("shape", linear.SHAPES, ids=str)
@pytest.mark.parametrize("product", gemm.PRODUCTS)
@pytest.mark.parametrize("who", ["torch", "ours"])
def bench_product(timed, shape, product, who):
    products = gemm.Products(shape)
    timed(
        f"Are our products as fast as torch's? {product} {shape}",
        lambda: getattr(products, who)(product),
        lambda: products.check(product),
    )
