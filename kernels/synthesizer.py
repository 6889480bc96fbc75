"""The synthesizer on a GPU: its prediction, and its regression in one launch.

Formulas stand in fused_dni.backends.reference.synthesizer. With h [N, O], e = 2 / N (M(h) - kappa
g) [N, O], a low-rank M's U [R, O] and V [O, R]:

=======  ================  ====================================================================
PARTS    tiles of [N, O]   predicting: h U^T over the tile; training: e V over the tile, column
                           sums, the sums of the statistics, largest magnitudes
REDUCE   [N, R]            the sum of the parts over all features
PREDICT  tiles of [N, O]   M(h)
TRIAL    each parameter    gradients, only looked at, where bounds do not show them to be finite
APPLY    each parameter    gradients, and the rule (or the gradients alone)
=======  ================  ====================================================================

As in kernels/linear.py an op is a range of phases, run in one cooperative launch with grid barriers
or in one launch a phase; sums are made of partial sums in a fixed order; an update is all or
nothing. The kernel of linear.py predicts by :func:`predict_tile` too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fused_dni.kernels.barrier import SYNTHESIZER, Kernel, wait_for_all
from fused_dni.kernels.common import SKIPPED, STEP, dot, rule_factors
from fused_dni.kernels.launch import Launch, constants
from fused_dni.kernels.tiles import (
    FLAGS,
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

PARTS: tl.constexpr = tl.constexpr(0)
REDUCE: tl.constexpr = tl.constexpr(1)
PREDICT: tl.constexpr = tl.constexpr(2)
TRIAL: tl.constexpr = tl.constexpr(3)
APPLY: tl.constexpr = tl.constexpr(4)

PHASES = ("parts", "reduce", "predict", "trial", "apply")
KERNEL = Kernel("synthesizer_kernel", PHASES, ("N", "O", "R"))

_LARGEST: tl.constexpr = tl.constexpr(1.0e38)  # well inside float32
_REDUCED: tl.constexpr = tl.constexpr(64)  # elements that a program sums up at a time
_CLASSES: tl.constexpr = tl.constexpr(32)  # context features in a tile
_LABELS: tl.constexpr = tl.constexpr(1024)  # labels that are counted at a time


class Tensors(NamedTuple):
    """Everything a launch may read or write; None where an op has no use for it."""

    h: Any = None  # [N, O]
    synthesizer_weight: Any = None  # [O, O], [O, R] or [O]
    down: Any = None  # [R, O]
    context_weight: Any = None  # [O, K]; with a table []
    synthesizer_bias: Any = None  # [O]
    table: Any = None  # [K, O]
    labels: Any = None  # int64 [N]
    vectors: Any = None  # [N, K]
    grad_h: Any = None  # [N, O]: g
    scaled: Any = None  # float32 [N, O]: M(h)
    reduced: Any = None  # float32 [N, R]: h U^T
    # The rule: float64 hyper-parameters, moments by slot.
    hyper: Any = None
    first_weight: Any = None
    first_down: Any = None
    first_context: Any = None
    first_bias: Any = None
    second_weight: Any = None
    second_down: Any = None
    second_context: Any = None
    second_bias: Any = None
    # Results of training without a rule, and what it adds to.
    grad_weight: Any = None
    grad_down: Any = None
    grad_context: Any = None
    grad_bias: Any = None
    statistics: Any = None  # float64 [5]
    # Workspace, float32 unless it says otherwise.
    partial: Any = None  # [out tiles, N, R]
    back: Any = None  # [N, R]: e V
    columns: Any = None  # [row tiles, 2, O]: sums of e and, for a diagonal M, of e h
    # float64 [5, FLAGS], by program: of s g, s s, g g, (s - g)^2; with a table of -e W[label]
    sums: Any = None
    largest: Any = None  # [4, FLAGS]: largest magnitudes of operands, of e, of e V, of gradients
    step: Any = None  # float64 [1]: the rule's step count before this one
    barrier: Any = None  # GridBarrier, in one launch


class Sizes(NamedTuple):
    """Numbers that change from call to call without another compilation."""

    rows: int  # N
    outputs: int  # O
    rank: int  # R, 0 without
    classes: int  # K, 0 without
    parts_programs: int  # how many programs left their entry in PARTS
    reduce_programs: int  # in REDUCE
    trial_programs: int  # in TRIAL
    target_scale: float  # kappa
    ignored: int  # with a table: the label of rows that are not in the loss


class Options(NamedTuple):
    """What a kernel is compiled for."""

    rows: int  # tiles of [N, O]
    outs: int
    weight_outs: int  # tiles of [O, O]; of [O, R], [R, O] and [O, K] along O
    weight_ins: int
    depth: int  # a trip through a product's inner dimension
    rank: int  # R, rounded up to what a product takes
    source: str  # "dense", "lowrank", "diagonal"
    training: bool
    rule: str  # "none": gradients are stored
    nesterov: bool
    momentum: bool
    train_weight: bool
    train_down: bool
    train_context: bool
    train_bias: bool
    operand: Any
    precision: str
    back_operand: Any
    back_precision: str


# ---------------------------------------------------------------------------------------------
# Prediction


@triton.jit
def counted_rows(t, s):
    """Count how many rows are in the loss, at least 1; all without a table."""
    counted = s.rows
    if t.table is not None:
        found = tl.full((_LABELS,), 0, tl.int32)
        for n in range(0, s.rows, _LABELS):
            i = n + tl.arange(0, _LABELS)
            label = tl.load(t.labels + i, mask=i < s.rows, other=s.ignored)
            found += (label != s.ignored).to(tl.int32)
        counted = tl.maximum(tl.sum(found), 1)
    return counted


@triton.jit
def _label_tile(t, s, row, out, ROWS: tl.constexpr, OUTS: tl.constexpr):
    """Load the table's rows of a tile's labels, float32, and which rows are in the loss. A label
    that there is not makes its row NaN."""
    i, j = row + tl.arange(0, ROWS), out + tl.arange(0, OUTS)
    label = tl.load(t.labels + i, mask=i < s.rows, other=s.ignored)
    counted = label != s.ignored
    known = (label >= 0) & (label < s.classes)
    at = tl.where(known, label, 0)[:, None] * s.outputs + j[None, :]
    inside = (counted & known)[:, None] & (j < s.outputs)[None, :]
    w = tl.load(t.table + at, mask=inside, other=0.0).to(tl.float32)
    return tl.where((counted & (known == 0))[:, None], float("nan"), w), counted


@triton.jit
def predict_tile(t, s, C: tl.constexpr, h, row, out, counted):
    """Return M(h) [rows, outs], float32; ``h`` is this tile of t.h, ``counted`` of
    :func:`counted_rows`. A class index that there is not makes its row NaN, so that whatever is
    made of it is skipped and counted."""
    if C.source == "dense":
        m = tl.full((C.rows, C.outs), 0.0, tl.float32)
        for k in range(0, s.outputs, C.depth):
            a = load_tile(t.h, row, k, s.rows, s.outputs, C.rows, C.depth)
            b = load_tile(t.synthesizer_weight, out, k, s.outputs, s.outputs, C.outs, C.depth)
            m = dot(a.to(C.operand), tl.trans(b.to(C.operand)), m, C.precision)
    elif C.source == "lowrank":
        a = load_tile(t.reduced, row, 0, s.rows, s.rank, C.rows, C.rank)
        b = load_tile(t.synthesizer_weight, out, 0, s.outputs, s.rank, C.outs, C.rank)
        m = tl.full((C.rows, C.outs), 0.0, tl.float32)
        m = dot(a.to(C.operand), tl.trans(b.to(C.operand)), m, C.precision)
    else:
        m = h * load_vector(t.synthesizer_weight, out, s.outputs, C.outs, 0.0)[None, :]
    bias = load_vector(t.synthesizer_bias, out, s.outputs, C.outs, 0.0)
    if t.table is not None:
        w, inside = _label_tile(t, s, row, out, C.rows, C.outs)
        m += bias[None, :] - tl.load(t.context_weight).to(tl.float32) * w
        m = tl.where(inside[:, None], m * (s.rows / counted), 0.0)
        bias = tl.full((C.outs,), 0.0, tl.float32)
    elif t.labels is not None:
        i, j = row + tl.arange(0, C.rows), out + tl.arange(0, C.outs)
        label = tl.load(t.labels + i, mask=i < s.rows, other=0)
        known = (label >= 0) & (label < s.classes)
        at = j[None, :].to(tl.int64) * s.classes + tl.where(known, label, 0)[:, None]
        c = tl.load(t.context_weight + at, mask=(j < s.outputs)[None, :], other=0.0)
        c = c.to(tl.float32)
        m += tl.where(known[:, None], c, float("nan"))
    elif t.vectors is not None:
        for k in range(0, s.classes, _CLASSES):
            v = load_tile(t.vectors, row, k, s.rows, s.classes, C.rows, _CLASSES)
            w = load_tile(t.context_weight, out, k, s.outputs, s.classes, C.outs, _CLASSES)
            m = dot(v.to(C.operand), tl.trans(w.to(C.operand)), m, C.precision)
    return m + bias[None, :]


@triton.jit
def reduce_tiles(partial, total, count, tiles, program, programs):
    """Store the sum over ``tiles`` vectors of ``count`` elements; returns the largest magnitude
    seen."""
    largest = 0.0
    for index in range(program, tl.cdiv(count, _REDUCED), programs):
        first = index * _REDUCED
        sums = sum_list(partial, tiles, count, first, count, _REDUCED)
        store_vector(total, sums, first, count, _REDUCED)
        largest = tl.maximum(largest, magnitude(sums))
    return largest


@triton.jit
def down_tile(t, s, C: tl.constexpr, h, row, out, ROWS: tl.constexpr, OUTS: tl.constexpr):
    """Store a tile's part of h U^T; ``h`` is this tile of t.h, zero outside."""
    u = load_tile(t.down, 0, out, s.rank, s.outputs, C.rank, OUTS)
    part = tl.full((ROWS, C.rank), 0.0, tl.float32)
    part = dot(h.to(C.operand), tl.trans(u.to(C.operand)), part, C.precision)
    at = t.partial + wide(out // OUTS) * s.rows * s.rank
    store_tile(at, part, row, 0, s.rows, s.rank, ROWS, C.rank)


@triton.jit
def _down(t, s, C: tl.constexpr, program, programs):
    down, across = tl.cdiv(s.rows, C.rows), tl.cdiv(s.outputs, C.outs)
    for index in range(program, down * across, programs):
        r, o = place(index, down, across)
        h = load_tile(t.h, r * C.rows, o * C.outs, s.rows, s.outputs, C.rows, C.outs)
        down_tile(t, s, C, h, r * C.rows, o * C.outs, C.rows, C.outs)


@triton.jit
def _predict(t, s, C: tl.constexpr, program, programs):
    down, across = tl.cdiv(s.rows, C.rows), tl.cdiv(s.outputs, C.outs)
    counted = counted_rows(t, s)
    for index in range(program, down * across, programs):
        r, o = place(index, down, across)
        row, out = r * C.rows, o * C.outs
        h = load_tile(t.h, row, out, s.rows, s.outputs, C.rows, C.outs).to(tl.float32)
        m = predict_tile(t, s, C, h, row, out, counted)
        store_tile(t.scaled, m, row, out, s.rows, s.outputs, C.rows, C.outs)


# ---------------------------------------------------------------------------------------------
# Training


@triton.jit
def _error(t, s, gain, row, out, ROWS: tl.constexpr, OUTS: tl.constexpr):
    """Return e of a tile, and M(h) and the target kappa g that it is made of; ``gain`` is 2 over
    how many rows are in the loss."""
    m = load_tile(t.scaled, row, out, s.rows, s.outputs, ROWS, OUTS)
    g = load_tile(t.grad_h, row, out, s.rows, s.outputs, ROWS, OUTS).to(tl.float32)
    target = g * s.target_scale
    e = (m - target) * gain
    if t.table is not None:
        i = row + tl.arange(0, ROWS)
        label = tl.load(t.labels + i, mask=i < s.rows, other=s.ignored)
        e = tl.where((label != s.ignored)[:, None], e, 0.0)
    return e, m, target


@triton.jit
def _parts(t, s, C: tl.constexpr, program, programs):
    down, across = tl.cdiv(s.rows, C.rows), tl.cdiv(s.outputs, C.outs)
    operands, errors = 0.0, 0.0
    zero = tl.full((), 0.0, tl.float64)
    sg, ss, gg, ee, ew = zero, zero, zero, zero, zero
    gain = 2.0 / counted_rows(t, s)
    for index in range(program, down * across, programs):
        r, o = place(index, down, across)
        row, out = r * C.rows, o * C.outs
        e, m, target = _error(t, s, gain, row, out, C.rows, C.outs)
        h = load_tile(t.h, row, out, s.rows, s.outputs, C.rows, C.outs).to(tl.float32)
        operands, errors = tl.maximum(operands, magnitude(h)), tl.maximum(errors, magnitude(e))
        m, target = m.to(tl.float64), target.to(tl.float64)
        sg, ss, gg = sg + tl.sum(m * target), ss + tl.sum(m * m), gg + tl.sum(target * target)
        ee += tl.sum((m - target) * (m - target))
        if t.table is not None:
            w, _counted = _label_tile(t, s, row, out, C.rows, C.outs)
            ew += tl.sum((e * w).to(tl.float64))
        if t.columns is not None:
            at = t.columns + r * 2 * s.outputs
            sums = tl.sum(e, 0)
            store_vector(at, sums, out, s.outputs, C.outs)
            errors = tl.maximum(errors, magnitude(sums))
            if C.source == "diagonal":
                dots = tl.sum(e * h, 0)
                store_vector(at + s.outputs, dots, out, s.outputs, C.outs)
                errors = tl.maximum(errors, magnitude(dots))
        if C.source == "lowrank":
            v = load_tile(t.synthesizer_weight, out, 0, s.outputs, s.rank, C.outs, C.rank)
            part = tl.full((C.rows, C.rank), 0.0, tl.float32)
            part = dot(e.to(C.back_operand), v.to(C.back_operand), part, C.back_precision)
            at = t.partial + wide(o) * s.rows * s.rank
            store_tile(at, part, row, 0, s.rows, s.rank, C.rows, C.rank)
            if o == 0:
                p = load_tile(t.reduced, row, 0, s.rows, s.rank, C.rows, C.rank)
                operands = tl.maximum(operands, magnitude(p))
        if o == 0:
            operands = tl.maximum(operands, _context_magnitude(t, s, C, row))
    tl.store(t.largest + program, operands)
    tl.store(t.largest + FLAGS + program, errors)
    tl.store(t.sums + program, sg)
    tl.store(t.sums + FLAGS + program, ss)
    tl.store(t.sums + 2 * FLAGS + program, gg)
    tl.store(t.sums + 3 * FLAGS + program, ee)
    if t.table is not None:
        tl.store(t.sums + 4 * FLAGS + program, -ew)
    if C.rule != "none":
        if program == 0:
            tl.store(t.step, tl.load(t.hyper + STEP))


@triton.jit
def _context_magnitude(t, s, C: tl.constexpr, row):
    """Return the largest magnitude in some rows' contexts; infinite if a class index is none."""
    largest = 1.0
    if t.labels is not None:
        i = row + tl.arange(0, C.rows)
        label = tl.load(t.labels + i, mask=i < s.rows, other=0)
        known = (label >= 0) & (label < s.classes)
        if t.table is not None:
            known = known | (label == s.ignored)
        largest = tl.max(tl.where(known, 1.0, float("inf")))
    elif t.vectors is not None:
        for k in range(0, s.classes, _CLASSES):
            c = load_tile(t.vectors, row, k, s.rows, s.classes, C.rows, _CLASSES)
            largest = tl.maximum(largest, magnitude(c.to(tl.float32)))
    return largest


@triton.jit
def _total(t, s, C: tl.constexpr, which):
    """Return one of the sums, over all programs."""
    i = tl.arange(0, FLAGS)
    at = t.sums + which * FLAGS + i
    return tl.sum(tl.load(at, mask=i < s.parts_programs, other=0.0))


@triton.jit
def _finite(t, s, C: tl.constexpr):
    """Say whether all that goes into an update is finite; and whether, by their bounds, so are the
    sums that come out."""
    operands = largest_left(t.largest, 0, s.parts_programs)
    errors = largest_left(t.largest, 1, s.parts_programs)
    if C.source == "lowrank":
        errors = tl.maximum(errors, largest_left(t.largest, 2, s.reduce_programs))
    if t.table is not None:  # no product over the rows, but a sum over all elements
        ew = tl.abs(_total(t, s, C, 4)).to(tl.float32)
        errors = tl.maximum(errors, tl.where(ew == ew, ew, float("inf")))
    finite = (operands < float("inf")) & (errors < float("inf"))
    return finite, tl.maximum(operands, 1.0) * errors * s.rows < _LARGEST


@triton.jit
def _slots(t, s, C: tl.constexpr, program, programs, factors, step, LOOK: tl.constexpr):
    """Apply or store every parameter's gradient, or only look at it (LOOK). Returns the largest
    magnitude in the latter case."""
    largest = 0.0
    outs = tl.cdiv(s.outputs, C.weight_outs)
    gain = 2.0 / counted_rows(t, s)
    if C.train_weight and C.source == "dense":
        ins = tl.cdiv(s.outputs, C.weight_ins)
        for index in range(program, outs * ins, programs):
            o, i = place(index, outs, ins)
            out, column = o * C.weight_outs, i * C.weight_ins
            g = tl.full((C.weight_outs, C.weight_ins), 0.0, tl.float32)
            for k in range(0, s.rows, C.depth):
                e, _m, _g = _error(t, s, gain, k, out, C.depth, C.weight_outs)
                h = load_tile(t.h, k, column, s.rows, s.outputs, C.depth, C.weight_ins)
                e, h = tl.trans(e.to(C.back_operand)), h.to(C.back_operand)
                g = dot(e, h, g, C.back_precision)
            largest = tl.maximum(largest, _slot_tile(
                t.synthesizer_weight, t.first_weight, t.second_weight, t.grad_weight, g, out,
                column, s.outputs, s.outputs, factors, C, C.weight_outs, C.weight_ins, step, 0,
                LOOK,
            ))  # fmt: skip
    if C.train_weight and C.source == "lowrank":
        for o in range(program, outs, programs):
            out = o * C.weight_outs
            g = tl.full((C.weight_outs, C.rank), 0.0, tl.float32)
            for k in range(0, s.rows, C.depth):
                e, _m, _g = _error(t, s, gain, k, out, C.depth, C.weight_outs)
                p = load_tile(t.reduced, k, 0, s.rows, s.rank, C.depth, C.rank)
                e, p = tl.trans(e.to(C.back_operand)), p.to(C.back_operand)
                g = dot(e, p, g, C.back_precision)
            largest = tl.maximum(largest, _slot_tile(
                t.synthesizer_weight, t.first_weight, t.second_weight, t.grad_weight, g, out, 0,
                s.outputs, s.rank, factors, C, C.weight_outs, C.rank, step, 0, LOOK,
            ))  # fmt: skip
    if C.train_down:
        # From the other end: V's tiles went to the first programs.
        for o in range(programs - 1 - program, outs, programs):
            out = o * C.weight_outs
            g = tl.full((C.rank, C.weight_outs), 0.0, tl.float32)
            for k in range(0, s.rows, C.depth):
                b = load_tile(t.back, k, 0, s.rows, s.rank, C.depth, C.rank)
                h = load_tile(t.h, k, out, s.rows, s.outputs, C.depth, C.weight_outs)
                b, h = tl.trans(b.to(C.back_operand)), h.to(C.back_operand)
                g = dot(b, h, g, C.back_precision)
            largest = tl.maximum(largest, _slot_tile(
                t.down, t.first_down, t.second_down, t.grad_down, g, 0, out, s.rank, s.outputs,
                factors, C, C.rank, C.weight_outs, step, 1, LOOK,
            ))  # fmt: skip
    if C.train_context and t.table is not None:
        for _ in range(programs - 1 - program, 1, programs):
            g = tl.full((C.outs,), 0.0, tl.float32) + _total(t, s, C, 4).to(tl.float32)
            largest = tl.maximum(largest, _slot_vector(
                t.context_weight, t.first_context, t.second_context, t.grad_context, g, 0, 1,
                factors, C, step, 2, LOOK,
            ))  # fmt: skip
    elif C.train_context:
        ins = tl.cdiv(s.classes, _CLASSES)
        for index in range(program, outs * ins, programs):
            out, column = index // ins * C.weight_outs, index % ins * _CLASSES
            g = tl.full((C.weight_outs, _CLASSES), 0.0, tl.float32)
            for k in range(0, s.rows, C.depth):
                e, _m, _g = _error(t, s, gain, k, out, C.depth, C.weight_outs)
                c = _context_tile(t, s, C, k, column)
                g = dot(tl.trans(e.to(C.back_operand)), c, g, C.back_precision)
            largest = tl.maximum(largest, _slot_tile(
                t.context_weight, t.first_context, t.second_context, t.grad_context, g, out,
                column, s.outputs, s.classes, factors, C, C.weight_outs, _CLASSES, step, 2, LOOK,
            ))  # fmt: skip
    if t.columns is not None:
        tiles, width = tl.cdiv(s.rows, C.rows), 2 * s.outputs
        for index in range(programs - 1 - program, tl.cdiv(s.outputs, C.outs), programs):
            out = index * C.outs
            if C.train_bias:
                sums = sum_list(t.columns, tiles, width, out, s.outputs, C.outs)
                largest = tl.maximum(largest, _slot_vector(
                    t.synthesizer_bias, t.first_bias, t.second_bias, t.grad_bias, sums, out,
                    s.outputs, factors, C, step, 3, LOOK,
                ))  # fmt: skip
            if C.train_weight and C.source == "diagonal":
                at = t.columns + s.outputs
                sums = sum_list(at, tiles, width, out, s.outputs, C.outs)
                largest = tl.maximum(largest, _slot_vector(
                    t.synthesizer_weight, t.first_weight, t.second_weight, t.grad_weight,
                    sums, out, s.outputs, factors, C, step, 0, LOOK,
                ))  # fmt: skip
    return largest


@triton.jit
def _context_tile(t, s, C: tl.constexpr, row, column):
    """Return contexts as an operand, [depth, CLASSES]: vectors, or classes as ones and zeros."""
    if t.labels is not None:
        i, j = row + tl.arange(0, C.depth), column + tl.arange(0, _CLASSES)
        label = tl.load(t.labels + i, mask=i < s.rows, other=-1)
        c = tl.where(label[:, None] == j[None, :], 1.0, 0.0)
    else:
        c = load_tile(t.vectors, row, column, s.rows, s.classes, C.depth, _CLASSES)
    return c.to(C.back_operand)


@triton.jit
def _slot_tile(
    parameter,
    first,
    second,
    gradient,
    g,
    row,
    column,
    rows,
    columns,
    factors,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    step,
    SLOT: tl.constexpr,
    LOOK: tl.constexpr,
):
    """Settle a tile of a matrix, or return its largest magnitude."""
    largest = 0.0
    if LOOK:
        largest = magnitude(g)
    else:
        start, at = tile_offsets(row, column, columns, ROWS, COLUMNS)
        inside = is_inside(row, column, rows, columns, ROWS, COLUMNS)
        settle(parameter, first, second, gradient, g, start, at, inside, factors, C, step, SLOT)
    return largest


@triton.jit
def _slot_vector(
    parameter,
    first,
    second,
    gradient,
    g,
    out,
    size,
    factors,
    C: tl.constexpr,
    step,
    SLOT: tl.constexpr,
    LOOK: tl.constexpr,
):
    """Settle a tile of a vector, or return its largest magnitude."""
    largest = 0.0
    if LOOK:
        largest = magnitude(g)
    else:
        at = out + tl.arange(0, C.outs)
        settle(parameter, first, second, gradient, g, 0, at, at < size, factors, C, step, SLOT)
    return largest


@triton.jit
def _trial(t, s, C: tl.constexpr, program, programs):
    """Look at all gradients where their bounds do not tell; returns whether that was so."""
    finite, bounded = _finite(t, s, C)
    doubtful = finite & (bounded == 0)
    if doubtful:
        largest = _slots(t, s, C, program, programs, 0.0, 0.0, True)
        tl.store(t.largest + 3 * FLAGS + program, largest)
    return doubtful


@triton.jit
def _apply(t, s, C: tl.constexpr, program, programs):
    sg, ss = _total(t, s, C, 0), _total(t, s, C, 1)
    gg, ee = _total(t, s, C, 2), _total(t, s, C, 3)
    applied = tl.abs(sg) + ss + gg + ee < float("inf")
    if C.rule != "none":
        finite, bounded = _finite(t, s, C)
        if finite & (bounded == 0):
            finite = largest_left(t.largest, 3, s.trial_programs) < float("inf")
        applied = finite & applied
    # In front of the products, which need the registers.
    if applied & (program == 0):
        tl.store(t.statistics, tl.load(t.statistics) + sg)
        tl.store(t.statistics + 1, tl.load(t.statistics + 1) + ss)
        tl.store(t.statistics + 2, tl.load(t.statistics + 2) + gg)
        tl.store(t.statistics + 3, tl.load(t.statistics + 3) + ee)
        tl.store(t.statistics + 4, tl.load(t.statistics + 4) + s.rows)
    if C.rule == "none":
        _slots(t, s, C, program, programs, 0.0, 0.0, False)
    else:
        step = tl.load(t.step)
        if applied:
            step += 1.0
            factors = rule_factors(t.hyper, step, C.rule)
            _slots(t, s, C, program, programs, factors, step, False)
            if program == 0:
                tl.store(t.hyper + STEP, step)
        elif program == 0:
            tl.store(t.hyper + SKIPPED, tl.load(t.hyper + SKIPPED) + 1.0)


# ---------------------------------------------------------------------------------------------
# The kernel


@triton.jit
def _wait_for_all(t, s, programs, PHASE: tl.constexpr):
    """Wait for all programs in front of a phase; returns whether they came."""
    return wait_for_all(t.barrier, 0, programs, PHASE, s.rows, s.outputs, s.rank, SYNTHESIZER)


@triton.jit
def synthesizer_kernel(t, s, C: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr):
    """Run the phases FIRST to LAST of a prediction or of a step of training."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    passed = True  # all barriers so far; otherwise nothing more is done
    if FIRST <= PARTS:
        if C.training:
            _parts(t, s, C, program, programs)
        elif C.source == "lowrank":
            _down(t, s, C, program, programs)
    if FIRST <= REDUCE and REDUCE <= LAST and C.source == "lowrank":
        if FIRST < REDUCE:
            passed = _wait_for_all(t, s, programs, REDUCE)
        if passed:
            total = t.back if C.training else t.reduced
            tiles, count = tl.cdiv(s.outputs, C.outs), wide(s.rows) * s.rank
            largest = reduce_tiles(t.partial, total, count, tiles, program, programs)
            if C.training:
                tl.store(t.largest + 2 * FLAGS + program, largest)
    if FIRST <= PREDICT and PREDICT <= LAST and not C.training:
        if FIRST < PREDICT and C.source == "lowrank":
            if passed:
                passed = _wait_for_all(t, s, programs, PREDICT)
        if passed:
            _predict(t, s, C, program, programs)
    if FIRST < TRIAL and TRIAL <= LAST:
        if passed:
            passed = _wait_for_all(t, s, programs, TRIAL)
    if FIRST <= TRIAL and TRIAL <= LAST and C.rule != "none":
        if passed:
            doubtful = _trial(t, s, C, program, programs)
            if TRIAL < LAST:
                if doubtful:
                    passed = _wait_for_all(t, s, programs, APPLY)
    if FIRST <= APPLY and APPLY <= LAST:
        if passed:
            _apply(t, s, C, program, programs)


# ---------------------------------------------------------------------------------------------
# Launchers


class Tiles(NamedTuple):
    """How an op is divided among programs; fields as in :class:`Options`."""

    launches: str  # "one", "several"
    rows: int
    outs: int
    weight_outs: int
    weight_ins: int
    depth: int
    warps: int
    stages: int


class Problem(NamedTuple):
    """What of an op is neither a tensor nor a tile."""

    source: str  # "dense", "lowrank", "diagonal"
    training: bool
    target_scale: float = 1.0
    rule: str = "none"  # "sgd", "adam", "adamw", "none"
    nesterov: bool = False
    trainable: tuple[bool, bool, bool, bool] = (False, False, False, False)
    precision: str = "ieee"  # of float32 products: "ieee", "tf32"
    ignored: int = -100  # with a table: the label of rows that are not in the loss


TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def default_tiles(rows: int, outputs: int, dtype: torch.dtype, architecture: int) -> Tiles:
    """Choose tiles by rule of thumb, where nothing was tuned; arguments as in kernels/linear.py."""
    if architecture == 0:
        return Tiles("one", 32, 64, 64, 64, 64, 4, 1)
    depth = 64 if dtype != torch.float32 else 32
    if rows <= 512 and outputs <= 4096:
        tall = min(max(triton.next_power_of_2(rows), 16), 64)
        return Tiles("one", tall, 32, 32, 64, depth, 4, 3)
    return Tiles("several", 64, 64, 64, 64, depth, 4, 3)


def workspace(t: Tensors, problem: Problem, tiles: Tiles, rank: int) -> Tensors:
    """Return ``t`` with room for what phases leave to each other, on h's device; but for
    ``barrier``."""
    rows, outputs = t.h.shape

    def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        made: Tensor = t.h.new_empty(shape, dtype=dtype)
        return made

    made: dict[str, Tensor] = {}
    if problem.source == "lowrank":
        made["partial"] = room(triton.cdiv(outputs, tiles.outs), rows, rank)
    if problem.training:
        if problem.source == "lowrank":
            made["back"] = room(rows, rank)
        if t.synthesizer_bias is not None or problem.source == "diagonal":
            made["columns"] = room(triton.cdiv(rows, tiles.rows), 2, outputs)
        made["sums"] = room(5, FLAGS.value, dtype=torch.float64)
        made["largest"] = room(4, FLAGS.value)
        made["step"] = room(1, dtype=torch.float64)
    return t._replace(**made)


def plan(
    t: Tensors,
    problem: Problem,
    tiles: Tiles,
    sizes: tuple[int, int, int, int],
    resident: int,
) -> list[Launch]:
    """Plan the launches of a prediction or of a step of training.

    Args:
        t: inputs, room for the results, the workspace, and in one launch the barrier.
        problem, tiles: what to compile for.
        sizes: N, O, R, K.
        resident: programs that a cooperative launch may have (one in the interpreter).
    """
    rows, outputs, rank, classes = sizes
    learned = classes if t.table is None else 1
    grids = _grids(problem, tiles, (rows, outputs, rank, learned))
    if tiles.launches == "one":
        common = min(max(grids.values()), resident)
        grids = dict.fromkeys(grids, common)
    s = Sizes(
        rows,
        outputs,
        rank,
        classes,
        grids.get(PARTS.value, 0),
        grids.get(REDUCE.value, 0),
        grids.get(TRIAL.value, 0),
        problem.target_scale,
        problem.ignored,
    )
    arguments: dict[str, Any] = {"t": t, "s": s, "C": _options(t, problem, tiles, rank)}
    how: dict[str, Any] = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    if tiles.launches == "one":
        whole = {**arguments, "FIRST": min(grids), "LAST": max(grids)}
        return [
            Launch(synthesizer_kernel, (common,), whole, {**how, "launch_cooperative_grid": True})
        ]
    return [
        Launch(synthesizer_kernel, (grid,), {**arguments, "FIRST": phase, "LAST": phase}, how)
        for phase, grid in grids.items()
    ]


def _grids(problem: Problem, tiles: Tiles, sizes: tuple[int, int, int, int]) -> dict[int, int]:
    """List the phases that have something to do, each with its number of programs."""
    rows, outputs, rank, classes = sizes
    lowrank, training = problem.source == "lowrank", problem.training
    pointwise = triton.cdiv(rows, tiles.rows) * triton.cdiv(outputs, tiles.outs)
    outs = triton.cdiv(outputs, tiles.weight_outs)
    across = triton.cdiv(outputs, tiles.weight_ins) if problem.source == "dense" else 2
    slots = max(
        outs * max(across, triton.cdiv(classes, _CLASSES.value)), triton.cdiv(outputs, tiles.outs)
    )
    programs = {
        PARTS: pointwise if training or lowrank else 0,
        REDUCE: triton.cdiv(rows * rank, _REDUCED.value) if lowrank else 0,
        PREDICT: 0 if training else pointwise,
        TRIAL: slots if training and problem.rule != "none" else 0,
        APPLY: slots if training else 0,
    }
    return {phase.value: min(count, FLAGS.value) for phase, count in programs.items() if count}


def _options(t: Tensors, problem: Problem, tiles: Tiles, rank: int) -> Options:
    operand = TYPES[t.h.dtype]
    half = t.h.dtype == torch.float16
    firsts = (t.first_weight, t.first_down, t.first_context, t.first_bias)
    made = Options(
        *tiles[1:6],
        rank=max(triton.next_power_of_2(rank), 16),
        source=problem.source,
        training=problem.training,
        rule=problem.rule,
        nesterov=problem.nesterov,
        momentum=any(m is not None for m in firsts),
        train_weight=problem.trainable[0],
        train_down=problem.trainable[1],
        train_context=problem.trainable[2],
        train_bias=problem.trainable[3],
        operand=operand,
        precision=problem.precision,
        # A gradient of size 1 / N has no room in float16; tf32 has its digits and more range.
        back_operand=tl.float32 if half else operand,
        back_precision="tf32" if half else problem.precision,
    )
    frozen: Options = constants(made)
    return frozen
