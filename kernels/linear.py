"""The linear layer on a GPU: forward, synthetic gradient and update, in one launch or in several.

One kernel is all ops. Its work is a list of phases over tiles of matrices; the formulas stand in
fused_dni.backends.reference.linear. With x [N, I], W [O, I], h [N, O]:

=========  ================  ==================================================================
PREPARE    x, W              x's largest magnitude; W in the type that products take, if wanted
PRODUCT    tiles of [N, O]   z = x W^T + b and its statistics over the tile
NORMALIZE  tiles of [N, O]   n, h; a low-rank synthesizer's h U^T over the tile
REDUCE     [N, R]            the sum of those over all features
GRADIENT   tiles of [N, O]   the synthetic gradient (or a given one), through the activation
DELTA      tiles of [N, O]   the gradient at z, through the normalisation
MEASURE    [N, O]            the largest magnitude of a given gradient at z
DX         tiles of [N, I]   delta W
TRIAL      tiles of [O, I]   delta^T x, only looked at, where bounds do not show it to be finite
WEIGHT     tiles of [O, I]   delta^T x, and the rule (or the gradient alone)
=========  ================  ==================================================================

An op is a range of them: a step all but MEASURE, a forward PRODUCT and NORMALIZE, a backward
GRADIENT to WEIGHT without a rule, an update PREPARE, MEASURE, TRIAL and WEIGHT. In one launch
(cooperative: all programs are resident) a grid barrier stands where a phase reads what other
programs wrote; in several launches each phase is one, with tiles of its own. Where a tile holds all
rows (batch normalisation) or all features (layer normalisation), PRODUCT does the work of NORMALIZE
and GRADIENT that of DELTA, and the barriers between them are gone. With the interface at the
preactivation the synthetic gradient is the one at z: GRADIENT leaves it as it is, and there is no
DELTA.

Sums over tiles are sums of partial sums in a fixed order: the same input gives the same bits. An
update is all or nothing: the largest magnitudes of delta and x are known before it. If N times
their product is a float32, so is every element of delta^T x; otherwise TRIAL looks at all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fused_dni.kernels.barrier import LINEAR, Kernel, wait_for_all
from fused_dni.kernels.common import (
    SKIPPED,
    STEP,
    activate,
    dot,
    rule_factors,
    slope,
)
from fused_dni.kernels.launch import Launch, constants
from fused_dni.kernels.synthesizer import (
    TYPES,
    counted_rows,
    down_tile,
    predict_tile,
    reduce_tiles,
)
from fused_dni.kernels.tiles import (
    FLAGS,
    combine_moments,
    is_inside,
    largest_left,
    load_tile,
    load_vector,
    magnitude,
    place,
    settle,
    store_tile,
    store_vector,
    sum_list,
    tile_offsets,
    wide,
)
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

PREPARE: tl.constexpr = tl.constexpr(0)
PRODUCT: tl.constexpr = tl.constexpr(1)
NORMALIZE: tl.constexpr = tl.constexpr(2)
REDUCE: tl.constexpr = tl.constexpr(3)
GRADIENT: tl.constexpr = tl.constexpr(4)
DELTA: tl.constexpr = tl.constexpr(5)
MEASURE: tl.constexpr = tl.constexpr(6)
DX: tl.constexpr = tl.constexpr(7)
TRIAL: tl.constexpr = tl.constexpr(8)
WEIGHT: tl.constexpr = tl.constexpr(9)

PHASES = (
    "prepare", "product", "normalize", "reduce", "gradient", "delta", "measure", "dx", "trial",
    "weight",
)  # fmt: skip
KERNEL = Kernel("linear_kernel", PHASES, ("N", "I", "O"))

_LARGEST: tl.constexpr = tl.constexpr(1.0e38)  # well inside float32


class Tensors(NamedTuple):
    """Everything a launch may read or write; None where an op has no use for it."""

    x: Any = None  # [N, I]
    # The layer.
    weight: Any = None  # [O, I]
    bias: Any = None  # [O], as the five below
    norm_weight: Any = None
    norm_bias: Any = None
    running_mean: Any = None
    running_var: Any = None
    # The synthesizer and what it is conditioned on.
    synthesizer_weight: Any = None  # [O, O], [O, R] or [O]
    down: Any = None  # [R, O]
    context_weight: Any = None  # [O, K]; with a table []
    synthesizer_bias: Any = None  # [O]
    table: Any = None  # [K, O]
    labels: Any = None  # int64 [N]
    vectors: Any = None  # [N, K]
    # The rule: float64 hyper-parameters, moments by slot.
    hyper: Any = None
    first_weight: Any = None
    first_bias: Any = None
    first_norm_weight: Any = None
    first_norm_bias: Any = None
    second_weight: Any = None
    second_bias: Any = None
    second_norm_weight: Any = None
    second_norm_bias: Any = None
    grad_h: Any = None  # [N, O]: where there is no synthesizer
    # Results.
    h: Any = None  # [N, O]
    normalized: Any = None  # float32 [N, O]: n
    rstd: Any = None  # float32 [O] (batch) or [N] (layer)
    scaled: Any = None  # float32 [N, O]: M(h)
    reduced: Any = None  # float32 [N, R]: h U^T
    delta: Any = None  # [N, O]: the gradient at z
    dx: Any = None  # [N, I]
    grad_weight: Any = None  # [O, I]
    grad_bias: Any = None  # [O], given to an update
    grad_norm_weight: Any = None
    grad_norm_bias: Any = None
    # Workspace, float32 unless it says otherwise.
    operand: Any = None  # [O, I]: W as products take it; W itself where nothing was cast
    z: Any = None  # [N, O]: for NORMALIZE to read; `normalized` itself where that is wanted
    moments: Any = (
        None  # batch [row tiles, 2, O], layer [out tiles, 2, N]: mean, squared deviations
    )
    batch: Any = None  # [2, O]: mean and unbiased variance of the batch
    partial: Any = None  # [out tiles, N, R]
    gradient: Any = None  # [N, O]: at n, on its way to delta
    columns: Any = None  # [row tiles, 2, O]: sums of gy and gy n
    across: Any = None  # [out tiles, 2, N]: sums of gn and gn n
    shifts: Any = None  # [row tiles, O]: sums of delta
    largest: Any = None  # [3, FLAGS]: largest magnitudes that a program saw: of x, delta, products
    squares: Any = None  # float64 [FLAGS]: squared synthetic gradient, summed by a program
    step: Any = None  # float64 [1]: the rule's step count before this one
    barrier: Any = None  # GridBarrier, in one launch


class Sizes(NamedTuple):
    """Numbers that change from call to call without another compilation."""

    rows: int  # N
    inputs: int  # I
    outputs: int  # O
    rank: int  # R, 0 without
    classes: int  # K, 0 without
    x_programs: int  # how many programs left an entry in `largest[0]`
    delta_programs: int  # in `largest[1]` and `squares`
    trial_programs: int  # in `largest[2]`
    inverse_scale: float  # 1 / kappa
    max_norm: float
    eps: float
    momentum: float
    ignored: int  # with a table: the label of rows that are not in the loss


class Options(NamedTuple):
    """What a kernel is compiled for."""

    # Tiles: of [N, O] in PRODUCT, of [N, O] behind it, of [N, I] in DX, of [O, I] in WEIGHT; and
    # the length of a trip through a product's inner dimension.
    product_rows: int
    product_outs: int
    rows: int
    outs: int
    dx_rows: int
    dx_ins: int
    weight_outs: int
    weight_ins: int
    depth: int
    rank: int  # R, rounded up to what a product takes
    # The layer.
    norm: str  # "none", "batch", "layer"
    statistics: bool  # batch: this batch's, not the running ones
    whole: bool  # a tile holds all that its normalisation's statistics are taken over
    activation: str
    # The gradient.
    # "dense", "lowrank", "diagonal": a synthesizer; "given": from above; "none": nothing to be done
    source: str
    interface: str  # "output": it is the gradient at h; "preactivation": at z
    clip: bool
    # The rule; "none": gradients are stored.
    rule: str
    nesterov: bool
    momentum: bool
    train_weight: bool
    train_bias: bool
    train_norm_weight: bool
    train_norm_bias: bool
    # Products: types of their operands, and how float32 ones are multiplied.
    operand: Any
    precision: str
    back_operand: Any
    back_precision: str
    described: bool  # x, operand and delta are tensor descriptors in PRODUCT, DX and WEIGHT


# ---------------------------------------------------------------------------------------------
# Forward


@triton.jit
def _operand(
    source, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, C: tl.constexpr
):
    """Load a tile of a product's operand, by the copy engine where the source is a descriptor."""
    if C.described:
        tile = source.load([row, column])
    else:
        tile = load_tile(source, row, column, rows, columns, ROWS, COLUMNS)
    return tile


@triton.jit
def _prepare(t, s, program, programs):
    ROWS: tl.constexpr = 32
    COLUMNS: tl.constexpr = 128
    if t.largest is not None:
        across = tl.cdiv(s.inputs, COLUMNS)
        largest = 0.0
        # From the other end: the first programs have a tile of the product to come.
        for index in range(programs - 1 - program, tl.cdiv(s.rows, ROWS) * across, programs):
            row, column = index // across * ROWS, index % across * COLUMNS
            x = load_tile(t.x, row, column, s.rows, s.inputs, ROWS, COLUMNS)
            largest = tl.maximum(largest, magnitude(x.to(tl.float32)))
        tl.store(t.largest + program, largest)
        if program == 0:
            tl.store(t.step, tl.load(t.hyper + STEP))
    if t.operand is not None:
        across = tl.cdiv(s.inputs, COLUMNS)
        for index in range(program, tl.cdiv(s.outputs, ROWS) * across, programs):
            row, column = index // across * ROWS, index % across * COLUMNS
            w = load_tile(t.weight, row, column, s.outputs, s.inputs, ROWS, COLUMNS)
            store_tile(t.operand, w, row, column, s.outputs, s.inputs, ROWS, COLUMNS)


@triton.jit
def _product(t, x, operand, s, C: tl.constexpr, program, programs):
    ROWS: tl.constexpr = C.product_rows
    OUTS: tl.constexpr = C.product_outs
    down, across = tl.cdiv(s.rows, ROWS), tl.cdiv(s.outputs, OUTS)
    for index in range(program, down * across, programs):
        r, o = place(index, down, across)
        row, out = r * ROWS, o * OUTS
        z = tl.full((ROWS, OUTS), 0.0, tl.float32)
        for k in range(0, s.inputs, C.depth):
            a = _operand(x, row, k, s.rows, s.inputs, ROWS, C.depth, C)
            b = _operand(operand, out, k, s.outputs, s.inputs, OUTS, C.depth, C)
            z = dot(a.to(C.operand), tl.trans(b.to(C.operand)), z, C.precision)
        z += load_vector(t.bias, out, s.outputs, OUTS, 0.0)[None, :]
        inside = is_inside(row, out, s.rows, s.outputs, ROWS, OUTS)
        if C.whole:
            if C.norm == "batch" and not C.statistics:
                mean = load_vector(t.running_mean, out, s.outputs, OUTS, 0.0)
                var = load_vector(t.running_var, out, s.outputs, OUTS, 1.0)
                _finish(t, s, C, z, mean, var, row, o, ROWS, OUTS)
            elif C.norm == "none":
                _finish(t, s, C, z, z, z, row, o, ROWS, OUTS)
            else:
                AXIS: tl.constexpr = 0 if C.norm == "batch" else 1
                count = s.rows if C.norm == "batch" else s.outputs
                mean = tl.sum(tl.where(inside, z, 0.0), AXIS) / count
                apart = tl.where(inside, z - tl.expand_dims(mean, AXIS), 0.0)
                _finish(t, s, C, z, mean, tl.sum(apart * apart, AXIS) / count, row, o, ROWS, OUTS)
        else:
            # Mean and squared deviations of this tile, for NORMALIZE to combine.
            if C.norm == "batch":
                mean = tl.sum(tl.where(inside, z, 0.0), 0) / tl.minimum(s.rows - row, ROWS)
                apart = tl.where(inside, z - mean[None, :], 0.0)
                at = t.moments + r * 2 * s.outputs
                store_vector(at, mean, out, s.outputs, OUTS)
                store_vector(at + s.outputs, tl.sum(apart * apart, 0), out, s.outputs, OUTS)
            else:
                mean = tl.sum(tl.where(inside, z, 0.0), 1) / tl.minimum(s.outputs - out, OUTS)
                apart = tl.where(inside, z - mean[:, None], 0.0)
                at = t.moments + o * 2 * s.rows
                store_vector(at, mean, row, s.rows, ROWS)
                store_vector(at + s.rows, tl.sum(apart * apart, 1), row, s.rows, ROWS)
            store_tile(t.z, z, row, out, s.rows, s.outputs, ROWS, OUTS)


@triton.jit
def _normalize(t, s, C: tl.constexpr, program, programs):
    down, across = tl.cdiv(s.rows, C.rows), tl.cdiv(s.outputs, C.outs)
    for index in range(program, down * across, programs):
        r, o = place(index, down, across)
        row, out = r * C.rows, o * C.outs
        if C.norm == "batch":
            mean, var = combine_moments(t.moments, s.rows, C.product_rows, out, s.outputs, C.outs)
        else:
            mean, var = combine_moments(t.moments, s.outputs, C.product_outs, row, s.rows, C.rows)
        z = load_tile(t.z, row, out, s.rows, s.outputs, C.rows, C.outs)
        _finish(t, s, C, z, mean, var, row, o, C.rows, C.outs)


@triton.jit
def _finish(t, s, C: tl.constexpr, z, mean, var, row, o, ROWS: tl.constexpr, OUTS: tl.constexpr):
    """Make what follows z in a tile: n, h, and its part of a low-rank synthesizer's first product.
    mean and var are [OUTS] (batch) or [ROWS] (layer), and not read without a normalisation."""
    out = o * OUTS
    inside = is_inside(row, out, s.rows, s.outputs, ROWS, OUTS)
    y = z
    if C.norm != "none":
        rstd = 1.0 / tl.sqrt_rn(var + s.eps)
        if C.norm == "batch":
            z = (z - mean[None, :]) * rstd[None, :]
            if row == 0:  # one of the programs that have these columns
                if t.rstd is not None:
                    store_vector(t.rstd, rstd, out, s.outputs, OUTS)
                if t.batch is not None:
                    store_vector(t.batch, mean, out, s.outputs, OUTS)
                    unbiased = var * (s.rows / (s.rows - 1.0))
                    store_vector(t.batch + s.outputs, unbiased, out, s.outputs, OUTS)
                    if C.rule == "none":
                        _move_running(t, s, out, OUTS)
        else:
            z = (z - mean[:, None]) * rstd[:, None]
            if t.rstd is not None:
                if o == 0:
                    store_vector(t.rstd, rstd, row, s.rows, ROWS)
        scale = load_vector(t.norm_weight, out, s.outputs, OUTS, 1.0)
        y = z * scale[None, :] + load_vector(t.norm_bias, out, s.outputs, OUTS, 0.0)[None, :]
    if t.normalized is not None:
        store_tile(t.normalized, z, row, out, s.rows, s.outputs, ROWS, OUTS)
    h = tl.where(inside, activate(y, C.activation), 0.0).to(t.h.dtype.element_ty)
    store_tile(t.h, h, row, out, s.rows, s.outputs, ROWS, OUTS)
    if C.source == "lowrank":
        down_tile(t, s, C, h, row, out, ROWS, OUTS)


@triton.jit
def _move_running(t, s, out, OUTS: tl.constexpr):
    """Move running statistics towards the batch's, of which this tile's columns are known."""
    mean = load_vector(t.batch, out, s.outputs, OUTS, 0.0)
    var = load_vector(t.batch + s.outputs, out, s.outputs, OUTS, 0.0)
    old_mean = load_vector(t.running_mean, out, s.outputs, OUTS, 0.0)
    old_var = load_vector(t.running_var, out, s.outputs, OUTS, 0.0)
    moved = old_mean + s.momentum * (mean - old_mean)
    store_vector(t.running_mean, moved, out, s.outputs, OUTS)
    store_vector(t.running_var, old_var + s.momentum * (var - old_var), out, s.outputs, OUTS)


# ---------------------------------------------------------------------------------------------
# Gradient


@triton.jit
def _gradient(t, s, C: tl.constexpr, program, programs):
    down, across = tl.cdiv(s.rows, C.rows), tl.cdiv(s.outputs, C.outs)
    largest = 0.0
    squares = tl.full((), 0.0, tl.float64)
    counted = counted_rows(t, s)
    for index in range(program, down * across, programs):
        r, o = place(index, down, across)
        row, out = r * C.rows, o * C.outs
        inside = is_inside(row, out, s.rows, s.outputs, C.rows, C.outs)
        h = load_tile(t.h, row, out, s.rows, s.outputs, C.rows, C.outs).to(tl.float32)
        if C.source == "given":
            g = load_tile(t.grad_h, row, out, s.rows, s.outputs, C.rows, C.outs).to(tl.float32)
        else:
            g = predict_tile(t, s, C, h, row, out, counted)
            if t.scaled is not None:
                store_tile(t.scaled, g, row, out, s.rows, s.outputs, C.rows, C.outs)
            g *= s.inverse_scale
        if C.clip:
            wide = tl.where(inside, g, 0.0).to(tl.float64)
            squares += tl.sum(wide * wide)
        if C.interface == "preactivation":
            left = _leave(t, s, C, g, inside, r, out)
        else:
            left = _back(t, s, C, g, h, inside, r, o)
        largest = tl.maximum(largest, left)
    if t.largest is not None:
        _count(t, C, program, largest, squares)


@triton.jit
def _back(t, s, C: tl.constexpr, g, h, inside, r, o):
    """Take a tile of the gradient at h through activation and scale, and through the normalisation
    or as far as this tile knows; returns the largest magnitude of what it left."""
    row, out = r * C.rows, o * C.outs
    largest = 0.0
    n, y = h, h
    scale = load_vector(t.norm_weight, out, s.outputs, C.outs, 1.0)
    if t.normalized is not None:
        n = load_tile(t.normalized, row, out, s.rows, s.outputs, C.rows, C.outs)
        shift = load_vector(t.norm_bias, out, s.outputs, C.outs, 0.0)
        y = n * scale[None, :] + shift[None, :]
    gy = tl.where(inside, g * slope(y, h, C.activation), 0.0)
    if t.columns is not None:
        at = t.columns + r * 2 * s.outputs
        sums, dots = tl.sum(gy, 0), tl.sum(gy * n, 0)
        store_vector(at, sums, out, s.outputs, C.outs)
        store_vector(at + s.outputs, dots, out, s.outputs, C.outs)
        largest = tl.maximum(largest, tl.maximum(magnitude(sums), magnitude(dots)))
    if C.norm == "none":
        delta = gy
    else:
        gn = gy * scale[None, :]
        if not C.whole:
            store_tile(t.gradient, gn, row, out, s.rows, s.outputs, C.rows, C.outs)
            if C.norm == "layer":
                at = t.across + o * 2 * s.rows
                store_vector(at, tl.sum(gn, 1), row, s.rows, C.rows)
                store_vector(at + s.rows, tl.sum(gn * n, 1), row, s.rows, C.rows)
            delta = gn
        elif C.norm == "layer":
            rstd = load_vector(t.rstd, row, s.rows, C.rows, 0.0)
            along, across_n = tl.sum(gn, 1) / s.outputs, tl.sum(gn * n, 1) / s.outputs
            delta = (gn - along[:, None] - n * across_n[:, None]) * rstd[:, None]
        else:
            rstd = load_vector(t.rstd, out, s.outputs, C.outs, 0.0)
            delta = gn
            if C.statistics:
                along, across_n = tl.sum(gn, 0) / s.rows, tl.sum(gn * n, 0) / s.rows
                delta = gn - along[None, :] - n * across_n[None, :]
            delta *= rstd[None, :]
    if C.whole:
        largest = tl.maximum(largest, _leave(t, s, C, delta, inside, r, out))
    return largest


@triton.jit
def _delta(t, s, C: tl.constexpr, program, programs):
    down, across = tl.cdiv(s.rows, C.rows), tl.cdiv(s.outputs, C.outs)
    largest = 0.0
    for index in range(program, down * across, programs):
        r, o = place(index, down, across)
        row, out = r * C.rows, o * C.outs
        inside = is_inside(row, out, s.rows, s.outputs, C.rows, C.outs)
        gn = load_tile(t.gradient, row, out, s.rows, s.outputs, C.rows, C.outs)
        n = load_tile(t.normalized, row, out, s.rows, s.outputs, C.rows, C.outs)
        if C.norm == "batch":
            scale = load_vector(t.norm_weight, out, s.outputs, C.outs, 1.0)
            rstd = load_vector(t.rstd, out, s.outputs, C.outs, 0.0)
            sums, dots = _columns(t, s, C, out)
            along, across_n = sums * scale / s.rows, dots * scale / s.rows
            delta = (gn - along[None, :] - n * across_n[None, :]) * rstd[None, :]
        else:
            rstd = load_vector(t.rstd, row, s.rows, C.rows, 0.0)
            sums = sum_list(t.across, across, 2 * s.rows, row, s.rows, C.rows)
            dots = sum_list(t.across + s.rows, across, 2 * s.rows, row, s.rows, C.rows)
            along, across_n = sums / s.outputs, dots / s.outputs
            delta = (gn - along[:, None] - n * across_n[:, None]) * rstd[:, None]
        largest = tl.maximum(largest, _leave(t, s, C, delta, inside, r, out))
    if t.largest is not None:
        # What GRADIENT left there was of this program too, and of as many.
        largest = tl.maximum(largest, tl.load(t.largest + FLAGS + program))
        tl.store(t.largest + FLAGS + program, largest)


@triton.jit
def _leave(t, s, C: tl.constexpr, delta, inside, r, out):
    """Store delta's tile and its column sums; returns the largest magnitude."""
    delta = tl.where(inside, delta, 0.0)
    store_tile(t.delta, delta, r * C.rows, out, s.rows, s.outputs, C.rows, C.outs)
    largest = magnitude(delta)
    if t.shifts is not None:
        sums = tl.sum(delta, 0)
        store_vector(t.shifts + r * s.outputs, sums, out, s.outputs, C.outs)
        largest = tl.maximum(largest, magnitude(sums))
    return largest


@triton.jit
def _count(t, C: tl.constexpr, program, largest, squares):
    """Leave what a program saw of the gradient."""
    tl.store(t.largest + FLAGS + program, largest)
    if C.clip:
        tl.store(t.squares + program, squares)


@triton.jit
def _columns(t, s, C: tl.constexpr, out):
    """Return sums over all rows of gy and of gy n, [outs]."""
    tiles, width = tl.cdiv(s.rows, C.rows), 2 * s.outputs
    sums = sum_list(t.columns, tiles, width, out, s.outputs, C.outs)
    return sums, sum_list(t.columns + s.outputs, tiles, width, out, s.outputs, C.outs)


@triton.jit
def _measure(t, s, C: tl.constexpr, program, programs):
    """Find what GRADIENT and DELTA find out on their way, of a gradient at z that is given."""
    down, across = tl.cdiv(s.rows, C.rows), tl.cdiv(s.outputs, C.outs)
    largest = 0.0
    for index in range(program, down * across, programs):
        row, out = index // across * C.rows, index % across * C.outs
        delta = load_tile(t.delta, row, out, s.rows, s.outputs, C.rows, C.outs)
        largest = tl.maximum(largest, magnitude(delta.to(tl.float32)))
        if row == 0:
            bias = load_vector(t.grad_bias if C.train_bias else None, out, s.outputs, C.outs, 0.0)
            scale = load_vector(
                t.grad_norm_weight if C.train_norm_weight else None, out, s.outputs, C.outs, 0.0
            )
            shift = load_vector(
                t.grad_norm_bias if C.train_norm_bias else None, out, s.outputs, C.outs, 0.0
            )
            vectors = tl.maximum(magnitude(bias), tl.maximum(magnitude(scale), magnitude(shift)))
            largest = tl.maximum(largest, vectors)
    _count(t, C, program, largest, tl.full((), 0.0, tl.float64))


# ---------------------------------------------------------------------------------------------
# Products with the gradient


@triton.jit
def _dx(t, delta, operand, s, C: tl.constexpr, program, programs):
    down, across = tl.cdiv(s.rows, C.dx_rows), tl.cdiv(s.inputs, C.dx_ins)
    factor = _clipping(t, s, C)
    for index in range(program, down * across, programs):
        r, i = place(index, down, across)
        row, column = r * C.dx_rows, i * C.dx_ins
        dx = tl.full((C.dx_rows, C.dx_ins), 0.0, tl.float32)
        for k in range(0, s.outputs, C.depth):
            a = _operand(delta, row, k, s.rows, s.outputs, C.dx_rows, C.depth, C)
            b = _operand(operand, k, column, s.outputs, s.inputs, C.depth, C.dx_ins, C)
            dx = dot(a.to(C.back_operand), b.to(C.back_operand), dx, C.back_precision)
        store_tile(t.dx, dx * factor, row, column, s.rows, s.inputs, C.dx_rows, C.dx_ins)


@triton.jit
def _clipping(t, s, C: tl.constexpr):
    """Return the factor that brings the synthetic gradient to its largest norm."""
    factor = 1.0
    if C.clip:
        i = tl.arange(0, FLAGS)
        squares = tl.load(t.squares + i, mask=i < s.delta_programs, other=0.0)
        norm = tl.sqrt(tl.sum(squares))
        factor = tl.where(norm > s.max_norm, s.max_norm / norm, 1.0).to(tl.float32)
    return factor


@triton.jit
def _finite(t, s, C: tl.constexpr):
    """Say whether all that goes into an update is finite; and whether, by their bounds, so are the
    sums that come out."""
    delta = largest_left(t.largest, 1, s.delta_programs)
    finite = delta < float("inf")
    largest = delta
    if C.train_weight:
        x = largest_left(t.largest, 0, s.x_programs)
        finite = finite & (x < float("inf"))
        largest = tl.maximum(delta, delta * x)
    return finite, largest * s.rows < _LARGEST


@triton.jit
def _vector_gradients(t, s, C: tl.constexpr, out):
    """Return gradients of bias, scale and shift, [outs]: from partial sums, or as they were
    given."""
    bias = tl.full((C.outs,), 0.0, tl.float32)  # exactly zero in front of a batch's own statistics
    scale, shift = bias, bias
    if t.shifts is not None:
        tiles = tl.cdiv(s.rows, C.rows)
        bias = sum_list(t.shifts, tiles, s.outputs, out, s.outputs, C.outs)
    elif C.source == "none":
        bias = load_vector(t.grad_bias, out, s.outputs, C.outs, 0.0)
    if t.columns is not None:
        shift, scale = _columns(t, s, C, out)
    elif C.source == "none":
        scale = load_vector(t.grad_norm_weight, out, s.outputs, C.outs, 0.0)
        shift = load_vector(t.grad_norm_bias, out, s.outputs, C.outs, 0.0)
    return bias, scale, shift


@triton.jit
def _trial(t, x, delta, s, C: tl.constexpr, program, programs):
    """Look at all gradients where their bounds do not tell; returns whether that was so."""
    finite, bounded = _finite(t, s, C)
    doubtful = finite & (bounded == 0)
    if doubtful:
        largest = _slots(t, x, delta, s, C, program, programs, 0.0, 1.0, 0.0, True)
        tl.store(t.largest + 2 * FLAGS + program, largest)
    return doubtful


@triton.jit
def _weight(t, x, delta, s, C: tl.constexpr, program, programs):
    if C.rule == "none":
        _slots(t, x, delta, s, C, program, programs, 0.0, 1.0, 0.0, False)
    else:
        finite, bounded = _finite(t, s, C)
        if finite & (bounded == 0):
            finite = largest_left(t.largest, 2, s.trial_programs) < float("inf")
        step = tl.load(t.step)
        if finite:
            step += 1.0
            factors = rule_factors(t.hyper, step, C.rule)
            factor = _clipping(t, s, C)
            _slots(t, x, delta, s, C, program, programs, factors, factor, step, False)
            if program == 0:
                tl.store(t.hyper + STEP, step)
        elif program == 0:
            tl.store(t.hyper + SKIPPED, tl.load(t.hyper + SKIPPED) + 1.0)


@triton.jit
def _slots(
    t, x, delta, s, C: tl.constexpr, program, programs, factors, factor, step, LOOK: tl.constexpr
):
    """Apply or store every slot's gradient, times ``factor``, or only look at it (LOOK); an
    update moves the running statistics along. Returns the largest magnitude that was looked at."""
    largest = 0.0
    if C.train_weight:
        down, across = tl.cdiv(s.outputs, C.weight_outs), tl.cdiv(s.inputs, C.weight_ins)
        for index in range(program, down * across, programs):
            o, c = place(index, down, across)
            out, column = o * C.weight_outs, c * C.weight_ins
            g = tl.full((C.weight_outs, C.weight_ins), 0.0, tl.float32)  # delta^T x
            for k in range(0, s.rows, C.depth):
                a = _operand(delta, k, out, s.rows, s.outputs, C.depth, C.weight_outs, C)
                b = _operand(x, k, column, s.rows, s.inputs, C.depth, C.weight_ins, C)
                a, b = tl.trans(a.to(C.back_operand)), b.to(C.back_operand)
                g = dot(a, b, g, C.back_precision)
            if LOOK:
                largest = tl.maximum(largest, magnitude(g))
            else:
                OUTS: tl.constexpr = C.weight_outs
                INS: tl.constexpr = C.weight_ins
                start, at = tile_offsets(out, column, s.inputs, OUTS, INS)
                inside = is_inside(out, column, s.outputs, s.inputs, OUTS, INS)
                settle(
                    t.weight, t.first_weight, t.second_weight, t.grad_weight, g * factor, start,
                    at, inside, factors, C, step, 0,
                )  # fmt: skip
    # From the other end: the first programs may have a tile of W more than the last.
    for index in range(programs - 1 - program, tl.cdiv(s.outputs, C.outs), programs):
        out = index * C.outs
        bias, scale, shift = _vector_gradients(t, s, C, out)
        if LOOK:
            largest = tl.maximum(largest, magnitude(bias))
            largest = tl.maximum(largest, tl.maximum(magnitude(scale), magnitude(shift)))
        else:
            at = out + tl.arange(0, C.outs)
            inside = at < s.outputs
            if C.train_bias:
                settle(
                    t.bias, t.first_bias, t.second_bias, t.grad_bias, bias * factor, 0, at, inside,
                    factors, C, step, 1,
                )  # fmt: skip
            if C.train_norm_weight:
                settle(
                    t.norm_weight, t.first_norm_weight, t.second_norm_weight, t.grad_norm_weight,
                    scale * factor, 0, at, inside, factors, C, step, 2,
                )  # fmt: skip
            if C.train_norm_bias:
                settle(
                    t.norm_bias, t.first_norm_bias, t.second_norm_bias, t.grad_norm_bias,
                    shift * factor, 0, at, inside, factors, C, step, 3,
                )  # fmt: skip
            if t.batch is not None:
                _move_running(t, s, out, C.outs)
    return largest


# ---------------------------------------------------------------------------------------------
# The kernel


@triton.jit
def _wait_for_all(t, s, programs, PHASE: tl.constexpr):
    """Wait for all programs in front of a phase; returns whether they came."""
    return wait_for_all(t.barrier, 0, programs, PHASE, s.rows, s.inputs, s.outputs, LINEAR)


@triton.jit
def linear_kernel(
    t, x, operand, delta, s, C: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr
):
    """Run the phases FIRST to LAST. x, operand and delta are those of ``t``, or descriptors of
    them."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    passed = True  # all barriers so far; otherwise nothing more is done
    if FIRST <= PREPARE:
        _prepare(t, s, program, programs)
    if FIRST <= PRODUCT and PRODUCT <= LAST and t.h is not None:
        _product(t, x, operand, s, C, program, programs)
    if FIRST <= NORMALIZE and NORMALIZE <= LAST and t.h is not None and not C.whole:
        if FIRST < NORMALIZE:
            passed = _wait_for_all(t, s, programs, NORMALIZE)
        if passed:
            _normalize(t, s, C, program, programs)
    if FIRST <= REDUCE and REDUCE <= LAST and C.source == "lowrank":
        if FIRST < REDUCE:
            if passed:
                passed = _wait_for_all(t, s, programs, REDUCE)
        if passed:
            tiles = tl.cdiv(s.outputs, C.product_outs if C.whole else C.outs)
            count = wide(s.rows) * s.rank
            reduce_tiles(t.partial, t.reduced, count, tiles, program, programs)
    if FIRST <= GRADIENT and GRADIENT <= LAST and C.source != "none":
        if FIRST < GRADIENT:
            if C.source == "diagonal":
                # Each program reads what it wrote itself: its tiles are the same in both phases.
                alike: tl.constexpr = C.product_rows == C.rows and C.product_outs == C.outs
                tl.static_assert(not C.whole or alike, "tiles of both have to be alike")
                tl.debug_barrier()
            elif passed:
                passed = _wait_for_all(t, s, programs, GRADIENT)
        if passed:
            _gradient(t, s, C, program, programs)
    goes_back: tl.constexpr = C.source != "none" and C.interface == "output"
    if FIRST <= DELTA and DELTA <= LAST and goes_back and not C.whole:
        if FIRST < DELTA:
            if passed:
                passed = _wait_for_all(t, s, programs, DELTA)
        if passed:
            _delta(t, s, C, program, programs)
    if FIRST <= MEASURE and MEASURE <= LAST and C.source == "none" and C.rule != "none":
        _measure(t, s, C, program, programs)
    if FIRST < DX and DX <= LAST:
        behind: tl.constexpr = TRIAL if C.rule != "none" else WEIGHT
        if passed:
            passed = _wait_for_all(t, s, programs, behind if t.dx is None else DX)
    if FIRST <= DX and DX <= LAST and t.dx is not None:
        if passed:
            _dx(t, delta, operand, s, C, program, programs)
    if FIRST <= TRIAL and TRIAL <= LAST and C.rule != "none":
        if FIRST < TRIAL and t.dx is not None:
            if passed:
                # dx is of the weights before the update
                passed = _wait_for_all(t, s, programs, TRIAL)
        if passed:
            doubtful = _trial(t, x, delta, s, C, program, programs)
            if TRIAL < LAST:
                if doubtful:
                    passed = _wait_for_all(t, s, programs, WEIGHT)
    if FIRST <= WEIGHT and WEIGHT <= LAST:
        if passed:
            _weight(t, x, delta, s, C, program, programs)


# ---------------------------------------------------------------------------------------------
# Launchers


class Tiles(NamedTuple):
    """How an op is divided among programs; fields as in :class:`Options`."""

    launches: str  # "one", "several"
    product_rows: int
    product_outs: int
    rows: int
    outs: int
    dx_rows: int
    dx_ins: int
    weight_outs: int
    weight_ins: int
    depth: int
    warps: int
    stages: int
    descriptors: bool = False  # operands of products by the copy engine (several launches, sm_90)


class Problem(NamedTuple):
    """What of an op is neither a tensor nor a tile."""

    norm: str = "none"  # "none", "batch", "layer"
    statistics: bool = False  # batch normalisation by this batch's statistics
    activation: str = "identity"
    eps: float = 1e-5
    momentum: float = 0.1
    source: str = "none"  # "dense", "lowrank", "diagonal", "given", "none"
    interface: str = "output"  # where the gradient is that it gives: "output", "preactivation"
    target_scale: float = 1.0
    max_norm: float = 0.0
    rule: str = "none"  # "sgd", "adam", "adamw", "none"
    nesterov: bool = False
    trainable: tuple[bool, bool, bool, bool] = (False, False, False, False)
    precision: str = "ieee"  # of float32 products: "ieee", "tf32"
    ignored: int = -100  # with a table: the label of rows that are not in the loss


# Ranges of phases. In an update nothing is computed in front of MEASURE: `Tensors.h` is None.
FORWARD_PHASES = (PREPARE.value, NORMALIZE.value)
BACKWARD_PHASES = (GRADIENT.value, WEIGHT.value)
STEP_PHASES = (PREPARE.value, WEIGHT.value)
UPDATE_PHASES = STEP_PHASES


def default_tiles(
    rows: int,
    inputs: int,
    outputs: int,
    dtype: torch.dtype,
    rule: str,
    precision: str,
    architecture: int,
) -> Tiles:
    """Choose tiles by rule of thumb, where nothing was tuned.

    One launch while the layer is bounded by latency: all rows in a tile as long as they fit, and
    as few features as a product can take, so that there are tiles for many multiprocessors. Several
    launches where products are large enough to be bounded by arithmetic.

    Args:
        architecture: 90 for compute capability 9.0 and so on; 0 for the interpreter.
    """
    if architecture == 0:
        return Tiles("one", 32, 64, 32, 64, 64, 64, 64, 64, 64, 4, 1)
    low = dtype != torch.float32
    if rows <= 512 and inputs * outputs <= 4096 * 1024:
        tall = min(max(triton.next_power_of_2(rows), 16), 128)
        return Tiles("one", tall, 16, tall, 16, 64, 32, 32, 64, 128 if low else 64, 8, 3)
    if (
        precision == "ieee" and not low
    ):  # no tensor cores: as many accumulators as there is room for
        return Tiles("several", 64, 64, 128, 32, 64, 64, 64, 64, 32, 8, 3)
    wide_outs = 256 if 90 <= architecture < 100 and low else 128
    # An update by Adam reads and writes three matrices, and has as many tiles of them in registers.
    tall = 64 if rule in ("adam", "adamw") or not low else 128
    return Tiles(
        "several", 128, wide_outs, 128, 32, 128, 128, tall, 128, 64 if low else 32, 8, 3,
        architecture >= 90,
    )  # fmt: skip


def tile_candidates(tiles: Tiles) -> Iterator[Tiles]:
    """Yield what is tried around a rule of thumb."""
    yield tiles
    if tiles.launches == "one":
        for outs in (16, 32):
            for rows in {tiles.rows, max(tiles.rows // 2, 16)}:
                for warps in (4, 8):
                    for outs_in in ((16, 64), (32, 64), (64, 64), (64, 128)):
                        yield tiles._replace(
                            product_rows=rows, product_outs=outs, rows=rows, outs=outs,
                            weight_outs=outs_in[0], weight_ins=outs_in[1], warps=warps,
                        )  # fmt: skip
    else:
        for wide_outs in (128, 256):
            for tall in (64, 128):
                for stages in (3, 4):
                    for descriptors in {tiles.descriptors, False}:
                        yield tiles._replace(
                            product_outs=wide_outs, weight_outs=tall, stages=stages,
                            descriptors=descriptors,
                        )  # fmt: skip


def is_whole(rows: int, outputs: int, problem: Problem, tiles: Tiles) -> bool:
    """Say whether a tile holds all that its normalisation's statistics are taken over."""
    if problem.norm == "batch" and problem.statistics:
        return rows <= min(tiles.product_rows, tiles.rows)
    if problem.norm == "layer":
        return outputs <= min(tiles.product_outs, tiles.outs)
    return True


def workspace(t: Tensors, problem: Problem, tiles: Tiles, phases: tuple[int, int]) -> Tensors:
    """Return ``t`` with room for what phases leave to each other, on x's device; but for
    ``barrier``."""
    like, (first, last) = t.x, phases
    rows, (outputs, inputs) = like.shape[0], t.weight.shape

    def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        made: Tensor = like.new_empty(shape, dtype=dtype)
        return made

    made: dict[str, Tensor] = {}
    whole = is_whole(rows, outputs, problem, tiles)
    row_tiles, out_tiles = triton.cdiv(rows, tiles.rows), triton.cdiv(outputs, tiles.outs)
    if first <= PRODUCT.value:
        if tiles.launches == "several" and t.weight.dtype != like.dtype and t.h is not None:
            made["operand"] = room(outputs, inputs, dtype=like.dtype)
        if problem.norm == "batch" and problem.statistics and t.running_mean is not None:
            made["batch"] = room(2, outputs)
        if not whole:
            made["z"] = room(rows, outputs) if t.normalized is None else t.normalized
            lists = (triton.cdiv(rows, tiles.product_rows), outputs)
            if problem.norm == "layer":
                lists = (triton.cdiv(outputs, tiles.product_outs), rows)
            made["moments"] = room(lists[0], 2, lists[1])
        if problem.source == "lowrank":
            parts = tiles.product_outs if whole else tiles.outs
            made["partial"] = room(triton.cdiv(outputs, parts), rows, t.down.shape[0])
    if first <= GRADIENT.value and last >= DELTA.value and problem.source != "none":
        back = problem.interface == "output"
        affine = t.norm_weight is not None or t.norm_bias is not None
        own = problem.norm == "batch" and problem.statistics
        if back and (affine or (own and not whole)):
            made["columns"] = room(row_tiles, 2, outputs)
        if t.bias is not None and not own:
            made["shifts"] = room(row_tiles, outputs)
        if back and not whole:
            made["gradient"] = room(rows, outputs)
            if problem.norm == "layer":
                made["across"] = room(out_tiles, 2, rows)
    if problem.rule != "none":
        made["largest"] = room(3, FLAGS.value)
        made["step"] = room(1, dtype=torch.float64)
        if problem.max_norm > 0:
            made["squares"] = room(FLAGS.value, dtype=torch.float64)
    return t._replace(**made)


def plan(
    t: Tensors,
    problem: Problem,
    tiles: Tiles,
    phases: tuple[int, int],
    sizes: tuple[int, int, int, int, int],
    resident: int,
) -> list[Launch]:
    """Plan the launches of an op.

    Args:
        t: inputs, room for the results, the workspace, and in one launch the barrier.
        problem, tiles: what to compile for.
        phases: FORWARD_PHASES, BACKWARD_PHASES, STEP_PHASES or UPDATE_PHASES.
        sizes: N, I, O, R, K.
        resident: programs that a cooperative launch may have (one in the interpreter).

    Raises:
        ValueError: in one launch, a diagonal synthesizer's gradient would have other tiles than
            what it is made of.
    """
    rows, inputs, outputs, rank, classes = sizes
    whole = is_whole(rows, outputs, problem, tiles)
    first = (tiles.product_rows, tiles.product_outs)
    if (tiles.launches, problem.source) == ("one", "diagonal") and whole and first != tiles[3:5]:
        raise ValueError(
            "in one launch with a diagonal synthesizer, tiles of the product and of what follows "
            f"have to be alike, for there is no barrier between; got {first[0]}x{first[1]} and "
            f"{tiles.rows}x{tiles.outs}: choose other tiles, or several launches"
        )
    grids = _grids(t, problem, tiles, phases, sizes, whole)
    if tiles.launches == "one":
        common = min(max(grids.values()), resident)
        grids = dict.fromkeys(grids, common)
    s = Sizes(
        rows,
        inputs,
        outputs,
        rank,
        classes,
        grids.get(PREPARE.value, 0),
        grids.get(GRADIENT.value, grids.get(MEASURE.value, 0)),
        grids.get(TRIAL.value, 0),
        1.0 / problem.target_scale,
        problem.max_norm,
        problem.eps,
        problem.momentum,
        problem.ignored,
    )
    options = _options(t, problem, tiles, rank, whole)
    how: dict[str, Any] = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    if tiles.launches == "one":
        how["launch_cooperative_grid"] = True
        constant = {"s": s, "C": options, "FIRST": phases[0], "LAST": phases[1]}
        return bind([Launch(linear_kernel, (common,), constant, how)], t, problem, tiles)
    launches = []
    for phase, grid in grids.items():
        described = _described(phase, t, tiles, options) is not None
        constant = {
            "s": s,
            "C": options._replace(described=described),
            "FIRST": phase,
            "LAST": phase,
        }
        launches.append(Launch(linear_kernel, (grid,), constant, how))
    return bind(launches, t, problem, tiles)


def bind(launches: list[Launch], t: Tensors, problem: Problem, tiles: Tiles) -> list[Launch]:
    """Make launches of :func:`plan` with these tensors for those they were planned for, which are
    to be like them in shape, type and alignment, and with this problem's target scale."""
    made = []
    for launch in launches:
        constant = launch.arguments
        tensors: dict[str, Any] | None = None
        if constant["C"].described:
            tensors = _described(constant["FIRST"], t, tiles, constant["C"])
        s = constant["s"]._replace(inverse_scale=1.0 / problem.target_scale)
        tensors = tensors or _sources(t)
        made.append(launch._replace(arguments={**constant, "t": t, "s": s, **tensors}))
    return made


def unbind(launches: list[Launch]) -> list[Launch]:
    """Return what :func:`bind` takes, of launches whose tensors are not to be kept alive."""
    return [
        launch._replace(arguments={k: launch.arguments[k] for k in ("s", "C", "FIRST", "LAST")})
        for launch in launches
    ]


def _sources(t: Tensors) -> dict[str, Any]:
    """Return the operands of products."""
    return {"x": t.x, "operand": t.weight if t.operand is None else t.operand, "delta": t.delta}


def _grids(
    t: Tensors,
    problem: Problem,
    tiles: Tiles,
    phases: tuple[int, int],
    sizes: tuple[int, int, int, int, int],
    whole: bool,
) -> dict[int, int]:
    """List the phases that have something to do, each with its number of programs: one a tile, as
    long as a list of the workspace has an entry for each."""
    rows, inputs, outputs, rank, _ = sizes
    forward, gradient = t.h is not None, problem.source != "none"
    ruled = problem.rule != "none"
    pointwise = triton.cdiv(rows, tiles.rows) * triton.cdiv(outputs, tiles.outs)
    weights = max(
        triton.cdiv(outputs, tiles.weight_outs) * triton.cdiv(inputs, tiles.weight_ins),
        triton.cdiv(outputs, tiles.outs),
    )
    prepared = triton.cdiv(rows if ruled else outputs, 32) * triton.cdiv(inputs, 128)
    product = triton.cdiv(rows, tiles.product_rows) * triton.cdiv(outputs, tiles.product_outs)
    dx = triton.cdiv(rows, tiles.dx_rows) * triton.cdiv(inputs, tiles.dx_ins)
    programs = {
        PREPARE: prepared if ruled or t.operand is not None else 0,
        PRODUCT: product if forward else 0,
        NORMALIZE: pointwise if forward and not whole else 0,
        REDUCE: triton.cdiv(rows * rank, 64) if problem.source == "lowrank" else 0,
        GRADIENT: pointwise if gradient else 0,
        DELTA: pointwise if gradient and not whole and problem.interface == "output" else 0,
        MEASURE: pointwise if ruled and not gradient else 0,
        DX: dx if t.dx is not None else 0,
        TRIAL: weights if ruled else 0,
        WEIGHT: weights if ruled or any(problem.trainable) else 0,
    }
    return {
        phase.value: min(count, FLAGS.value)
        for phase, count in programs.items()
        if count and phases[0] <= phase.value <= phases[1]
    }


def _options(t: Tensors, problem: Problem, tiles: Tiles, rank: int, whole: bool) -> Options:
    operand = TYPES[t.x.dtype]
    half = t.x.dtype == torch.float16
    firsts = (t.first_weight, t.first_bias, t.first_norm_weight, t.first_norm_bias)
    made = Options(
        *tiles[1:10],
        rank=max(triton.next_power_of_2(rank), 16),
        norm=problem.norm,
        statistics=problem.statistics,
        whole=whole,
        activation=problem.activation,
        source=problem.source,
        interface=problem.interface,
        clip=problem.max_norm > 0,
        rule=problem.rule,
        nesterov=problem.nesterov,
        momentum=any(m is not None for m in firsts),
        train_weight=problem.trainable[0],
        train_bias=problem.trainable[1],
        train_norm_weight=problem.trainable[2],
        train_norm_bias=problem.trainable[3],
        operand=operand,
        precision=problem.precision,
        # A gradient of size 1 / N has no room in float16; tf32 has its digits and more range.
        back_operand=tl.float32 if half else operand,
        back_precision="tf32" if half else problem.precision,
        described=False,
    )  # fmt: skip
    frozen: Options = constants(made)
    return frozen


def _described(phase: int, t: Tensors, tiles: Tiles, options: Options) -> dict[str, Any] | None:
    """Return the operands of products, the two of this phase as descriptors, by which Hopper's copy
    engine brings their tiles to the tensor cores; None if the phase has no product, if it is made
    elsewhere, or if an operand is not aligned as the engine wants it."""
    blocks = {
        PRODUCT.value: {
            "x": (tiles.product_rows, tiles.depth),
            "operand": (tiles.product_outs, tiles.depth),
        },
        DX.value: {"delta": (tiles.dx_rows, tiles.depth), "operand": (tiles.depth, tiles.dx_ins)},
        TRIAL.value: {
            "delta": (tiles.depth, tiles.weight_outs),
            "x": (tiles.depth, tiles.weight_ins),
        },
    }
    blocks[WEIGHT.value] = blocks[TRIAL.value]
    elsewhere = options.precision == "ieee" and options.operand == tl.float32
    if not tiles.descriptors or phase not in blocks or elsewhere:
        return None
    made = _sources(t)
    for name, block in blocks[phase].items():
        source = made[name]
        if source.stride(0) * source.element_size() % 16 or source.data_ptr() % 16:
            return None
        made[name] = TensorDescriptor.from_tensor(source, list(block))
    return made
