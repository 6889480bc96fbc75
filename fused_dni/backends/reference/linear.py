"""The linear layer: forward, backward, update, and the decoupled step made of them.

With x [N, I], W [O, I], b [O], an optional normalisation with scale gamma and shift beta [O], and
an activation phi::

    z = x W^T + b                                              [N, O]
    n = (z - mean) * rstd,  rstd = 1 / sqrt(var + eps)         [N, O]   (n = z without)
    y = gamma n + beta                                         [N, O]
    h = phi(y)                                                 [N, O]

Mean and (biased) variance are taken over the N rows by batch normalisation (Ioffe & Szegedy 2015,
arXiv 1502.03167; rstd [O]) and over the O features by layer normalisation (Ba et al. 2016, arXiv
1607.06450; rstd [N]). Batch normalisation tracks the mean and the unbiased variance, as PyTorch.
Backwards, with g = dL/dh and the mean taken over the same axis::

    gy = g * phi'(y);  dgamma = sum_N gy * n;  dbeta = sum_N gy
    gn = gy * gamma
    delta = rstd * (gn - mean(gn) - n * mean(gn * n))          [N, O]
    dW = delta^T x;  db = sum_N delta;  dx = delta W

In evaluation batch normalisation's statistics are constants and delta = rstd * gn. In training it
removes the column means of z, hence b has no influence and db is exactly zero (rounding would
give noise, which Adam turns into movement).

A decoupled step (Jaderberg et al. 2016, arXiv 1608.05343) puts the synthetic gradient
s = M(h) / kappa in the place of g and applies the update at once; dx = delta W, with W as it was
before the update, is the target for whatever made x. With the interface at the preactivation s
stands in the place of delta instead, and neither phi nor the normalisation is gone back through.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_dni.backends.common.precision import accumulator, product, require_masters, sum_rows
from fused_dni.backends.common.synthesizer import synthesizer_predict, synthetic_gradient
from fused_dni.backends.reference.activation import (
    activate,
    derivative_from_input,
    derivative_from_output,
)
from fused_dni.backends.reference.rules import apply_, finite, skip_
from fused_dni.ops.types import (
    FROM_OUTPUT,
    BoundStep,
    LinearConfig,
    LinearGradients,
    LinearTensors,
    RuleTensors,
    Saved,
    Step,
    SynthesizerTensors,
)


class _Moments(NamedTuple):
    """Statistics of a batch, from which the running ones move."""

    mean: Tensor  # [O]
    var: Tensor  # [O], biased
    rows: int


class _Forward(NamedTuple):
    h: Tensor  # [N, O], x's dtype
    saved: Saved
    moments: _Moments | None


def uses_batch_statistics(layer: LinearTensors, config: LinearConfig, training: bool) -> bool:
    """Say whether batch normalisation is at work on this batch's own mean and variance."""
    return config.normalization == "batch" and (training or layer.running_mean is None)


def normalize(
    z: Tensor, layer: LinearTensors, config: LinearConfig, training: bool
) -> tuple[Tensor, Tensor | None, _Moments | None]:
    """Return n [N, O], rstd ([O], [N] or None) and, where they were taken, a batch's moments."""
    if config.normalization is None:
        return z, None, None
    if config.normalization == "layer":
        mean = z.mean(1, keepdim=True)  # [N, 1]
        centred = z - mean
        rstd = torch.rsqrt((centred * centred).mean(1) + config.eps)  # [N]
        return centred * rstd[:, None], rstd, None
    if config.normalization != "batch":
        raise ValueError(f"unknown normalization {config.normalization!r}")
    if uses_batch_statistics(layer, config, training):
        if z.shape[0] < 2:
            raise ValueError("batch normalisation in training needs more than one row")
        mean = z.mean(0)  # [O]
        centred = z - mean
        var = (centred * centred).mean(0)  # [O]
        rstd = torch.rsqrt(var + config.eps)
        return centred * rstd, rstd, _Moments(mean, var, z.shape[0])
    assert layer.running_mean is not None and layer.running_var is not None
    rstd = torch.rsqrt(layer.running_var.to(z.dtype) + config.eps)  # [O]
    return (z - layer.running_mean.to(z.dtype)) * rstd, rstd, None


def scale_and_shift(n: Tensor, layer: LinearTensors) -> Tensor:
    """Return ``y = gamma n + beta`` [N, O]; either may be absent."""
    y = n if layer.norm_weight is None else n * layer.norm_weight.to(n.dtype)
    return y if layer.norm_bias is None else y + layer.norm_bias.to(n.dtype)


def move_running_(layer: LinearTensors, config: LinearConfig, moments: _Moments | None) -> None:
    """Move the running statistics by ``config.momentum`` towards a batch's. Mutates them."""
    if moments is None or layer.running_mean is None or layer.running_var is None:
        return
    unbiased = moments.var * (moments.rows / (moments.rows - 1))
    for running, new in ((layer.running_mean, moments.mean), (layer.running_var, unbiased)):
        running.copy_((1 - config.momentum) * running + config.momentum * new)


def _forward(x: Tensor, layer: LinearTensors, config: LinearConfig, training: bool) -> _Forward:
    """Apply the forward formulas; mutates nothing."""
    dtype = accumulator(layer.weight)
    z = product(x, layer.weight.t(), x.dtype, dtype)  # [N, I] @ [I, O] -> [N, O]
    if layer.bias is not None:
        z = z + layer.bias.to(dtype)
    n, rstd, moments = normalize(z, layer, config, training)
    y = scale_and_shift(n, layer) if config.normalization is not None else n
    h = activate(y, config.activation).to(x.dtype)
    keep = config.normalization is not None or config.activation not in FROM_OUTPUT
    return _Forward(h, Saved(n if keep else None, rstd), moments)


@torch.no_grad()
def linear_forward(
    x: Tensor, layer: LinearTensors, config: LinearConfig, training: bool, save: bool
) -> tuple[Tensor, Saved]:
    """Return h [N, O] in x's dtype and what a backward needs (in the accumulator's dtype).

    Mutates the running statistics, if batch normalisation is in training.

    Raises:
        ValueError: unknown normalisation or activation, or batch normalisation over one row.
    """
    h, saved, moments = _forward(x, layer, config, training)
    if training:
        move_running_(layer, config, moments)
    return h, saved if save else Saved()


@torch.no_grad()
def linear_backward(
    grad_h: Tensor,
    x: Tensor,
    h: Tensor,
    saved: Saved,
    layer: LinearTensors,
    config: LinearConfig,
    training: bool,
    need_dx: bool,
    need_weight: bool,
) -> LinearGradients:
    """Return gradients at z (accumulator's dtype), x (x's dtype) and the parameters (theirs).

    Mutates nothing.
    """
    dtype = accumulator(layer.weight)
    normalized = config.normalization is not None
    n, rstd = saved
    if config.activation in FROM_OUTPUT:
        slope = derivative_from_output(h.to(dtype), config.activation)  # [N, O]
    else:
        assert n is not None
        y = scale_and_shift(n, layer) if normalized else n
        slope = derivative_from_input(y, config.activation)
    gy = grad_h.to(dtype) * slope  # [N, O]
    d_norm_weight = d_norm_bias = None
    if normalized:
        assert n is not None and rstd is not None
        if layer.norm_weight is not None:
            d_norm_weight = sum_rows(gy * n).to(layer.norm_weight.dtype)  # [O]
        if layer.norm_bias is not None:
            d_norm_bias = sum_rows(gy).to(layer.norm_bias.dtype)  # [O]
    if not normalized:
        delta = gy
    else:
        assert n is not None and rstd is not None
        gn = gy if layer.norm_weight is None else gy * layer.norm_weight.to(dtype)
        if config.normalization == "layer":
            along = gn.mean(1, keepdim=True)  # [N, 1]
            across = (gn * n).mean(1, keepdim=True)  # [N, 1]
            delta = rstd[:, None] * (gn - along - n * across)
        elif uses_batch_statistics(layer, config, training):
            delta = rstd * (gn - gn.mean(0) - n * (gn * n).mean(0))
        else:
            delta = rstd * gn
    d_bias = None
    if layer.bias is not None:
        d_bias = torch.zeros_like(layer.bias)
        if not uses_batch_statistics(layer, config, training):
            d_bias = sum_rows(delta).to(layer.bias.dtype)  # [O]
    d_weight = d_x = None
    if need_weight:
        d_weight = weight_gradient(delta, x).to(layer.weight.dtype)
    if need_dx:
        d_x = product(delta, layer.weight, x.dtype, x.dtype)  # [N, O] @ [O, I] -> [N, I]
    return LinearGradients(delta, d_x, d_weight, d_bias, d_norm_weight, d_norm_bias)


def weight_gradient(delta: Tensor, x: Tensor) -> Tensor:
    """Return ``delta^T x`` [O, I] in delta's dtype, the product in x's."""
    return product(delta.t(), x, x.dtype, delta.dtype)  # [O, N] @ [N, I] -> [O, I]


def preactivation_gradients(
    delta: Tensor, x: Tensor, layer: LinearTensors, config: LinearConfig, need_dx: bool
) -> LinearGradients:
    """Go back from a gradient at z alone: dx on demand, and the bias's (zero in front of a batch
    normalisation in training, which removes what a bias does). No other is known."""
    bare = LinearTensors(layer.weight, layer.bias)
    made = linear_backward(
        delta, x, delta, Saved(), bare, LinearConfig(), True, need_dx=need_dx, need_weight=False
    )
    if made.bias is not None and config.normalization == "batch":
        made = made._replace(bias=torch.zeros_like(made.bias))
    return made


def _slots(layer: LinearTensors) -> tuple[Tensor | None, ...]:
    return (layer.weight, layer.bias, layer.norm_weight, layer.norm_bias)


def _slot_gradients(x: Tensor, gradients: LinearGradients) -> tuple[Tensor | None, ...]:
    """List gradients by slot; the weight's is formed here."""
    return (
        weight_gradient(gradients.delta, x),
        gradients.bias,
        gradients.norm_weight,
        gradients.norm_bias,
    )


@torch.no_grad()
def linear_update_(
    x: Tensor, gradients: LinearGradients, layer: LinearTensors, rule: RuleTensors
) -> None:
    """Apply ``rule`` to weight, bias, norm_weight, norm_bias; ``gradients.weight`` is not read.

    Mutates the trainable parameters, the rule's buffers and counters; if the gradient at z or of
    a trainable slot is not finite, ``rule.hyper[SKIPPED]`` alone.

    Raises:
        TypeError: bfloat16 or float16 parameters.
    """
    require_masters(_slots(layer), rule.stochastic)
    if not bool(torch.isfinite(gradients.delta).all()):
        skip_(rule)
        return
    apply_(_slots(layer), _slot_gradients(x, gradients), rule)


@torch.no_grad()
def linear_step_(
    x: Tensor,
    layer: LinearTensors,
    config: LinearConfig,
    synthesizer: SynthesizerTensors,
    context: Tensor | None,
    target_scale: float,
    max_norm: float,
    rule: RuleTensors,
    need_dx: bool,
    need_prediction: bool,
) -> Step:
    """Take a step: forward, synthetic gradient, update. h [N, O]; prediction and dx [N, I] on
    demand.

    Mutates the running statistics (batch normalisation), the trainable parameters, the rule's
    buffers and counters; if the gradient at z or of a trainable slot is not finite,
    ``rule.hyper[SKIPPED]`` alone (h, prediction and dx are returned as they are).

    Raises:
        IndexError: a class index outside ``[0, K)``; raised before anything is changed.
        TypeError: bfloat16 or float16 parameters.
        ValueError: unknown names, or a context that does not go with the synthesizer.
    """
    require_masters(_slots(layer), rule.stochastic)
    h, saved, moments = _forward(x, layer, config, training=True)
    prediction = synthesizer_predict(h, synthesizer, context)
    synthetic = synthetic_gradient(prediction, target_scale, max_norm)
    inside = config.interface == "preactivation"
    if inside:
        gradients = preactivation_gradients(synthetic, x, layer, config, need_dx)
    else:
        gradients = linear_backward(
            synthetic, x, h, saved, layer, config, True, need_dx=need_dx, need_weight=False
        )
    by_slot = _slot_gradients(x, gradients)
    if bool(torch.isfinite(gradients.delta).all()) and finite(by_slot, rule):
        move_running_(layer, config, moments)
        apply_(_slots(layer), by_slot, rule)
    else:
        skip_(rule)
    if not need_prediction:
        return Step(h, None, gradients.x)
    return Step(h, prediction, gradients.x, saved if inside else None)


def bind_step(
    layer: LinearTensors,
    config: LinearConfig,
    synthesizer: SynthesizerTensors,
    max_norm: float,
    rule: RuleTensors,
) -> BoundStep:
    """:func:`linear_step_` with what does not change from batch to batch."""

    def step(
        x: Tensor, context: Tensor | None, target_scale: float, need_dx: bool, need_prediction: bool
    ) -> Step:
        return linear_step_(
            x,
            layer,
            config,
            synthesizer,
            context,
            target_scale,
            max_norm,
            rule,
            need_dx,
            need_prediction,
        )

    return step
