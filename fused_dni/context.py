"""What a synthesizer is conditioned on: class labels or a dense vector, a row each.

Label conditioning (cDNI) is what makes deep decoupling train (Jaderberg et al. 2016, section 3.1).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

_current: ContextVar[Tensor | None] = ContextVar("fused_dni_context", default=None)


def variable() -> ContextVar[Tensor | None]:
    """Return the variable in which :func:`condition_on` keeps the context."""
    return _current


class _OfThread(threading.local):
    """The same once more, for ``torch.compile``, which reads no ``ContextVar``."""

    context: Tensor | None = None


_traced = _OfThread()


_next_number: Any = vars(torch.autograd)["_get_sequence_nr"]


class _Span(NamedTuple):
    """A :func:`condition_on` that has ended: the autograd nodes that were made inside it, by their
    numbers, which count up in each thread."""

    first: int
    behind: int
    context: Tensor


# Those in which something was checkpointed, the latest last: a forward that a backward runs again
# finds its context here. Bounded, as nobody says when the last backward has run.
_spans: deque[_Span] = deque(maxlen=64)
_checkpointed: ContextVar[bool] = ContextVar("fused_dni_checkpointed", default=False)


def note_checkpoint() -> None:
    """Say that what runs now may be run again by a backward, outside of its context: in training
    without gradients (a checkpoint of the reentrant kind), or under saved-tensor hooks."""
    if not torch.compiler.is_compiling():  # which reads no ContextVar
        _checkpointed.set(True)


def _context_of_recomputed() -> Tensor | None:
    """Return the context in which the node was made that the running backward runs anew."""
    node: Any = torch._C._current_autograd_node()
    if node is None:
        return None
    number = node._sequence_nr()
    spans = [span for span in _spans if span.first <= number < span.behind]
    if not spans:
        return None
    # The innermost of nested ones. Threads count for themselves: their spans may overlap otherwise.
    inner = max(spans, key=lambda span: span.first)
    if any(span.behind < inner.behind for span in spans):
        raise RuntimeError(
            "activation checkpointing: contexts of several threads fit what is run again; pass "
            "context=... to the checkpointed function instead of fused_dni.condition_on"
        )
    return inner.context


@contextmanager
def condition_on(context: Tensor) -> Iterator[None]:
    """Give ``context`` to every decoupled layer whose forward runs inside.

    The context is captured by the layers in their forward, so the backward may run outside, also
    one that runs a checkpointed forward again (``torch.utils.checkpoint``). It is
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
    first, noted = _next_number(), _checkpointed.set(False)
    try:
        yield
    finally:
        _current.reset(token)
        _traced.context = outer
        if _checkpointed.get():
            _spans.append(_Span(first, _next_number(), context))
        _checkpointed.reset(noted)


def current_context() -> Tensor | None:
    """Return the innermost :func:`condition_on`'s context, or None outside of one."""
    if torch.compiler.is_compiling():
        return _traced.context
    if _spans and torch._C._current_graph_task_id() != -1:
        made_in = _context_of_recomputed()
        if made_in is not None:
            return made_in
    context = _current.get()
    if context is not None and torch._C._autograd._top_saved_tensors_default_hooks(True):
        note_checkpoint()
    return context


def fold_context(
    context: Tensor | None, leading: torch.Size | None, features: int, like: Tensor
) -> Tensor:
    """Check ``context`` and fold it to one row per row of the folded input.

    Args:
        context: as in :func:`condition_on`, or None.
        leading: the input's leading dimensions, with N = their product; None to check all else
            and fold nothing.
        features: K, the synthesizer's ``context_features`` (> 0).
        like: a tensor whose device is required; a dense context is converted to its dtype, which
            under autocast need not be that of the model's input.

    Returns:
        int64 [N] or ``like.dtype`` [N, K], contiguous; unfolded [...] or [..., K].

    Raises:
        ValueError: no context.
        TypeError: a context that is no tensor.
        RuntimeError: a shape, dtype or device that does not fit.
    """
    if context is None:
        raise ValueError(
            f"context is missing: the synthesizer has context_features={features}; pass "
            "context=... to the layer or run the forward inside fused_dni.condition_on(...)"
        )
    if not isinstance(context, Tensor):
        raise TypeError(f"context must be a torch.Tensor, got {type(context).__name__}")
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
    if leading is None:
        return rows
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
