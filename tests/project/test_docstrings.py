"""First lines of docstrings: what a function does, in the imperative."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path for part in (ROOT / "fused_dni", ROOT / "kernels") for path in part.rglob("*.py")
)
# That a description begins with, where there should be a verb.
NO_VERBS = {
    *("What", "Whether", "How", "Why", "Which", "Where", "Who", "Whose", "That", "Those"),
    *("The", "A", "An", "None", "Every", "As", "Of"),
}


def _functions(tree: ast.AST) -> list[ast.FunctionDef]:
    """Functions and methods; a property is described as what it is."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and not any(ast.unparse(d).endswith(("property", ".setter")) for d in node.decorator_list)
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_begin_with_a_verb(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wrong = [
        f"{path.name}:{function.lineno} {function.name}: {text.splitlines()[0]}"
        for function in _functions(tree)
        if (text := ast.get_docstring(function)) and text.split()[0].rstrip(":,") in NO_VERBS
    ]
    assert not wrong, "\n".join(wrong)
