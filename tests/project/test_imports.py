"""Arrows of import point down, and nowhere in a circle.

Counted are all: at a module's top, in functions, for types alone and by a written-out name. What
is looked up in a table is data: the registry's backends, the functions of the kinds of reports, and
the instrument's names that ``fused_dni/__init__.py`` gives late.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest
from imports import Graph, arrows, by_computed_name, circle, modules

from fused_dni.report.schema import KINDS

ROOT = Path(__file__).resolve().parents[2]
MODULES = modules({"fused_dni": ROOT / "fused_dni", "fused_dni.kernels": ROOT / "kernels"})
# The root promises the instrument's names to type checkers, and imports it when they are used.
ARROWS = arrows(MODULES, untyped=("fused_dni",))

#: The rooms (folders and files of the package; ``fused_dni`` is its __init__), from the top: each
#: imports from the floors below its own, and from no other room on it.
FLOORS = (
    ("__main__",),
    ("cli",),
    ("experiments",),
    ("measure",),
    ("distributed",),
    ("fused_dni", "report"),
    ("annotate",),
    ("convert", "diagnostics", "optim", "schedule"),
    ("modules",),
    ("context", "pace", "rules", "synthesizers"),
    ("functional",),
    ("backends",),
    ("ops",),
    ("kernels",),
)
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
#: Rooms that import from themselves alone.
CLOSED = ("report", "kernels")
#: What rooms may import of a room, where that is not all of it.
DOORS = {
    **dict.fromkeys(
        [(room, "backends") for room in ("functional", "rules", "modules")],
        ("fused_dni.backends.common", "fused_dni.backends.reference"),
    ),
    ("backends", "ops"): ("fused_dni.ops.types", "fused_dni.ops.results"),
    ("ops", "kernels"): ("fused_dni.kernels.tuning",),
}
#: Who imports by names that are not written out, and why that is no arrow.
BY_TABLE = {
    "fused_dni": "the instrument's names, late",
    "fused_dni.cli.arguments": "a file of the user's",
    "fused_dni.kernels.aot": "what its command names, kernels/specimens.py by default",
    "fused_dni.ops.registry": "backends, when first asked for",
    "fused_dni.report.schema": "the kinds of reports",
}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def wrong(graph: Mapping[str, set[str]]) -> list[str]:
    """Every arrow that the floors, the closed rooms or the doors forbid."""
    found = []
    for module, targets in graph.items():
        for target in sorted(targets):
            here, there = room(module), room(target)
            if here == there:
                continue
            doors = DOORS.get((here, there), ("fused_dni",))
            inside = any(f"{target}.".startswith(f"{door}.") for door in doors)
            if FLOOR[here] >= FLOOR[there] or here in CLOSED or not inside:
                found.append(f"{module} -> {target}")
    return found


def rooms(graph: Mapping[str, set[str]]) -> Graph:
    """The arrows between rooms."""
    between: Graph = {}
    for module, targets in graph.items():
        outside = {room(target) for target in targets} - {room(module)}
        between.setdefault(room(module), set()).update(outside)
    return between


def planted(module: str, target: str) -> Graph:
    """Our arrows and one more."""
    assert target in ARROWS and target not in ARROWS[module]
    return {**ARROWS, module: ARROWS[module] | {target}}


def test_every_room_has_a_floor():
    assert {room(module) for module in MODULES} == FLOOR.keys()


def test_arrows_point_down():
    assert wrong(ARROWS) == []


def test_there_is_no_circle():
    assert circle(ARROWS) == []
    assert circle(rooms(ARROWS)) == []


def test_tables_of_names_are_known():
    assert {name for name, path in MODULES.items() if by_computed_name(path)} == BY_TABLE.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_reports_are_made_by_reports(kind):
    module = f"fused_dni.report.kinds.{KINDS[kind].module}"
    assert room(module) == "report"
    assert callable(importlib.import_module(module).blocks)


# ------------------------------------------------------------------- these tests can fail


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("fused_dni.modules.linear", "fused_dni.measure.timing"),
        ("fused_dni.functional.linear", "fused_dni.report.text"),
        ("fused_dni.optim", "fused_dni"),
        ("fused_dni.optim", "fused_dni.schedule"),
        ("fused_dni.measure.tune", "fused_dni.experiments.run"),
        ("fused_dni.measure.profile.command", "fused_dni.cli"),
        ("fused_dni.report.words", "fused_dni.measure.timing"),
        ("fused_dni.report.words", "fused_dni.ops.types"),
        ("fused_dni.experiments.train", "fused_dni.cli.arguments"),
        ("fused_dni.ops.registry", "fused_dni.backends.cpu"),
        ("fused_dni.backends.cpu", "fused_dni.ops.registry"),
        ("fused_dni.modules.base", "fused_dni.backends.cpu"),
        ("fused_dni.kernels.tuning", "fused_dni.ops.types"),
        ("fused_dni.kernels.aot", "fused_dni.report.text"),
    ],
)
def test_a_planted_arrow_is_found(module, target):
    assert wrong(planted(module, target)) == [f"{module} -> {target}"]


@pytest.mark.parametrize(
    ("module", "target", "between"),
    [
        ("fused_dni.measure.timing", "fused_dni.measure.verdict.layer", False),
        ("fused_dni.report.text", "fused_dni.report.kinds", False),
        ("fused_dni.ops.types", "fused_dni.functional.linear", True),
        ("fused_dni.kernels.tuning", "fused_dni.measure.tiles", True),
    ],
)
def test_a_planted_circle_is_found(module, target, between):
    graph = planted(module, target)
    way = circle(graph)
    assert way[0] == way[-1] and all(b in graph[a] for a, b in itertools.pairwise(way))
    assert bool(circle(rooms(graph))) == between


def test_arrows_of_every_kind_are_seen(tmp_path):
    """Also from the folder that a package has elsewhere, as ``fused_dni.kernels`` has."""
    sources = {
        "house/__init__.py": "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from house.top import late\n",
        "house/top.py": "import house.low.one\nimport os.path",
        "house/typed.py": "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from house.top import late",
        "house/inside.py": "def call():\n    from house import top as other",
        "house/named.py": "import importlib\nimportlib.import_module('house.top')",
        "house/computed.py": "from importlib import import_module\nlist(map(import_module, []))",
        "house/low/__init__.py": "from .one import *",
        "house/low/one.py": "from .. import typed\nfrom ..away.two import Three, Four",
        "far/__init__.py": "",
        "far/two.py": "from house.extension import compiled\nimport house.low as low",
    }
    for name, source in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    found = modules({"house": tmp_path / "house", "house.away": tmp_path / "far"})
    assert arrows(found) == {
        "house": {"house.top"},
        "house.top": {"house.low.one"},
        "house.typed": {"house.top"},
        "house.inside": {"house.top"},
        "house.named": {"house.top"},
        "house.computed": set(),
        "house.low": {"house.low.one"},
        "house.low.one": {"house.typed", "house.away.two"},
        "house.away": set(),
        "house.away.two": {"house", "house.low"},
    }
    assert arrows(found, untyped=("house",))["house"] == set()
    assert [name for name, path in found.items() if by_computed_name(path)] == ["house.computed"]
