"""Where the CUDA kernels are tested: on a GPU, if there is one, and otherwise on the emulation's
machine; one and the same test on both."""

from __future__ import annotations

import pytest
import torch

from fused_dni.ops import registry

_why_not = dict(registry.report())["cuda"]
if _why_not is not None:
    pytest.skip(f"cuda {_why_not}", allow_module_level=True)

from fused_dni.backends.cuda.calls import extension  # noqa: E402

BACKEND = registry.get("cuda")
CUDA = extension()
DEVICE = "cpu" if CUDA.emulated else "cuda"
# A file's ``pytestmark``: what runs on a GPU is a test of one.
MARKS = [] if CUDA.emulated else [pytest.mark.gpu]
# Of what there is to see in the emulation alone.
emulated = pytest.mark.skipif(not CUDA.emulated, reason="only the emulation tells")


def machine(*, seed: int = 0, resident: int = 0, clusters: bool = True) -> None:
    """Have grids of so many blocks at the most (0: as usual), in clusters or not; in the emulation
    in the order that the seed permutes. A GPU has an order of its own, every time."""
    if CUDA.emulated:
        CUDA.emulate(seed=seed, clusters=clusters, **({"resident": resident} if resident else {}))
    else:
        torch.cuda.synchronize()
        CUDA.limit(blocks=resident, clusters=clusters)
