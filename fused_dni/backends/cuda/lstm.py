"""The LSTM of the CUDA backend: ``csrc/cuda/lstm_*.cu``, a launch an op.

A window's steps, the products around them, the prediction at its end and the weights' gradients run
in one cooperative launch, a cell's step in the same kernels as a window of one. Of a long window
the input's product is torch's, a launch before: large products are not what these kernels are good
at. The update is a launch of its own: a layer that is used twice in a backward is updated once.

Everything but parameters, which are float32, is of x's dtype; kernels compute in float32. Where x
is float16 the gates' gradients are float32 inside and rounded when they are handed out. Nothing
waits for the device but :meth:`CudaLSTM.lstm_close` without statistics.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fused_dni.backends.common.gpu import GpuBackend, Window, contiguous, of_dtype
from fused_dni.backends.cuda.calls import barrier, described, extension, ieee, on
from fused_dni.ops.types import (
    AFFINE,
    RULES,
    CellGradients,
    CellTrace,
    Layers,
    LSTMGradients,
    LSTMLayer,
    LSTMRows,
    LSTMTrace,
    RuleTensors,
)

_Layers = tuple[tuple[Any, ...], ...]

# From so many multiply-adds on a window's product with its input is torch's. By estimate: it is
# made at several times the kernel's rate, and costs a few launches of some microseconds.
_LARGE = 2**30


class CudaLSTM(GpuBackend):
    """The LSTM's ops of :class:`fused_dni.ops.types.Backend`, of up to sixteen layers.

    Recurrent weights stay on chip for all steps up to the sizes that csrc/cuda/lstm.cuh states.
    """

    @torch.no_grad()
    def lstm_forward(
        self,
        x: Tensor,
        h: Tensor,
        c: Tensor,
        layers: Layers,
        lengths: Tensor | None,
        dropout: tuple[Tensor, ...],
        save: bool,
    ) -> LSTMTrace:
        """See :meth:`fused_dni.ops.types.Backend.lstm_forward`."""
        (steps, batch, _), (depth, _, size) = x.shape, h.shape
        kept = depth if save else 1
        hidden = x.new_empty(kept, steps + 1, batch, size)
        cells = x.new_empty(depth, steps + 1, batch, size) if save else None
        gates, last_h, last_c = _forward(x, h, c, layers, lengths, dropout, save, hidden, cells)
        return LSTMTrace(hidden, last_h, last_c, cells, gates if save else None)

    def window_backward(self, window: Window) -> LSTMGradients:
        """Launch ``lstm_backward``."""
        trace = window.trace
        if trace.cells is None or trace.gates is None:
            raise ValueError("this trace is of a forward without save")
        states = (trace.hidden, trace.cells, None)
        return _backward(window, states, trace.gates, (trace.h, trace.c))

    def launch_lstm_update(
        self, rows: tuple[LSTMRows, ...], layers: Layers, rule: RuleTensors
    ) -> None:
        """Launch ``lstm_update_``."""
        like, cuda = rows[0].hidden, extension()
        parameters = tuple(chain.from_iterable(layers))
        described_layers = []
        for k, of in enumerate(rows):
            slots = []
            for slot in range(4 * k, 4 * k + 4):
                trained = (parameters[slot], rule.first[slot], rule.second[slot])
                slots += [described(t if rule.trainable[slot] else None) for t in trained]
            described_layers.append((*of.input.shape, *map(described, of), *slots))
        workspace = like.new_empty(3 * len(layers) + 1, cuda.lstm_most_blocks, dtype=torch.float32)
        with on(like.device):
            cuda.lstm_update(
                (
                    len(layers), like.shape[1], ieee(), RULES.index(rule.kind),
                    rule.nesterov, described(rule.hyper), tuple(described_layers),
                    described(workspace), *barrier(like.device),
                )
            )  # fmt: skip

    @torch.no_grad()
    def lstm_cell_forward(
        self, x: Tensor, h: Tensor, c: Tensor, layer: LSTMLayer, save: bool
    ) -> CellTrace:
        """See :meth:`fused_dni.ops.types.Backend.lstm_cell_forward`."""
        room = x.new_empty(1, 2, *h.shape)
        gates, new_h, new_c = _forward(
            x.unsqueeze(0), h.unsqueeze(0), c.unsqueeze(0), (layer,), None, (), save, room, None
        )
        return CellTrace(new_h[0], new_c[0], gates[0, 0] if save else None)

    @torch.no_grad()
    def lstm_cell_backward(
        self,
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
        """See :meth:`fused_dni.ops.types.Backend.lstm_cell_backward`."""
        if trace.gates is None:
            raise ValueError("this trace is of a forward without save")
        before, c_before, behind = (of_dtype(t, x.dtype)[None, None] for t in (h, c, trace.c))
        grad_h, grad_c = (None if g is None else g.unsqueeze(0) for g in (grad_h, grad_c))
        whole = LSTMTrace(before, h, c)
        window = Window(
            (None, grad_h, grad_c), x[None], (layer,), None, (), whole, need_dx, need_weights
        )
        made = _backward(window, (before, c_before, behind), trace.gates[None, None], None)
        return CellGradients(
            made.delta[0, 0],
            made.h[0],
            made.c[0],
            None if made.x is None else made.x[0],
            made.layers[0] if need_weights else None,
        )


# ---------------------------------------------------------------------------------------------
# Launches


def _forward(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    layers: Layers,
    lengths: Tensor | None,
    dropout: tuple[Tensor, ...],
    save: bool,
    hidden: Tensor,
    cells: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gates, h and c behind the last step; fills ``hidden`` and ``cells``."""
    (steps, batch, features), (depth, _, size) = x.shape, h.shape
    x, h, c, lengths = (
        x.contiguous(),
        of_dtype(h, x.dtype),
        of_dtype(c, x.dtype),
        contiguous(lengths),
    )
    dropout = tuple([t.contiguous() for t in dropout])
    gates = x.new_empty(hidden.shape[0], steps, batch, 4 * size)
    last_h, last_c = torch.empty_like(h), torch.empty_like(c)
    below = x.new_empty(steps, batch, size) if dropout else None
    carry = x.new_empty(batch, size, dtype=torch.float32)
    projected = steps * batch * features * 4 * size >= _LARGE
    if projected:
        _project(x, layers[0], gates[0])
    with on(x.device):
        extension().lstm_forward(
            (
                steps, batch, features, size, depth, ieee(), save, projected,
                described(x), described(h), described(c), _described_layers(layers),
                described(lengths), tuple(map(described, dropout)), described(hidden),
                described(cells), described(gates), described(last_h), described(last_c),
                described(below), described(carry), *barrier(x.device),
            )
        )  # fmt: skip
    return gates, last_h, last_c


def _project(x: Tensor, layer: LSTMLayer, out: Tensor) -> None:
    """Fill ``out`` [T, B, 4H]: the product of x with a layer's input weights, and its biases, of
    x's dtype, with operands rounded to it as the kernel rounds them."""
    weight = layer.weight_ih.to(x.dtype).t()
    rows, made = x.flatten(0, 1), out.flatten(0, 1)
    biases = [bias for bias in (layer.bias_ih, layer.bias_hh) if bias is not None]
    if biases:
        torch.addmm(torch.stack(biases).sum(0).to(x.dtype), rows, weight, out=made)
    else:
        torch.mm(rows, weight, out=made)


def _backward(
    window: Window,
    states: tuple[Tensor, Tensor, Tensor | None],
    gates: Tensor,
    final: tuple[Tensor, Tensor] | None,
) -> LSTMGradients:
    """Launch a backward.

    ``states`` are h and c at the entrance and behind each step [L, T + 1, B, H]; or, of one step
    alone, h and c before it and c behind it [1, 1, B, H]. ``final`` is what a ``boundary`` reads.
    """
    _, x, layers, lengths, dropout, _, need_dx, need_weights, boundary = window
    (steps, batch, features), (depth, _, _, wide) = x.shape, gates.shape
    size = wide // 4
    x, lengths = x.contiguous(), contiguous(lengths)
    dropout = tuple([t.contiguous() for t in dropout])
    arriving = [None if g is None else of_dtype(g, x.dtype) for g in window.arriving]
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype  # of delta, inside
    delta = torch.empty_like(gates, dtype=dtype)
    d_h, d_c = x.new_empty(depth, batch, size), x.new_empty(depth, batch, size)
    dx = torch.empty_like(x) if need_dx else None
    above = x.new_empty(steps, batch, size, dtype=dtype) if depth > 1 else None
    carry = x.new_empty(batch, size, dtype=torch.float32)
    made: list[LSTMLayer] = []
    staged: list[Tensor | None] = []
    if need_weights:
        for k, layer in enumerate(layers):
            bias = None if layer.bias_ih is None else torch.empty_like(layer.bias_ih)
            made.append(
                LSTMLayer(
                    torch.empty_like(layer.weight_ih), torch.empty_like(layer.weight_hh), bias, bias
                )
            )
            differs = lengths is not None if k == 0 else bool(dropout)
            room = x.new_empty(steps, batch, features if k == 0 else size) if differs else None
            staged.append(room)
    gradients: _Layers = tuple(
        tuple(map(described, (*layer[:3], room)))
        for layer, room in zip(made, staged, strict=True)
    ) or ((),) * depth  # fmt: skip
    reduced, predicted = None, None
    ended, synthesizer, rank = None, None, 0
    if boundary is not None:
        synthesizer, ended = boundary.synthesizer, contiguous(boundary.ended)
        if synthesizer.down is not None:
            rank = synthesizer.down.shape[0]
            reduced = x.new_empty(batch, rank, dtype=dtype)
        if synthesizer.kind != "diagonal":
            predicted = x.new_empty(batch, 2 * depth * size, dtype=torch.float32)
    behind = () if states[2] is None else (described(states[2]),)
    with on(x.device):
        extension().lstm_backward(
            (
                steps, batch, features, size, depth, ieee(), need_dx, need_weights,
                described(x), _described_layers(layers), described(lengths),
                tuple(map(described, dropout)), *map(described, arriving),
                states[0].shape[1], described(states[0]), described(states[1]), *behind,
                described(gates),
                -1 if synthesizer is None else AFFINE.index(synthesizer.kind), rank,
                *((None,) * 2 if synthesizer is None else map(described, final or ())),
                *((None,) * 3 if synthesizer is None else map(
                    described, (synthesizer.weight, synthesizer.down, synthesizer.bias))),
                described(ended),
                0.0 if boundary is None else boundary.strength / boundary.target_scale,
                described(reduced), described(predicted), described(delta), described(d_h),
                described(d_c), described(dx), described(above), gradients, described(carry),
                *barrier(x.device),
            )
        )  # fmt: skip
    return LSTMGradients(delta.to(x.dtype), d_h, d_c, dx, tuple(made))


def _described_layers(layers: Layers) -> _Layers:
    return tuple([tuple(map(described, layer)) for layer in layers])
