"""Who imports whom in packages, read from their sources.

Not by grimp: it looks for a package's parts in the package's own folder, and ``fused_dni.kernels``
lies beside it; nor does it see what is imported by name.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

Graph = dict[str, set[str]]


def modules(folders: Mapping[str, Path]) -> dict[str, Path]:
    """The file of every module, by its name; ``folders`` are those of the packages, by theirs."""
    found = {}
    for package, folder in folders.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


def arrows(found: Mapping[str, Path], untyped: Collection[str] = ()) -> Graph:
    """For every module those of ``found`` that it imports: at its top, in functions, for types
    alone (but in the modules ``untyped``), relatively, and by a name that is written out
    (``import_module("...")``)."""
    graph: Graph = {}
    for name, path in found.items():
        tree = ast.parse(path.read_text())
        if name in untyped:
            tree.body = [s for s in tree.body if not _is_for_types(s)]
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        wanted = {target for node in ast.walk(tree) for target in _wanted(node, package)}
        graph[name] = {_module(target, found) for target in wanted} - {"", name}
    return graph


def _is_for_types(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING"


def _wanted(node: ast.AST, package: str) -> Iterator[str]:
    """What a piece of a module imports, by full names; its package resolves relative ones."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parts = package.split(".")
        above = parts[: len(parts) - node.level + 1] if node.level else []
        base = [*above, *([node.module] if node.module else [])]
        yield from (".".join([*base, alias.name]) for alias in node.names)
    elif isinstance(node, ast.Call) and _is_by_name(node):
        yield from (a.value for a in node.args if isinstance(a, ast.Constant))


def _is_by_name(call: ast.Call) -> bool:
    return ast.unparse(call.func).split(".")[-1] in ("import_module", "__import__")


def _module(target: str, found: Mapping[str, Path]) -> str:
    """The module that a name is, or lies in (a class, an extension, a star); "" if in none."""
    while target and target not in found:
        target = target.rpartition(".")[0]
    return target


def by_computed_name(path: Path) -> bool:
    """Whether a module uses ``import_module`` otherwise than on a name that is written out."""
    tree = ast.parse(path.read_text())
    plain = {
        call.func
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and _is_by_name(call)
        and isinstance(call.args[0], ast.Constant)
    }
    used = (n for n in ast.walk(tree) if isinstance(n, (ast.Name, ast.Attribute)))
    return any(
        ast.unparse(use).split(".")[-1] in ("import_module", "__import__") and use not in plain
        for use in used
    )


def circle(graph: Mapping[str, Collection[str]]) -> list[str]:
    """A way along arrows that ends where it begins; empty if there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])[::-1]
    return []
