"""The README's examples run as they stand, each in a namespace of its own."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow(90)

README = Path(__file__).resolve().parents[2] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_there_is_an_example_for_each_drop_in():
    code = "\n".join(BLOCKS)
    for name in ("FusedDNILinear", "Decoupled(", "DecoupledSequential", "convert", "revert"):
        assert name in code


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_example_runs(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main = types.ModuleType("__main__")  # where a class of the example can be found by its name
    monkeypatch.setitem(sys.modules, "__main__", main)
    exec(compile(BLOCKS[number], f"README.md, example {number}", "exec"), main.__dict__)
    if number == 0:  # the shortest one trains
        assert float(capsys.readouterr().out) < 0.2


def test_links_to_files_that_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        if not target.startswith("http"):
            assert (README.parent / target).exists(), target
