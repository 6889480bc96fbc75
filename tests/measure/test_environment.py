"""``fused-dni env``: complete where all is there, and never failing where something is missing."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import pytest

from fused_dni.measure import environment
from fused_dni.ops import measured

SECTIONS = {
    "package",
    "python",
    "system",
    "processor",
    "threads",
    "backends",
    "measured",
    "compilers",
    "gpu",
    "variables",
}


@pytest.fixture(scope="module")
def report():
    return environment.report()


def test_every_section_is_there_and_none_failed(report):
    assert set(report) == SECTIONS
    assert {name: facts["error"] for name, facts in report.items() if "error" in facts} == {}


def test_is_plain_data(report):
    assert json.loads(json.dumps(report)) == report


def test_names_what_a_bug_report_needs(report):
    torch = importlib.import_module("torch")
    assert report["package"]["torch"] == torch.__version__
    assert report["package"]["fused_dni"]
    assert report["threads"]["torch"] == torch.get_num_threads()
    assert report["backends"]["reference"] == "serves"
    assert all(
        value == "serves" or value.startswith("cannot serve: ")
        for value in report["backends"].values()
    )


def test_text_has_every_fact_once(report):
    text = environment.format_report(report)
    for section, facts in report.items():
        assert f"{section}\n" in text
        for key in facts:
            assert f"  {key}" in text
    assert "None" not in text
    assert max(map(len, text.splitlines())) < 400


def test_shows_which_backends_won(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSED_DNI_CACHE", str(tmp_path))
    own = measured.Entry("lstm", "sm_90", "float32-ieee", (32, 16, 256, 256))
    both = measured.Entry("linear", "sm_90", "bfloat16", (128, 1024, 1024))
    slow, fast = {"triton": 1e-5, "cuda": 2.5e-5}, {"cuda": 1e-5, "triton": 1.5e-5}
    monkeypatch.setattr(measured, "_tables", [{own: fast, both: fast}, {both: slow}])
    assert environment._measured() == {
        "table": str(tmp_path / "backends.json"),
        "entries": 2,
        "linear/sm_90/bfloat16/128x1024x1024": "cuda 10 us, triton 1.50 times as long",
        "lstm/sm_90/float32-ieee/32x16x256x256": "cuda 10 us, triton 1.50 times as long",
    }


def test_nothing_is_fatal(monkeypatch):
    def broken():
        raise OSError("no such thing")

    monkeypatch.setattr(environment, "_processor", broken)
    monkeypatch.setattr(environment, "_gpu", broken)
    report = environment.report()
    assert report["processor"] == {"error": "OSError: no such thing"}
    assert "no such thing" in environment.format_report(report)


def test_tools_that_are_missing_or_fail_are_none(monkeypatch, tmp_path):
    failing = tmp_path / "c++"
    failing.write_text("#!/bin/sh\nexit 3\n")
    failing.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert environment.output_of("c++") is None
    assert environment.output_of("a-tool-that-nobody-has") is None
    facts = environment._compilers()
    assert facts["c++"] is None
    assert facts["g++"] is None


def test_report_without_extension_and_proc(monkeypatch):
    monkeypatch.setitem(sys.modules, "fused_dni.backends._cpu", None)
    monkeypatch.setattr(environment, "Path", _NoFiles)
    assert environment._package()["C++ extension"].startswith("was not built")
    assert environment.openmp_libraries() == []
    assert environment._processor()["flags"] == []


class _NoFiles(type(environment.Path())):
    def read_text(self, *_args, **_kwargs):
        raise FileNotFoundError(2, "no such file", str(self))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_one_openmp_pool():
    """torch and our extension, both at work in parallel, in a process of their own: one OpenMP
    runtime, so one pool. Two pools on few cores cost a factor."""
    code = """
import torch
import fused_dni
from fused_dni.measure import environment
torch.set_num_threads(2)
layer = fused_dni.FusedDNILinear(64, 64, update=fused_dni.SGD(0.1), backend="cpu")
layer(torch.randn(64, 64))
a = torch.randn(512, 512)
(a @ a).sum()
libraries = environment.openmp_libraries()
assert len(libraries) == 1, libraries
for threads in (1, 2):
    torch.set_num_threads(threads)
    assert fused_dni.backends._cpu.max_threads() == threads
print("one pool")
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "one pool\n", done.stderr


def test_command_line_prints_both_forms():
    command = [sys.executable, "-m", "fused_dni", "env"]
    plain = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert plain.returncode == 0, plain.stderr
    assert "backends" in plain.stdout
    machine = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, timeout=120, env=os.environ
    )
    assert set(json.loads(machine.stdout)) >= SECTIONS
