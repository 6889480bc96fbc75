"""The backends' LSTM ops as PyTorch sees them; see :mod:`fused_dni.ops.linear`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_dni.ops import registry
from fused_dni.ops.returned import note_by_weight
from fused_dni.ops.schemas import empty_if_none, none_if_empty
from fused_dni.ops.tracing import direct
from fused_dni.ops.types import (
    Backend,
    CellGradients,
    CellTrace,
    LSTMGradients,
    LSTMLayer,
    LSTMRows,
    LSTMTrace,
    RuleTensors,
)

Layers = tuple[LSTMLayer, ...]


def flat(layers: Layers) -> list[Tensor]:
    """The parameters that exist, layer by layer."""
    return [p for layer in layers for p in layer if p is not None]


def layers_of(parameters: Sequence[Tensor], bias: bool) -> Layers:
    """Undo :func:`flat`."""
    size = 4 if bias else 2
    return tuple(LSTMLayer(*parameters[i : i + size]) for i in range(0, len(parameters), size))


# ---------------------------------------------------------------------------------------------
# lstm_forward


@torch.library.custom_op("fused_dni::lstm_forward", mutates_args=())
def _lstm_forward(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    parameters: Sequence[Tensor],
    bias: bool,
    lengths: Tensor | None,
    dropout: Sequence[Tensor],
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    layers = layers_of(parameters, bias)
    trace = registry.get(backend).lstm_forward(x, h, c, layers, lengths, tuple(dropout), save)
    note_by_weight(parameters[0], trace.h, trace.c)
    hidden = trace.hidden
    if not save and hidden.shape[0] > 1:
        hidden = hidden[-1:].clone()
    cells, gates = (t if save else None for t in (trace.cells, trace.gates))
    return hidden, trace.h, trace.c, empty_if_none(cells, x), empty_if_none(gates, x)


@_lstm_forward.register_fake
def _(x, h, c, parameters, bias, lengths, dropout, save, backend):  # type: ignore[no-untyped-def]
    (steps, batch, _), (layers, _, size) = x.shape, h.shape
    state = (torch.empty_like(h), torch.empty_like(c))
    if not save:
        return (x.new_empty(1, steps + 1, batch, size), *state, x.new_empty(0), x.new_empty(0))
    hidden = x.new_empty(layers, steps + 1, batch, size)
    gates = x.new_empty(layers, steps, batch, 4 * size)
    return (hidden, *state, torch.empty_like(hidden), gates)


def lstm_forward(
    backend: Backend,
    x: Tensor,
    h: Tensor,
    c: Tensor,
    layers: Layers,
    lengths: Tensor | None,
    dropout: tuple[Tensor, ...],
    save: bool,
) -> LSTMTrace:
    if direct(x):
        return backend.lstm_forward(x, h, c, layers, lengths, dropout, save)
    bias = layers[0].bias_ih is not None
    hidden, h, c, cells, gates = _lstm_forward(
        x, h, c, flat(layers), bias, lengths, list(dropout), save, backend.name
    )
    if not save:
        return LSTMTrace(hidden, h, c)
    return LSTMTrace(hidden, h, c, cells, gates)


# ---------------------------------------------------------------------------------------------
# lstm_backward


@torch.library.custom_op("fused_dni::lstm_backward", mutates_args=())
def _lstm_backward(
    grad_output: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    x: Tensor,
    parameters: Sequence[Tensor],
    bias: bool,
    lengths: Tensor | None,
    dropout: Sequence[Tensor],
    hidden: Tensor,
    h: Tensor,
    c: Tensor,
    cells: Tensor,
    gates: Tensor,
    need_dx: bool,
    need_weights: bool,
    backend: str,
) -> list[Tensor]:
    made = registry.get(backend).lstm_backward(
        grad_output,
        grad_h,
        grad_c,
        x,
        layers_of(parameters, bias),
        lengths,
        tuple(dropout),
        LSTMTrace(hidden, h, c, cells, gates),
        need_dx,
        need_weights,
    )
    # The biases of a layer have one gradient, but results of an op may not share memory.
    weights = [t.clone() if i % 4 == 3 and bias else t for i, t in enumerate(flat(made.layers))]
    return [made.delta, made.h, made.c, empty_if_none(made.x, x), *weights]


@_lstm_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad_output,
    grad_h,
    grad_c,
    x,
    parameters,
    bias,
    lengths,
    dropout,
    hidden,
    h,
    c,
    cells,
    gates,
    need_dx,
    need_weights,
    backend,
):
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    weights = [torch.empty_like(p) for p in parameters] if need_weights else []
    return [torch.empty_like(gates), torch.empty_like(h), torch.empty_like(c), dx, *weights]


def lstm_backward(
    backend: Backend,
    grad_output: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    x: Tensor,
    layers: Layers,
    lengths: Tensor | None,
    dropout: tuple[Tensor, ...],
    trace: LSTMTrace,
    need_dx: bool,
    need_weights: bool,
) -> LSTMGradients:
    if direct(x):
        return backend.lstm_backward(
            grad_output,
            grad_h,
            grad_c,
            x,
            layers,
            lengths,
            dropout,
            trace,
            need_dx,
            need_weights,
        )
    assert trace.cells is not None and trace.gates is not None
    bias = layers[0].bias_ih is not None
    delta, h, c, dx, *weights = _lstm_backward(
        grad_output,
        grad_h,
        grad_c,
        x,
        flat(layers),
        bias,
        lengths,
        list(dropout),
        trace.hidden,
        trace.h,
        trace.c,
        trace.cells,
        trace.gates,
        need_dx,
        need_weights,
        backend.name,
    )
    return LSTMGradients(delta, h, c, none_if_empty(dx), layers_of(weights, bias))


def lstm_update_(
    backend: Backend, rows: tuple[LSTMRows, ...], layers: Layers, rule: RuleTensors
) -> None:
    """Only ever called at the end of an eager backward."""
    backend.lstm_update_(rows, layers, rule)


# ---------------------------------------------------------------------------------------------
# lstm_cell_forward


@torch.library.custom_op("fused_dni::lstm_cell_forward", mutates_args=())
def _lstm_cell_forward(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    parameters: Sequence[Tensor],
    bias: bool,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    (layer,) = layers_of(parameters, bias)
    trace = registry.get(backend).lstm_cell_forward(x, h, c, layer, save)
    return trace.h, trace.c, empty_if_none(trace.gates if save else None, x)


@_lstm_cell_forward.register_fake
def _(x, h, c, parameters, bias, save, backend):  # type: ignore[no-untyped-def]
    gates = x.new_empty(x.shape[0], 4 * h.shape[1]) if save else x.new_empty(0)
    return torch.empty_like(h), torch.empty_like(c), gates


def lstm_cell_forward(
    backend: Backend, x: Tensor, h: Tensor, c: Tensor, layer: LSTMLayer, save: bool
) -> CellTrace:
    if direct(x):
        return backend.lstm_cell_forward(x, h, c, layer, save)
    bias = layer.bias_ih is not None
    h, c, gates = _lstm_cell_forward(x, h, c, flat((layer,)), bias, save, backend.name)
    return CellTrace(h, c, gates if save else None)


# ---------------------------------------------------------------------------------------------
# lstm_cell_backward


@torch.library.custom_op("fused_dni::lstm_cell_backward", mutates_args=())
def _lstm_cell_backward(
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    x: Tensor,
    h: Tensor,
    c: Tensor,
    parameters: Sequence[Tensor],
    bias: bool,
    new_h: Tensor,
    new_c: Tensor,
    gates: Tensor,
    need_dx: bool,
    need_weights: bool,
    backend: str,
) -> list[Tensor]:
    (layer,) = layers_of(parameters, bias)
    trace = CellTrace(new_h, new_c, gates)
    made = registry.get(backend).lstm_cell_backward(
        grad_h, grad_c, x, h, c, layer, trace, need_dx, need_weights
    )
    weights = [] if made.layer is None else flat((made.layer,))
    if len(weights) == 4:
        weights[3] = weights[3].clone()
    return [made.delta, made.h, made.c, empty_if_none(made.x, x), *weights]


@_lstm_cell_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad_h,
    grad_c,
    x,
    h,
    c,
    parameters,
    bias,
    new_h,
    new_c,
    gates,
    need_dx,
    need_weights,
    backend,
):
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    weights = [torch.empty_like(p) for p in parameters] if need_weights else []
    return [torch.empty_like(gates), torch.empty_like(h), torch.empty_like(c), dx, *weights]


def lstm_cell_backward(
    backend: Backend,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    x: Tensor,
    h: Tensor,
    c: Tensor,
    layer: LSTMLayer,
    trace: CellTrace,
    need_dx: bool,
    need_weights: bool,
) -> CellGradients:
    if direct(x):
        return backend.lstm_cell_backward(
            grad_h, grad_c, x, h, c, layer, trace, need_dx, need_weights
        )
    assert trace.gates is not None
    bias = layer.bias_ih is not None
    delta, dh, dc, dx, *weights = _lstm_cell_backward(
        grad_h,
        grad_c,
        x,
        h,
        c,
        flat((layer,)),
        bias,
        trace.h,
        trace.c,
        trace.gates,
        need_dx,
        need_weights,
        backend.name,
    )
    made = layers_of(weights, bias)
    return CellGradients(delta, dh, dc, none_if_empty(dx), made[0] if made else None)
