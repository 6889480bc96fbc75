"""Room for what the ops return: what stands for it in a trace, and what backends fill.

A function an op, named as it is, of those of its arguments that shapes and dtypes depend on. Absent
results are those that the op does not return with these arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_dni.ops.types import (
    FROM_OUTPUT,
    CellGradients,
    CellTrace,
    CrossEntropy,
    LinearConfig,
    LinearGradients,
    LinearTensors,
    LSTMGradients,
    LSTMLayer,
    LSTMTrace,
    Prediction,
    Saved,
    SlotGradients,
    Step,
    SynthesizerTensors,
    accumulator,
)


def nothing() -> None:
    """Return None, as the op does."""


def _like(p: Tensor | None) -> Tensor | None:
    return None if p is None else torch.empty_like(p)


def saved_of(h: Tensor, config: LinearConfig, dtype: torch.dtype) -> Saved:
    """Make room for what a backward needs beside h [N, O]."""
    rows, features = h.shape
    if config.normalization is None:
        if config.activation in FROM_OUTPUT:
            return Saved()
        return Saved(h.new_empty(rows, features, dtype=dtype))
    rstd = features if config.normalization == "batch" else rows
    return Saved(h.new_empty(rows, features, dtype=dtype), h.new_empty(rstd, dtype=dtype))


def linear_forward(
    x: Tensor, layer: LinearTensors, config: LinearConfig, save: bool
) -> tuple[Tensor, Saved]:
    h = x.new_empty(x.shape[0], layer.weight.shape[0])
    return h, saved_of(h, config, accumulator(layer.weight)) if save else Saved()


def linear_backward(
    x: Tensor, h: Tensor, layer: LinearTensors, need_dx: bool, need_weight: bool
) -> LinearGradients:
    weight, bias, norm_weight, norm_bias, *_ = layer
    return LinearGradients(
        h.new_empty(h.shape, dtype=accumulator(weight)),
        x.new_empty(x.shape) if need_dx else None,
        torch.empty_like(weight) if need_weight else None,
        None if bias is None else torch.empty_like(bias),
        None if norm_weight is None else torch.empty_like(norm_weight),
        None if norm_bias is None else torch.empty_like(norm_bias),
    )


def linear_step_(
    x: Tensor,
    layer: LinearTensors,
    config: LinearConfig,
    synthesizer: SynthesizerTensors,
    need_dx: bool,
    need_prediction: bool,
) -> Step:
    h = x.new_empty(x.shape[0], layer.weight.shape[0])
    dx = x.new_empty(x.shape) if need_dx else None
    if not need_prediction:
        return Step(h, None, dx)
    prediction = synthesizer_predict(h, synthesizer)
    if config.interface == "output":
        return Step(h, prediction, dx)
    return Step(h, prediction, dx, saved_of(h, config, accumulator(layer.weight)))


def linear_cross_entropy(x: Tensor, weight: Tensor, need_delta: bool) -> CrossEntropy:
    shape, dtype = (x.shape[0], weight.shape[0]), accumulator(weight)
    delta = weight.new_empty(shape, dtype=dtype) if need_delta else None
    return CrossEntropy(weight.new_empty(()), delta)


def synthesizer_predict(h: Tensor, synthesizer: SynthesizerTensors) -> Prediction:
    return prediction_of(h, synthesizer, accumulator(synthesizer.weight))


def prediction_of(h: Tensor, synthesizer: SynthesizerTensors, dtype: torch.dtype) -> Prediction:
    """Make room for a prediction over h [N, O]."""
    down = synthesizer.down
    return Prediction(
        h.new_empty(h.shape, dtype=dtype),
        None if down is None else h.new_empty(h.shape[0], down.shape[0], dtype=dtype),
    )


def synthesizer_gradients(synthesizer: SynthesizerTensors) -> SlotGradients:
    weight, down, context_weight, bias = synthesizer.parameters()
    return torch.empty_like(weight), _like(down), _like(context_weight), _like(bias)


def lstm_forward(x: Tensor, h: Tensor, c: Tensor, save: bool) -> LSTMTrace:
    (steps, batch, _), (depth, _, size) = x.shape, h.shape
    hidden = x.new_empty(depth if save else 1, steps + 1, batch, size)
    last_h, last_c = h.new_empty(h.shape), c.new_empty(c.shape)
    if not save:
        return LSTMTrace(hidden, last_h, last_c)
    gates = x.new_empty(depth, steps, batch, 4 * size)
    return LSTMTrace(hidden, last_h, last_c, torch.empty_like(hidden), gates)


def lstm_layer(layer: LSTMLayer) -> LSTMLayer:
    """Make room for a layer's gradients."""
    return LSTMLayer(
        torch.empty_like(layer.weight_ih),
        torch.empty_like(layer.weight_hh),
        _like(layer.bias_ih),
        _like(layer.bias_hh),
    )


def lstm_backward(
    x: Tensor, layers: tuple[LSTMLayer, ...], trace: LSTMTrace, need_dx: bool, need_weights: bool
) -> LSTMGradients:
    if trace.cells is None or trace.gates is None:
        raise ValueError("this trace is of a forward without save")
    return LSTMGradients(
        torch.empty_like(trace.gates),
        torch.empty_like(trace.h),
        torch.empty_like(trace.c),
        x.new_empty(x.shape) if need_dx else None,
        tuple([lstm_layer(layer) for layer in layers]) if need_weights else (),
    )


def lstm_cell_forward(x: Tensor, h: Tensor, c: Tensor, save: bool) -> CellTrace:
    gates = x.new_empty(x.shape[0], 4 * h.shape[1]) if save else None
    return CellTrace(h.new_empty(h.shape), c.new_empty(c.shape), gates)


def lstm_cell_backward(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    layer: LSTMLayer,
    trace: CellTrace,
    need_dx: bool,
    need_weights: bool,
) -> CellGradients:
    if trace.gates is None:
        raise ValueError("this trace is of a forward without save")
    return CellGradients(
        torch.empty_like(trace.gates),
        h.new_empty(h.shape),
        c.new_empty(c.shape),
        x.new_empty(x.shape) if need_dx else None,
        lstm_layer(layer) if need_weights else None,
    )
