"""Builds the CUDA sources for a CPU: the Python module ``_cuda_emulated`` (see README.md here).

``python csrc/host_emulation/build.py FOLDER [--sanitize address|thread]`` prints the path of the
module. Only what has changed is compiled. With "address" it is built for AddressSanitizer and
UndefinedBehaviorSanitizer, with "thread" for ThreadSanitizer and with one thread of the system for
each of CUDA; a Python that loads such a module has to be started with the sanitizer's runtime
(``LD_PRELOAD=$(c++ -print-file-name=libasan.so)``).
"""

from __future__ import annotations

import argparse
import fcntl
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pybind11
from ninja.ninja_syntax import Writer

HERE = Path(__file__).resolve().parent
CUDA = HERE.parent / "cuda"
FLAGS = [
    "-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast",
    "-DFUSED_DNI_EMULATED", "-Wall", "-Wextra", "-Werror",
    # `#pragma unroll` is for nvcc: GCC does not know it, Clang tries and may not succeed.
    "-Wno-unknown-pragmas", "-Wno-pass-failed",
]  # fmt: skip
SANITIZERS = {
    "": ["-O2"],
    "address": ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-O0", "-fsanitize=thread", "-DFUSED_DNI_EMULATED_THREADS"],
}
# What reads Python's arguments: one thread does, quickly enough as it comes, and compiling its
# templates takes as long as the kernels. Compiled once for the modules without AddressSanitizer.
READERS = ("bind_linear.cpp", "bind_lstm.cpp")


def build(folder: Path, sanitize: str = "") -> Path:
    """Build a module under ``folder`` and return its path; several processes may ask at once.

    Raises:
        RuntimeError: what does not compile, with the compiler's output.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    module = Path(sanitize or "plain", f"_cuda_emulated{sysconfig.get_config_var('EXT_SUFFIX')}")
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(folder / "build.ninja", "w", encoding="utf-8") as file:
            _write(Writer(file), module.name)
        made = subprocess.run(
            [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder), str(module)],
            capture_output=True,
            text=True,
        )
    if made.returncode:
        raise RuntimeError(f"the CUDA sources do not compile for a CPU:\n{made.stdout}")
    return folder / module


def _write(rules: Writer, module: str) -> None:
    include = sysconfig.get_paths()["include"]
    rules.variable("cxx", os.environ.get("CXX", "c++"))
    rules.variable("flags", FLAGS)
    rules.variable("includes", [f"-isystem{pybind11.get_include()}", f"-isystem{include}"])
    rules.rule(
        "compile",
        "$cxx $flags $sanitizer $includes -MD -MF $out.d -c -x c++ $in -o $out",
        depfile="$out.d",
        deps="gcc",
    )
    rules.rule("link", "$cxx -shared $sanitizer $in -o $out -lpthread")
    # launch.cu is the host's side of a real device.
    sources = [s for s in CUDA.iterdir() if s.suffix in (".cu", ".cpp") and s.name != "launch.cu"]
    machine = [s for s in HERE.glob("*.cpp") if s.name != "planted.cpp"]
    readers: list[str] = []
    for name in READERS:
        readers += rules.build(
            f"{name}.o", "compile", str(CUDA / name), variables={"sanitizer": "-O0"}
        )
    for sanitize, sanitizer in SANITIZERS.items():
        folder, objects = sanitize or "plain", []
        for source in sorted([*sources, *machine]):
            if source.name not in READERS or sanitize == "address":
                objects += rules.build(
                    f"{folder}/{source.name}.o",
                    "compile",
                    str(source),
                    variables={"sanitizer": sanitizer},
                )
        shared = [] if sanitize == "address" else readers
        rules.build(
            f"{folder}/{module}", "link", [*objects, *shared], variables={"sanitizer": sanitizer}
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sanitize", choices=[s for s in SANITIZERS if s], default="")
    arguments = parser.parse_args()
    try:
        print(build(arguments.folder, arguments.sanitize))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
