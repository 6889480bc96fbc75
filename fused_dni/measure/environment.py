"""What a bug report needs: versions, processor, thread pools, backends, compiler, GPU.

Every fact is gathered on its own: what cannot be found is reported as absent with the reason, and
nothing here raises because a tool, a library or a file is missing. ``torch.utils.collect_env`` runs
pip and a dozen programs for its text, and knows neither our extensions nor the flags that choose
kernels; threadpoolctl would be one more dependency for the one list of OpenMP runtimes.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fused_dni.backends.common import built

#: Processor flags that decide which code runs, here or in torch's own products.
FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_bf16",
    "avx512_fp16",
    "avx512_vnni",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "sve",
    "bf16",
)

#: Settings of the environment that change speed or results.
VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_PROC_BIND",
    "OMP_WAIT_POLICY",
    "GOMP_CPU_AFFINITY",
    "GOMP_SPINCOUNT",
    "KMP_AFFINITY",
    "MKL_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME",
    "TRITON_INTERPRET",
    "FUSED_DNI_ANNOTATE",
    "FUSED_DNI_CACHE",
    "FUSED_DNI_CUDA_ARCHS",
    "FUSED_DNI_CUDA_EMULATION",
    "FUSED_DNI_SPIN_BOUND",
)


def report() -> dict[str, Any]:
    """Everything below as plain data that :func:`json.dumps` takes."""
    sections: dict[str, Callable[[], Any]] = {
        "package": _package,
        "python": _python,
        "system": _system,
        "processor": _processor,
        "threads": _threads,
        "backends": _backends,
        "measured": _measured,
        "compilers": _compilers,
        "gpu": _gpu,
        "variables": _variables,
    }
    result: dict[str, Any] = {}
    for name, gather in sections.items():
        try:
            result[name] = gather()
        except Exception as error:  # a report that fails would be the worse bug
            result[name] = {"error": f"{type(error).__name__}: {error}"}
    return result


def format_report(report: dict[str, Any]) -> str:
    """Return the report as aligned text, a section a paragraph."""
    paragraphs = []
    for section, facts in report.items():
        rows = facts.items() if isinstance(facts, dict) else [("", facts)]
        width = max((len(str(key)) for key, _ in rows), default=0)
        lines = [section]
        for key, value in rows:
            lines += _lines(str(key).ljust(width), value)
        if len(lines) == 1:
            lines.append("  none")
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs) + "\n"


def _lines(key: str, value: Any) -> list[str]:
    if value is None:
        value = "not found"
    elif isinstance(value, bool):
        value = "yes" if value else "no"
    elif isinstance(value, dict):
        value = ", ".join(f"{k} {_scalar(v)}" for k, v in value.items()) or "none"
    elif isinstance(value, (list, tuple)):
        if any(isinstance(item, dict) for item in value):
            lines: list[str] = []
            for item in value:
                lines += _lines(key if not lines else " " * len(key), item)
            return lines
        value = " ".join(str(item) for item in value) or "none"
    return [f"  {key}  {value}"]


def _scalar(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(str(item) for item in value) or "none"
    return "not found" if value is None else str(value)


def version(distribution: str) -> str | None:
    """Return what is installed of a distribution, None if nothing is."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package() -> dict[str, Any]:
    facts: dict[str, Any] = {
        "fused_dni": version("fused_dni"),
        "location": str(Path(__file__).parents[1]),
    }
    for name in ("torch", "triton", "numpy"):
        facts[name] = version(name)
    try:
        import torch

        facts["torch"] = torch.__version__
        facts["torch built for CUDA"] = torch.version.cuda
        facts["float32 matmul precision"] = torch.get_float32_matmul_precision()
    except ImportError as error:
        facts["torch"] = f"cannot be imported: {error}"
    try:
        facts.update(_extension())
    except Exception as error:
        facts["C++ extension"] = f"cannot be used: {error}"
    facts.update(_cuda_extension())
    return facts


def left_out() -> list[str]:
    """Say in a line each what the installation left out, and how to get it."""
    kernels = {"_cpu": "C++", "_cuda": "CUDA"}
    lines = [
        f"without the {kernels[name]} kernels: {why}" for name, why in built.left_out().items()
    ]
    if wider := _extension().get("C++ left out"):
        lines.append(
            f"without C++ kernels for {wider}, which this machine can run: install fused_dni here, "
            'or with FUSED_DNI_CPU_ISAS="all"'
        )
    return lines


def _extension() -> dict[str, Any]:
    """Say what the compiled extension says of itself."""
    try:
        import fused_dni.backends._cpu as cpu
    except ImportError as error:
        return {"C++ extension": built.why_missing("_cpu", error)}
    facts: dict[str, Any] = {
        "C++ extension": cpu.__file__,
        "C++ isa": cpu.isa(),
        "C++ isas": cpu.isas(),
        "C++ compiler": cpu.compiler,
    }
    if wider := cpu.wider():
        facts["C++ left out"] = wider
    return facts


def _cuda_extension() -> dict[str, Any]:
    """Say whether the CUDA part is there, what it was built with and for."""
    try:
        import fused_dni.backends._cuda as cuda
    except ImportError as error:
        return {"CUDA extension": built.why_missing("_cuda", error)}
    return {
        "CUDA extension": cuda.__file__,
        "CUDA toolkit of the build": cuda.toolkit,
        "CUDA architectures": cuda.architectures,
    }


def _python() -> dict[str, Any]:
    return {
        "version": platform.python_version(),
        "implementation": platform.python_implementation(),
        "compiler": platform.python_compiler(),
        "virtual environment": sys.prefix != sys.base_prefix,
    }


def _system() -> dict[str, Any]:
    libc = " ".join(platform.libc_ver()).strip()
    facts: dict[str, Any] = {"platform": platform.platform(), "libc": libc or None}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        facts["memory"] = f"{size / 2**30:.1f} GiB"
    return facts


def _cpuinfo(name: str) -> str:
    """Return what Linux says of the first core by this name; "" where it does not."""
    try:
        said = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        return ""
    found = re.search(rf"^{name}\s*:(.*)$", said, re.MULTILINE)
    return "" if found is None else found[1].strip()


def processor() -> str:
    """Name the processor."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _processor() -> dict[str, Any]:
    flags = {flag for name in ("flags", "Features") for flag in _cpuinfo(name).split()}
    facts: dict[str, Any] = {
        "model": processor(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores seen": os.cpu_count(),
    }
    if hasattr(os, "sched_getaffinity"):
        facts["cores allowed"] = len(os.sched_getaffinity(0))
    try:
        import torch

        facts["torch capability"] = torch.backends.cpu.get_cpu_capability()
    except Exception as error:
        facts["torch capability"] = f"unknown: {error}"
    return facts


def openmp_libraries() -> list[str]:
    """OpenMP runtimes mapped into this process, a path each; more than one means two thread pools
    that fight for the same cores. Empty where the system does not tell (no ``/proc``)."""
    names = ("libgomp", "libomp", "libiomp5", "vcomp")
    try:
        maps = Path("/proc/self/maps").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return []
    # A path may hold spaces: it is all that follows the fifth column.
    columns = (line.split(maxsplit=5) for line in maps)
    paths = {parts[5] for parts in columns if len(parts) == 6}
    return sorted(
        path for path in paths if Path(path).name.startswith(names) and ".so" in Path(path).name
    )


def _threads() -> dict[str, Any]:
    facts: dict[str, Any] = {}
    try:
        import torch

        facts["torch"] = torch.get_num_threads()
        facts["torch interop"] = torch.get_num_interop_threads()
    except ImportError:
        facts["torch"] = None
    with contextlib.suppress(ImportError):  # so that its OpenMP runtime, if any, is counted
        import fused_dni.backends._cpu as cpu

        facts["our kernels"] = cpu.max_threads()
    libraries = openmp_libraries()
    facts["OpenMP runtimes"] = libraries
    facts["one OpenMP pool"] = len(libraries) <= 1
    return facts


def _backends() -> dict[str, Any]:
    try:
        from fused_dni.ops import registry
    except ImportError as error:
        return {"error": f"registry cannot be imported: {error}"}
    return {
        name: "serves" if reason is None else f"cannot serve: {reason}"
        for name, reason in registry.report()
    }


def _measured() -> dict[str, Any]:
    """Gather the tables by which a backend is chosen on a GPU: where they lie, and who won
    what."""
    from fused_dni.ops import measured

    entries = {
        entry: seconds for table in reversed(measured.tables()) for entry, seconds in table.items()
    }
    facts = {"table": str(measured.path()), "entries": len(entries)}
    for entry, seconds in sorted(entries.items()):
        (best, least), *rest = seconds.items()
        others = ", ".join(f"{name} {taken / least:.2f} times as long" for name, taken in rest)
        facts[str(entry)] = f"{best} {least * 1e6:.4g} us, {others}"
    return facts


def output_of(*command: str) -> str | None:
    """Return what a command prints, None if it is missing, fails or hangs."""
    path = shutil.which(command[0])
    if path is None:
        return None
    try:
        done = subprocess.run(
            [path, *command[1:]],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _compilers() -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for name in (os.environ.get("CXX", "").strip() or "c++", "g++", "clang++"):
        printed = output_of(*name.split(), "--version")
        facts[name] = printed.splitlines()[0] if printed else None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [str(Path(home) / "bin" / "nvcc")] if home else []
    for nvcc in (*candidates, "nvcc", "/usr/local/cuda/bin/nvcc"):
        printed = output_of(nvcc, "--version")
        if printed:
            releases = [line for line in printed.splitlines() if "release" in line]
            facts["nvcc"] = f"{shutil.which(nvcc)}: {(releases or printed.splitlines())[-1]}"
            break
    else:
        facts["nvcc"] = None
    return facts


def _gpu() -> dict[str, Any]:
    facts: dict[str, Any] = {}
    query = "name,driver_version,memory.total,compute_cap"
    printed = output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    facts["nvidia-smi"] = printed.splitlines() if printed else None
    try:
        import torch
    except ImportError:
        return facts
    facts["torch sees CUDA"] = torch.cuda.is_available()
    if torch.cuda.is_available():
        facts["cuDNN"] = torch.backends.cudnn.version()
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            facts[f"cuda:{index}"] = {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory": f"{properties.total_memory / 2**30:.1f} GiB",
                "multiprocessors": properties.multi_processor_count,
            }
    return facts


def _variables() -> dict[str, str]:
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}
