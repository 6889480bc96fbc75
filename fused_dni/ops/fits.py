"""Shapes and dtypes of what the ops are called with: kernels take addresses, and read no sizes.

A function an op, named as it is, of those of its arguments that it looks at. Modules check what
users hand in; here it is held that what was kept from a forward (an output, a prediction, a
context) still fits the parameters that it meets. Bound steps are checked when they are bound.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_dni.ops.types import (
    FROM_OUTPUT,
    HYPER_SIZE,
    STATISTICS_SIZE,
    CellTrace,
    Layers,
    LinearConfig,
    LinearGradients,
    LinearTensors,
    LSTMLayer,
    LSTMRows,
    LSTMTrace,
    Prediction,
    RuleTensors,
    Saved,
    SynthesizerTensors,
    accumulator,
)


def _is(name: str, t: Tensor | None, *shape: int, dtype: torch.dtype | None = None) -> None:
    if t is None:
        return
    if t.shape != shape:
        raise RuntimeError(f"{name} must have shape {list(shape)}, got {list(t.shape)}")
    if dtype is not None and t.dtype is not dtype:
        raise RuntimeError(f"{name} must be {dtype}, got {t.dtype}")


def _like(name: str, t: Tensor, weight: Tensor) -> None:
    """Refuse what is as wide as no input of a layer with these parameters."""
    if accumulator(t) is not accumulator(weight):
        raise RuntimeError(f"{name} has dtype {t.dtype}, the weight {weight.dtype}")


def _matrix(name: str, t: Tensor) -> tuple[int, int]:
    if t.dim() != 2:
        raise RuntimeError(f"{name} must have two dimensions, got {list(t.shape)}")
    return t.shape[0], t.shape[1]


def _there(name: str, t: Tensor | None, what: str) -> None:
    if t is None:
        raise RuntimeError(f"{name} is missing: {what} needs it")


def update_rule(rule: RuleTensors, slots: Sequence[Tensor | None]) -> None:
    """Check a rule that a user hands in; a module's own fits its parameters."""
    if not len(rule.trainable) == len(rule.first) == len(rule.second) == len(slots):
        raise RuntimeError(f"rule must have {len(slots)} slots, got {len(rule.trainable)}")
    _is("rule.hyper", rule.hyper, HYPER_SIZE, dtype=torch.float64)
    for p, first, second in zip(slots, rule.first, rule.second, strict=True):
        if p is not None:
            dtype = accumulator(p)
            _is("a moment of rule.first", first, *p.shape, dtype=dtype)
            _is("a moment of rule.second", second, *p.shape, dtype=dtype)


# -- linear ---------------------------------------------------------------------------------------


def linear_forward(x: Tensor, layer: LinearTensors) -> None:
    weight = layer.weight
    outputs, inputs = _matrix("weight", weight)
    _is("x", x, _matrix("x", x)[0], inputs)
    _like("x", x, weight)
    shape, dtype, device = (outputs,), weight.dtype, weight.device
    if x.device != device:
        raise RuntimeError(f"x is on {x.device}, the weight on {device}")
    for name, t in zip(layer._fields[1:], layer[1:], strict=True):
        if t is not None and (t.shape != shape or t.dtype is not dtype or t.device != device):
            _is(name, t, outputs, dtype=dtype)
            raise RuntimeError(f"{name} is on {t.device}, the weight on {device}")


def linear_backward(
    grad_h: Tensor, x: Tensor, h: Tensor, saved: Saved, layer: LinearTensors, config: LinearConfig
) -> None:
    linear_forward(x, layer)
    rows, outputs = x.shape[0], layer.weight.shape[0]
    _is("grad_h", grad_h, rows, outputs)
    _is("h", h, rows, outputs)
    dtype = accumulator(layer.weight)
    _is("normalized", saved.normalized, rows, outputs, dtype=dtype)
    if config.normalization is not None:
        _there("rstd", saved.rstd, "a normalisation")
        _is("rstd", saved.rstd, outputs if config.normalization == "batch" else rows, dtype=dtype)
    if config.normalization is not None or config.activation not in FROM_OUTPUT:
        _there("normalized", saved.normalized, "this normalisation or activation")


def linear_update_(x: Tensor, gradients: LinearGradients, layer: LinearTensors) -> None:
    linear_forward(x, layer)
    outputs = layer.weight.shape[0]
    dtype = accumulator(layer.weight)
    _is("delta", gradients.delta, x.shape[0], outputs, dtype=dtype)
    for name, t in zip(gradients._fields[3:], gradients[3:], strict=True):
        _is(f"the gradient of {name}", t, outputs, dtype=layer.weight.dtype)


def linear_step_(
    x: Tensor,
    layer: LinearTensors,
    synthesizer: SynthesizerTensors,
    context: Tensor | None,
) -> None:
    linear_forward(x, layer)
    predicted_from(x.shape[0], layer.weight.shape[0], synthesizer, context)


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> None:
    linear_forward(x, LinearTensors(weight, bias))
    _is("target", target, x.shape[0])


# -- synthesizer ----------------------------------------------------------------------------------


def predicted_from(
    rows: int,
    features: int,
    synthesizer: SynthesizerTensors,
    context: Tensor | None,
    h: Tensor | None = None,
) -> None:
    """Check a synthesizer, and a context, for h [rows, features]."""
    kind, weight, down, context_weight, bias, table, _ = synthesizer
    inner = features if down is None else down.shape[0]
    shapes: tuple[tuple[int, ...], ...] = (features, inner), (inner, features)
    if kind == "diagonal":
        shapes = (features,), ()
    elif down is None and kind != "dense":
        _there("the synthesizer's down", down, f"kind={kind!r}")
    classes = 0
    of_context: tuple[int, ...] = ()
    if table is not None:
        classes = table.shape[0]
    elif context_weight is not None:
        classes = context_weight.shape[-1]
        of_context = (inner,) if kind == "cross_entropy" else (features, classes)
    labels = context is None or context.dtype is torch.int64
    for name, t, shape in (
        ("h", h, (rows, features)),
        ("the synthesizer's weight", weight, shapes[0]),
        ("the synthesizer's down", down, shapes[1]),
        ("the synthesizer's context_weight", context_weight, of_context),
        ("the synthesizer's bias", bias, (features,)),
        ("the synthesizer's table", table, (classes, features)),
        ("context", context, (rows,) if labels else (rows, classes)),
    ):
        if t is not None and t.shape != shape:
            raise RuntimeError(f"{name} must have shape {list(shape)}, got {list(t.shape)}")
    dtype, device = weight.dtype, weight.device
    for t in (down, context_weight, bias, table):
        if t is not None and (
            t.device != device
            or (t.dtype is not dtype and not (t is table and t.dtype is torch.bfloat16))
        ):
            raise RuntimeError(
                f"a synthesizer's parameters must be of one dtype and device, got {t.dtype} on "
                f"{t.device} beside {dtype} on {device}"
            )
    for name, t in (("h", h), ("context", context)):
        if t is not None and t.device != device:
            raise RuntimeError(f"{name} is on {t.device}, the synthesizer on {device}")


def synthesizer_predict(h: Tensor, synthesizer: SynthesizerTensors, context: Tensor | None) -> None:
    predicted_from(h.shape[0], h.shape[-1], synthesizer, context, h)


def synthesizer_gradients(
    h: Tensor,
    prediction: Prediction,
    grad_h: Tensor,
    synthesizer: SynthesizerTensors,
    context: Tensor | None,
    statistics: Tensor,
) -> None:
    predicted_from(h.shape[0], h.shape[-1], synthesizer, context, h)
    shape, down = h.shape, synthesizer.down
    reduced = () if down is None else (shape[0], down.shape[0])
    dtype = prediction.scaled.dtype
    if dtype is not synthesizer.weight.dtype:
        dtype = accumulator(synthesizer.weight)
    for name, t, wanted, of in (
        ("prediction.scaled", prediction.scaled, shape, dtype),
        ("prediction.reduced", None if down is None else prediction.reduced, reduced, dtype),
        ("grad_h", grad_h, shape, None),
        ("statistics", statistics, (STATISTICS_SIZE,), torch.float64),
    ):
        if t is not None and (t.shape != wanted or of not in (None, t.dtype)):
            _is(name, t, *wanted, dtype=of)


synthesizer_update_ = synthesizer_gradients


# -- LSTM -----------------------------------------------------------------------------------------


def _layers(layers: Layers, inputs: int, hidden: int) -> None:
    first = layers[0].weight_ih
    dtype, device = first.dtype, first.device
    rows = 4 * hidden
    for i, layer in enumerate(layers):
        shapes = ((rows, hidden if i else inputs), (rows, hidden), (rows,), (rows,))
        for name, t, shape in zip(layer._fields, layer, shapes, strict=True):
            if t is not None and (t.shape != shape or t.dtype is not dtype or t.device != device):
                _is(f"{name} of layer {i}", t, *shape, dtype=dtype)
                raise RuntimeError(f"{name} of layer {i} is on {t.device}, others on {device}")


def lstm_forward(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    layers: Layers,
    lengths: Tensor | None,
    dropout: tuple[Tensor, ...],
) -> None:
    steps, batch, inputs = x.shape
    hidden = layers[0].weight_hh.shape[-1]
    _layers(layers, inputs, hidden)
    _is("h", h, len(layers), batch, hidden)
    _is("c", c, len(layers), batch, hidden)
    _is("lengths", lengths, batch)
    for mask in dropout:
        _is("a mask of dropout", mask, steps, batch, hidden)


def lstm_backward(
    grad_output: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    x: Tensor,
    layers: Layers,
    lengths: Tensor | None,
    dropout: tuple[Tensor, ...],
    trace: LSTMTrace,
) -> None:
    lstm_forward(x, trace.h, trace.c, layers, lengths, dropout)
    depth, batch, hidden = trace.h.shape
    steps = x.shape[0]
    dtype = trace.hidden.dtype
    _like("trace.hidden", trace.hidden, layers[0].weight_ih)
    _is("trace.hidden", trace.hidden, depth, steps + 1, batch, hidden)
    _is("trace.cells", trace.cells, depth, steps + 1, batch, hidden, dtype=dtype)
    _is("trace.gates", trace.gates, depth, steps, batch, 4 * hidden, dtype=dtype)
    _is("grad_output", grad_output, steps, batch, hidden)
    _is("grad_h", grad_h, depth, batch, hidden)
    _is("grad_c", grad_c, depth, batch, hidden)


def lstm_update_(rows: tuple[LSTMRows, ...], layers: Layers) -> None:
    hidden = layers[0].weight_hh.shape[-1]
    _layers(layers, rows[0].input.shape[-1], hidden)
    for row in rows:
        count, wide = row.input.shape
        _is("rows.input", row.input, count, wide if row is rows[0] else hidden)
        _is("rows.hidden", row.hidden, count, hidden)
        _is("rows.delta", row.delta, count, 4 * hidden)


def lstm_cell_forward(x: Tensor, h: Tensor, c: Tensor, layer: LSTMLayer) -> None:
    batch, inputs = x.shape
    hidden = layer.weight_hh.shape[-1]
    _layers((layer,), inputs, hidden)
    _is("h", h, batch, hidden)
    _is("c", c, batch, hidden)


def lstm_cell_backward(
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    x: Tensor,
    h: Tensor,
    c: Tensor,
    layer: LSTMLayer,
    trace: CellTrace,
) -> None:
    lstm_cell_forward(x, h, c, layer)
    if trace.gates is not None:
        _like("trace.gates", trace.gates, layer.weight_ih)
    _is("grad_h", grad_h, *h.shape)
    _is("grad_c", grad_c, *h.shape)
    _is("trace.h", trace.h, *h.shape)
    _is("trace.c", trace.c, *h.shape)
    _is("trace.gates", trace.gates, h.shape[0], 4 * h.shape[1])
