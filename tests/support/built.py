"""What tests need compiled beyond what is installed, under build/, and again only as far as sources
change; several processes may ask at once.

    python tests/support/built.py

builds all of it ahead of the tests, as `make install-for-tests` does (they do it themselves
otherwise). That takes setuptools, pybind11 and ninja, and neither torch nor pytest, which are being
installed meanwhile.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"

# CUDA takes minutes an architecture. The module that tests load has all kernels for one; for the
# others (two came with CUDA 12.8) each kernel is compiled, but not again for precisions that differ
# in nothing but the type of a product's operands (`make test-all` has them).
MODULE, OTHERS = "90a", "80;100;120"
REPEATED = ("linear_fp16.cu", "linear_fp32.cu", "linear_tf32.cu")


@contextmanager
def alone(name: str) -> Iterator[None]:
    """One process at a time."""
    BUILD.mkdir(exist_ok=True)
    with open(BUILD / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class NotBuilt(Exception):
    """Why there is none, in one line."""


def build_cuda() -> Path:
    """``_cuda`` for the architecture :data:`MODULE`, warnings being errors: an installation has it
    for the GPUs of its machine alone.

    Raises:
        NotBuilt: there is nothing to build it with, or it is not wanted.
    """
    (path,) = _cuda(MODULE, BUILD / "cuda").glob("_cuda.*.so")
    return path


def build_others(every: bool) -> list[Path]:
    """Objects with the kernels for the architectures of :data:`OTHERS`, the sources of
    :data:`REPEATED` being left out unless it is to be every one.

    Raises:
        NotBuilt: as above.
    """
    sources = (ROOT / "csrc" / "cuda").glob("*.cu")
    names = sorted(f"{s.name}.o" for s in sources if every or s.name not in REPEATED)
    folder = BUILD / "cuda" / "others"
    _cuda(OTHERS, folder, "--objects", ",".join(names))
    return [folder / "objects" / "_cuda" / name for name in names]


def _cuda(architectures: str, folder: Path, *options: str) -> Path:
    """Build in ``folder``; where what was built lies in it."""
    if os.environ.get("FUSED_DNI_CUDA_ARCHS", "").strip().lower() == "none":
        raise NotBuilt("FUSED_DNI_CUDA_ARCHS says none")
    with alone("cuda"):
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--only", "_cuda", *options,
             "--build-lib", str(folder), "--build-temp", str(folder / "objects")],
            cwd=ROOT,
            env={**os.environ, "FUSED_DNI_CUDA_ARCHS": architectures, "FUSED_DNI_WERROR": "1"},
            capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    there = folder / "fused_dni" / "backends"
    left_out = json.loads((there / "build.json").read_text())["left out"]
    if left_out:
        raise NotBuilt(f"not built: {left_out['_cuda']}")
    return there


@functools.cache
def cuda_extension() -> ModuleType:
    """The module that :func:`build_cuda` makes, which is not what ``fused_dni`` imports; a test
    that asks for it is skipped where there is none."""
    import pytest

    try:
        path = build_cuda()
    except NotBuilt as without:
        pytest.skip(str(without))
    spec = importlib.util.spec_from_file_location("_cuda", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Build the CUDA sources for a CPU, plain and with each sanitizer, and for GPUs."""
    emulation = runpy.run_path(str(ROOT / "csrc" / "host_emulation" / "build.py"))
    for sanitize in emulation["SANITIZERS"]:
        emulation["build"](BUILD / "host_emulation", sanitize)
    try:
        build_cuda()
        build_others(every=False)
    except NotBuilt as without:
        print(f"without CUDA for GPUs: {without}")


if __name__ == "__main__":
    main()
