"""One Linear-BatchNorm-ReLU layer: forward only, and a training step from the gradient at its
output, with and without the gradient at its input. Beside each group its floor."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fused_dni as fd
from workloads import backends
from workloads import gpu as wg
from workloads import linear as w

SHAPES = pytest.mark.parametrize("shape", w.SHAPES, ids=str)
BACKENDS = pytest.mark.parametrize("backend", backends())


def forward_group(shape: w.Shape) -> str:
    return f"What does a layer's forward cost? {shape}"


@SHAPES
def bench_forward_floor(timed, shape):
    timed(forward_group(shape), lambda: w.products(shape, False, forward_only=True))


@SHAPES
def bench_forward_stock(timed, shape):
    linear, norm = w.parts(shape, torch.float32)
    layer = nn.Sequential(linear, norm, nn.ReLU()).eval()
    x = w.layer_data(shape)[0]

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    timed(forward_group(shape), lambda: forward)


@SHAPES
@BACKENDS
def bench_forward_ours(timed, shape, backend):
    linear, norm = w.parts(shape, torch.float32)
    layer = fd.FusedDNILinear.from_linear(linear, norm, "relu", backend=backend).eval()
    x = w.layer_data(shape)[0]

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    def check() -> None:
        with torch.no_grad():
            expected = nn.Sequential(linear, norm, nn.ReLU()).eval()(x)
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)

    timed(forward_group(shape), lambda: forward, check)


def step_group(shape: w.Shape, dx: bool) -> str:
    return f"Is a layer's step cheaper by DNI? {shape}, {'with' if dx else 'without'} dx"


DX = pytest.mark.parametrize("dx", [False, True], ids=["no_dx", "dx"])


@SHAPES
@DX
def bench_layer_floor(timed, shape, dx):
    timed(step_group(shape, dx), lambda: w.products(shape, dx))


@SHAPES
@DX
@pytest.mark.parametrize("kind", ["eager", "compiled"])
def bench_layer_stock(timed, shape, dx, kind):
    timed(
        step_group(shape, dx),
        lambda: w.Layer(shape, kind, dx).step,
        lambda: w.check_layer(shape, kind, dx),
    )


@SHAPES
@DX
@pytest.mark.parametrize("kind", ["ours", "dni"])
@BACKENDS
def bench_layer_ours(timed, shape, dx, kind, backend):
    timed(
        step_group(shape, dx),
        lambda: w.Layer(shape, kind, dx, backend=backend).step,
        lambda: w.check_layer(shape, kind, dx, backend),
    )


@pytest.mark.skipif(wg.why_no_gpu() is not None, reason=str(wg.why_no_gpu()))
@pytest.mark.parametrize("kind", [wg.Decoupled, wg.Backprop, wg.Stock], ids=lambda k: k.__name__)
@pytest.mark.parametrize("precision", wg.PRECISIONS)
@DX
@SHAPES
def bench_layer_on_a_gpu(timed, shape, dx, precision, kind):
    """Eager, with its launches: graphs and compilers are compared by bench/gpu.sh."""
    case, device = wg.Case(shape.rows, shape.outputs, precision, dx=dx), torch.device("cuda", 0)
    given = () if kind is wg.Stock else ("triton",)

    def make(case, device, **options):
        return kind(case, device, *given, **options)

    with wg.arithmetic(precision):
        timed(
            f"Is a layer's step cheaper by DNI? {case} on a GPU",
            lambda: make(case, device).step,
            lambda: wg.check_layer(make, case, device),
            device="cuda",
        )
