"""The LSTM of the Triton backend: ``fused_dni.kernels.lstm`` and a matrix library's products.

What depends on the state from step to step runs in our kernels. The inputs' part of all steps, dx
and the weights' gradients are products of [T * B] rows: torch's own.

Everything but parameters is of x's dtype; kernels compute in float32. Where x is float16 the gates'
gradients are float32 inside and rounded when they are handed out. Nothing waits for the device but
:meth:`TritonLSTM.lstm_close` without statistics, whose lesson has as many rows as the data say.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.runtime import driver

from fused_dni.backends.common.gpu import GpuBackend, Window, contiguous, of_dtype
from fused_dni.backends.common.precision import product
from fused_dni.backends.common.windows import alive_steps, layer_input
from fused_dni.backends.triton.launching import barrier_on, precision, run, shared_by, stream
from fused_dni.kernels import lstm, tuning
from fused_dni.kernels.barrier import GridBarrier
from fused_dni.ops.types import (
    CellGradients,
    CellTrace,
    Layers,
    LSTMBoundary,
    LSTMGradients,
    LSTMLayer,
    LSTMRows,
    LSTMTrace,
    RuleTensors,
)


class TritonLSTM(GpuBackend):
    """The LSTM's ops of :class:`fused_dni.ops.types.Backend`."""

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
        h, c, lengths = of_dtype(h, x.dtype), of_dtype(c, x.dtype), contiguous(lengths)
        products = _forward_products(x.dtype)
        tiles = _window_tiles("lstm_forward", x, size, products)
        # Without save a layer's room is the next one's.
        kept = depth if save else 1
        gates = x.new_empty(kept, steps, batch, 4 * size)
        cells = x.new_empty(depth, steps + 1, batch, size) if save else None
        hidden = x.new_empty(kept, steps + 1, batch, size)
        last_h, last_c = torch.empty_like(h), torch.empty_like(c)
        barrier = _barrier(x, tiles)
        carry = x.new_empty(batch, size, dtype=torch.float32)
        below = x
        for k, layer in enumerate(layers):
            place = k if save else 0
            if k > 0:
                below = hidden[k - 1 if save else 0, 1:]
                if dropout:
                    below = below * dropout[k - 1]
            torch.mm(
                below.reshape(steps * batch, -1),
                layer.weight_ih.to(x.dtype).t(),
                out=gates[place].view(steps * batch, 4 * size),
            )
            hidden[place, 0] = h[k]
            if cells is not None:
                cells[k, 0] = c[k]
            trace = lstm.Trace(
                hidden[place],
                last_h[k],
                last_c[k],
                None if cells is None else cells[k],
                gates[place],
            )
            launches = lstm.plan_forward(
                lstm.Layer(*layer), c[k], trace, lengths, carry, barrier, save, tiles, products
            )
            run(launches, x.device)
            if not tiles.persistent:
                last_c[k] = carry
        return LSTMTrace(hidden, last_h, last_c, cells, gates if save else None)

    def window_backward(self, window: Window) -> LSTMGradients:
        """Run the backward from the top layer down."""
        arriving, x, layers, lengths, dropout, trace, need_dx, need_weights, boundary = window
        hidden, last_h, last_c, cells, gates = trace
        if cells is None or gates is None:
            raise ValueError("this trace is of a forward without save")
        depth, batch, size = last_h.shape
        steps, dtype = x.shape[0], x.dtype
        above, grad_h, grad_c = (contiguous(g) for g in arriving)
        lengths = contiguous(lengths)
        products = _backward_products(dtype)
        tiles = _window_tiles("lstm_backward", x, size, products)
        delta = torch.empty_like(gates, dtype=products.dtype)
        d_h, d_c = torch.empty_like(last_h), torch.empty_like(last_c)
        barrier = _barrier(x, tiles)
        carry = x.new_empty(batch, size, dtype=torch.float32)
        ends, start = None, None
        if boundary is not None:
            ends = _ends(boundary, last_h, last_c)
            start = (torch.empty_like(carry), torch.empty_like(carry))
        alive = None if lengths is None else alive_steps(steps, lengths, x)
        made: list[LSTMLayer] = []
        dx = None
        for k in reversed(range(depth)):
            layer = layers[k]
            launches = lstm.plan_backward(
                lstm.Layer(*layer),
                (
                    above,
                    None if grad_h is None else grad_h[k],
                    None if grad_c is None else grad_c[k],
                ),
                lstm.Trace(hidden[k], last_h[k], last_c[k], cells[k], gates[k]),
                lengths,
                lstm.Gradients(delta[k], d_h[k], d_c[k]),
                ends,
                "none" if boundary is None else boundary.synthesizer.kind,
                k,
                start,
                carry,
                barrier,
                tiles,
                products,
            )
            run(launches, x.device)
            if not tiles.persistent:
                d_h[k] = product(delta[k, 0], layer.weight_hh, dtype, dtype)  # [B, 4H] @ [4H, H]
                d_c[k] = carry
            of_rows = delta[k].flatten(0, 1)  # [T, B, 4H] -> [T * B, 4H]
            if need_weights:
                below = _layer_input(k, x, hidden, dropout, alive)
                made.insert(
                    0,
                    _weight_gradients(
                        below.flatten(0, 1), hidden[k, :-1].flatten(0, 1), of_rows, layer
                    ),
                )
            if k > 0 or need_dx:
                dx = product(of_rows, layer.weight_ih, dtype, dtype).view(steps, batch, -1)
                if k > 0 and dropout:
                    dx = dx * dropout[k - 1]
                above = dx
        return LSTMGradients(delta.to(dtype), d_h, d_c, dx if need_dx else None, tuple(made))

    def launch_lstm_update(
        self, rows: tuple[LSTMRows, ...], layers: Layers, rule: RuleTensors
    ) -> None:
        """Launch ``lstm_update_``."""
        like = rows[0].hidden
        size, products = like.shape[1], _backward_products(like.dtype)
        tiles = tuning.choose(
            "lstm_update",
            (rows[0].delta.shape[0], size, products.width),
            like.dtype,
            like.device,
            lambda: lstm.update_tiles(size, machine(like.device)),
        )
        launches = lstm.plan_update(
            tuple([lstm.Rows(*of) for of in rows]),
            tuple([lstm.Layer(*layer) for layer in layers]),
            lstm.Rule(*rule),
            lstm.UpdateWorkspace.allocate(len(layers), like),
            shared_by(like.device, stream(like.device)).record,
            tiles,
            products,
        )
        run(launches, like.device)

    @torch.no_grad()
    def lstm_cell_forward(
        self, x: Tensor, h: Tensor, c: Tensor, layer: LSTMLayer, save: bool
    ) -> CellTrace:
        """See :meth:`fused_dni.ops.types.Backend.lstm_cell_forward`."""
        x, h, c = x.contiguous(), of_dtype(h, x.dtype), of_dtype(c, x.dtype)
        batch, size = h.shape
        products = _forward_products(x.dtype)
        gates = h.new_empty(batch, 4 * size) if save else None
        trace = CellTrace(torch.empty_like(h), torch.empty_like(c), gates)
        launches = lstm.plan_cell_forward(
            x, h, c, lstm.Layer(*layer), *trace, _cell_tiles(h, products), products
        )
        run(launches, x.device)
        return trace

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
        h, c = of_dtype(h, x.dtype), of_dtype(c, x.dtype)
        products = _backward_products(x.dtype)
        delta = torch.empty_like(trace.gates, dtype=products.dtype)
        d_c = torch.empty_like(c)
        launches = lstm.plan_cell_backward(
            contiguous(grad_h), contiguous(grad_c), c, trace.c, trace.gates, layer.weight_hh,
            delta, d_c, _cell_tiles(h, products), products,
        )  # fmt: skip
        run(launches, x.device)
        return CellGradients(
            delta.to(x.dtype),
            product(delta, layer.weight_hh, x.dtype, x.dtype),  # [B, 4H] @ [4H, H] -> [B, H]
            d_c,
            product(delta, layer.weight_ih, x.dtype, x.dtype) if need_dx else None,  # [B, I]
            _weight_gradients(x, h, delta, layer) if need_weights else None,
        )


# ---------------------------------------------------------------------------------------------
# A window's backward


def _layer_input(
    index: int, x: Tensor, hidden: Tensor, dropout: tuple[Tensor, ...], alive: Tensor | None
) -> Tensor:
    """Return what layer ``index`` reads, [T, B, I or H]; without a copy where no row has ended."""
    if alive is not None:
        return layer_input(index, x, hidden, dropout, alive)
    if index == 0:
        return x
    below = hidden[index - 1, 1:]
    return below * dropout[index - 1] if dropout else below


def _weight_gradients(x: Tensor, h: Tensor, delta: Tensor, layer: LSTMLayer) -> LSTMLayer:
    """Return ``delta^T x``, ``delta^T h``, delta's column sums; each of its parameter's dtype."""
    bias = None
    if layer.bias_ih is not None:
        bias = delta.sum(0, dtype=torch.float32).to(layer.bias_ih.dtype)  # [N, 4H] -> [4H]
    return LSTMLayer(
        product(delta.t(), x, x.dtype, layer.weight_ih.dtype),  # [4H, N] @ [N, I]
        product(delta.t(), h, x.dtype, layer.weight_hh.dtype),  # [4H, N] @ [N, H]
        bias,
        bias,
    )


def _ends(boundary: LSTMBoundary, h: Tensor, c: Tensor) -> lstm.Ends:
    synthesizer, ended = boundary.synthesizer, boundary.ended
    down = synthesizer.down
    return lstm.Ends(
        h,
        c,
        synthesizer.weight,
        down,
        synthesizer.bias,
        contiguous(ended),
        boundary.strength / boundary.target_scale,
        0 if down is None else down.shape[0],
        h.shape[0],
    )


# ---------------------------------------------------------------------------------------------
# Dtypes, devices, tiles


def _float32() -> str:
    """Say how our kernels multiply float32 operands: see fused_dni.kernels.lstm."""
    return "tf32x3" if precision() == "ieee" else "tf32"


def _forward_products(dtype: torch.dtype) -> lstm.Products:
    """For an x of this dtype."""
    return lstm.Products(dtype, _float32() if dtype == torch.float32 else "tf32")


def _backward_products(dtype: torch.dtype) -> lstm.Products:
    """For an x of this dtype: a gradient has no room in float16."""
    if dtype == torch.float16:
        return lstm.Products(torch.float32, "tf32")
    return _forward_products(dtype)


@functools.cache
def machine(device: torch.device) -> lstm.Machine | None:
    """Describe the device; None for the interpreter."""
    if device.type != "cuda":
        return None
    properties = driver.active.utils.get_device_properties(device.index)
    return lstm.Machine(properties["multiprocessor_count"], properties["max_shared_mem"])


def _barrier(x: Tensor, tiles: lstm.WindowTiles) -> GridBarrier | None:
    """Say where programs of a window over x [T, B, I] meet, if it runs in one launch."""
    if not tiles.persistent:
        return None
    return barrier_on(x.device, stream(x.device), lstm.groups(tiles, x.shape[1]))


def _window_tiles(op: str, x: Tensor, size: int, products: lstm.Products) -> lstm.WindowTiles:
    batch, width = x.shape[1], products.width

    def default() -> lstm.WindowTiles:
        return lstm.window_tiles(batch, size, width, op == "lstm_backward", machine(x.device))

    return tuning.choose(op, (batch, size, width), x.dtype, x.device, default)


def _cell_tiles(h: Tensor, products: lstm.Products) -> lstm.WindowTiles:
    (batch, size), width = h.shape, products.width

    def default() -> lstm.WindowTiles:
        return lstm.step_tiles(batch, size, width, machine(h.device))

    return tuning.choose("lstm_cell", (batch, size, width), h.dtype, h.device, default)
