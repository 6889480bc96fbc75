"""The LSTM on a GPU: a window of steps in one launch, a step in one launch, and the update.

Formulas stand in fused_dni.backends.reference.lstm. T steps, B rows, H hidden units, gates in the
order i f g o of the parameters' rows. What does not depend on the state is left to the caller and a
matrix library: the inputs' part x W_ih^T of z, for all steps at once, and behind the backward dx
and the weights' gradients, products over all steps. What is left is a chain of T small products:

    z_t = x_t W_ih^T + b_ih + b_hh + h_{t-1} W_hh^T             [B, H] [H, 4H]
    dh_{t-1} = delta_t W_hh                                     [B, 4H] [4H, H]

**A window in one launch.** A program owns ``units`` hidden units, all four gates of them, for
``rows`` rows of the batch, so that gates and cell state never leave it. Its part of W_hh
([H, 4 units], backwards [4H, units]) is read once, before the first step, and stays in shared
memory; the cell state (backwards its gradient) stays in registers. A step reads the whole h_{t-1}
(delta_t) of its rows, which other programs have written, and so ends with a barrier, of the
programs that share rows alone. What the next step needs besides is asked for before the barrier.

Such a product is thin (16 to 64 rows) and deep: were it divided among the warps by rows and
columns, each would have to hold the same operands. So its depth is divided: a warp multiplies a
part of its own, as one product of a batch of them, and the parts are summed in the end.

**A step a launch**, where the weights do not fit (:func:`window_tiles`): the same step, the weights
streamed. The cell's forward is such a step, in which the input's product runs, too.

Products accumulate in float32. Their operands are of h's type forwards. Backwards they are of
delta's, which is h's, or float32 where that is float16: a gradient has no room in float16, while
tf32 has its digits. "highest" float32 products are made of three tf32 ones ("tf32x3"): what they
leave out, 2^-22 of a term, is less than what summing up rounds.

The same input gives the same bits: an element is one program's, its sum's order is fixed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fused_dni.kernels.barrier import (
    LSTM_BACKWARD,
    LSTM_FORWARD,
    GridBarrier,
    Kernel,
    wait_for_all,
)
from fused_dni.kernels.common import (
    INTERPRETED,
    SKIPPED,
    STEP,
    dot,
    rule_factors,
    sigmoid,
    tanh,
)
from fused_dni.kernels.launch import Launch, constants
from fused_dni.kernels.synthesizer import TYPES
from fused_dni.kernels.tiles import is_inside, load_tile, magnitude, settle, tile_offsets, wide
from torch import Tensor

FORWARD_KERNEL = Kernel("lstm_window_forward", None, ("T", "B", "H"))
BACKWARD_KERNEL = Kernel("lstm_window_backward", None, ("T", "B", "H"))

_LARGEST: tl.constexpr = tl.constexpr(1.0e38)  # well inside float32
_PARTS: tl.constexpr = tl.constexpr(64)  # programs that measure, at the most


class Options(NamedTuple):
    """What the kernels of a window are compiled for."""

    size: int  # H
    rows: int  # of the batch, of a program
    units: int  # hidden units of a program
    depth: int  # of a product's tile; of a warp's part of it, where parts > 1
    parts: int  # of a product's depth, one a warp; 1 where weights are streamed
    chunks: int  # tiles of all parts together that a product's depth is made of
    group: int  # chunks of the state that are asked for together
    operand: Any  # the type of the products' operands
    precision: str  # how float32 operands are multiplied: "tf32", "tf32x3"


class Layer(NamedTuple):
    """A layer's parameters, or one of their moments; None where there is none."""

    weight_ih: Any  # [4H, I]
    weight_hh: Any  # [4H, H]
    bias_ih: Any = None  # [4H]
    bias_hh: Any = None  # [4H]


class Trace(NamedTuple):
    """What a layer's forward over T steps leaves behind."""

    hidden: Any  # [T + 1, B, H]: h at the entrance, then after each step
    h: Any  # [B, H]: after each row's last step
    c: Any  # [B, H]
    cells: Any  # [T + 1, B, H]: c, as hidden; None without save
    gates: Any  # [T, B, 4H]


class Gradients(NamedTuple):
    """What a layer's backward makes in front of the products over all steps."""

    delta: Any  # [T, B, 4H], of the type of its products' operands
    h: Any  # [B, H]: at the entrance
    c: Any  # [B, H]


class Rows(NamedTuple):
    """What a layer's weight gradients are products of, a row for each step of each sequence."""

    input: Any  # [N, I]
    hidden: Any  # [N, H]
    delta: Any  # [N, 4H]


class Ends(NamedTuple):
    """The synthesizer at a window's end: fused_dni.ops.types.LSTMBoundary."""

    h: Any  # [L, B, H]: the final state
    c: Any  # [L, B, H]
    weight: Any  # [F, F], [F, R] or [F], with F = 2 L H features: h_0, c_0, h_1, c_1, ...
    down: Any  # [R, F], low rank only
    bias: Any  # [F] or None
    ended: Any  # bool [B] or None
    factor: float  # strength / target_scale
    rank: int  # R, 0 without
    layers: int  # L


# ---------------------------------------------------------------------------------------------
# The place of a program


@triton.jit
def _own(rows, C: tl.constexpr):
    """Return a program's rows [rows, 1] (64-bit: offsets are made of them), units [1, units], and
    which of their pairs exist."""
    row = (tl.program_id(1) * C.rows + tl.arange(0, C.rows)).to(tl.int64)[:, None]
    unit = (tl.program_id(0) * C.units + tl.arange(0, C.units))[None, :]
    return row, unit, (row < rows) & (unit < C.size)


@triton.jit
def _wait_for_all(barrier, step, steps, rows, size, KERNEL: tl.constexpr):
    """Wait for the programs of the same rows behind a step; returns whether they came."""
    return wait_for_all(
        barrier, tl.program_id(1), tl.num_programs(0), step, steps, rows, size, KERNEL
    )  # fmt: skip


@triton.jit
def _load_lengths(lengths, row, rows, steps):
    """Load the rows' numbers of steps [rows, 1]."""
    if lengths is None:
        length = tl.full(row.shape, steps, tl.int64)
    else:
        length = tl.load(lengths + row, mask=row < rows, other=0)
    return length


@triton.jit
def _load(source, at, mask):
    """Load float32 elements; zero outside, or everywhere where there is no source."""
    if source is None:
        v = tl.full(at.shape, 0.0, tl.float32)
    else:
        v = tl.load(source + at, mask=mask, other=0.0).to(tl.float32)
    return v


@triton.jit
def _load_gates(gates, at, mask, C: tl.constexpr):
    """Load i, f, g, o [rows, units], in their own type: a value that is waited for only when it is
    used."""
    i = tl.load(gates + at, mask=mask, other=0.0)
    f = tl.load(gates + at + C.size, mask=mask, other=0.0)
    g = tl.load(gates + at + 2 * C.size, mask=mask, other=0.0)
    o = tl.load(gates + at + 3 * C.size, mask=mask, other=0.0)
    return i, f, g, o


@triton.jit
def _store_gates(gates, at, i, f, g, o, mask, C: tl.constexpr):
    """Undo :func:`_load_gates`."""
    tl.store(gates + at, i.to(gates.dtype.element_ty), mask=mask)
    tl.store(gates + at + C.size, f.to(gates.dtype.element_ty), mask=mask)
    tl.store(gates + at + 2 * C.size, g.to(gates.dtype.element_ty), mask=mask)
    tl.store(gates + at + 3 * C.size, o.to(gates.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------------
# Products whose weights stay where they are: a warp for each part of the depth


@triton.jit
def _chunk(n: tl.constexpr, C: tl.constexpr):
    """Return indices [parts, depth] along a product's depth, of its chunk number n."""
    part = n * C.parts + tl.arange(0, C.parts)
    return part[:, None] * C.depth + tl.arange(0, C.depth)[None, :]


@triton.jit
def _keep(weight, unit, unit_stride, depth_stride, depth, C: tl.constexpr):
    """Load a program's columns of a weight: a tile [parts, depth, units] for each chunk."""
    CHUNKS: tl.constexpr = C.chunks
    kept = ()
    for n in tl.static_range(CHUNKS):
        k = _chunk(n, C)[:, :, None]
        u = unit[None, :, :]  # [1, 1, units]
        at = k.to(tl.int64) * depth_stride + u.to(tl.int64) * unit_stride
        tile = tl.load(weight + at, mask=(k < depth) & (u < C.size), other=0.0)
        kept = kept + (tile.to(C.operand),)  # noqa: RUF005 (Triton knows no star)
    return kept


@triton.jit
def _read(state, row, rows, depth, FIRST: tl.constexpr, C: tl.constexpr):
    """Read what the programs of these rows have written: a tile [parts, rows, depth] for each chunk
    of a group. All are asked for before the first is used, and past the first-level cache, which
    other programs do not write to."""
    END: tl.constexpr = min(FIRST + C.group, C.chunks)
    tiles = ()
    for n in tl.static_range(FIRST, END):
        k = _chunk(n, C)[:, None, :]
        r = row[None, :, :]  # [1, rows, 1]
        tile = tl.load(
            state + r * depth + k, mask=(r < rows) & (k < depth), other=0.0, cache_modifier=".cg"
        )
        tiles = tiles + (tile.to(C.operand),)  # noqa: RUF005
    return tiles


@triton.jit
def _accumulate(sums, tiles, kept, FIRST: tl.constexpr, C: tl.constexpr):
    """Return ``sums`` [parts, rows, units] and a group's products."""
    COUNT: tl.constexpr = len(tiles)
    for n in tl.static_range(COUNT):
        sums = dot(tiles[n], kept[FIRST + n], sums, C.precision)
    return sums


@triton.jit
def _add(i, f, g, o, i2, f2, g2, o2):
    return i + i2, f + f2, g + g2, o + o2


@triton.jit
def _sum_parts(i, f, g, o):
    """Return the sums of four products' parts, [parts, rows, units] to [rows, units]: of all four
    at once, which is one exchange between the warps (and nothing to the interpreter)."""
    if INTERPRETED:
        i, f, g, o = tl.sum(i, 0), tl.sum(f, 0), tl.sum(g, 0), tl.sum(o, 0)
    else:
        i, f, g, o = tl.reduce((i, f, g, o), 0, _add)
    return i, f, g, o


# ---------------------------------------------------------------------------------------------
# Products whose weights are streamed


@triton.jit
def _stream_gates(i, f, g, o, source, weight, row, rows, unit, there, depth, C: tl.constexpr):
    """Return the four gates' sums [rows, units] and source [rows, depth] times weight [4H,
    depth]."""
    for first in range(0, depth, C.depth):
        k = first + tl.arange(0, C.depth)
        a = tl.load(
            source + row * depth + k[None, :], mask=(row < rows) & (k < depth)[None, :], other=0.0
        ).to(C.operand)
        at = weight + unit.to(tl.int64) * depth + k[:, None]  # [depth, units]
        mask = (unit < C.size) & (k < depth)[:, None]
        gate = wide(C.size) * depth
        i = dot(a, tl.load(at, mask=mask, other=0.0).to(C.operand), i, C.precision)
        f = dot(a, tl.load(at + gate, mask=mask, other=0.0).to(C.operand), f, C.precision)
        g = dot(a, tl.load(at + 2 * gate, mask=mask, other=0.0).to(C.operand), g, C.precision)
        o = dot(a, tl.load(at + 3 * gate, mask=mask, other=0.0).to(C.operand), o, C.precision)
    return i, f, g, o


# ---------------------------------------------------------------------------------------------
# A step between its products


@triton.jit
def _biases(layer, unit, C: tl.constexpr):
    """Return b_ih + b_hh of each gate, [1, units]."""
    at, there = unit, unit < C.size
    i = _load(layer.bias_ih, at, there) + _load(layer.bias_hh, at, there)
    at += C.size
    f = _load(layer.bias_ih, at, there) + _load(layer.bias_hh, at, there)
    at += C.size
    g = _load(layer.bias_ih, at, there) + _load(layer.bias_hh, at, there)
    at += C.size
    o = _load(layer.bias_ih, at, there) + _load(layer.bias_hh, at, there)
    return i, f, g, o


@triton.jit
def _step(i, f, g, o, c):
    """Return gates behind their non-linearities, c' and h', of the gates before them and c."""
    i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
    c = f * c + i * g
    return i, f, g, o, c, o * tanh(c)


@triton.jit
def _step_backward(dh, dc, i, f, g, o, before, after):
    """Return delta of each gate, and dc, of a step from cell state ``before`` to ``after``."""
    shown = tanh(after)
    e = dc + dh * o * (1.0 - shown * shown)
    delta_i, delta_f = e * g * i * (1.0 - i), e * before * f * (1.0 - f)
    delta_g, delta_o = e * i * (1.0 - g * g), dh * shown * o * (1.0 - o)
    return delta_i, delta_f, delta_g, delta_o, e * f


# ---------------------------------------------------------------------------------------------
# Forward


@triton.jit(do_not_specialize=["steps"])
def lstm_window_forward(
    gates,  # [T, B, 4H]: x W_ih^T; with SAVE afterwards the gates
    hidden,  # [T + 1, B, H]: h at the entrance, and room
    cells,  # [T + 1, B, H], with SAVE
    c,  # [B, H] at the entrance
    last_h,  # [B, H], as last_c
    last_c,
    layer,  # Layer
    lengths,  # int64 [B] or None
    barrier,  # GridBarrier with a word for each block of rows
    steps,
    rows,
    SAVE: tl.constexpr,
    C: tl.constexpr,
):
    """Run a window, in a cooperative launch over (blocks of units, blocks of rows)."""
    row, unit, there = _own(rows, C)
    state, gate = row * C.size + unit, row * (4 * C.size) + unit  # in [B, H] and [B, 4H]
    state_stride, gate_stride = wide(rows) * C.size, wide(rows) * (4 * C.size)
    length = _load_lengths(lengths, row, rows, steps)

    matrix = C.size * C.size
    kept_i = _keep(layer.weight_hh, unit, C.size, 1, C.size, C)
    kept_f = _keep(layer.weight_hh + wide(matrix), unit, C.size, 1, C.size, C)
    kept_g = _keep(layer.weight_hh + wide(2 * matrix), unit, C.size, 1, C.size, C)
    kept_o = _keep(layer.weight_hh + wide(3 * matrix), unit, C.size, 1, C.size, C)
    bias_i, bias_f, bias_g, bias_o = _biases(layer, unit, C)
    cell = _load(c, state, there)

    CHUNKS: tl.constexpr = C.chunks
    GROUP: tl.constexpr = C.group
    z_i, z_f, z_g, z_o = _load_gates(gates, gate, there, C)
    passed = True
    for t in range(steps):
        before = hidden + wide(t) * state_stride
        i = tl.full((C.parts, C.rows, C.units), 0.0, tl.float32)
        f = tl.full((C.parts, C.rows, C.units), 0.0, tl.float32)
        g = tl.full((C.parts, C.rows, C.units), 0.0, tl.float32)
        o = tl.full((C.parts, C.rows, C.units), 0.0, tl.float32)
        for first in tl.static_range(0, CHUNKS, GROUP):
            tiles = _read(before, row, rows, C.size, first, C)
            i = _accumulate(i, tiles, kept_i, first, C)
            f = _accumulate(f, tiles, kept_f, first, C)
            g = _accumulate(g, tiles, kept_g, first, C)
            o = _accumulate(o, tiles, kept_o, first, C)
        i, f, g, o = _sum_parts(i, f, g, o)
        i, f, g, o, new_cell, h = _step(
            i + (z_i.to(tl.float32) + bias_i),
            f + (z_f.to(tl.float32) + bias_f),
            g + (z_g.to(tl.float32) + bias_g),
            o + (z_o.to(tl.float32) + bias_o),
            cell,
        )
        alive = t < length
        cell = tl.where(alive, new_cell, cell)
        shown = tl.where(alive, h, 0.0).to(hidden.dtype.element_ty)
        tl.store(before + state_stride + state, shown, mask=there)
        at = gate + wide(t) * gate_stride
        z_i, z_f, z_g, z_o = _load_gates(gates, at + gate_stride, there & (t + 1 < steps), C)
        if passed:
            passed = _wait_for_all(barrier, t, steps, rows, C.size, LSTM_FORWARD)
        there = there & passed  # nothing more is written otherwise
        # What no program waits for is written behind the barrier, beside the next product.
        tl.store(last_h + state, shown, mask=there & (t == length - 1))
        if SAVE:
            _store_gates(gates, at, i, f, g, o, there & alive, C)
            written = cells + wide(t + 1) * state_stride + state
            tl.store(written, cell.to(cells.dtype.element_ty), mask=there)
    tl.store(last_c + state, cell.to(last_c.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["t", "steps"])
def lstm_step_forward(
    gates,  # [T, B, 4H]: x W_ih^T, or only room; with SAVE afterwards the gates
    x,  # [B, I]: the input, whose product is made here; None where ``gates`` holds it
    before,  # [T, B, H]: h before each step
    after,  # [T, B, H]: h behind it
    cells,  # [T, B, H]: c behind it, or None
    c,  # [B, H]
    new_c,  # [B, H]; may be c
    last_h,  # [B, H] or None
    layer,
    lengths,
    t,
    steps,
    rows,
    features,
    SAVE: tl.constexpr,
    C: tl.constexpr,
):
    """Run step number t, over (blocks of units, blocks of rows)."""
    row, unit, there = _own(rows, C)
    state, gate = row * C.size + unit, row * (4 * C.size) + unit
    alive = t < _load_lengths(lengths, row, rows, steps)
    now, gates_now = wide(t) * rows * C.size, wide(t) * rows * (4 * C.size)

    i, f, g, o = _biases(layer, unit, C)
    if x is None:
        z_i, z_f, z_g, z_o = _load_gates(gates + gates_now, gate, there, C)
        i, f, g, o = i + z_i, f + z_f, g + z_g, o + z_o
    else:
        none = tl.full((C.rows, C.units), 0.0, tl.float32)
        i, f, g, o = i + none, f + none, g + none, o + none
        i, f, g, o = _stream_gates(
            i, f, g, o, x, layer.weight_ih, row, rows, unit, there, features, C
        )
    i, f, g, o = _stream_gates(
        i, f, g, o, before + now, layer.weight_hh, row, rows, unit, there, C.size, C
    )
    cell = _load(c, state, there)
    i, f, g, o, new_cell, h = _step(i, f, g, o, cell)
    cell = tl.where(alive, new_cell, cell)
    shown = tl.where(alive, h, 0.0).to(after.dtype.element_ty)
    tl.store(after + now + state, shown, mask=there)
    tl.store(new_c + state, cell.to(new_c.dtype.element_ty), mask=there)
    if last_h is not None:
        ends = t == _load_lengths(lengths, row, rows, steps) - 1
        tl.store(last_h + state, shown, mask=there & ends)
    if cells is not None:
        tl.store(cells + now + state, cell.to(cells.dtype.element_ty), mask=there)
    if SAVE:
        _store_gates(gates + gates_now, gate, i, f, g, o, there & alive, C)


# ---------------------------------------------------------------------------------------------
# Backward


@triton.jit
def _synthesize(ends, layer, row, rows, unit, there, KIND: tl.constexpr, RANK: tl.constexpr,
                C: tl.constexpr):  # fmt: skip
    """Predict the gradient at a layer's h and c [rows, units], times its factor; zero where the
    sequence ends."""
    DEPTH: tl.constexpr = 32
    features, state_stride = 2 * ends.layers * C.size, wide(rows) * C.size
    h_column, c_column = 2 * layer * C.size + unit, (2 * layer + 1) * C.size + unit
    if KIND == "diagonal":
        own = layer * state_stride + row * C.size + unit
        at_h = _load(ends.weight, h_column, unit < C.size) * _load(ends.h, own, there)
        at_c = _load(ends.weight, c_column, unit < C.size) * _load(ends.c, own, there)
    else:
        at_h = tl.full((C.rows, C.units), 0.0, tl.float32)
        at_c = tl.full((C.rows, C.units), 0.0, tl.float32)
        if KIND == "lowrank":
            reduced = tl.full((C.rows, RANK), 0.0, tl.float32)  # h U^T
        for piece in range(ends.layers):
            for first in range(0, C.size, DEPTH):
                k = first + tl.arange(0, DEPTH)
                at = piece * state_stride + row * C.size + k[None, :]
                inside = (row < rows) & (k < C.size)[None, :]
                h = tl.load(ends.h + at, mask=inside, other=0.0).to(C.operand)
                c = tl.load(ends.c + at, mask=inside, other=0.0).to(C.operand)
                of_h = (2 * piece * C.size + k)[:, None]  # features of these, [DEPTH, 1]
                inside = (k < C.size)[:, None]
                if KIND == "dense":
                    inside = inside & (unit < C.size)
                    at = ends.weight + h_column.to(tl.int64) * features + of_h
                    w_h = tl.load(at, mask=inside, other=0.0).to(C.operand)
                    w_c = tl.load(at + C.size, mask=inside, other=0.0).to(C.operand)
                    at_h = dot(c, w_c, dot(h, w_h, at_h, C.precision), C.precision)
                    at = ends.weight + c_column.to(tl.int64) * features + of_h
                    w_h = tl.load(at, mask=inside, other=0.0).to(C.operand)
                    w_c = tl.load(at + C.size, mask=inside, other=0.0).to(C.operand)
                    at_c = dot(c, w_c, dot(h, w_h, at_c, C.precision), C.precision)
                else:
                    r = tl.arange(0, RANK)[None, :]
                    inside = inside & (r < ends.rank)
                    at = ends.down + r.to(tl.int64) * features + of_h
                    u_h = tl.load(at, mask=inside, other=0.0).to(C.operand)
                    u_c = tl.load(at + C.size, mask=inside, other=0.0).to(C.operand)
                    reduced = dot(c, u_c, dot(h, u_h, reduced, C.precision), C.precision)
        if KIND == "lowrank":
            r = tl.arange(0, RANK)[:, None]
            inside = (r < ends.rank) & (unit < C.size)
            at = ends.weight + h_column.to(tl.int64) * ends.rank + r
            v_h = tl.load(at, mask=inside, other=0.0).to(C.operand)
            at = ends.weight + c_column.to(tl.int64) * ends.rank + r
            v_c = tl.load(at, mask=inside, other=0.0).to(C.operand)
            at_h = dot(reduced.to(C.operand), v_h, at_h, C.precision)
            at_c = dot(reduced.to(C.operand), v_c, at_c, C.precision)
    at_h += _load(ends.bias, h_column, unit < C.size)
    at_c += _load(ends.bias, c_column, unit < C.size)
    if ends.ended is not None:
        over = tl.load(ends.ended + row, mask=row < rows, other=0) != 0
        at_h, at_c = tl.where(over, 0.0, at_h), tl.where(over, 0.0, at_c)
    return at_h * ends.factor, at_c * ends.factor


@triton.jit
def _arriving(grad_h, grad_c, ends, layer, row, rows, unit, there, KIND: tl.constexpr,
              RANK: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """Return the gradients at a layer's final h and c, [rows, units]: those given (None for zero)
    and the synthetic ones, unless KIND is "none"."""
    own = row * C.size + unit
    dh, dc = _load(grad_h, own, there), _load(grad_c, own, there)
    if KIND != "none":
        at_h, at_c = _synthesize(ends, layer, row, rows, unit, there, KIND, RANK, C)
        dh, dc = dh + at_h, dc + at_c
    return dh, dc


@triton.jit
def lstm_inject(
    grad_h, grad_c, start_h, start_c, ends, layer, rows,
    KIND: tl.constexpr, RANK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Make what a window's backward starts from, [B, H] each, where it takes a launch a step."""
    row, unit, there = _own(rows, C)
    dh, dc = _arriving(grad_h, grad_c, ends, layer, row, rows, unit, there, KIND, RANK, C)
    own = row * C.size + unit
    tl.store(start_h + own, dh.to(start_h.dtype.element_ty), mask=there)
    tl.store(start_c + own, dc.to(start_c.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["steps"])
def lstm_window_backward(
    above,  # [T, B, H]: the gradient at the hidden states, or None
    grad_h,  # [B, H] or None, as grad_c
    grad_c,
    gates,  # [T, B, 4H]
    cells,  # [T + 1, B, H]
    weight,  # [4H, H]: W_hh
    delta,  # [T, B, 4H]
    d_h,  # [B, H], as d_c
    d_c,
    lengths,
    ends,  # Ends or None
    layer,  # its index
    barrier,
    steps,
    rows,
    KIND: tl.constexpr,
    RANK: tl.constexpr,
    C: tl.constexpr,
):
    """Run a window backwards, in a cooperative launch over (blocks of units, blocks of rows)."""
    row, unit, there = _own(rows, C)
    state, gate = row * C.size + unit, row * (4 * C.size) + unit
    state_stride, gate_stride = wide(rows) * C.size, wide(rows) * (4 * C.size)
    length = _load_lengths(lengths, row, rows, steps)

    start, dc = _arriving(grad_h, grad_c, ends, layer, row, rows, unit, there, KIND, RANK, C)
    kept = _keep(weight, unit, 1, C.size, 4 * C.size, C)

    # What a step reads of its own, asked for during the step before.
    last = wide(steps - 1)
    alive = there & (last < length)
    i, f, g, o = _load_gates(gates + last * gate_stride, gate, alive, C)
    after = tl.load(cells + (last + 1) * state_stride + state, mask=alive, other=0.0)
    before = tl.load(cells + last * state_stride + state, mask=alive, other=0.0)
    given = before
    if above is not None:
        given = tl.load(above + last * state_stride + state, mask=alive, other=0.0)
    CHUNKS: tl.constexpr = C.chunks
    GROUP: tl.constexpr = C.group
    dh = tl.full((C.rows, C.units), 0.0, tl.float32)
    passed = True
    for back in range(steps):
        t = last - back
        if above is not None:
            dh += given.to(tl.float32)
        delta_i, delta_f, delta_g, delta_o, new_dc = _step_backward(
            dh + tl.where(t == length - 1, start, 0.0),
            dc,
            i.to(tl.float32),
            f.to(tl.float32),
            g.to(tl.float32),
            o.to(tl.float32),
            before.to(tl.float32),
            after.to(tl.float32),
        )
        # Where a row has ended its gates were not read: the products above are zeros there.
        dc = tl.where(t < length, new_dc, dc)
        now = delta + t * gate_stride
        _store_gates(now, gate, delta_i, delta_f, delta_g, delta_o, there, C)
        alive = there & (t - 1 < length) & (t > 0)
        i, f, g, o = _load_gates(gates + (t - 1) * gate_stride, gate, alive, C)
        after = tl.load(cells + t * state_stride + state, mask=alive, other=0.0)
        before = tl.load(cells + (t - 1) * state_stride + state, mask=alive, other=0.0)
        if above is not None:
            given = tl.load(above + (t - 1) * state_stride + state, mask=alive, other=0.0)
        if passed:
            passed = _wait_for_all(barrier, t.to(tl.int32), steps, rows, C.size, LSTM_BACKWARD)
        there = there & passed  # nothing more is written otherwise
        sums = tl.full((C.parts, C.rows, C.units), 0.0, tl.float32)
        for first in tl.static_range(0, CHUNKS, GROUP):
            tiles = _read(now, row, rows, 4 * C.size, first, C)
            sums = _accumulate(sums, tiles, kept, first, C)
        dh = tl.sum(sums, 0)
    tl.store(d_h + state, dh.to(d_h.dtype.element_ty), mask=there)
    tl.store(d_c + state, dc.to(d_c.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["t", "steps"])
def lstm_step_backward(
    above,  # [T, B, H] or None
    grad_h,  # [B, H] or None: at the final state
    dc,  # [B, H]: at c behind the step, or None
    gates,  # [T, B, 4H]
    before,  # [T, B, H]: c before each step
    after,  # [T, B, H]: c behind it
    weight,  # [4H, H]: W_hh
    delta,  # [T, B, 4H]
    new_dc,  # [B, H]: at c before the step; may be dc
    lengths,
    t,
    steps,
    rows,
    LAST: tl.constexpr,  # no step comes behind
    C: tl.constexpr,
):
    """Run step number t backwards, over (blocks of units, blocks of rows)."""
    row, unit, there = _own(rows, C)
    state, gate = row * C.size + unit, row * (4 * C.size) + unit
    length = _load_lengths(lengths, row, rows, steps)
    now, gates_now = wide(t) * rows * C.size, wide(t) * rows * (4 * C.size)
    alive = there & (t < length)

    dh = tl.full((C.rows, C.units), 0.0, tl.float32)
    if not LAST:
        behind = delta + gates_now + wide(rows) * (4 * C.size)
        # [rows, 4H] times W_hh [4H, H]: its columns are read across rows of the matrix.
        for first in range(0, 4 * C.size, C.depth):
            k = first + tl.arange(0, C.depth)
            inside = k < 4 * C.size
            a = tl.load(
                behind + row * (4 * C.size) + k[None, :],
                mask=(row < rows) & inside[None, :],
                other=0.0,
            )
            w = tl.load(
                weight + k[:, None].to(tl.int64) * C.size + unit,
                mask=inside[:, None] & (unit < C.size),
                other=0.0,
            )
            dh = dot(a.to(C.operand), w.to(C.operand), dh, C.precision)
    if above is not None:
        dh += _load(above + now, state, alive)
    dh += _load(grad_h, state, there & (t == length - 1))
    i, f, g, o = _load_gates(gates + gates_now, gate, alive, C)
    arrived = _load(dc, state, there)
    delta_i, delta_f, delta_g, delta_o, left = _step_backward(
        dh,
        arrived,
        i.to(tl.float32),
        f.to(tl.float32),
        g.to(tl.float32),
        o.to(tl.float32),
        _load(before + now, state, alive),
        _load(after + now, state, alive),
    )
    _store_gates(delta + gates_now, gate, delta_i, delta_f, delta_g, delta_o, there, C)
    left = tl.where(t < length, left, arrived)
    tl.store(new_dc + state, left.to(new_dc.dtype.element_ty), mask=there)


# ---------------------------------------------------------------------------------------------
# Update


class UpdateOptions(NamedTuple):
    """What the kernels of an update are compiled for."""

    rows: int  # tile of a weight's gradient: of its 4H rows,
    columns: int  # of its I or H columns,
    depth: int  # and of the N rows that it is a sum over
    operand: Any
    precision: str
    rule: str
    nesterov: bool
    momentum: bool


@triton.jit
def _largest_of(matrix, rows, columns, program):
    """Return the largest magnitude that a program sees of a matrix."""
    ROWS: tl.constexpr = 16
    COLUMNS: tl.constexpr = 128
    across = tl.cdiv(columns, COLUMNS)
    largest = 0.0
    for index in range(program, tl.cdiv(rows, ROWS) * across, tl.num_programs(0)):
        row, column = index // across * ROWS, index % across * COLUMNS
        tile = load_tile(matrix, row, column, rows, columns, ROWS, COLUMNS)
        largest = tl.maximum(largest, magnitude(tile.to(tl.float32)))
    return largest


@triton.jit
def lstm_measure(of, largest, failed, record, step, hyper, count, features, size):
    """Leave the largest magnitudes of a layer's delta, input and hidden state (``of``: Rows), by
    program; and what an update needs before any of its programs writes. A window whose programs did
    not meet (``record``: see :class:`GridBarrier`) has left nothing to update by."""
    program = tl.program_id(0)
    tl.store(largest + program, _largest_of(of.delta, count, 4 * size, program))
    tl.store(largest + _PARTS + program, _largest_of(of.input, count, features, program))
    tl.store(largest + 2 * _PARTS + program, _largest_of(of.hidden, count, size, program))
    if program == 0:
        tl.store(failed, tl.load(record))
        tl.store(step, tl.load(hyper + STEP))


@triton.jit
def _gradient(delta, of, row, column, count, rows, columns, C: tl.constexpr):
    """Return a tile [rows, columns] of ``delta^T of``."""
    g = tl.full((C.rows, C.columns), 0.0, tl.float32)
    for k in range(0, count, C.depth):
        d = load_tile(delta, k, row, count, rows, C.depth, C.rows)
        x = load_tile(of, k, column, count, columns, C.depth, C.columns)
        g = dot(tl.trans(d.to(C.operand)), x.to(C.operand), g, C.precision)
    return g


@triton.jit
def _bias_gradient(delta, row, count, rows, C: tl.constexpr):
    """Return ``rows`` elements of delta's column sums."""
    sums = tl.full((C.depth, C.rows), 0.0, tl.float32)
    for k in range(0, count, C.depth):
        sums += load_tile(delta, k, row, count, rows, C.depth, C.rows).to(tl.float32)
    return tl.sum(sums, 0)


@triton.jit
def _is_bounded(largest, other, programs, count):
    """Say whether the largest magnitudes that so many programs saw of delta and the other operand
    show a sum over ``count`` of their products to be finite."""
    at = tl.arange(0, _PARTS)
    delta = tl.max(tl.load(largest + at, mask=at < programs, other=0.0))
    of = tl.max(tl.load(largest + other * _PARTS + at, mask=at < programs, other=0.0))
    return of * delta * count < _LARGEST


@triton.jit
def _note_failure(failed, g):
    """Say that an element is not finite. All who say so write the same."""
    if not (magnitude(g) < float("inf")):
        tl.store(failed, 1)


@triton.jit
def _settle_weight(parameter, first, second, g, row, column, rows, columns, factors,
                   C: tl.constexpr, step, SLOT: tl.constexpr):  # fmt: skip
    start, at = tile_offsets(row, column, columns, C.rows, C.columns)
    inside = is_inside(row, column, rows, columns, C.rows, C.columns)
    settle(parameter, first, second, None, g, start, at, inside, factors, C, step, SLOT)


@triton.jit
def lstm_update(
    of,  # Rows
    layer,  # Layer, as first and second; None where a slot is frozen
    first,
    second,
    largest,  # float32 [3, PARTS]: see lstm_measure
    failed,  # int32 [1]
    step,  # float64 [1]
    hyper,
    programs,  # that measured
    count,
    features,
    size,
    TRIAL: tl.constexpr,
    LAST: tl.constexpr,
    SLOT: tl.constexpr,  # the number of the layer's first slot: see settle
    C: tl.constexpr,
):
    """Apply a layer's gradients, over (tiles of 4H rows, tiles of I columns, then of H, then one).

    With TRIAL they are only looked at, where the largest magnitudes do not show them to be finite.
    Otherwise they are applied, if all layers' are finite. The LAST of an update's launches counts.
    """
    rows = 4 * size
    row, j = tl.program_id(0) * C.rows, tl.program_id(1)
    input_tiles, hidden_tiles = tl.cdiv(features, C.columns), tl.cdiv(size, C.columns)
    if TRIAL:
        if j < input_tiles:
            if layer.weight_ih is not None:
                if not _is_bounded(largest, 1, programs, count):
                    column = j * C.columns
                    g = _gradient(of.delta, of.input, row, column, count, rows, features, C)
                    _note_failure(failed, g)
        elif j < input_tiles + hidden_tiles:
            if layer.weight_hh is not None:
                if not _is_bounded(largest, 2, programs, count):
                    column = (j - input_tiles) * C.columns
                    g = _gradient(of.delta, of.hidden, row, column, count, rows, size, C)
                    _note_failure(failed, g)
        elif layer.bias_ih is not None or layer.bias_hh is not None:
            _note_failure(failed, _bias_gradient(of.delta, row, count, rows, C))
    else:
        done = tl.load(step) + 1.0
        sound = tl.load(failed) == 0
        if sound:
            factors = rule_factors(hyper, done, C.rule)
            if j < input_tiles:
                if layer.weight_ih is not None:
                    column = j * C.columns
                    g = _gradient(of.delta, of.input, row, column, count, rows, features, C)
                    _settle_weight(
                        layer.weight_ih, first.weight_ih, second.weight_ih,
                        g, row, column, rows, features, factors, C, done, SLOT,
                    )  # fmt: skip
            elif j < input_tiles + hidden_tiles:
                if layer.weight_hh is not None:
                    column = (j - input_tiles) * C.columns
                    g = _gradient(of.delta, of.hidden, row, column, count, rows, size, C)
                    _settle_weight(
                        layer.weight_hh, first.weight_hh, second.weight_hh,
                        g, row, column, rows, size, factors, C, done, SLOT + 1,
                    )  # fmt: skip
            elif layer.bias_ih is not None or layer.bias_hh is not None:
                sums = _bias_gradient(of.delta, row, count, rows, C)
                at = row + tl.arange(0, C.rows)
                if layer.bias_ih is not None:
                    settle(layer.bias_ih, first.bias_ih, second.bias_ih, None,
                           sums, 0, at, at < rows, factors, C, done, SLOT + 2)  # fmt: skip
                if layer.bias_hh is not None:
                    settle(layer.bias_hh, first.bias_hh, second.bias_hh, None,
                           sums, 0, at, at < rows, factors, C, done, SLOT + 3)  # fmt: skip
        if LAST:
            if (row == 0) & (j == 0):
                if sound:
                    tl.store(hyper + STEP, done)
                else:
                    tl.store(hyper + SKIPPED, tl.load(hyper + SKIPPED) + 1.0)


# ---------------------------------------------------------------------------------------------
# Tiles


class Machine(NamedTuple):
    """What of a device decides whether a window fits."""

    processors: int
    shared: int  # bytes of shared memory that a program can have


# By architecture, for compiling ahead of time: A100, H100 SXM, B200.
MACHINES = {
    80: Machine(108, 163 * 1024),
    90: Machine(132, 227 * 1024),
    100: Machine(148, 227 * 1024),
}


class WindowTiles(NamedTuple):
    """How a window's steps run; see :class:`Options`."""

    persistent: bool  # one launch a window; otherwise one a step
    rows: int
    units: int
    depth: int
    warps: int  # also the parts of a product's depth, if persistent
    group: int = 1  # not read unless persistent
    stages: int = 1


class UpdateTiles(NamedTuple):
    """How an update is divided among programs; see :class:`UpdateOptions`."""

    programs: int  # that measure, at most 64

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


class Products(NamedTuple):
    """What the products of a kernel are made of."""

    dtype: torch.dtype  # of their operands
    precision: str  # of float32 ones: "tf32", "tf32x3"

    @property
    def width(self) -> int:
        """Bytes that an operand's element takes: "tf32x3" splits it in two."""
        return self.dtype.itemsize * (2 if self.precision == "tf32x3" else 1)


def _power(n: int, least: int = 16) -> int:
    """Return the least power of two that is neither below n nor below ``least``."""
    return max(least, 1 << (n - 1).bit_length())


def _blocks(n: int, block: int) -> int:
    return -(-n // block)


def shared_bytes(tiles: WindowTiles, depth: int, gates: int, width: int) -> int:
    """Bound the shared memory of a persistent program as Triton lays it out, at the most: its
    weights, and the larger of a group of the state's tiles and a sum's parts on their way to be
    added up.

    Args:
        tiles: the program's.
        depth: of its products: H, backwards 4H.
        gates: how many products it makes: 4, backwards 1.
        width: of an operand's element, in bytes.
    """
    chunk = tiles.warps * tiles.depth
    chunks = _blocks(depth, chunk)
    weights = width * gates * tiles.units * chunks * chunk
    staged = width * tiles.rows * chunk * min(tiles.group, chunks)
    return weights + max(staged, 4 * gates * tiles.warps * tiles.rows * tiles.units)


def window_candidates(
    batch: int, size: int, width: int, backward: bool, machine: Machine
) -> Iterator[WindowTiles]:
    """Yield what fits the machine, the best by rule of thumb first.

    A window in one launch needs all programs resident at a time: one a multiprocessor, since the
    weights of one take most of its shared memory. Few rows and units a program make a short step.
    """
    depth, gates = (4 * size, 1) if backward else (size, 4)
    for rows, units in itertools.product((16, 32, 64), (16, 32)):
        useful = rows < 2 * _power(batch) and units < 2 * _power(size)
        programs = _blocks(batch, rows) * _blocks(size, units)
        # A warp has a part of each sum in registers: 64 of a thread at the most.
        if not useful or programs > machine.processors or gates * rows * units > 64 * 32:
            continue
        warps = min(8, _power(depth) // 16)
        tile = min(32, _power(_blocks(depth, warps)))
        # What is asked for together waits in registers, too: again 64 of a thread, or what is left.
        group = (64 if rows < 64 else 32) * 32 * 4 // (rows * tile * width)
        while group:
            tiles = WindowTiles(True, rows, units, tile, warps, group)
            if shared_bytes(tiles, depth, gates, width) <= machine.shared:
                yield tiles
                break
            group //= 2
    yield from step_candidates(batch, size, width, machine)


def step_candidates(batch: int, size: int, width: int, machine: Machine) -> Iterator[WindowTiles]:
    """Yield tiles of a step a launch, and of the cell, the best by rule of thumb first."""
    rows = min(64, _power(batch))
    crowded = _blocks(batch, rows) * _blocks(size, 32) >= machine.processors
    for units in (32, 16) if crowded else (16, 32):
        yield WindowTiles(False, rows, units, 128 // width, 4, stages=3)


def window_tiles(
    batch: int, size: int, width: int, backward: bool, machine: Machine | None
) -> WindowTiles:
    """Follow the rule of thumb. In the interpreter (no machine) programs run one after another, so
    that a window in one launch is one program's."""
    if machine is not None:
        return next(window_candidates(batch, size, width, backward, machine))
    if batch <= 64 and size <= 64:
        depth = _power(_blocks(4 * size if backward else size, 2))
        return WindowTiles(True, _power(batch), _power(size), depth, 2)
    return step_tiles(batch, size, width, machine)


def step_tiles(batch: int, size: int, width: int, machine: Machine | None) -> WindowTiles:
    """Follow the rule of thumb; without a machine that of the interpreter."""
    if machine is not None:
        return next(step_candidates(batch, size, width, machine))
    return WindowTiles(False, 64, 64, 64, 4)


def update_candidates(size: int, machine: Machine) -> Iterator[UpdateTiles]:
    """Yield tiles of an update, the best by rule of thumb first: large ones where there are
    enough."""
    tiles = [UpdateTiles(64, 128, 64, 32, 8, 3), UpdateTiles(64, 64, 64, 32, 4, 3)]
    few = _blocks(4 * size, 128) * _blocks(2 * size, 64) < machine.processors
    yield from reversed(tiles) if few else tiles


def update_tiles(size: int, machine: Machine | None) -> UpdateTiles:
    """Follow the rule of thumb; without a machine that of the interpreter."""
    if machine is None:
        return UpdateTiles(1, 128, 128, 64, 4, 1)
    return next(update_candidates(size, machine))


# ---------------------------------------------------------------------------------------------
# Launchers


def _options(tiles: WindowTiles, size: int, depth: int, products: Products) -> Options:
    parts = tiles.warps if tiles.persistent else 1
    made = Options(
        size, tiles.rows, tiles.units, tiles.depth, parts, _blocks(depth, parts * tiles.depth),
        tiles.group, TYPES[products.dtype], products.precision,
    )  # fmt: skip
    frozen: Options = constants(made)
    return frozen


def _grid(tiles: WindowTiles, batch: int, size: int) -> tuple[int, int]:
    return _blocks(size, tiles.units), _blocks(batch, tiles.rows)


def _launch_options(tiles: WindowTiles) -> dict[str, Any]:
    made: dict[str, Any] = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    if tiles.persistent:
        made["launch_cooperative_grid"] = True
    return made


def groups(tiles: WindowTiles, batch: int) -> int:
    """Count how many groups of programs meet, each by itself, in a persistent launch."""
    return _blocks(batch, tiles.rows)


def plan_forward(
    layer: Layer,
    c: Tensor,
    trace: Trace,
    lengths: Tensor | None,
    carry: Tensor,
    barrier: GridBarrier | None,
    save: bool,
    tiles: WindowTiles,
    products: Products,
) -> list[Launch]:
    """Plan a layer's window behind its inputs' product.

    Args:
        layer: float32, or of the trace's dtype.
        c: [B, H], the cell state at the entrance.
        trace: of this layer alone. ``gates`` [T, B, 4H] has x W_ih^T and, with ``save``, gets the
            gates; ``hidden`` and ``cells`` [T + 1, B, H] have the state at the entrance in front
            and get the rest (``cells`` only with ``save``); ``h`` and ``c`` [B, H] get the final
            state.
        lengths: int64 [B] or None.
        carry: float32 [B, H], gets c after every step; not used if ``tiles.persistent``.
        barrier: with words for all :func:`groups`; used if ``tiles.persistent``.
        save, tiles, products: what to compile for.
    """
    hidden, last_h, last_c, cells, gates = trace
    batch, size = c.shape
    steps = hidden.shape[0] - 1
    grid = _grid(tiles, batch, size)
    common = {
        "gates": gates, "last_h": last_h, "layer": layer, "lengths": lengths, "steps": steps,
        "rows": batch, "SAVE": save, "C": _options(tiles, size, size, products),
    }  # fmt: skip
    if tiles.persistent:
        whole = {"hidden": hidden, "cells": cells, "c": c, "last_c": last_c, "barrier": barrier}
        return [Launch(lstm_window_forward, grid, common | whole, _launch_options(tiles))]
    step = {
        "x": None, "before": hidden, "after": hidden[1:], "new_c": carry, "features": 0,
        "cells": cells[1:] if save and cells is not None else None,
    }  # fmt: skip
    return [
        Launch(
            lstm_step_forward,
            grid,
            common | step | {"t": t, "c": carry if t else c},
            _launch_options(tiles),
        )
        for t in range(steps)
    ]


def plan_backward(
    layer: Layer,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    trace: Trace,
    lengths: Tensor | None,
    made: Gradients,
    ends: Ends | None,
    kind: str,
    index: int,
    start: tuple[Tensor, Tensor] | None,
    carry: Tensor,
    barrier: GridBarrier | None,
    tiles: WindowTiles,
    products: Products,
) -> list[Launch]:
    """Plan a layer's window backwards, in front of the products over all steps.

    Args:
        layer: as in :func:`plan_forward`.
        grads: gradients at the hidden states [T, B, H] and at the final h and c [B, H].
        trace: of this layer alone, as :func:`plan_forward` left it.
        lengths: int64 [B] or None.
        made: of this layer alone: gets ``delta`` [T, B, 4H], of the operands' dtype, and ``h`` and
            ``c`` [B, H]; of them neither is written unless ``tiles.persistent``: ``c`` is then in
            ``carry``, and ``h`` is delta_1 W_hh.
        ends: the synthesizer at the window's end, if the synthetic gradient is to be added.
        kind: its kind.
        index: which of its layers this is.
        start: room [B, H] for what the backward starts from at h and c; used with ``ends`` unless
            ``tiles.persistent``.
        carry: float32 [B, H], gets the gradient at c before every step; not used if
            ``tiles.persistent``.
        barrier, tiles, products: as in :func:`plan_forward`.
    """
    above, grad_h, grad_c = grads
    hidden, last_h, _, cells, gates = trace
    batch, size = last_h.shape
    steps = hidden.shape[0] - 1
    grid = _grid(tiles, batch, size)
    options = _options(tiles, size, 4 * size, products)
    at_end = {
        "grad_h": grad_h, "grad_c": grad_c, "ends": ends, "layer": index, "rows": batch,
        "KIND": kind, "RANK": _power(0 if ends is None else ends.rank), "C": options,
    }  # fmt: skip
    common = {
        "above": above, "gates": gates, "weight": layer.weight_hh, "delta": made.delta,
        "lengths": lengths, "steps": steps, "rows": batch, "C": options,
    }  # fmt: skip
    if tiles.persistent:
        whole = {"cells": cells, "d_h": made.h, "d_c": made.c, "barrier": barrier}
        arguments = at_end | common | whole
        return [Launch(lstm_window_backward, grid, arguments, _launch_options(tiles))]
    launches = []
    if ends is not None:
        assert start is not None
        arguments = at_end | {"start_h": start[0], "start_c": start[1]}
        launches.append(Launch(lstm_inject, grid, arguments, _launch_options(tiles)))
        grad_h, grad_c = start
    assert cells is not None
    step = {"grad_h": grad_h, "before": cells, "after": cells[1:], "new_dc": carry}
    for t in reversed(range(steps)):
        last = t == steps - 1
        now = {"t": t, "dc": grad_c if last else carry, "LAST": last}
        launches.append(
            Launch(lstm_step_backward, grid, common | step | now, _launch_options(tiles))
        )
    return launches


def plan_cell_forward(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    layer: Layer,
    new_h: Tensor,
    new_c: Tensor,
    gates: Tensor | None,
    tiles: WindowTiles,
    products: Products,
) -> list[Launch]:
    """Plan one step, its two products and what follows them in one launch: x [B, I], h, c [B, H].
    ``new_h``, ``new_c`` [B, H] and ``gates`` [B, 4H], if they are wanted, get the results."""
    batch, size = h.shape
    arguments = {
        "gates": gates, "x": x, "before": h, "after": new_h, "cells": None, "c": c,
        "new_c": new_c, "last_h": None, "layer": layer, "lengths": None, "t": 0, "steps": 1,
        "rows": batch, "features": x.shape[1], "SAVE": gates is not None,
        "C": _options(tiles, size, size, products),
    }  # fmt: skip
    grid = _grid(tiles, batch, size)
    return [Launch(lstm_step_forward, grid, arguments, _launch_options(tiles))]


def plan_cell_backward(
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    c: Tensor,
    new_c: Tensor,
    gates: Tensor,
    weight: Tensor,
    delta: Tensor,
    d_c: Tensor,
    tiles: WindowTiles,
    products: Products,
) -> list[Launch]:
    """Plan the way back through one step from c to new_c [B, H], in front of its products:
    ``delta`` [B, 4H] and ``d_c`` [B, H] get the results. ``weight`` is W_hh."""
    batch, size = c.shape
    arguments = {
        "above": None, "grad_h": grad_h, "dc": grad_c, "gates": gates, "before": c,
        "after": new_c, "weight": weight, "delta": delta, "new_dc": d_c, "lengths": None, "t": 0,
        "steps": 1, "rows": batch, "LAST": True, "C": _options(tiles, size, 4 * size, products),
    }  # fmt: skip
    grid = _grid(tiles, batch, size)
    return [Launch(lstm_step_backward, grid, arguments, _launch_options(tiles))]


class Rule(NamedTuple):
    """An update rule over the slots of all layers, four a layer: as
    :class:`fused_dni.ops.types.RuleTensors`."""

    kind: str
    nesterov: bool
    hyper: Tensor
    first: tuple[Tensor | None, ...]
    second: tuple[Tensor | None, ...]
    trainable: tuple[bool, ...]
    stochastic: bool = False


class UpdateWorkspace(NamedTuple):
    """Room for what an update has to know before it writes; nothing has to be in it."""

    largest: Tensor  # float32 [L, 3 * PARTS]
    failed: Tensor  # int32 [1]
    step: Tensor  # float64 [1]

    @staticmethod
    def allocate(layers: int, like: Tensor) -> UpdateWorkspace:
        """Allocate it on the device of ``like``."""
        return UpdateWorkspace(
            like.new_empty(layers, 3 * _PARTS.value, dtype=torch.float32),
            like.new_empty(1, dtype=torch.int32),
            like.new_empty(1, dtype=torch.float64),
        )


def plan_update(
    rows: tuple[Rows, ...],
    layers: tuple[Layer, ...],
    rule: Rule,
    workspace: UpdateWorkspace,
    record: Tensor,
    tiles: UpdateTiles,
    products: Products,
) -> list[Launch]:
    """Apply ``rule`` to what ``rows`` make of gradients: three launches a layer.

    Measure what bounds the products, try the products where the bounds do not show them to be
    finite, and apply, each for all layers before the next. Mutates what
    :meth:`fused_dni.ops.types.Backend.lstm_update_` says. ``record`` is a :class:`GridBarrier`'s.
    """
    measure, trial, apply = [], [], []
    momentum = rule.kind == "sgd" and any(m is not None for m in rule.first)
    options = UpdateOptions(
        tiles.rows, tiles.columns, tiles.depth, TYPES[products.dtype], products.precision,
        rule.kind, rule.nesterov, momentum or rule.kind != "sgd",
    )  # fmt: skip
    options = constants(options)
    for k, (of, layer) in enumerate(zip(rows, layers, strict=True)):
        slots = slice(4 * k, 4 * k + 4)
        first, second = Layer(*rule.first[slots]), Layer(*rule.second[slots])
        trained = Layer(
            *[p if on else None for p, on in zip(layer, rule.trainable[slots], strict=True)]
        )
        count, features = of.input.shape
        size = of.hidden.shape[1]
        known = {
            "of": of, "largest": workspace.largest[k], "failed": workspace.failed,
            "step": workspace.step, "hyper": rule.hyper, "count": count, "features": features,
            "size": size,
        }  # fmt: skip
        measured = known | {"record": record}
        measure.append(Launch(lstm_measure, (tiles.programs,), measured, {"num_warps": 4}))
        grid = (
            _blocks(4 * size, tiles.rows),
            _blocks(features, tiles.columns) + _blocks(size, tiles.columns) + 1,
        )
        arguments = known | {
            "layer": trained, "first": first, "second": second, "programs": tiles.programs,
            # Of no account but to rounding at random: one kernel does for all layers otherwise.
            "SLOT": 4 * k if rule.stochastic else 0, "C": options,
        }  # fmt: skip
        how = {"num_warps": tiles.warps, "num_stages": tiles.stages}
        trial.append(Launch(lstm_update, grid, arguments | {"TRIAL": True, "LAST": False}, how))
        last = k == len(layers) - 1
        apply.append(Launch(lstm_update, grid, arguments | {"TRIAL": False, "LAST": last}, how))
    return measure + trial + apply
