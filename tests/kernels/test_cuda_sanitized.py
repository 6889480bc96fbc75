"""The CUDA kernels on a CPU under sanitizers: accesses outside of tensors, undefined behaviour, and
accesses of two threads that no barrier separates. (That each sanitizer sees such a defect in a
kernel is tested in test_host_emulation.py.)"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
build = runpy.run_path(str(ROOT / "csrc" / "host_emulation" / "build.py"))["build"]

pytestmark = pytest.mark.slow(120)


def runtime(name: str) -> str:
    """A sanitizer's library."""
    asked = [os.environ.get("CXX", "c++"), f"-print-file-name={name}"]
    found = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(found):
        pytest.skip(f"the C++ compiler has no {name}")
    return found


def run(sanitize: str, library: str, *arguments: str, **options: str) -> str:
    """What the process says; it must end well."""
    preloaded = f"{runtime(library)} {runtime('libstdc++.so')}"
    module = build(ROOT / "build" / "host_emulation", sanitize)
    environment = os.environ | options
    environment |= {"LD_PRELOAD": preloaded, "FUSED_DNI_CUDA_EMULATION": str(module)}
    environment["FUSED_DNI_SPIN_BOUND"] = "0"  # whatever is slow here has not hung
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(ROOT / "tests" / "support" / "sanitized_run.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, (done.stderr or done.stdout)[:4000]
    assert done.stdout == "done\n"
    return done.stderr


def test_addresses_and_undefined_behaviour() -> None:
    said = run(
        "address", "libasan.so", ASAN_OPTIONS="detect_leaks=0", UBSAN_OPTIONS="print_stacktrace=1"
    )
    assert "runtime error" not in said, said[:4000]


def test_races() -> None:
    """Only the kernels are instrumented: what Python and torch do among themselves is theirs."""
    said = run(
        "thread", "libtsan.so", "races", TSAN_OPTIONS="ignore_noninstrumented_modules=1 exitcode=66"
    )
    assert "WARNING: ThreadSanitizer" not in said, said[:4000]
