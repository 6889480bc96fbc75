"""Nsight Systems: the command line for a timeline of launches, ranges and libraries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

MISSING = (
    "nsys is not on PATH: install NVIDIA Nsight Systems (package nsight-systems of NVIDIA's CUDA "
    "repository, or developer.nvidia.com/nsight-systems)"
)


def line(command: Sequence[str], folder: Path, only: str | None = None) -> list[str]:
    """Return the command line.

    Args:
        command: what is profiled.
        folder: where ``nsys.nsys-rep`` goes.
        only: record from the start of the first range of this name to its end.
    """
    words = ["nsys", "profile", "--trace=cuda,nvtx,osrt,cublas", "--force-overwrite=true"]
    words.append(f"--output={folder / 'nsys'}")
    if only is not None:
        # Torch's ranges are not registered strings, the only ones that are looked at otherwise.
        words += ["--capture-range=nvtx", f"--nvtx-capture={only}", "--capture-range-end=stop"]
        words.append("--env-var=NSYS_NVTX_PROFILER_REGISTER_ONLY=0")
    return [*words, *command]
