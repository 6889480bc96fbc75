"""What ``torch.compile`` is told of functions here, without importing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def constant_when_traced(function: Callable[P, R]) -> Callable[P, R]:
    """Have a trace call ``function`` once and keep its result, as a constant of the graph.

    ``torch.compiler.assume_constant_result`` sets this very mark, but imports torch._dynamo and
    sympy to do so: seconds that whoever never compiles would wait for.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
