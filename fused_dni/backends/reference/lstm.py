"""The LSTM: a step, a window of steps through a stack of layers, and the update.

Hochreiter & Schmidhuber 1997 (Long short-term memory, Neural Computation 9(8)), with the forget
gate of Gers et al. 2000 (Learning to forget, Neural Computation 12(10)), as in ``torch.nn.LSTM``.
With x [B, I], the state h, c [B, H], W_ih [4H, I], W_hh [4H, H] and s the logistic function, a
step is::

    z = x W_ih^T + b_ih + h W_hh^T + b_hh                       [B, 4H], split into z_i z_f z_g z_o
    i = s(z_i);  f = s(z_f);  g = tanh(z_g);  o = s(z_o)        [B, H] each
    c' = f * c + i * g
    h' = o * tanh(c')

Backwards, with dh' and dc' the gradients at the step's results::

    e = dc' + dh' * o * (1 - tanh(c')^2)                        all that reaches c'
    delta_i = e * g * i (1 - i);   delta_f = e * c * f (1 - f)
    delta_g = e * i * (1 - g^2);   delta_o = dh' * tanh(c') * o (1 - o)
    dc = e * f;   dh = delta W_hh;   dx = delta W_ih

and, summed over the steps and sequences of the window::

    dW_ih = delta^T x;   dW_hh = delta^T h;   db_ih = db_hh = sum delta

Here gates and delta are in the order of the parameters' rows, i f g o. A step that lies past a
row's length leaves its state as it was, has a hidden state of zero for an output, and has neither
gradient nor influence, whatever its input holds.

Everything that is not a parameter has x's dtype; where that is bfloat16 or float16, products take
operands of it and the rest is computed in :func:`~fused_dni.backends.common.precision.accumulator`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_dni.backends.common.precision import accumulator, product, require_masters, sum_rows
from fused_dni.backends.common.windows import alive_steps, layer_input
from fused_dni.backends.reference.rules import apply_
from fused_dni.ops.types import (
    CellGradients,
    CellTrace,
    LSTMGradients,
    LSTMLayer,
    LSTMRows,
    LSTMTrace,
    RuleTensors,
)


def preactivation(x: Tensor, h: Tensor, layer: LSTMLayer) -> Tensor:
    """Return ``z`` [B, 4H] in the accumulator's dtype."""
    dtype = accumulator(layer.weight_ih)
    z = product(x, layer.weight_ih.t(), x.dtype, dtype)  # [B, I] @ [I, 4H] -> [B, 4H]
    z = z + product(h, layer.weight_hh.t(), x.dtype, dtype)  # [B, H] @ [H, 4H] -> [B, 4H]
    for bias in (layer.bias_ih, layer.bias_hh):
        if bias is not None:
            z = z + bias.to(dtype)
    return z


def squash(z: Tensor) -> Tensor:
    """Return the gates i f g o behind their non-linearities, [B, 4H]."""
    i, f, g, o = z.chunk(4, 1)
    return torch.cat((i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()), 1)


def next_cell(gates: Tensor, c: Tensor) -> Tensor:
    """Return ``c' = f * c + i * g`` [B, H]."""
    i, f, g, _ = gates.chunk(4, 1)
    return f * c + i * g


def shown(c: Tensor) -> Tensor:
    """Return ``tanh(c')`` [B, H], of which the output gate lets a part through."""
    return c.tanh()


def next_hidden(gates: Tensor, c: Tensor) -> Tensor:
    """Return ``h' = o * tanh(c')`` [B, H], of the cell state after the step."""
    return gates.chunk(4, 1)[3] * shown(c)


def step_backward(
    grad_h: Tensor, grad_c: Tensor, gates: Tensor, before: Tensor, after: Tensor
) -> tuple[Tensor, Tensor]:
    """Return ``delta`` [B, 4H] and ``dc`` [B, H] of a step from cell state ``before`` to
    ``after``."""
    i, f, g, o = gates.chunk(4, 1)
    tanh = shown(after)
    e = grad_c + grad_h * o * (1 - tanh * tanh)
    delta = (e * g * i * (1 - i), e * before * f * (1 - f), e * i * (1 - g * g),
             grad_h * tanh * o * (1 - o))  # fmt: skip
    return torch.cat(delta, 1), e * f


def weight_gradients(rows: LSTMRows, layer: LSTMLayer) -> LSTMLayer:
    """Return ``delta^T input``, ``delta^T hidden``, delta's column sums; each of its parameter's
    dtype."""
    dtype, operands = accumulator(layer.weight_ih), rows.input.dtype
    delta = rows.delta.to(dtype)
    bias = None
    if layer.bias_ih is not None:
        bias = sum_rows(delta).to(layer.bias_ih.dtype)  # [N, 4H] -> [4H]
    return LSTMLayer(
        product(delta.t(), rows.input, operands, dtype).to(layer.weight_ih.dtype),  # [4H, I]
        product(delta.t(), rows.hidden, operands, dtype).to(layer.weight_hh.dtype),  # [4H, H]
        bias,
        bias,
    )


@torch.no_grad()
def lstm_forward(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    layers: tuple[LSTMLayer, ...],
    lengths: Tensor | None,
    dropout: tuple[Tensor, ...],
    save: bool,
) -> LSTMTrace:
    """Run a window: x [T, B, I] from the state h, c [L, B, H]. Mutates nothing."""
    steps = x.shape[0]
    dtype = accumulator(layers[0].weight_ih)
    alive = alive_steps(steps, lengths, x)  # [T, B, 1]
    hidden = x.new_zeros(len(layers), steps + 1, *h.shape[1:])
    cells, gates = (
        torch.zeros_like(hidden),
        x.new_zeros(len(layers), steps, h.shape[1], 4 * h.shape[2]),
    )
    last_h, last_c = torch.empty_like(h), torch.empty_like(c)
    hidden[:, 0], cells[:, 0] = h, c
    for k, layer in enumerate(layers):
        inputs = layer_input(k, x, hidden, dropout, alive)
        h_k, c_k = h[k], c[k].to(dtype)
        for t in range(steps):
            opened = squash(preactivation(inputs[t], h_k, layer))
            cell = next_cell(opened, c_k)
            stepped = next_hidden(opened, cell).to(x.dtype)
            c_k = torch.where(alive[t], cell, c_k)
            h_k = torch.where(alive[t], stepped, h_k)
            hidden[k, t + 1] = torch.where(alive[t], stepped, 0)
            cells[k, t + 1], gates[k, t] = c_k, opened
        last_h[k], last_c[k] = h_k, c_k
    last_h, last_c = last_h.data, last_c.data  # new to everybody: their versions begin here
    if not save:
        return LSTMTrace(hidden[-1:].clone(), last_h, last_c)
    return LSTMTrace(hidden, last_h, last_c, cells, gates)


@torch.no_grad()
def lstm_backward(
    grad_output: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    x: Tensor,
    layers: tuple[LSTMLayer, ...],
    lengths: Tensor | None,
    dropout: tuple[Tensor, ...],
    trace: LSTMTrace,
    need_dx: bool,
    need_weights: bool,
) -> LSTMGradients:
    """Go back through a window, from the top layer down. Mutates nothing."""
    hidden, cells, gates = trace.hidden, trace.cells, trace.gates
    assert cells is not None and gates is not None
    steps = x.shape[0]
    dtype = accumulator(layers[0].weight_ih)
    alive = alive_steps(steps, lengths, x)  # [T, B, 1]
    delta = torch.zeros_like(gates)
    d_h, d_c = torch.empty_like(trace.h), torch.empty_like(trace.c)
    made: list[LSTMLayer] = []
    # The gradient at the hidden states of the layer in hand, [T, B, H], as it comes from above.
    above = torch.zeros_like(hidden[-1, 1:]) if grad_output is None else grad_output
    for k in reversed(range(len(layers))):
        layer = layers[k]
        inputs = layer_input(k, x, hidden, dropout, alive)
        dh_k = torch.zeros_like(hidden[k, 0]) if grad_h is None else grad_h[k]
        dc_k = torch.zeros_like(cells[k, 0]) if grad_c is None else grad_c[k]
        dh_k, dc_k = dh_k.to(dtype), dc_k.to(dtype)
        for t in reversed(range(steps)):
            d, dc = step_backward(
                dh_k + above[t].to(dtype),
                dc_k,
                gates[k, t].to(dtype),
                cells[k, t].to(dtype),
                cells[k, t + 1].to(dtype),
            )
            d = torch.where(alive[t], d, 0)
            dh = product(d, layer.weight_hh, x.dtype, dtype)  # [B, 4H] @ [4H, H] -> [B, H]
            dh_k, dc_k = torch.where(alive[t], dh, dh_k), torch.where(alive[t], dc, dc_k)
            delta[k, t] = d
        d_h[k], d_c[k] = dh_k, dc_k
        rows = LSTMRows(inputs.flatten(0, 1), hidden[k, :-1].flatten(0, 1), delta[k].flatten(0, 1))
        if need_weights:
            made.insert(0, weight_gradients(rows, layer))
        if k > 0 or need_dx:
            above = product(rows.delta, layer.weight_ih, x.dtype, x.dtype).view_as(inputs)
            if k > 0 and dropout:
                above = above * dropout[k - 1]
    return LSTMGradients(delta, d_h, d_c, above if need_dx else None, tuple(made))


@torch.no_grad()
def lstm_update_(
    rows: tuple[LSTMRows, ...], layers: tuple[LSTMLayer, ...], rule: RuleTensors
) -> None:
    """Apply ``rule`` to the parameters of all layers, four slots a layer.

    Mutates the trainable parameters, the rule's buffers and counters; if the gradient of a
    trainable slot, of whichever layer, is not finite, ``rule.hyper[SKIPPED]`` alone.

    Raises:
        TypeError: bfloat16 or float16 parameters.
    """
    parameters = [p for layer in layers for p in layer]
    require_masters(parameters, rule.stochastic)
    made = [weight_gradients(r, layer) for r, layer in zip(rows, layers, strict=True)]
    apply_(parameters, [g for layer in made for g in layer], rule)


@torch.no_grad()
def lstm_cell_forward(x: Tensor, h: Tensor, c: Tensor, layer: LSTMLayer, save: bool) -> CellTrace:
    """Run one step: x [B, I] from the state h, c [B, H]. Mutates nothing."""
    gates = squash(preactivation(x, h, layer))
    cell = next_cell(gates, c.to(gates.dtype))
    new_h = next_hidden(gates, cell).to(x.dtype)
    return CellTrace(new_h, cell.to(x.dtype), gates.to(x.dtype) if save else None)


@torch.no_grad()
def lstm_cell_backward(
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
    """Go back through one step; h and c are the state before it. Mutates nothing."""
    assert trace.gates is not None
    dtype = accumulator(layer.weight_ih)
    grad_h = torch.zeros_like(trace.h) if grad_h is None else grad_h
    grad_c = torch.zeros_like(trace.c) if grad_c is None else grad_c
    delta, d_c = step_backward(
        grad_h.to(dtype), grad_c.to(dtype), trace.gates.to(dtype), c.to(dtype), trace.c.to(dtype)
    )
    d_h = product(delta, layer.weight_hh, x.dtype, x.dtype)  # [B, 4H] @ [4H, H] -> [B, H]
    d_x = product(delta, layer.weight_ih, x.dtype, x.dtype) if need_dx else None  # [B, I]
    delta = delta.to(x.dtype)
    made = weight_gradients(LSTMRows(x, h, delta), layer) if need_weights else None
    return CellGradients(delta, d_h, d_c.to(x.dtype), d_x, made)
