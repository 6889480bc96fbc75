"""Which ``nn.Sequential`` a model's own code calls as a whole, and into which it reaches.

In an ``nn.Sequential`` that is only ever called, the order of its children is the order of their
use, and what stands behind a layer sees that layer's output and is the only one that does. Where
code reaches inside (an index, a loop, a child's name) none of that is known. It is read from the
source of the models' classes: nothing is run.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable
from types import FunctionType
from typing import Any

from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# What gives a module's children, all of them.
_CHILDREN = {"children", "named_children", "modules", "named_modules", "values", "items"}
_CHILDREN |= {"_modules", "get_submodule", "__iter__", "__getitem__", "__dict__"}
# Functions that hand on what they are given as it is, or its parts.
_PARTS = {"enumerate", "zip", "reversed", "list", "tuple", "iter", "sorted"}

_Modules = dict[int, nn.Module]


def reached_into(model: nn.Module) -> dict[int, str]:
    """Return the containers whose children code of the model may use one by one.

    Returns:
        By the container's identity, which code does.
    """
    found: dict[int, str] = {}
    for module in model.modules():
        if _is_container(module):
            continue
        if type(module).__module__.startswith("torch.nn."):
            continue
        name = f"{type(module).__name__}.forward"
        try:
            functions = _reachable(module)
        except (OSError, TypeError, SyntaxError):
            held = _containers_below(module)
            found.update((id(m), f"the source of {name} cannot be read") for m in held)
            continue
        for function in functions:
            reader = _Reader(module, function)
            found.update((i, f"{name} uses its parts one by one") for i in reader.opened)
    return found


def runs_in_order(parent: nn.Module) -> bool:
    """Say whether a module runs its children one behind the other."""
    return isinstance(parent, nn.Sequential) and _is_container(parent)


def _is_container(module: nn.Module) -> bool:
    """Say whether a module has children and no code of its own that uses them."""
    if "forward" in vars(module):
        return False
    return any(
        isinstance(module, kind) and type(module).forward is kind.forward for kind in _CONTAINERS
    )


def _containers_below(module: nn.Module) -> Iterable[nn.Module]:
    for child in module.children():
        if _is_container(child):
            yield child
            yield from _containers_below(child)


def _reachable(module: nn.Module) -> list[ast.AST]:
    """Return the code of ``forward`` and of the module's methods that it names."""
    waiting, seen = ["forward"], {"forward"}
    code: list[ast.AST] = []
    while waiting:
        name = waiting.pop()
        found = vars(module).get(name, inspect.getattr_static(type(module), name, None))
        if isinstance(found, property):
            found = found.fget
        found = getattr(found, "__func__", found)
        if not isinstance(found, FunctionType):
            if name == "forward":
                raise TypeError("forward is no Python function")
            continue
        found = inspect.unwrap(found)
        if (found.__module__ or "").startswith("torch.nn.modules.module"):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(found)))
        code.append(tree)
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        waiting += names - seen
        seen |= names
    return code


class _Reader(ast.NodeVisitor):
    """Finds, in a method, the containers whose children it uses.

    A name may stand for any of the modules that it is ever bound to in the method.
    """

    def __init__(self, module: nn.Module, tree: ast.AST) -> None:
        self.module = module
        self.opened: set[int] = set()
        first = next((n for n in ast.walk(tree) if isinstance(n, ast.arguments)), None)
        self.own = first.args[0].arg if first is not None and first.args else "self"
        self._bound: dict[str, _Modules] = {}
        for _ in range(4):  # a name bound to a part of what another name is bound to
            self.visit(tree)

    # -- what an expression may stand for ------------------------------------------------------

    def _modules(self, node: ast.AST) -> _Modules:
        if isinstance(node, ast.Name):
            own = {id(self.module): self.module} if node.id == self.own else {}
            return own | self._bound.get(node.id, {})
        if isinstance(node, ast.Attribute):
            return self._attribute(self._modules(node.value), node.attr)
        if isinstance(node, ast.Subscript):
            base = self._modules(node.value)
            whole = base if isinstance(node.slice, ast.Slice) else {}
            return whole | self._children(base)
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, (ast.IfExp, ast.BoolOp)):
            parts = node.values if isinstance(node, ast.BoolOp) else [node.body, node.orelse]
            return self._union(parts)
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            return self._union(node.elts)
        if isinstance(node, (ast.Starred, ast.NamedExpr)):
            return self._modules(node.value)
        return {}

    def _union(self, nodes: Iterable[ast.AST]) -> _Modules:
        out: _Modules = {}
        for node in nodes:
            out |= self._modules(node)
        return out

    def _attribute(self, base: _Modules, name: str) -> _Modules:
        if name in _CHILDREN:
            return self._children(base)
        out: _Modules = {}
        for module in base.values():
            child = module._modules.get(name)
            if child is not None:
                self._open(module)
                out[id(child)] = child
        return out

    def _call(self, node: ast.Call) -> _Modules:
        function = node.func
        if isinstance(function, ast.Name) and function.id == "getattr" and node.args:
            return self._children(self._modules(node.args[0]))
        if isinstance(function, ast.Name) and function.id in _PARTS:
            return self._union(node.args)
        if isinstance(function, ast.Attribute) and function.attr in _CHILDREN:
            return self._children(self._modules(function.value))
        return {}

    def _children(self, base: _Modules) -> _Modules:
        out: _Modules = {}
        for module in base.values():
            self._open(module)
            out |= {id(m): m for m in module._modules.values() if m is not None}
        return out

    def _open(self, module: nn.Module) -> None:
        if module is not self.module:
            self.opened.add(id(module))

    # -- where children are taken --------------------------------------------------------------

    def _elements(self, node: ast.AST) -> _Modules:
        """Return what a loop over an expression may give."""
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name) and function.id in _PARTS:
                out: _Modules = {}
                for argument in node.args:
                    out |= self._elements(argument)
                return out
            return self._modules(node)
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            return self._modules(node)
        return self._children(self._modules(node))

    def _bind(self, target: ast.AST, modules: _Modules, whole: bool) -> None:
        """Bind names to modules; ``whole`` says that a tuple of names takes a module apart."""
        if isinstance(target, (ast.Tuple, ast.List)):
            if whole:
                modules = self._children(modules)
            for element in target.elts:
                self._bind(element, modules, True)
            return
        self._bind_names(target, modules)

    def _bind_names(self, target: ast.AST, modules: _Modules) -> None:
        for node in ast.walk(target):
            if isinstance(node, ast.Name) and modules:
                self._bound[node.id] = self._bound.get(node.id, {}) | modules

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._bind(target, self._modules(node.value), not isinstance(node.value, ast.Tuple))
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._bind(node.target, self._modules(node.value), False)
        self.generic_visit(node)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self._bind(node.target, self._modules(node.value), False)
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        self._bind(node.target, self._elements(node.iter), not _gives_tuples(node.iter))
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._bind(node.target, self._elements(node.iter), not _gives_tuples(node.iter))
        self.generic_visit(node)

    def visit_Starred(self, node: ast.Starred) -> None:
        self._children(self._modules(node.value))
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self._modules(node)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._modules(node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """Note that a function that is handed a container may do anything with it."""
        function = node.func
        name = getattr(function, "attr", getattr(function, "id", ""))
        if "checkpoint" not in name and name not in _PARTS | {"isinstance", "len", "id", "type"}:
            given: Any = [*node.args, *(k.value for k in node.keywords)]
            for module in self._union(given).values():
                if _is_container(module):
                    self._children({id(module): module})
        self._modules(node)
        self.generic_visit(node)


def _gives_tuples(node: ast.AST) -> bool:
    """Say whether a loop over an expression gives tuples with modules in them."""
    if not isinstance(node, ast.Call):
        return False
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    return name in ("enumerate", "zip", "items", "named_children", "named_modules")
