"""Builds the extensions ``fused_dni._cpu`` and, where there is an nvcc, ``fused_dni._cuda``;
everything declarative stands in pyproject.toml.

The CPU's kernels are compiled once per instruction set, with different flags and into different
namespaces, and linked into one module that chooses at run time. setuptools has one set of flags an
extension and compiles one file after another, so the work goes to ninja: it runs the compilers in
parallel and knows from their dependency files what a changed header touches.

nvcc needs no GPU. It is looked for in ``$CUDA_HOME/bin``, on the path and in ``/usr/local/cuda``;
``FUSED_DNI_CUDA_ARCHS`` says what it compiles for ("80;90a"; "none" leaves the CUDA part out).
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import ninja
import pybind11
from ninja.ninja_syntax import Writer
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU = ROOT / "csrc" / "cpu"
CUDA = ROOT / "csrc" / "cuda"

COMMON = ["dispatch.cpp", "scratch.cpp", "lstm_close.cpp", "bindings.cpp"]
KERNELS = ["linear.cpp", "synthesizer.cpp", "lstm.cpp", "lstm_cell.cpp", "lstm_update.cpp"]
BF16_KERNELS = ["linear_bf16.cpp"]

FLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden",
    "-Wall", "-Wextra", "-Werror",
]  # fmt: skip
# Square roots need no errno, and a * b + c may be one instruction wherever there is one.
KERNEL_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
AVX512 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"]
ISAS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512,
    "avx512bf16": [*AVX512, "-mavx512bf16"],
}

NVCC_FLAGS = [
    "-std=c++17", "-O3", "-Werror", "all-warnings", "-cudart", "static",
    "--compiler-options", "-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror",
]  # fmt: skip
OLDEST_NVCC = (12, 4)


def _find_nvcc() -> tuple[str, tuple[int, int]] | None:
    """nvcc and its version, if there is one that is new enough."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for path in (home and f"{home}/bin/nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if not path or not os.access(path, os.X_OK):
            continue
        said = subprocess.run(
            [path, "--version"], capture_output=True, text=True, check=True
        ).stdout
        found = re.search(r"release (\d+)\.(\d+)", said)
        version = (int(found[1]), int(found[2])) if found else (0, 0)
        if version >= OLDEST_NVCC:
            return path, version
        print(f"{path} is of CUDA {version[0]}.{version[1]}: 12.4 or newer is needed")
    return None


def _architectures(version: tuple[int, int]) -> list[str]:
    """What to compile for: as asked, or what this toolkit knows of sm_80 and newer."""
    asked = os.environ.get("FUSED_DNI_CUDA_ARCHS", "")
    if asked.strip().lower() == "none":
        return []
    if asked.strip():
        names = re.split(r"[;,\s]+", asked.strip())
        for name in names:
            if not re.fullmatch(r"\d{2,3}[af]?", name) or int(name.rstrip("af")) < 80:
                raise SystemExit(
                    f"FUSED_DNI_CUDA_ARCHS: got {asked!r}, takes compute capabilities from 80 up "
                    'separated by semicolons, for example "80;90a", or "none"'
                )
        return names
    return ["80", "90a", *(["100", "120"] if version >= (12, 8) else [])]


class NinjaBuild(build_ext):
    """``build_ext`` whose compiling and linking is done by ninja."""

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        name = extension.name.rpartition(".")[2]
        folder = Path(self.build_temp).resolve() / name
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(folder / "build.ninja", "w", encoding="utf-8") as file:
            write = self._write_cuda if name == "_cuda" else self._write_cpu
            write(Writer(file), target)
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder)]
        if self.verbose:
            command.append("-v")
        subprocess.run(command, check=True)

    def _write_cpu(self, build: Writer, target: Path) -> None:
        includes = [f"-isystem{path}" for path in (pybind11.get_include(), *_python_includes())]
        build.variable("cxx", os.environ.get("CXX", "c++"))
        build.variable("flags", [*FLAGS, *includes])
        build.variable("user", os.environ.get("CXXFLAGS", ""))
        build.variable("ldflags", os.environ.get("LDFLAGS", ""))
        build.rule(
            "compile",
            "$cxx $flags $isa $user -MMD -MF $out.d -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
            description="compile $out",
        )
        build.rule("link", "$cxx -shared $in $ldflags -fopenmp -o $out", description="link $out")
        objects: list[str] = []
        for name in COMMON:
            objects += build.build(f"{name}.o", "compile", str(CPU / name))
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        for isa, wider in ISAS.items():
            if wider and not x86:
                continue
            flags = [*KERNEL_FLAGS, *wider, f"-DFUSED_DNI_ISA={isa}"]
            for name in BF16_KERNELS if isa == "avx512bf16" else KERNELS:
                objects += build.build(
                    f"{name}.{isa}.o", "compile", str(CPU / name), variables={"isa": flags}
                )
        build.build(str(target), "link", objects)
        build.default(str(target))

    def _write_cuda(self, build: Writer, target: Path) -> None:
        assert NVCC is not None
        includes = [f"-isystem={path}" for path in (pybind11.get_include(), *_python_includes())]
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
        listed = f"""'-DFUSED_DNI_ARCHITECTURES="{" ".join(ARCHITECTURES)}"'"""
        build.variable("nvcc", NVCC[0])
        build.variable("flags", [*NVCC_FLAGS, listed, *includes])
        build.variable("codes", codes)
        build.rule(
            "compile",
            "$nvcc $flags $codes -MD -MF $out.d -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
            description="compile $out",
        )
        build.rule(
            "link", "$nvcc -shared -cudart static $codes $in -o $out", description="link $out"
        )
        objects: list[str] = []
        for source in CUDA_SOURCES:
            objects += build.build(f"{source.name}.o", "compile", str(source))
        build.build(str(target), "link", objects)
        build.default(str(target))


def _python_includes() -> list[str]:
    paths = sysconfig.get_paths()
    return sorted({paths["include"], paths["platinclude"]})


NVCC = _find_nvcc()
ARCHITECTURES = _architectures(NVCC[1]) if NVCC else []
CUDA_SOURCES = sorted([*CUDA.glob("*.cu"), *CUDA.glob("*.cpp")])
EXTENSIONS = [
    Extension(
        "fused_dni._cpu",
        [f"csrc/cpu/{name}" for name in [*COMMON, *KERNELS, *BF16_KERNELS]],
        language="c++",
    )
]
if ARCHITECTURES:
    EXTENSIONS.append(
        Extension(
            "fused_dni._cuda", [str(s.relative_to(ROOT)) for s in CUDA_SOURCES], language="c++"
        )
    )
else:
    print("without CUDA kernels: no nvcc of CUDA 12.4 or newer, or FUSED_DNI_CUDA_ARCHS=none")

setup(
    packages=[*find_packages(include=["fused_dni", "fused_dni.*"]), "fused_dni.kernels"],
    package_dir={"fused_dni": "fused_dni", "fused_dni.kernels": "kernels"},
    package_data={
        "fused_dni": ["py.typed"],
        "fused_dni.backends": ["*.json"],
        "fused_dni.kernels": ["*.json"],
    },
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": NinjaBuild},
)
