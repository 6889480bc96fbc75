"""Who imports whom in bench/: one way only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
#: From the bottom to the top. What stands in one line does not import each other.
FLOORS = (
    ("stored", "clocks", "models", "races", "gpu_run", "relay"),
    ("workloads", "gpu_baselines", "rates"),
    ("crossover", "groups", "suites", "conftest", "planted", "readings"),
    ("measuring", "claims", "instructions", "pipelines", "stragglers"),
    ("pages",),
    ("tables", "answers", "gpu_kernels"),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def part(path):
    """The module, or the folder that it is in."""
    return path.relative_to(BENCH).parts[0].removesuffix(".py")


def imported(path):
    """First names of all modules that are imported, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


def test_every_module_has_a_floor():
    assert {part(path) for path in BENCH.rglob("*.py")} == set(FLOOR_OF)


@pytest.mark.parametrize("name", FLOOR_OF)
def test_imports_point_down(name):
    paths = [path for path in BENCH.rglob("*.py") if part(path) == name]
    for path in paths:
        ours = {module for module in imported(path) if module in FLOOR_OF} - {name}
        assert {module for module in ours if FLOOR_OF[module] >= FLOOR_OF[name]} == set(), path
