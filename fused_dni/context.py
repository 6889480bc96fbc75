"""What a synthesizer is conditioned on: class labels or a dense vector, a row each.

Label conditioning (cDNI) is what makes deep decoupling train (Jaderberg et al. 2016, section 3.1).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_current: ContextVar[Tensor | None] = ContextVar("fused_dni_context", default=None)


class _OfThread(threading.local):
    """The same once more, for ``torch.compile``, which reads no ``ContextVar``."""

    context: Tensor | None = None


_traced = _OfThread()


@contextmanager
def condition_on(context: Tensor) -> Iterator[None]:
    """Give ``context`` to every decoupled layer whose forward runs inside.

    The context is captured by the layers in their forward, so the backward may run outside. It is
    local to the thread or asyncio task and may be nested (the innermost counts). Layers built with
    ``context_features=0`` ignore it. Around a compiled model it is local to the thread alone.

    Args:
        context: class indices, int64 of shape [...], or a dense vector, floating point of shape
            [..., K], where [...] are the leading dimensions of the layers' input, or the first
            few of them (a label a sequence then serves every position).

    Raises:
        TypeError: context is not a tensor.
    """
    if not isinstance(context, Tensor):
        raise TypeError(f"context must be a torch.Tensor, got {type(context).__name__}")
    token, outer = _current.set(context), _traced.context
    _traced.context = context
    try:
        yield
    finally:
        _current.reset(token)
        _traced.context = outer


def current_context() -> Tensor | None:
    """The innermost :func:`condition_on`'s context, or None outside of one."""
    if torch.compiler.is_compiling():
        return _traced.context
    return _current.get()


def fold_context(
    context: Tensor | None, leading: torch.Size, features: int, like: Tensor
) -> Tensor | None:
    """Check ``context`` and fold it to one row per row of the folded input.

    Args:
        context: as in :func:`condition_on`, or None.
        leading: the input's leading dimensions, with N = their product.
        features: K, the synthesizer's ``context_features`` (> 0).
        like: a tensor whose device, and dtype for a dense context, is required.

    Returns:
        int64 [N] or ``like.dtype`` [N, K], contiguous.

    Raises:
        ValueError: no context.
        RuntimeError: a shape, dtype or device that does not fit.
    """
    if context is None:
        raise ValueError(
            f"context is missing: the synthesizer has context_features={features}; pass "
            "context=... to the layer or run the forward inside fused_dni.condition_on(...)"
        )
    if context.device != like.device:
        raise RuntimeError(f"context is on {context.device}, the layer on {like.device}")
    if context.dtype == torch.int64:
        rows = context
    elif context.is_floating_point():
        if context.dim() == 0 or context.shape[-1] != features:
            raise RuntimeError(
                f"context of dtype {context.dtype} must have shape [..., {features}] "
                f"(context_features), got {list(context.shape)}"
            )
        rows = context.detach().to(like.dtype)
    else:
        raise RuntimeError(
            "context must be class indices (torch.int64) or a floating point vector, got "
            f"{context.dtype}"
        )
    tail = rows.shape[rows.dim() :] if context.dtype == torch.int64 else rows.shape[-1:]
    shape = rows.shape[: rows.dim() - len(tail)]
    if shape == leading and len(leading) == 1:
        return rows.contiguous()
    if len(shape) > len(leading) or shape != leading[: len(shape)]:
        raise RuntimeError(
            f"context covers rows {list(shape)}, which are not the leading dimensions "
            f"{list(leading)} of the input, nor the first few of them"
        )
    spread = rows.reshape(*shape, *(1 for _ in leading[len(shape) :]), *tail)
    return spread.expand(*leading, *tail).reshape(-1, *tail).contiguous()
