"""Tiles of row-major matrices, and walks over them: device functions that all kernels share.

Offsets of rows are 64-bit: a matrix may have more than 2^31 elements.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fused_dni.kernels.common import apply_rule

# Programs that leave something in a list of the workspace, at the most: its length.
FLAGS: tl.constexpr = tl.constexpr(1024)

_CHUNK: tl.constexpr = tl.constexpr(32)  # vectors of a list that are read at a time


@triton.jit
def wide(i):
    """Return a size as it has to be in a product with others: 64-bit."""
    return i * tl.full((), 1, tl.int64)


@triton.jit
def tile_offsets(row, column, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return where a tile of a matrix with so many columns begins, and its elements behind that:
    64-bit once, 32-bit for each."""
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    return wide(row) * columns + column, i[:, None] * columns + j[None, :]


@triton.jit
def load_tile(source, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Load [ROWS, COLUMNS] of a matrix [rows, columns] from (row, column) on; zero outside."""
    first, at = tile_offsets(row, column, columns, ROWS, COLUMNS)
    inside = is_inside(row, column, rows, columns, ROWS, COLUMNS)
    return tl.load(source + first + at, mask=inside, other=0.0)


@triton.jit
def store_tile(target, tile, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Undo :func:`load_tile`, in the target's type."""
    first, at = tile_offsets(row, column, columns, ROWS, COLUMNS)
    inside = is_inside(row, column, rows, columns, ROWS, COLUMNS)
    tl.store(target + first + at, tile.to(target.dtype.element_ty), mask=inside)


@triton.jit
def is_inside(row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Say which elements of a tile the matrix has."""
    i, j = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    return (i < rows)[:, None] & (j < columns)[None, :]


@triton.jit
def load_vector(source, first, size, COUNT: tl.constexpr, absent):
    """Load float32 [COUNT] of a vector [size] from ``first`` on; ``absent`` outside, or everywhere
    where there is no vector."""
    if source is None:
        v = tl.full((COUNT,), absent, tl.float32)
    else:
        i = first + tl.arange(0, COUNT)
        v = tl.load(source + i, mask=i < size, other=absent).to(tl.float32)
    return v


@triton.jit
def store_vector(target, v, first, size, COUNT: tl.constexpr):
    """Undo :func:`load_vector`, in the target's type."""
    i = first + tl.arange(0, COUNT)
    tl.store(target + i, v.to(target.dtype.element_ty), mask=i < size)


@triton.jit
def _chunk(source, count, stride, first, size, LENGTH: tl.constexpr):
    """Load [CHUNK, LENGTH]: the first of ``count`` vectors [size] that lie ``stride`` apart, from
    ``first`` on; zero outside."""
    i, j = tl.arange(0, _CHUNK), first + tl.arange(0, LENGTH)
    at = i[:, None].to(tl.int64) * stride + j[None, :]
    return tl.load(source + at, mask=(i < count)[:, None] & (j < size)[None, :], other=0.0)


@triton.jit
def sum_list(source, count, stride, first, size, LENGTH: tl.constexpr):
    """Return [LENGTH]: the sum of ``count`` vectors [size], ``stride`` apart, from ``first`` on."""
    total = tl.full((LENGTH,), 0.0, tl.float32)
    for k in range(0, count, _CHUNK):
        part = _chunk(source + wide(k) * stride, count - k, stride, first, size, LENGTH)
        total += tl.sum(part, 0)
    return total


@triton.jit
def combine_moments(source, count, part: tl.constexpr, first, size, LENGTH: tl.constexpr):
    """Return mean and biased variance [LENGTH] over ``count`` elements, of which ``source``
    [cdiv(count, part), 2, size] has the mean and the squared deviations of each ``part``.

    Chan, Golub & LeVeque 1983 (The American Statistician 37): squared deviations from the common
    mean.
    """
    lists, stride = tl.cdiv(count, part), 2 * size
    mean = tl.full((LENGTH,), 0.0, tl.float32)
    for k in range(0, lists, _CHUNK):
        sizes = tl.minimum(tl.maximum(count - (k + tl.arange(0, _CHUNK)) * part, 0), part)
        means = _chunk(source + wide(k) * stride, lists - k, stride, first, size, LENGTH)
        mean += tl.sum(means * sizes.to(tl.float32)[:, None], 0) / count
    var = tl.full((LENGTH,), 0.0, tl.float32)
    for k in range(0, lists, _CHUNK):
        sizes = tl.minimum(tl.maximum(count - (k + tl.arange(0, _CHUNK)) * part, 0), part)
        at = source + wide(k) * stride
        apart = _chunk(at, lists - k, stride, first, size, LENGTH) - mean[None, :]
        squares = _chunk(at + size, lists - k, stride, first, size, LENGTH)
        var += tl.sum(squares + apart * apart * sizes.to(tl.float32)[:, None], 0) / count
    return mean, var


@triton.jit
def place(index, down, across):
    """Return row and column, in tiles, of tile number ``index`` of ``down`` by ``across``.

    A group of rows of tiles is gone through column by column, so that programs that run side by
    side share operands in the cache.
    """
    GROUP: tl.constexpr = 8
    group = index // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    rest = index % (GROUP * across)
    return group * GROUP + rest % height, rest // height


@triton.jit
def magnitude(tile):
    """Return the largest magnitude; infinite if an element is not finite."""
    size = tl.abs(tile)
    return tl.max(tl.where(size < float("inf"), size, float("inf")))


@triton.jit
def largest_left(lists, which, programs):
    """Return the largest of what so many programs left in one of a workspace's lists, FLAGS long
    each."""
    i = tl.arange(0, FLAGS)
    return tl.max(tl.load(lists + which * FLAGS + i, mask=i < programs, other=0.0))


@triton.jit
def _mixed(h):
    """Apply the finalizer of MurmurHash3 (A. Appleby, public domain), uint32."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def round_at_random(value, start, at, step, SLOT: tl.constexpr):
    """Round float32 values of the elements ``start + at`` as bfloat16, each one of its two
    neighbours, right in the mean; the same bits as
    fused_dni.backends.reference.rules.rounded_at_random."""
    seed = ((step.to(tl.int64) * 1024 + SLOT) * 0x9E3779B1) & 0xFFFFFFFF
    element = (start + at).to(tl.uint32)
    up = _mixed(_mixed(element) ^ seed.to(tl.uint32)) & 0xFFFF
    kept = (value.to(tl.int32, bitcast=True) + up.to(tl.int32)) & -65536
    return kept.to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def settle(
    parameter,
    first,
    second,
    gradient,
    g,
    start,
    at,
    mask,
    factors,
    C: tl.constexpr,
    step=0.0,
    SLOT: tl.constexpr = 0,
):
    """Apply the rule C.rule to the elements ``start + at`` of a parameter and its moments, which
    are mutated, with the gradient g; or, if it is "none", store g in ``gradient``.

    A bfloat16 parameter is rounded at random, by the number of the step and of its slot.
    """
    if C.rule == "none":
        tl.store(gradient + start + at, g.to(gradient.dtype.element_ty), mask=mask)
    else:
        p = tl.load(parameter + start + at, mask=mask, other=0.0).to(tl.float32)
        m, v = p, p
        if C.momentum:
            m = tl.load(first + start + at, mask=mask, other=0.0)
        if C.rule != "sgd":
            v = tl.load(second + start + at, mask=mask, other=0.0)
        p, m, v = apply_rule(p, g, m, v, factors, C.rule, C.nesterov, C.momentum)
        if parameter.dtype.element_ty == tl.bfloat16:
            p = round_at_random(p, start, at, step, SLOT)
        tl.store(parameter + start + at, p, mask=mask)
        if C.momentum:
            tl.store(first + start + at, m, mask=mask)
        if C.rule != "sgd":
            tl.store(second + start + at, v, mask=mask)
