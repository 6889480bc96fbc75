"""The backends' ops as PyTorch sees them.

Each function here has the signature of :class:`fused_dni.backends.base.Backend` with the backend
in front. Eagerly it calls the backend straight away; under ``torch.compile`` it goes through an op
registered with ``torch.library`` (namespace ``fused_dni``), whose schema is flat and names what is
mutated, so that ``fullgraph=True`` traces through. The registered ops carry no autograd formulas:
ops that mutate cannot; :mod:`fused_dni.functional.linear` wraps them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_dni.backends import registry
from fused_dni.backends.base import (
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

# ---------------------------------------------------------------------------------------------
# Between the flat schemas and the signature's tuples. An absent tensor result is an empty one.


def _none(t: Tensor | None) -> Tensor | None:
    return None if t is None or t.numel() == 0 else t


def _empty(t: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if t is None else t


def _moments(rule: RuleTensors) -> tuple[list[Tensor], list[Tensor]]:
    """The moments that exist, in the order of the slots."""
    return [t for t in rule.first if t is not None], [t for t in rule.second if t is not None]


def _rule(
    kind: str,
    nesterov: bool,
    stochastic: bool,
    hyper: Tensor,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    trainable: Sequence[bool],
) -> RuleTensors:
    """Undo :func:`_moments`: moments exist for the trainable slots, or for none."""

    def spread(made: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        left = iter(made)
        return tuple(next(left) if t and made else None for t in trainable)

    return RuleTensors(
        kind, nesterov, hyper, spread(first), spread(second), tuple(trainable), stochastic
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
    return h, _empty(saved.normalized, weight), _empty(saved.rstd, weight)


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
    if not torch.compiler.is_compiling():
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
    return h, Saved(_none(normalized), _none(rstd))


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
        _empty(g.x, x),
        _empty(g.weight, weight),
        _empty(g.bias, weight),
        _empty(g.norm_weight, weight),
        _empty(g.norm_bias, weight),
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
    if not torch.compiler.is_compiling():
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
    return LinearGradients(delta, *(_none(t) for t in rest))


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
        SynthesizerTensors(synthesizer, synthesizer_weight, down, context_weight, synthesizer_bias),
        context,
        target_scale,
        max_norm,
        _rule(rule, nesterov, stochastic, hyper, first, second, trainable),
        need_dx,
        need_prediction,
    )
    absent = (None, None)
    made = (*(step.prediction or absent), *(step.saved or absent))
    scaled, reduced, normalized, rstd = (_empty(t, weight) for t in made)
    return step.h, scaled, reduced, _empty(step.dx, x), normalized, rstd


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
    if not torch.compiler.is_compiling():
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
    first, second = _moments(rule)
    h, scaled, reduced, dx, normalized, rstd = _linear_step_(
        x,
        *layer,
        config.normalization,
        config.activation,
        config.eps,
        config.momentum,
        config.interface,
        synthesizer.kind,
        *synthesizer.parameters(),
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
        return Step(h, None, _none(dx))
    saved = Saved(_none(normalized), _none(rstd)) if config.interface == "preactivation" else None
    return Step(h, Prediction(scaled, _none(reduced)), _none(dx), saved)


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
        _rule(rule, nesterov, stochastic, hyper, first, second, trainable),
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
    if not torch.compiler.is_compiling():
        backend.linear_update_(x, gradients, layer, rule)
        return
    first, second = _moments(rule)
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


# ---------------------------------------------------------------------------------------------
# synthesizer


@torch.library.custom_op("fused_dni::synthesizer_predict", mutates_args=())
def _synthesizer_predict(
    h: Tensor,
    kind: str,
    weight: Tensor,
    down: Tensor | None,
    context_weight: Tensor | None,
    bias: Tensor | None,
    context: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    tensors = SynthesizerTensors(kind, weight, down, context_weight, bias)
    p = registry.get(backend).synthesizer_predict(h, tensors, context)
    return p.scaled, _empty(p.reduced, weight)


@_synthesizer_predict.register_fake
def _(h, kind, weight, down, context_weight, bias, context, backend):  # type: ignore[no-untyped-def]
    reduced = (0,) if down is None else (h.shape[0], down.shape[0])
    return weight.new_empty(h.shape), weight.new_empty(reduced)


def synthesizer_predict(
    backend: Backend, h: Tensor, synthesizer: SynthesizerTensors, context: Tensor | None
) -> Prediction:
    if not torch.compiler.is_compiling():
        return backend.synthesizer_predict(h, synthesizer, context)
    scaled, reduced = _synthesizer_predict(
        h, synthesizer.kind, *synthesizer.parameters(), context, backend.name
    )
    return Prediction(scaled, _none(reduced))


@torch.library.custom_op("fused_dni::synthesizer_gradients", mutates_args=("statistics",))
def _synthesizer_gradients(
    h: Tensor,
    scaled: Tensor,
    reduced: Tensor | None,
    grad_h: Tensor,
    kind: str,
    weight: Tensor,
    down: Tensor | None,
    context_weight: Tensor | None,
    bias: Tensor | None,
    context: Tensor | None,
    target_scale: float,
    statistics: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = registry.get(backend).synthesizer_gradients(
        h,
        Prediction(scaled, reduced),
        grad_h,
        SynthesizerTensors(kind, weight, down, context_weight, bias),
        context,
        target_scale,
        statistics,
    )
    a, b, c, d = (_empty(t, weight) for t in made)
    return a, b, c, d


@_synthesizer_gradients.register_fake
def _(  # type: ignore[no-untyped-def]
    h,
    scaled,
    reduced,
    grad_h,
    kind,
    weight,
    down,
    context_weight,
    bias,
    context,
    target_scale,
    statistics,
    backend,
):
    return tuple(
        weight.new_empty(0) if p is None else torch.empty_like(p)
        for p in (weight, down, context_weight, bias)
    )


def synthesizer_gradients(
    backend: Backend,
    h: Tensor,
    prediction: Prediction,
    grad_h: Tensor,
    synthesizer: SynthesizerTensors,
    context: Tensor | None,
    target_scale: float,
    statistics: Tensor,
) -> tuple[Tensor | None, ...]:
    if not torch.compiler.is_compiling():
        return backend.synthesizer_gradients(
            h, prediction, grad_h, synthesizer, context, target_scale, statistics
        )
    made = _synthesizer_gradients(
        h,
        *prediction,
        grad_h,
        synthesizer.kind,
        *synthesizer.parameters(),
        context,
        target_scale,
        statistics,
        backend.name,
    )
    return tuple(_none(t) for t in made)


@torch.library.custom_op(
    "fused_dni::synthesizer_update_",
    mutates_args=(
        "weight",
        "down",
        "context_weight",
        "bias",
        "statistics",
        "hyper",
        "first",
        "second",
    ),
)
def _synthesizer_update_(
    h: Tensor,
    scaled: Tensor,
    reduced: Tensor | None,
    grad_h: Tensor,
    kind: str,
    weight: Tensor,
    down: Tensor | None,
    context_weight: Tensor | None,
    bias: Tensor | None,
    context: Tensor | None,
    target_scale: float,
    statistics: Tensor,
    rule: str,
    nesterov: bool,
    stochastic: bool,
    hyper: Tensor,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    trainable: Sequence[bool],
    backend: str,
) -> None:
    registry.get(backend).synthesizer_update_(
        h,
        Prediction(scaled, reduced),
        grad_h,
        SynthesizerTensors(kind, weight, down, context_weight, bias),
        context,
        target_scale,
        statistics,
        _rule(rule, nesterov, stochastic, hyper, first, second, trainable),
    )


@_synthesizer_update_.register_fake
def _(*args):  # type: ignore[no-untyped-def]
    return None


def synthesizer_update_(
    backend: Backend,
    h: Tensor,
    prediction: Prediction,
    grad_h: Tensor,
    synthesizer: SynthesizerTensors,
    context: Tensor | None,
    target_scale: float,
    statistics: Tensor,
    rule: RuleTensors,
) -> None:
    if not torch.compiler.is_compiling():
        backend.synthesizer_update_(
            h, prediction, grad_h, synthesizer, context, target_scale, statistics, rule
        )
        return
    first, second = _moments(rule)
    _synthesizer_update_(
        h,
        *prediction,
        grad_h,
        synthesizer.kind,
        *synthesizer.parameters(),
        context,
        target_scale,
        statistics,
        rule.kind,
        rule.nesterov,
        rule.stochastic,
        rule.hyper,
        first,
        second,
        rule.trainable,
        backend.name,
    )
