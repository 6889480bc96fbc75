"""``backward_local``: the backward of a step whose loss is never computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fused_dni.modules.base import NO_TARGET

# What stands in a packed sequence beside its data.
_COUNTS = (torch.int64, torch.int32)


def backward_local(*outputs: Any) -> None:
    """Deliver the gradients of a step that needs none from above its decoupled layers.

    On a step without targets (:attr:`fused_dni.Schedule.target` is false) a decoupled layer takes
    its gradient from the prediction alone: what is above it, the loss included, need not be run.
    This runs the backward from the layers' outputs: parameters without a rule get their local
    gradients in ``.grad``, ordinary layers below get theirs. Where every layer has a rule and
    nothing below asks for a gradient there is nothing left to do, and nothing is done::

        h = bottom(x)
        if schedule.target:
            loss(top(h), y).backward()
        else:
            fd.backward_local(h)

    Args:
        *outputs: what decoupled layers returned in this step: tensors, packed sequences, or lists,
            tuples and dictionaries of them. Of a segment that returns more than its output give
            the output alone.

    Raises:
        TypeError: no tensor among the outputs.
        RuntimeError: a tensor that no decoupled layer returned in a step without targets (or that
            was changed since). Nothing was run.
    """
    tensors = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.dtype not in _COUNTS]
    if not tensors:
        raise TypeError(f"outputs must be tensors that decoupled layers returned, got {outputs!r}")
    for t in tensors:
        if getattr(t, NO_TARGET, None) != t._version:
            raise RuntimeError(
                "backward_local: an output is not what a decoupled layer returned in a step "
                "without targets. On a step with targets (schedule.target is true) run what is "
                "above, and the loss's backward; else give the layer's own output, unchanged and "
                "not detached"
            )
    tensors = [t for t in tensors if t.requires_grad]
    if tensors:
        # Nothing is read of them: without targets a layer ignores what arrives.
        torch.autograd.backward(tensors, [t.new_zeros(()).expand_as(t) for t in tensors])
