"""The cross-entropy of a linear layer's outputs as differentiable function.

It changes no parameter: gradients are returned by the node, as those of ``F.linear``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_dni import ops
from fused_dni.functional import check
from fused_dni.functional.node import Node, once_differentiable
from fused_dni.ops import registry
from fused_dni.ops.types import Backend, LinearConfig, LinearGradients, LinearTensors, Saved


def backward_from_loss(
    backend: Backend,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    delta: Tensor,
    gradient: Tensor,
    need_dx: bool,
    need_weight: bool,
) -> LinearGradients:
    """Take a gradient at the loss [] back through the layer.

    Args:
        delta: the loss's gradient at the logits [N, C].
    """
    scaled = delta * gradient
    # The outputs are not read, but for their shape.
    return ops.linear_backward(
        backend, scaled, x, scaled, Saved(), LinearTensors(weight, bias), LinearConfig(), True,
        need_dx, need_weight,
    )  # fmt: skip


class LinearCrossEntropyNode(Node):
    """Inputs: x, weight and bias, which are differentiable; then what is not."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        label_smoothing: float,
        ignore_index: int,
        backend: Backend,
        need_dx: bool,
    ) -> Tensor:
        loss, delta = ops.linear_cross_entropy(
            backend, x, weight, bias, target, label_smoothing, ignore_index, True
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, delta)
        ctx.backend, ctx.need_dx = backend, need_dx
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, arrived: Tensor | None) -> tuple[Tensor | None, ...]:
        none: tuple[Tensor | None, ...] = (None,) * 8
        if arrived is None:
            return none
        x, weight, bias, delta = ctx.saved_tensors
        wants = ctx.needs_input_grad
        made = backward_from_loss(
            ctx.backend, x, weight, bias, delta, arrived, ctx.need_dx and wants[0], wants[1]
        )
        out = (made.x, made.weight, made.bias)
        wanted = [t if want else None for t, want in zip(out, wants, strict=False)]
        return (*wanted, *none[3:])


def exact_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float,
    ignore_index: int,
    backend: Backend,
    need_dx: bool = True,
) -> Tensor:
    """:class:`LinearCrossEntropyNode` on checked tensors [N, I] and [N] (what the module calls);
    without gradients the loss alone.

    ``need_dx=False`` says that the producer of x wants no gradient though x asks for one.
    """
    if not torch.is_grad_enabled():
        made = ops.linear_cross_entropy(
            backend, x, weight, bias, target, label_smoothing, ignore_index, False
        )
        return made.loss
    loss: Tensor = LinearCrossEntropyNode.apply(
        x, weight, bias, target, label_smoothing, ignore_index, backend, need_dx
    )
    return loss


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Compute ``F.cross_entropy(F.linear(input, linear_weight, linear_bias), target)``, fused.

    The names are those of ``torch.nn.functional.linear_cross_entropy``; of its options there is
    ``reduction="mean"`` alone, over class indices.

    Args:
        input: [..., I], floating point; leading dimensions are rows of one batch.
        linear_weight: [C, I]. linear_bias: [C] or None.
        target: class indices in [0, C), int64 [...]: the leading dimensions of the input.
        ignore_index: rows of this target are not in the mean, and have no gradient.
        label_smoothing: share of the uniform distribution in the targets', in [0, 1].
        backend: force one by name.

    Returns:
        The mean over the rows that are not ignored, [], of the weight's dtype; NaN if all are.

    Raises:
        IndexError: a target out of range (on a GPU the loss is NaN then).
        ValueError: ``label_smoothing`` out of range, no target.
        RuntimeError: a shape, dtype or device that does not fit, an empty batch, or a backend that
            cannot serve.
        TypeError: an input or target that is no tensor.
    """
    check.smoothing(label_smoothing)
    check.layer(LinearTensors(linear_weight, linear_bias), LinearConfig())
    x = check.rows(input, linear_weight, "input")
    rows = check.target(
        target, input.shape[:-1], input.device, linear_weight.shape[0], ignore_index
    )
    check.batch(x.shape[0], LinearConfig(), True)
    return exact_cross_entropy(
        x,
        linear_weight,
        linear_bias,
        rows,
        label_smoothing,
        ignore_index,
        registry.resolve(backend, x, linear_weight),
    )
