"""The C++ kernels and the emulation of those in CUDA, built by other compilers than the default,
warnings as errors, and some of their tests against what comes out (CONTRIBUTING.md)."""

from __future__ import annotations

import importlib.util
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from built import BUILD, ROOT, alone

pytestmark = [pytest.mark.repeat, pytest.mark.slow(600)]

build_emulation = runpy.run_path(str(ROOT / "csrc" / "host_emulation" / "build.py"))["build"]
ZIG = f"{sys.executable} -m ziglang c++"
NAMES = ["clang++", *(f"clang++-{n}" for n in range(14, 22)), "g++-13", "g++-14", "g++-15"]

# With the module in place of the installed one.
RUN = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("fused_dni.backends._cpu", sys.argv[1])
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import pytest
raise SystemExit(pytest.main(sys.argv[2:]))
"""


def compilers() -> list[str]:
    """Commands: those that OTHER_CXX names, or all that are found."""
    asked = os.environ.get("OTHER_CXX", "").split(":")
    if asked != [""]:
        return asked
    found = [name for name in NAMES if shutil.which(name)]
    return found + [ZIG] * (importlib.util.find_spec("ziglang") is not None)


def others(*, openmp: bool) -> list[object]:
    """The compilers as parameters; one that is skipped if there are none. Zig has no OpenMP."""
    found = [name for name in compilers() if not (openmp and "zig" in name)]
    missing = pytest.param("", marks=pytest.mark.skip("no other C++ compiler (OTHER_CXX=...)"))
    return [*found] or [missing]


def folder(cxx: str) -> Path:
    """Where a compiler's work is kept."""
    name = "zig" if "zig" in cxx else Path(shlex.split(cxx)[0]).name
    return BUILD / "other_compilers" / name


def run(*command: str, **environment: str) -> None:
    """Run to a good end."""
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize("cxx", others(openmp=True))
def test_cpu_kernels(cxx: str) -> None:
    """All but that there is one pool of threads: Clang brings an OpenMP runtime of its own."""
    where = folder(cxx) / "cpu"
    with alone(f"other_compilers_{folder(cxx).name}"):
        run(
            *(sys.executable, "setup.py", "-q", "build_ext", "--only", "_cpu"),
            *("--build-lib", str(where), "--build-temp", str(where / "objects")),
            CXX=cxx,
            FUSED_DNI_WERROR="1",
            FUSED_DNI_CPU_ISAS="all",
        )
    (module,) = (where / "fused_dni" / "backends").glob("_cpu*.so")
    for names, where_from in (
        ("not one_thread_pool", "tests/kernels/test_cpu_kernels.py"),
        ("test_step and cpu", "tests/ops/test_linear_backends.py"),
    ):
        options = ("-q", "-n", "0", "-p", "no:cacheprovider", "-k", names, where_from)
        run(sys.executable, "-c", RUN, str(module), *options)


@pytest.mark.parametrize("cxx", others(openmp=False))
def test_emulation(cxx: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps and windows on grids of several sizes."""
    monkeypatch.setenv("CXX", cxx)
    module = build_emulation(folder(cxx) / "emulation")
    run(
        *(sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"),
        *("-k", "grids or bare_barriers or tensor_cores"),
        *("tests/kernels/test_cuda_linear.py", "tests/kernels/test_cuda_lstm.py"),
        FUSED_DNI_CUDA_EMULATION=str(module),
    )
