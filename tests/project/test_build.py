"""What setup.py builds, and what it says of what it leaves out: nothing is compiled here."""

from __future__ import annotations

import io
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from fused_dni.backends.common import built
from fused_dni.cli import main

ROOT = Path(__file__).resolve().parents[2]

Say = Callable[[str, str], None]
OURS = re.compile("FUSED_DNI_")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Say:
    """A machine whose path has only the tools that a test adds, with what each prints."""
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX", *filter(OURS.match, os.environ)):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    access = os.access  # this machine's own toolkit is none of that one's
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and "local" not in path)

    def say(tool: str, line: str) -> None:
        script = tmp_path / tool
        script.write_text(f"#!/bin/sh\necho '{line}'\n")
        script.chmod(0o755)

    return say


def setup() -> dict[str, Any]:
    """The names of setup.py."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


def cuda(names: dict[str, Any]) -> Any:
    """What is to be built, or why nothing."""
    try:
        return names["_cuda_build"]().architectures
    except names["Missing"] as missing:
        return str(missing)


def test_without_a_gpu_there_is_no_cuda_part(machine: Say) -> None:
    machine("nvcc", "Cuda compilation tools, release 13.0, V13.0.88")
    said = cuda(setup())
    assert said.startswith("nvidia-smi listed no GPU") and 'FUSED_DNI_CUDA_ARCHS="90a"' in said


def test_it_is_built_for_the_gpus_that_are_there(machine: Say) -> None:
    machine("nvcc", "Cuda compilation tools, release 13.0, V13.0.88")
    machine("nvidia-smi", "9.0\n9.0\n8.6\n7.5")
    assert cuda(setup()) == ["86", "90a"]


def test_a_gpu_and_no_nvcc(machine: Say) -> None:
    machine("nvidia-smi", "9.0")
    said = cuda(setup())
    assert "there was no nvcc" in said and "CUDA 12.4 or newer" in said and "\n" not in said


def test_an_nvcc_that_is_too_old(machine: Say) -> None:
    machine("nvidia-smi", "9.0")
    machine("nvcc", "Cuda compilation tools, release 11.8, V11.8.89")
    said = cuda(setup())
    assert "is of CUDA 11.8" in said and "CUDA 12.4 or newer" in said and "\n" not in said


@pytest.mark.parametrize(
    ("asked", "built_for"),
    [("80;90a", ["80", "90a"]), ("all", ["80", "90a", "100", "120"]), ("90A", ["90a"])],
)
def test_what_is_asked_for_is_built(
    machine: Say, monkeypatch: pytest.MonkeyPatch, asked: str, built_for: list[str]
) -> None:
    machine("nvcc", "Cuda compilation tools, release 13.0, V13.0.88")
    monkeypatch.setenv("FUSED_DNI_CUDA_ARCHS", asked)
    assert cuda(setup()) == built_for


@pytest.mark.parametrize("asked", ["hopper", "75", "9.0", "80;;90a"])
def test_what_cannot_be_asked_for(
    machine: Say, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    machine("nvcc", "Cuda compilation tools, release 13.0, V13.0.88")
    monkeypatch.setenv("FUSED_DNI_CUDA_ARCHS", asked)
    said = cuda(setup())
    if asked == "80;;90a":  # an empty place between separators says nothing
        assert said == ["80", "90a"]
    else:
        assert f"FUSED_DNI_CUDA_ARCHS={asked!r}" in said and '"80;90a"' in said


def test_warnings_are_errors_only_where_that_is_asked_for(
    machine: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "-Werror" not in " ".join([*setup()["FLAGS"], *setup()["NVCC_FLAGS"]])
    monkeypatch.setenv("FUSED_DNI_WERROR", "1")
    assert "-Werror" in setup()["FLAGS"] and "-Werror" in setup()["NVCC_FLAGS"]
    assert "export FUSED_DNI_WERROR=1 FUSED_DNI_CPU_ISAS=all;" in (ROOT / "Makefile").read_text()


def cpu(names: dict[str, Any]) -> Any:
    """What the C++ kernels are compiled for, or why they are not."""
    try:
        return names["_cpu_isas"]("c++")
    except names["Missing"] as missing:
        return str(missing)


MACROS = ["AVX2", "FMA", "AVX512F", "AVX512DQ", "AVX512BW", "AVX512VL", "AVX512BF16"]


@pytest.mark.parametrize(
    ("defined", "built_for"),
    [
        (MACROS, ["portable", "avx2", "avx512", "avx512bf16"]),
        (MACROS[:6], ["portable", "avx2", "avx512"]),
        (MACROS[:5], ["portable", "avx2"]),
        (MACROS[:1], ["portable"]),
        ([], ["portable"]),
    ],
)
def test_cpu_kernels_are_for_what_this_machine_runs(
    machine: Say, monkeypatch: pytest.MonkeyPatch, defined: list[str], built_for: list[str]
) -> None:
    """As its compiler says, where it does."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    machine("c++", "\n".join(f"#define __{name}__ 1" for name in defined))
    assert cpu(setup()) == built_for
    monkeypatch.setenv("FUSED_DNI_CPU_ISAS", "all")
    assert cpu(setup()) == ["portable", "avx2", "avx512", "avx512bf16"]
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert cpu(setup()) == ["portable"]


def test_where_the_compiler_does_not_say_they_are_for_all(
    machine: Say, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    machine("c++", "unknown option '-march=native'")
    (tmp_path / "c++").write_text("#!/bin/sh\nexit 1\n")
    assert cpu(setup()) == ["portable", "avx2", "avx512", "avx512bf16"]


def test_what_switches_stacks_is_not_marked_for_shadow_stacks(
    machine: Say, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine("c++", "")
    for name, switched_off in (("x86_64", ["region.cpp"]), ("aarch64", [])):
        monkeypatch.setattr(platform, "machine", lambda name=name: name)
        names, written = setup(), io.StringIO()
        names["NinjaBuild"]._write_cpu(None, names["Writer"](written), tmp_path / "_cpu.so", "c++")
        rules = written.getvalue().replace("$\n", "").split("\nbuild ")
        found = [rule.split()[0] for rule in rules if "-fcf-protection=none" in rule]
        assert found == [f"{source}.o:" for source in switched_off]


def test_the_instruction_sets_that_are_asked_for(
    machine: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("FUSED_DNI_CPU_ISAS", "AVX512;avx2")
    assert cpu(setup()) == ["portable", "avx2", "avx512"]
    monkeypatch.setenv("FUSED_DNI_CPU_ISAS", "avx2 neon")
    said = cpu(setup())
    assert "FUSED_DNI_CPU_ISAS='avx2 neon'" in said and "portable, avx2, avx512" in said


@pytest.mark.parametrize("command", [["build"], ["build_ext", "--inplace"]], ids=" ".join)
def test_without_a_compiler_the_rest_is_built(tmp_path: Path, command: list[str]) -> None:
    """Where warnings are errors, too; in place is how an editable installation builds."""
    copy = tmp_path / "fused_dni"
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "build.json")
    for name in ("fused_dni", "kernels", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "fused_dni_launcher.py"):
        shutil.copy(ROOT / name, copy)
    environment = {**os.environ, "CXX": "/nowhere/c++", "FUSED_DNI_CUDA_ARCHS": "none"}
    environment["FUSED_DNI_WERROR"] = "1"
    subprocess.run(
        [sys.executable, "setup.py", "-q", *command],
        cwd=copy, env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    where = "build/lib*/fused_dni" if command == ["build"] else "fused_dni"
    (said,) = copy.glob(f"{where}/backends/build.json")
    left_out = json.loads(said.read_text())["left out"]
    assert left_out.keys() == {"_cpu", "_cuda"}
    assert "no C++ compiler (/nowhere/c++)" in left_out["_cpu"] and "CXX" in left_out["_cpu"]
    assert not list(copy.rglob("*.so"))


def test_what_was_left_out_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(built, "left_out", lambda: {"_cuda": "there was no nvcc"})
    _cpu = pytest.importorskip("fused_dni.backends._cpu")
    monkeypatch.setattr(_cpu, "wider", lambda: "avx512")
    assert main(["env", "--left-out"]) == 0
    assert "without C++ kernels for avx512" in capsys.readouterr().out
    monkeypatch.setattr(_cpu, "wider", lambda: "")
    assert main(["env", "--left-out"]) == 0
    assert capsys.readouterr().out == "without the CUDA kernels: there was no nvcc\n"
    absent = ModuleNotFoundError("No module named 'fused_dni.backends._cuda'")
    assert built.why_missing("_cuda", absent) == "was not built: there was no nvcc"
    assert "install fused_dni again" in built.why_missing("_cpu", absent)
    broken = ImportError("undefined symbol: add_lstm")
    assert built.why_missing("_cpu", broken).endswith(
        "cannot be loaded: undefined symbol: add_lstm"
    )
