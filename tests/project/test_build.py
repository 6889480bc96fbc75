"""What setup.py builds, and what it says of what it leaves out: nothing is compiled here."""

from __future__ import annotations

import json
import os
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


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Say:
    """A machine whose path has only the tools that a test adds, with what each prints."""
    for name in ("CUDA_HOME", "CUDA_PATH", "FUSED_DNI_CUDA_ARCHS", "FUSED_DNI_WERROR", "CXX"):
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
    assert "export FUSED_DNI_WERROR=1" in (ROOT / "Makefile").read_text()


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
    assert main(["env", "--left-out"]) == 0
    assert capsys.readouterr().out == "without the CUDA kernels: there was no nvcc\n"
    absent = ModuleNotFoundError("No module named 'fused_dni.backends._cuda'")
    assert built.why_missing("_cuda", absent) == "was not built: there was no nvcc"
    assert "install fused_dni again" in built.why_missing("_cpu", absent)
    broken = ImportError("undefined symbol: add_lstm")
    assert built.why_missing("_cpu", broken).endswith(
        "cannot be loaded: undefined symbol: add_lstm"
    )
