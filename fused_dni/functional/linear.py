"""The fused linear layer as differentiable function, and its decoupled step.

The function changes no parameter. Gradients are returned by the node, so hooks, accumulation,
clipping, DDP and any ``torch.optim`` optimizer see them as they see those of ``F.linear``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_dni import ops
from fused_dni.functional import check
from fused_dni.functional.node import Node, once_differentiable
from fused_dni.ops import fits, registry
from fused_dni.ops.types import (
    FROM_OUTPUT,
    Backend,
    LinearConfig,
    LinearGradients,
    LinearTensors,
    RuleTensors,
    Saved,
    Step,
    SynthesizerTensors,
)


class LinearUse(NamedTuple):
    """One use of a layer: what its forward leaves behind for its backward."""

    x: Tensor  # [N, I]
    h: Tensor  # [N, O], detached: the output itself would keep its own node alive
    saved: Saved
    layer: LinearTensors
    config: LinearConfig
    training: bool
    backend: Backend


def forward_use(
    x: Tensor, layer: LinearTensors, config: LinearConfig, training: bool, backend: Backend
) -> tuple[Tensor, LinearUse]:
    """Run the forward: h [N, O], and what :func:`backward_use` reads."""
    h, saved = ops.linear_forward(backend, x, layer, config, training, True)
    return h, LinearUse(x, h.detach(), saved, layer, config, training, backend)


def backward_use(
    use: LinearUse, gradient: Tensor, need_dx: bool, need_weight: bool
) -> LinearGradients:
    """Take a gradient at h [N, O] back through the whole layer."""
    x, h, saved, layer, config, training, backend = use
    return ops.linear_backward(
        backend, gradient.contiguous(), x, h, saved, layer, config, training, need_dx, need_weight
    )


def backward_from_preactivation(
    use: LinearUse, gradient: Tensor, need_dx: bool, need_weight: bool
) -> LinearGradients:
    """Take a gradient at z [N, O] alone back: those of x and weight on demand, and the bias's (zero
    in front of a batch normalisation in training, which removes what a bias does). No other is
    known."""
    x, h, _, layer, config, _, backend = use
    bare = LinearTensors(layer.weight, layer.bias)
    made = ops.linear_backward(
        backend, gradient.contiguous(), x, h, Saved(), bare, LinearConfig(), True, need_dx,
        need_weight,
    )  # fmt: skip
    if made.bias is not None and config.normalization == "batch":
        made = made._replace(bias=torch.zeros_like(made.bias))
    return made


class LinearNode(Node):
    """The exact layer. Inputs: x and four slots, which are differentiable; then what is not."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        config: LinearConfig,
        training: bool,
        backend: Backend,
        need_dx: bool,
    ) -> Tensor:
        layer = LinearTensors(weight, bias, norm_weight, norm_bias, running_mean, running_var)
        h, saved = ops.linear_forward(backend, x, layer, config, training, True)
        ctx.set_materialize_grads(False)
        # A layer whose derivative does not need h leaves it to be overwritten behind it.
        reads_h = config.activation in FROM_OUTPUT and config.activation != "identity"
        kept = h if reads_h else None
        ctx.save_for_backward(x, kept, *saved, weight, bias, norm_weight, norm_bias)
        ctx.running = (running_mean, running_var)
        ctx.call = (config, training, backend)
        ctx.need_dx = need_dx
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, arrived: Tensor | None) -> tuple[Tensor | None, ...]:
        none: tuple[Tensor | None, ...] = (None,) * 11
        if arrived is None:
            return none
        x, h, normalized, rstd, *slots = ctx.saved_tensors
        wants = ctx.needs_input_grad
        use = LinearUse(
            x,
            arrived if h is None else h,  # not read then, but for its shape
            Saved(normalized, rstd),
            LinearTensors(*slots, *ctx.running),
            *ctx.call,
        )
        made = backward_use(use, arrived, ctx.need_dx and wants[0], wants[1])
        out = (made.x, made.weight, made.bias, made.norm_weight, made.norm_bias)
        wanted = [t if want else None for t, want in zip(out, wants, strict=False)]
        return (*wanted, *none[5:])


def exact_linear(
    x: Tensor,
    layer: LinearTensors,
    config: LinearConfig,
    training: bool,
    backend: Backend,
    need_dx: bool = True,
) -> Tensor:
    """:class:`LinearNode` on checked two-dimensional tensors (what the modules call).

    ``need_dx=False`` says that the producer of x wants no gradient though x asks for one.
    """
    h: Tensor = LinearNode.apply(x, *layer, config, training, backend, need_dx)
    return h


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    normalization: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    eps: float = 1e-5,
    momentum: float = 0.1,
    activation: str = "identity",
    backend: str | None = None,
) -> Tensor:
    """Compute ``activation(normalization(input @ weight.T + bias))``, with its exact gradient,
    fused.

    Args:
        input: [..., I], floating point.
        weight: [O, I]. bias: [O] or None.
        normalization: None, "batch" (over all leading dimensions) or "layer".
        norm_weight, norm_bias: [O] or None, scale and shift of the normalisation.
        running_mean, running_var: [O]; needed by "batch", which moves them in training (mutated).
        training: batch statistics (and moving the running ones) instead of the running ones.
        eps, momentum: as in ``nn.BatchNorm1d`` / ``nn.LayerNorm``.
        activation: one of ``fused_dni.ops.types.ACTIVATIONS``.
        backend: force one by name.

    Returns:
        [..., O].

    Raises:
        ValueError: an unknown name, or batch statistics over a single row.
        RuntimeError: a shape, dtype or device that does not fit, or a backend that cannot serve.
    """
    check.options(normalization, activation)
    layer = LinearTensors(weight, bias, norm_weight, norm_bias, running_mean, running_var)
    config = LinearConfig(normalization, activation, eps, momentum)
    check.layer(layer, config)
    x = check.rows(input, weight, "input")
    check.batch(x.shape[0], config, training)
    h = exact_linear(x, layer, config, training, registry.resolve(backend, x, weight))
    return h.reshape(*input.shape[:-1], weight.shape[0])


def linear_step_(
    input: Tensor,
    layer: LinearTensors,
    config: LinearConfig,
    synthesizer: SynthesizerTensors,
    rule: RuleTensors,
    *,
    context: Tensor | None = None,
    target_scale: float | None = None,
    max_norm: float | None = None,
    need_dx: bool = False,
    need_prediction: bool = True,
    backend: str | None = None,
) -> Step:
    """Take a step of a decoupled linear layer: forward, synthetic gradient, update, in one launch.

    Args:
        input: [N, I].
        layer, rule: the layer's parameters and the rule that updates them; mutated.
        config: normalisation, activation and interface.
        synthesizer: predicts the gradient at the interface; only read.
        context: int64 [N] or floating point [N, K], if the synthesizer has a context weight.
        target_scale: kappa; None for N.
        max_norm: bound of the synthetic gradient's Frobenius norm; None for none.
        need_dx: return dL/dinput, taken with the weights as they were.
        need_prediction: return what :func:`synthesizer_update_` needs; with the interface at the
            preactivation also what ``fused_dni.ops.linear_backward`` needs to take a gradient at h
            there.
        backend: force one by name.

    Returns:
        h [N, O], and prediction (with ``saved``) and dx [N, I] on demand. None of them carries a
        graph.

    Raises:
        IndexError: a class index outside ``[0, K)``; nothing has been changed then.
        RuntimeError, ValueError: as :func:`linear`.

    A gradient that is not finite changes nothing but the rule's skip counter.
    """
    check.options(config.normalization, config.activation, config.interface)
    if config.interface == "preactivation" and any(rule.trainable[2:]):
        raise ValueError(
            "interface='preactivation' makes no gradient for norm_weight and norm_bias: rule must "
            f"not train them, got trainable={rule.trainable}"
        )
    check.layer(layer, config)
    check.synthesizer(synthesizer, layer.weight, layer.weight.shape[0])
    fits.update_rule(rule, layer[:4])
    x = check.rows(input, layer.weight, "input")
    check.batch(x.shape[0], config, True)
    found = registry.resolve(backend, x, layer.weight)
    scale = float(x.shape[0]) if target_scale is None else target_scale
    return ops.linear_step_(
        found,
        x,
        layer,
        config,
        synthesizer,
        context,
        scale,
        max_norm or 0.0,
        rule,
        need_dx,
        need_prediction,
    )
