"""Builds the extensions ``fused_dni.backends._cpu`` and ``fused_dni.backends._cuda``; everything
declarative stands in pyproject.toml.

The CPU's kernels are compiled once per instruction set, with different flags and into different
namespaces, and linked into one module that chooses at run time. setuptools has one set of flags an
extension and compiles one file after another, so the work goes to ninja: it runs the compilers in
parallel and knows from their dependency files what a changed header touches.

What is installed is for this machine: its instruction sets, and the GPUs that nvidia-smi lists
(nvcc needs none, but minutes; where there is none, there is no CUDA part). Environment variables
change that:

FUSED_DNI_CPU_ISAS    what to compile for beside portable code: "avx2;avx512", or "all", as a wheel
                      for other machines wants it
FUSED_DNI_CUDA_ARCHS  what to compile for: "80;90a", "all" that the toolkit knows, or "none"
CUDA_HOME             where nvcc is, in front of the path and /usr/local/cuda
FUSED_DNI_WERROR      1 makes warnings errors, as ``make test`` has it

What cannot be built is left out, and the package installs all the same: ``build.json`` beside the
extensions says why, and ``fused-dni env`` repeats it.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

import ninja
import pybind11
from ninja.ninja_syntax import Writer
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU = ROOT / "csrc" / "cpu"
CUDA = ROOT / "csrc" / "cuda"

COMMON = [
    "dispatch.cpp", "quick.cpp", "region.cpp", "scratch.cpp", "lstm_close.cpp", "bindings.cpp",
]  # fmt: skip
KERNELS = [
    "linear.cpp", "linear_cross_entropy.cpp", "synthesizer.cpp", "lstm.cpp", "lstm_cell.cpp",
    "lstm_update.cpp",
]  # fmt: skip
BF16_KERNELS = ["linear_bf16.cpp"]

# Another compiler's new warning must not break an installation.
STRICT = os.environ.get("FUSED_DNI_WERROR", "0") not in ("", "0")
FLAGS = [
    "-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fopenmp", "-fvisibility=hidden",
    "-Wall", "-Wextra", *(["-Werror"] if STRICT else []),
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
    "-std=c++17", "-O3", *(["-Werror", "all-warnings"] if STRICT else []), "-cudart", "static",
    "--compiler-options",
    "-fPIC,-fvisibility=hidden,-Wall,-Wextra" + (",-Werror" if STRICT else ""),
]  # fmt: skip
OLDEST_NVCC = (12, 4)
# One instruction for a * b + c would round otherwise than the tensors' operations that quick.cpp
# stands for.
COMMON_FLAGS = ["-ffp-contract=off"]
# Shadow stacks know nothing of a switch from one stack to another: the object must not be marked as
# one that they suit, as some systems' compilers have it by default.
SWITCHES = {"region.cpp": ["-fcf-protection=none"]}


# What a compiler defines where it compiles for a set.
ISA_MACROS = {
    "portable": set(),
    "avx2": {"__AVX2__", "__FMA__"},
    "avx512": {"__AVX512F__", "__AVX512DQ__", "__AVX512BW__", "__AVX512VL__"},
    "avx512bf16": {"__AVX512BF16__"},
}


class Missing(Exception):
    """Why a part is left out, in one line that says how to get it."""


class CudaBuild(NamedTuple):
    """How the CUDA part is compiled."""

    nvcc: str
    architectures: list[str]


def _cuda_build() -> CudaBuild:
    """What to compile the CUDA part with, and for which architectures.

    Raises:
        Missing: there is nothing to compile it with or for.
    """
    asked = os.environ.get("FUSED_DNI_CUDA_ARCHS", "").strip().lower()
    if asked == "none":
        raise Missing("FUSED_DNI_CUDA_ARCHS said none when it was installed")
    names = _present() if not asked else [] if asked == "all" else re.split(r"[;,\s]+", asked)
    for name in names:
        if not re.fullmatch(r"\d{2,3}[af]?", name) or int(name.rstrip("af")) < 80:
            raise Missing(
                f"FUSED_DNI_CUDA_ARCHS={asked!r} is not a list of compute capabilities from 80 up "
                'separated by semicolons, for example "80;90a", nor "all" or "none"'
            )
    if not names and asked != "all":
        raise Missing(
            "nvidia-smi listed no GPU of compute capability 8.0 or newer when it was installed; "
            'FUSED_DNI_CUDA_ARCHS="90a" builds for one that is elsewhere'
        )
    nvcc, version = _find_nvcc()
    if asked == "all":
        names = ["80", "90a", *(["100", "120"] if version >= (12, 8) else [])]
    return CudaBuild(nvcc, names)


def _present() -> list[str]:
    """Compute capabilities of this machine's GPUs, as nvcc names them."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    said = subprocess.run(
        [smi, "--query-gpu=compute_cap", "--format=csv,noheader"],
        capture_output=True, text=True, check=False,
    ).stdout  # fmt: skip
    found = {int(major) * 10 + int(minor) for major, minor in re.findall(r"(\d+)\.(\d)", said)}
    return ["90a" if cc == 90 else str(cc) for cc in sorted(found) if cc >= 80]


def _find_nvcc() -> tuple[str, tuple[int, int]]:
    """nvcc and its version.

    Raises:
        Missing: there is none, or it is too old.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    old = ""
    for path in (home and f"{home}/bin/nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if not path or not os.access(path, os.X_OK):
            continue
        said = subprocess.run(
            [path, "--version"], capture_output=True, text=True, check=False
        ).stdout
        found = re.search(r"release (\d+)\.(\d+)", said)
        version = (int(found[1]), int(found[2])) if found else (0, 0)
        if version >= OLDEST_NVCC:
            return path, version
        old = old or f"{path} is of CUDA {version[0]}.{version[1]}, "
    raise Missing(
        f"{old or 'there was no nvcc on the path, in CUDA_HOME or in /usr/local/cuda, '}"
        "and it needs CUDA 12.4 or newer when it is installed"
    )


def _compiler() -> str:
    """The C++ compiler's command.

    Raises:
        Missing: there is none.
    """
    command = os.environ.get("CXX") or "c++"
    if shutil.which(shlex.split(command)[0]) is None:
        raise Missing(
            f"there was no C++ compiler ({command}) when it was installed: install one (Debian, "
            "Ubuntu: apt install g++), or name it in CXX"
        )
    return command


def _x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _cpu_isas(compiler: str) -> list[str]:
    """The instruction sets to compile for.

    Raises:
        Missing: the environment asks for something else.
    """
    known = list(ISAS) if _x86() else ["portable"]
    asked = os.environ.get("FUSED_DNI_CPU_ISAS", "").strip().lower()
    if asked == "all":
        return known
    if asked:
        names = {name for name in re.split(r"[;,\s]+", asked) if name}
        if not names <= set(known):
            raise Missing(
                f"FUSED_DNI_CPU_ISAS={asked!r} is not a list of {', '.join(known)} separated by "
                'semicolons, nor "all"'
            )
        return [isa for isa in known if isa in names | {"portable"}]
    command = [*shlex.split(compiler), "-march=native", "-dM", "-E", "-xc++", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    if said.returncode:
        return known
    defined = set(re.findall(r"#define (\w+)", said.stdout))
    return [isa for isa in known if ISA_MACROS[isa] <= defined]


class NinjaBuild(build_ext):
    """``build_ext`` whose compiling and linking is done by ninja."""

    user_options = [  # noqa: RUF012  (setuptools')
        *build_ext.user_options,
        ("only=", None, "the one extension to build, for example _cuda (tests/support/built.py)"),
        ("objects=", None, "of that, instead of the module, these, as launch.cu.o,lstm.cu.o"),
    ]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.only: str | None = None
        self.objects: str | None = None

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.only is not None:
            self.extensions = [e for e in self.extensions if e.name.endswith(f".{self.only}")]

    def run(self) -> None:
        self.left_out: dict[str, str] = {}
        super().run()
        # In a work tree (pip install -e) as in a wheel: beside the extensions.
        folder = Path(self.get_ext_fullpath("fused_dni.backends._cpu")).resolve().parent
        if self.inplace:
            folder = ROOT / "fused_dni" / "backends"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.json").write_text(json.dumps({"left out": self.left_out}) + "\n")

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        name = extension.name.rpartition(".")[2]
        folder = Path(self.build_temp).resolve() / name
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(folder / "build.ninja", "w", encoding="utf-8") as file:
                writer = Writer(file)
                if name == "_cuda":
                    self._write_cuda(writer, target, _cuda_build())
                else:
                    self._write_cpu(writer, target, _compiler())
        except Missing as missing:
            print(f"{extension.name} is not built: {missing}")
            self.left_out[name] = str(missing)
            installed = ROOT / "fused_dni" / "backends" / target.name
            for stale in (target, *([installed] if self.only is None else [])):
                stale.unlink(missing_ok=True)
            return
        wanted = self.objects.split(",") if self.objects else []
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder), *wanted]
        if self.verbose:
            command.append("-v")
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError:
            if STRICT or name != "_cuda":
                raise
            self.left_out[name] = "nvcc failed when it was installed: pip install -v shows how"

    def _write_cpu(self, build: Writer, target: Path, compiler: str) -> None:
        includes = [f"-isystem{path}" for path in (pybind11.get_include(), *_python_includes())]
        build.variable("cxx", compiler)
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
        isas = _cpu_isas(compiler)
        linked = [f"-DFUSED_DNI_WITH_{isa.upper()}" for isa in isas]
        for name in COMMON:
            flags = [*COMMON_FLAGS, *linked, *(SWITCHES.get(name, []) if _x86() else [])]
            objects += build.build(
                f"{name}.o", "compile", str(CPU / name), variables={"isa": flags}
            )
        for isa in isas:
            flags = [*KERNEL_FLAGS, *ISAS[isa], f"-DFUSED_DNI_ISA={isa}"]
            for name in BF16_KERNELS if isa == "avx512bf16" else KERNELS:
                objects += build.build(
                    f"{name}.{isa}.o", "compile", str(CPU / name), variables={"isa": flags}
                )
        build.build(str(target), "link", objects)
        build.default(str(target))

    def _write_cuda(self, build: Writer, target: Path, how: CudaBuild) -> None:
        includes = [f"-isystem={path}" for path in (pybind11.get_include(), *_python_includes())]
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in how.architectures]
        listed = f"""'-DFUSED_DNI_ARCHITECTURES="{" ".join(how.architectures)}"'"""
        build.variable("nvcc", how.nvcc)
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


CUDA_SOURCES = sorted([*CUDA.glob("*.cu"), *CUDA.glob("*.cpp")])
CPU_SOURCES = [CPU / name for name in [*COMMON, *KERNELS, *BF16_KERNELS]]
# Optional: without one of them, or both, the package installs and says so. (A source that does not
# compile is an error all the same.)
EXTENSIONS = [
    Extension(
        f"fused_dni.backends.{name}",
        [str(source.relative_to(ROOT)) for source in sources],
        language="c++",
        optional=True,
    )
    for name, sources in (("_cpu", CPU_SOURCES), ("_cuda", CUDA_SOURCES))
]

setup(
    packages=[*find_packages(include=["fused_dni", "fused_dni.*"]), "fused_dni.kernels"],
    py_modules=["fused_dni_launcher"],
    package_dir={"fused_dni": "fused_dni", "fused_dni.kernels": "kernels"},
    package_data={
        "fused_dni": ["py.typed"],
        "fused_dni.backends": ["*.json", "*.pyi"],
        "fused_dni.ops": ["*.json"],
        "fused_dni.kernels": ["*.json"],
        "fused_dni.report": ["*.html"],
    },
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": NinjaBuild},
)
