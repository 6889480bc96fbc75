"""The cross-entropy of a linear layer's outputs, as PyTorch sees it (:mod:`fused_dni.ops.linear`).

What goes back from its gradient at the logits is a linear layer's: ``linear_backward`` and
``linear_update_``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_dni.ops import registry
from fused_dni.ops.schemas import empty_if_none, none_if_empty
from fused_dni.ops.tracing import direct
from fused_dni.ops.types import Backend, CrossEntropy


@torch.library.custom_op("fused_dni::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float,
    ignore_index: int,
    need_delta: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    made = registry.get(backend).linear_cross_entropy(
        x, weight, bias, target, label_smoothing, ignore_index, need_delta
    )
    return made.loss, empty_if_none(made.delta, weight)


@_linear_cross_entropy.register_fake
def _(  # type: ignore[no-untyped-def]
    x, weight, bias, target, label_smoothing, ignore_index, need_delta, backend
):
    low = weight.dtype in (torch.bfloat16, torch.float16)
    shape = (x.shape[0], weight.shape[0]) if need_delta else (0,)
    dtype = torch.float32 if low and need_delta else weight.dtype
    return weight.new_empty(()), weight.new_empty(shape, dtype=dtype)


def linear_cross_entropy(
    backend: Backend,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float,
    ignore_index: int,
    need_delta: bool,
) -> CrossEntropy:
    if direct(x) and direct(target):
        return backend.linear_cross_entropy(
            x, weight, bias, target, label_smoothing, ignore_index, need_delta
        )
    loss, delta = _linear_cross_entropy(
        x, weight, bias, target, label_smoothing, ignore_index, need_delta, backend.name
    )
    return CrossEntropy(loss, none_if_empty(delta))
