"""A little of everything that the backend ``cuda`` does, in a process under a sanitizer: see
test_cuda_sanitized.py. With "races" as an argument, the few ops that every barrier of the kernels
is in, on the smallest sizes: there each thread of the device is one of the system."""

from __future__ import annotations

import sys
from typing import Any

import torch

import fused_dni as fd
from fused_dni.backends import registry


def layer_step(rows: int, inputs: int, outputs: int, dtype: torch.dtype, **options: Any) -> None:
    """A step with a target for the layer below, and the training of the synthesizer."""
    layer = fd.FusedDNILinear(inputs, outputs, activation="gelu", backend="cuda", **options)
    x = torch.randn(rows, inputs, dtype=dtype, requires_grad=True)
    labels = torch.randint(3, (rows,)) if options.get("context_features") else None
    h = layer(x) if labels is None else layer(x, labels)
    h.float().square().mean().backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())


def window(steps: int, batch: int, size: int, dtype: torch.dtype, **options: Any) -> None:
    """Two windows of a sequence, with all that stands between them."""
    lstm = fd.FusedDNILSTM(3, size, backend="cuda", **options)
    state = None
    for _ in range(2):
        x = torch.randn(steps, batch, 3, dtype=dtype, requires_grad=True)
        output, state = lstm(x, state)
        output.float().square().mean().backward()
        assert x.grad is not None and bool(torch.isfinite(x.grad).all())


def everything() -> None:
    low_rank = {"context_features": 3, "update": fd.Adam(1e-3)}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer_step(5, 7, 9, dtype, normalization="batch", **low_rank)
        layer_step(33, 40, 70, dtype, normalization="layer", update=fd.SGD(0.1, momentum=0.9))
        layer_step(130, 9, 17, dtype, normalization="batch", update=fd.SGD(0.1, nesterov=True,
                                                                         momentum=0.9))  # fmt: skip
        layer_step(5, 7, 9, dtype, synthesizer=fd.LinearSynthesizer(9), max_norm=0.1,
                   update=fd.AdamW(1e-3))  # fmt: skip
        layer_step(5, 7, 9, dtype, synthesizer=None)
        window(3, 2, 9, dtype, num_layers=2, update=fd.Adam(1e-3))
        window(2, 17, 20, dtype)
    cell = fd.FusedDNILSTMCell(3, 5, backend="cuda")
    state = cell(torch.randn(2, 3))
    state[0].square().mean().backward()


def races() -> None:
    layer_step(5, 7, 9, torch.float32, normalization="batch", context_features=3,
               update=fd.Adam(1e-3))  # fmt: skip
    layer_step(40, 6, 20, torch.bfloat16, normalization="layer", update=fd.SGD(0.1))
    window(2, 2, 9, torch.bfloat16, update=fd.SGD(0.1))


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    registry.get("cuda")
    races() if "races" in sys.argv else everything()
    print("done")


if __name__ == "__main__":
    main()
