"""What ``import fused_dni`` brings with it, beside PyTorch."""

from __future__ import annotations

import subprocess
import sys

import fused_dni

#: Seconds that whoever only trains layers would wait for.
HEAVY = ("torch._dynamo", "sympy", "triton", "matplotlib", "rich", "sklearn")

CODE = """
import sys, torch
before = set(sys.modules)
import fused_dni
print(*sorted(set(sys.modules) - before), file=open(sys.argv[1], "w"))
"""


def test_it_loads_neither_compilers_nor_the_instrument(tmp_path) -> None:
    found = tmp_path / "modules"
    subprocess.run([sys.executable, "-c", CODE, str(found)], check=True)
    loaded = found.read_text().split()
    assert "fused_dni.modules.linear" in loaded
    rooms = {name.split(".")[1] for name in loaded if name.startswith("fused_dni.")}
    assert not rooms & {"measure", "report", "experiments", "cli", "kernels"}
    assert not [name for name in loaded if name.startswith(HEAVY)]


def test_the_instrument_arrives_when_it_is_asked_for() -> None:
    assert {"verdict", "advise", "Verdict", "Advice"} <= set(dir(fused_dni))
    for name in fused_dni.__all__:
        assert getattr(fused_dni, name) is not None
    assert callable(fused_dni.verdict) and callable(fused_dni.advise)


def test_a_name_that_is_not_there() -> None:
    assert not hasattr(fused_dni, "verdikt")
