"""A little of everything that the backend ``cuda`` does, in a process under a sanitizer: see
test_cuda_sanitized.py. With "races" as an argument, the few ops that every barrier of the kernels
is in, on the smallest sizes: there each thread of the device is one of the system."""

from __future__ import annotations

import sys
from typing import Any

import torch

import fused_dni as fd
from fused_dni.ops import registry
from fused_dni.ops.types import LSTMLayer


def layer_step(rows: int, inputs: int, outputs: int, dtype: torch.dtype, **options: Any) -> None:
    """A step with a target for the layer below, and the training of the synthesizer."""
    layer = fd.FusedDNILinear(inputs, outputs, activation="gelu", backend="cuda", **options)
    x = torch.randn(rows, inputs, requires_grad=True)
    labels = torch.randint(3, (rows,)) if options.get("context_features") else None
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        h = layer(x) if labels is None else layer(x, labels)
    h.float().square().mean().backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())


def windows(size: int, **options: Any) -> None:
    """Two windows of a sequence, with all that stands between them."""
    lstm = fd.FusedDNILSTM(3, size, backend="cuda", **options)
    state = None
    for _ in range(2):
        x = torch.randn(2, 2, 3, requires_grad=True)
        output, state = lstm(x, state)
        output.square().mean().backward()
        assert x.grad is not None and bool(torch.isfinite(x.grad).all())


def window(batch: int, size: int, dtype: torch.dtype) -> None:
    """Forward and backward in low precision."""
    backend = registry.get("cuda")
    layer = LSTMLayer(
        torch.randn(4 * size, 3), torch.randn(4 * size, size), torch.randn(4 * size),
        torch.randn(4 * size),
    )  # fmt: skip
    x = torch.randn(2, batch, 3).to(dtype)
    state = torch.zeros(1, batch, size, dtype=dtype)
    trace = backend.lstm_forward(x, state, state, (layer,), None, (), True)
    given = torch.randn(2, batch, size).to(dtype)
    made = backend.lstm_backward(
        given, None, None, x, (layer,), None, (), trace, need_dx=True, need_weights=True
    )
    assert made.x is not None and bool(torch.isfinite(made.x).all())


def everything() -> None:
    conditioned = {"context_features": 3, "update": fd.Adam(1e-3)}
    layer_step(5, 7, 9, torch.float32, normalization="batch", **conditioned)
    layer_step(33, 40, 70, torch.bfloat16, normalization="layer", update=fd.SGD(0.1))
    layer_step(130, 9, 17, torch.float32, normalization="batch",
               update=fd.SGD(0.1, momentum=0.9, nesterov=True))  # fmt: skip
    layer_step(5, 7, 9, torch.bfloat16, synthesizer=fd.LinearSynthesizer(9), max_norm=0.1,
               update=fd.AdamW(1e-3))  # fmt: skip
    layer_step(5, 7, 9, torch.bfloat16, synthesizer=None)
    layer_step(40, 6, 20, torch.float32, normalization="layer", interface="preactivation",
               max_norm=0.1, update=fd.SGD(0.1))  # fmt: skip
    windows(9, num_layers=2, update=fd.Adam(1e-3))
    windows(20)
    window(17, 20, torch.bfloat16)
    window(2, 8, torch.float16)
    cell = fd.FusedDNILSTMCell(3, 5, backend="cuda")
    cell(torch.randn(2, 3))[0].square().mean().backward()


def races() -> None:
    layer_step(5, 7, 9, torch.float32, normalization="batch", context_features=3,
               update=fd.Adam(1e-3))  # fmt: skip
    layer_step(40, 6, 20, torch.bfloat16, normalization="layer", update=fd.SGD(0.1))
    windows(9, update=fd.SGD(0.1))


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    races() if "races" in sys.argv else everything()
    print("done")


if __name__ == "__main__":
    main()
