"""A pytest plugin (``-p pretended_gpu``): collects as on a machine with one GPU, or, with
PRETENDED_GPU=no in the environment, as on this one; in both cases without what `skipif` rules out.
Nothing can be run that way."""

from __future__ import annotations

import os
import sys
import types

import pytest
import torch


def _pretend() -> None:
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1  # type: ignore[method-assign]
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_name = lambda *_: "A GPU"
    extension = types.ModuleType("fused_dni.backends._cuda")
    vars(extension).update(
        emulated=False, architectures="90a", toolkit="13.0", driver=lambda: "13.0",
        spin_bound=lambda nanoseconds: None,
    )  # fmt: skip
    sys.modules[extension.__name__] = extension
    for name in ("FUSED_DNI_CUDA_EMULATION", "TRITON_INTERPRET"):
        os.environ.pop(name, None)


if os.environ.get("PRETENDED_GPU") != "no":
    _pretend()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [
        item for item in items if not any(mark.args[0] for mark in item.iter_markers("skipif"))
    ]
