"""The linear ops of the backends as PyTorch sees them.

Each function here has the signature of :class:`fused_dni.ops.types.Backend` with the backend in
front. Eagerly it calls the backend straight away; under ``torch.compile`` it goes through an op
registered with ``torch.library`` (namespace ``fused_dni``), whose schema is flat and names what is
mutated, so that ``fullgraph=True`` traces through. The registered ops carry no autograd formulas:
ops that mutate cannot; :mod:`fused_dni.functional` wraps them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_dni.ops import registry
from fused_dni.ops.schemas import empty_if_none, moments, none_if_empty, rule_of
from fused_dni.ops.tracing import direct
from fused_dni.ops.types import (
    FROM_OUTPUT,
    Backend,
    LinearConfig,
    LinearGradients,
    LinearTensors,
    Prediction,
    RuleTensors,
    Saved,
    Step,
    SynthesizerTensors,
)


def _fake_saved(
    save: bool, n: int, weight: Tensor, normalization: str | None, activation: str
) -> tuple[Tensor, Tensor]:
    """What stands for a :class:`Saved` of n rows in a trace."""
    o = weight.shape[0]
    if not save or (normalization is None and activation in FROM_OUTPUT):
        return weight.new_empty(0), weight.new_empty(0)
    rstd = {"batch": (o,), "layer": (n,)}.get(normalization or "", (0,))
    return weight.new_empty(n, o), weight.new_empty(rstd)


# ---------------------------------------------------------------------------------------------
# linear_forward


@torch.library.custom_op("fused_dni::linear_forward", mutates_args=("running_mean", "running_var"))
def _linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    normalization: str | None,
    activation: str,
    eps: float,
    momentum: float,
    training: bool,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    layer = LinearTensors(weight, bias, norm_weight, norm_bias, running_mean, running_var)
    config = LinearConfig(normalization, activation, eps, momentum)
    h, saved = registry.get(backend).linear_forward(x, layer, config, training, save)
    return h, empty_if_none(saved.normalized, weight), empty_if_none(saved.rstd, weight)


@_linear_forward.register_fake
def _(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    norm_weight,
    norm_bias,
    running_mean,
    running_var,
    normalization,
    activation,
    eps,
    momentum,
    training,
    save,
    backend,
):
    n = x.shape[0]
    h = x.new_empty(n, weight.shape[0])
    return h, *_fake_saved(save, n, weight, normalization, activation)


def linear_forward(
    backend: Backend,
    x: Tensor,
    layer: LinearTensors,
    config: LinearConfig,
    training: bool,
    save: bool,
) -> tuple[Tensor, Saved]:
    if direct(x):
        return backend.linear_forward(x, layer, config, training, save)
    h, normalized, rstd = _linear_forward(
        x,
        *layer,
        config.normalization,
        config.activation,
        config.eps,
        config.momentum,
        training,
        save,
        backend.name,
    )
    return h, Saved(none_if_empty(normalized), none_if_empty(rstd))


# ---------------------------------------------------------------------------------------------
# linear_backward


@torch.library.custom_op("fused_dni::linear_backward", mutates_args=())
def _linear_backward(
    grad_h: Tensor,
    x: Tensor,
    h: Tensor,
    normalized: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    normalization: str | None,
    activation: str,
    eps: float,
    momentum: float,
    training: bool,
    need_dx: bool,
    need_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    g = registry.get(backend).linear_backward(
        grad_h,
        x,
        h,
        Saved(normalized, rstd),
        LinearTensors(weight, bias, norm_weight, norm_bias, running_mean, running_var),
        LinearConfig(normalization, activation, eps, momentum),
        training,
        need_dx,
        need_weight,
    )
    return (
        g.delta,
        empty_if_none(g.x, x),
        empty_if_none(g.weight, weight),
        empty_if_none(g.bias, weight),
        empty_if_none(g.norm_weight, weight),
        empty_if_none(g.norm_bias, weight),
    )


@_linear_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad_h,
    x,
    h,
    normalized,
    rstd,
    weight,
    bias,
    norm_weight,
    norm_bias,
    running_mean,
    running_var,
    normalization,
    activation,
    eps,
    momentum,
    training,
    need_dx,
    need_weight,
    backend,
):
    def like(p: Tensor | None) -> Tensor:
        return weight.new_empty(0) if p is None else torch.empty_like(p)

    return (
        weight.new_empty(h.shape),
        torch.empty_like(x) if need_dx else x.new_empty(0),
        torch.empty_like(weight) if need_weight else weight.new_empty(0),
        like(bias),
        like(norm_weight),
        like(norm_bias),
    )


def linear_backward(
    backend: Backend,
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
    if direct(grad_h):
        return backend.linear_backward(
            grad_h, x, h, saved, layer, config, training, need_dx, need_weight
        )
    delta, *rest = _linear_backward(
        grad_h,
        x,
        h,
        *saved,
        *layer,
        config.normalization,
        config.activation,
        config.eps,
        config.momentum,
        training,
        need_dx,
        need_weight,
        backend.name,
    )
    return LinearGradients(delta, *(none_if_empty(t) for t in rest))


# ---------------------------------------------------------------------------------------------
# linear_step_


@torch.library.custom_op(
    "fused_dni::linear_step_",
    mutates_args=(
        "weight",
        "bias",
        "norm_weight",
        "norm_bias",
        "running_mean",
        "running_var",
        "hyper",
        "first",
        "second",
    ),
)
def _linear_step_(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    normalization: str | None,
    activation: str,
    eps: float,
    momentum: float,
    interface: str,
    synthesizer: str,
    synthesizer_weight: Tensor,
    down: Tensor | None,
    context_weight: Tensor | None,
    synthesizer_bias: Tensor | None,
    table: Tensor | None,
    ignore_index: int,
    context: Tensor | None,
    target_scale: float,
    max_norm: float,
    rule: str,
    nesterov: bool,
    stochastic: bool,
    hyper: Tensor,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    trainable: Sequence[bool],
    need_dx: bool,
    need_prediction: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    step = registry.get(backend).linear_step_(
        x,
        LinearTensors(weight, bias, norm_weight, norm_bias, running_mean, running_var),
        LinearConfig(normalization, activation, eps, momentum, interface),
        SynthesizerTensors(
            synthesizer,
            synthesizer_weight,
            down,
            context_weight,
            synthesizer_bias,
            table,
            ignore_index,
        ),
        context,
        target_scale,
        max_norm,
        rule_of(rule, nesterov, stochastic, hyper, first, second, trainable),
        need_dx,
        need_prediction,
    )
    absent = (None, None)
    made = (*(step.prediction or absent), *(step.saved or absent))
    scaled, reduced, normalized, rstd = (empty_if_none(t, weight) for t in made)
    return step.h, scaled, reduced, empty_if_none(step.dx, x), normalized, rstd


@_linear_step_.register_fake
def _(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    norm_weight,
    norm_bias,
    running_mean,
    running_var,
    normalization,
    activation,
    eps,
    momentum,
    interface,
    synthesizer,
    synthesizer_weight,
    down,
    context_weight,
    synthesizer_bias,
    table,
    ignore_index,
    context,
    target_scale,
    max_norm,
    rule,
    nesterov,
    stochastic,
    hyper,
    first,
    second,
    trainable,
    need_dx,
    need_prediction,
    backend,
):
    n, o = x.shape[0], weight.shape[0]
    lowrank = need_prediction and down is not None
    return (
        x.new_empty(n, o),
        weight.new_empty((n, o) if need_prediction else (0,)),
        weight.new_empty((n, down.shape[0]) if lowrank else (0,)),
        torch.empty_like(x) if need_dx else x.new_empty(0),
        *_fake_saved(
            need_prediction and interface == "preactivation", n, weight, normalization, activation
        ),
    )


def linear_step_(
    backend: Backend,
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
    if direct(x):
        return backend.linear_step_(
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
    first, second = moments(rule)
    h, scaled, reduced, dx, normalized, rstd = _linear_step_(
        x,
        *layer,
        config.normalization,
        config.activation,
        config.eps,
        config.momentum,
        config.interface,
        *synthesizer,
        context,
        target_scale,
        max_norm,
        rule.kind,
        rule.nesterov,
        rule.stochastic,
        rule.hyper,
        first,
        second,
        rule.trainable,
        need_dx,
        need_prediction,
        backend.name,
    )
    if not need_prediction:
        return Step(h, None, none_if_empty(dx))
    saved = (
        Saved(none_if_empty(normalized), none_if_empty(rstd))
        if config.interface == "preactivation"
        else None
    )
    return Step(h, Prediction(scaled, none_if_empty(reduced)), none_if_empty(dx), saved)


# ---------------------------------------------------------------------------------------------
# linear_update_


@torch.library.custom_op(
    "fused_dni::linear_update_",
    mutates_args=("weight", "bias", "norm_weight", "norm_bias", "hyper", "first", "second"),
)
def _linear_update_(
    x: Tensor,
    delta: Tensor,
    grad_bias: Tensor | None,
    grad_norm_weight: Tensor | None,
    grad_norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    rule: str,
    nesterov: bool,
    stochastic: bool,
    hyper: Tensor,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    trainable: Sequence[bool],
    backend: str,
) -> None:
    registry.get(backend).linear_update_(
        x,
        LinearGradients(delta, None, None, grad_bias, grad_norm_weight, grad_norm_bias),
        LinearTensors(weight, bias, norm_weight, norm_bias),
        rule_of(rule, nesterov, stochastic, hyper, first, second, trainable),
    )


@_linear_update_.register_fake
def _(*args):  # type: ignore[no-untyped-def]
    return None


def linear_update_(
    backend: Backend,
    x: Tensor,
    gradients: LinearGradients,
    layer: LinearTensors,
    rule: RuleTensors,
) -> None:
    if direct(x):
        backend.linear_update_(x, gradients, layer, rule)
        return
    first, second = moments(rule)
    _linear_update_(
        x,
        gradients.delta,
        gradients.bias,
        gradients.norm_weight,
        gradients.norm_bias,
        *layer[:4],
        rule.kind,
        rule.nesterov,
        rule.stochastic,
        rule.hyper,
        first,
        second,
        rule.trainable,
        backend.name,
    )
