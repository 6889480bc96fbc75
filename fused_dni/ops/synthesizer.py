"""The synthesizer ops of the backends as PyTorch sees them.

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
from fused_dni.ops.types import Backend, Prediction, RuleTensors, SynthesizerTensors


@torch.library.custom_op("fused_dni::synthesizer_predict", mutates_args=())
def _synthesizer_predict(
    h: Tensor,
    kind: str,
    weight: Tensor,
    down: Tensor | None,
    context_weight: Tensor | None,
    bias: Tensor | None,
    table: Tensor | None,
    ignore_index: int,
    context: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    tensors = SynthesizerTensors(kind, weight, down, context_weight, bias, table, ignore_index)
    p = registry.get(backend).synthesizer_predict(h, tensors, context)
    return p.scaled, empty_if_none(p.reduced, weight)


@_synthesizer_predict.register_fake
def _(  # type: ignore[no-untyped-def]
    h, kind, weight, down, context_weight, bias, table, ignore_index, context, backend
):
    reduced = (0,) if down is None else (h.shape[0], down.shape[0])
    return weight.new_empty(h.shape), weight.new_empty(reduced)


def synthesizer_predict(
    backend: Backend, h: Tensor, synthesizer: SynthesizerTensors, context: Tensor | None
) -> Prediction:
    if direct(h):
        return backend.synthesizer_predict(h, synthesizer, context)
    scaled, reduced = _synthesizer_predict(h, *synthesizer, context, backend.name)
    return Prediction(scaled, none_if_empty(reduced))


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
    table: Tensor | None,
    ignore_index: int,
    context: Tensor | None,
    target_scale: float,
    statistics: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = registry.get(backend).synthesizer_gradients(
        h,
        Prediction(scaled, reduced),
        grad_h,
        SynthesizerTensors(kind, weight, down, context_weight, bias, table, ignore_index),
        context,
        target_scale,
        statistics,
    )
    a, b, c, d = (empty_if_none(t, weight) for t in made)
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
    table,
    ignore_index,
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
    if direct(grad_h):
        return backend.synthesizer_gradients(
            h, prediction, grad_h, synthesizer, context, target_scale, statistics
        )
    made = _synthesizer_gradients(
        h,
        *prediction,
        grad_h,
        *synthesizer,
        context,
        target_scale,
        statistics,
        backend.name,
    )
    return tuple(none_if_empty(t) for t in made)


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
    table: Tensor | None,
    ignore_index: int,
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
        SynthesizerTensors(kind, weight, down, context_weight, bias, table, ignore_index),
        context,
        target_scale,
        statistics,
        rule_of(rule, nesterov, stochastic, hyper, first, second, trainable),
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
    if direct(grad_h):
        backend.synthesizer_update_(
            h, prediction, grad_h, synthesizer, context, target_scale, statistics, rule
        )
        return
    first, second = moments(rule)
    _synthesizer_update_(
        h,
        *prediction,
        grad_h,
        *synthesizer,
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
