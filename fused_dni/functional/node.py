"""What all autograd nodes here share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Node(torch.autograd.Function):
    """Base of the library's nodes, by which profilers' annotations find them.

    ``run`` is ``apply`` without what ``torch.func`` needs around it, a call of the interpreter's
    for each argument: for tensors in plain memory, while nothing is traced or transformed.
    """

    run: Any = vars(torch._C._FunctionBase)["apply"]


def spend(ctx: Any, twice: str) -> None:
    """Raise if this node ran backward before: what it delivers would be delivered twice.

    Args:
        ctx: a node's, with ``spent`` False since its forward; set to True.
        twice: the error's message.

    Raises:
        RuntimeError: it did. Traced code, whose backward runs once, is not looked after.
    """
    if torch.compiler.is_compiling():
        return
    if ctx.spent:
        raise RuntimeError(twice)
    ctx.spent = True


_Backward = Callable[..., Any]

NO_SECOND = (
    "trying to differentiate twice a layer of fused_dni, whose backward is @once_differentiable "
    "(create_graph=True, Hessians, gradient penalties): fused_dni.revert(model) puts PyTorch's own "
    "layers back, which have second derivatives"
)


def once_differentiable(backward: _Backward) -> _Backward:
    """Make a second derivative through a node's backward an error.

    ``torch.autograd.function.once_differentiable`` does so only where what arrives asks for a
    gradient, and its error is not on the way to the node's inputs: the second derivative behind
    ``h.sum()``, or with regard to an input, is silently zero or None there.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *arrived: Tensor | None) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *arrived)
        with torch.no_grad():
            made = backward(ctx, *arrived)
        if torch.compiler.is_compiling():
            return made
        # What was saved leads to all inputs: the node's output does, and the inputs themselves.
        ways = [t for t in (*arrived, *ctx.saved_tensors) if t is not None and t.requires_grad]
        several = isinstance(made, tuple)
        returned = made if several else (made,)
        refuse = torch._C._functions.DelayedError(NO_SECOND, len(returned) + len(ways))
        refused = refuse(*returned, *ways)[: len(returned)]
        return refused if several else refused[0]

    return wrapper
