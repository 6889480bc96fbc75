"""Builds the extension ``fused_dni._cpu``; everything declarative stands in pyproject.toml.

The kernels are compiled once per instruction set, with different flags and into different
namespaces, and linked into one module that chooses at run time. setuptools has one set of flags an
extension and compiles one file after another, so the work goes to ninja: it runs the compilers in
parallel and knows from their dependency files what a changed header touches.
"""

from __future__ import annotations

import os
import platform
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


class NinjaBuild(build_ext):
    """``build_ext`` whose compiling and linking is done by ninja."""

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(folder / "build.ninja", "w", encoding="utf-8") as file:
            self._write(Writer(file), target)
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder)]
        if self.verbose:
            command.append("-v")
        subprocess.run(command, check=True)

    def _write(self, build: Writer, target: Path) -> None:
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


def _python_includes() -> list[str]:
    paths = sysconfig.get_paths()
    return sorted({paths["include"], paths["platinclude"]})


setup(
    packages=[*find_packages(include=["fused_dni", "fused_dni.*"]), "fused_dni.kernels"],
    package_dir={"fused_dni": "fused_dni", "fused_dni.kernels": "kernels"},
    package_data={"fused_dni": ["py.typed"], "fused_dni.kernels": ["*.json"]},
    ext_modules=[
        Extension(
            "fused_dni._cpu",
            [f"csrc/cpu/{name}" for name in [*COMMON, *KERNELS, *BF16_KERNELS]],
            language="c++",
        )
    ],
    cmdclass={"build_ext": NinjaBuild},
)
