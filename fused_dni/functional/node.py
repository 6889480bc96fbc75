"""What all autograd nodes here share."""

from __future__ import annotations

from typing import Any

import torch


class Node(torch.autograd.Function):
    """Base of the library's nodes, by which profilers' annotations find them."""


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
