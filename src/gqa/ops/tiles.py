"""What the CPU kernels are made of above single vectors: staged rows and the two matrix products of attention.

Numbers are staged once into float32 rows of constant stride that stay in the first caches, whatever their dtype,
strides or pages were; all products run on those. STAGE is odd in cache lines, so that rows do not compete for one set.
"""

# One product, two ways to walk A; both sum n outer products (`rank_one`) from zero and only then add what C holds, so
# that the rounding of a long sum grows with the roots of its parts:
#   rows:    C[i, j] (+)= sum_r A[i, r] B[r, j]   A's rows are staged rows, r runs along them
#   columns: C[i, j]  +=  sum_r A[r, i] B[r, j]   A's columns are neighbours, r runs down the rows

from __future__ import annotations

import numpy as np

from gqa.ops.simd import (
    FP32,
    REGISTERS,
    VECTOR_BYTES,
    WIDTH,
    add_tile,
    fold,
    inline,
    jit,
    load_as,
    load_scalar,
    prefetch,
    rank_one,
    rank_shared,
    size_of,
    splat,
    store,
    store_scalar,
    store_tile,
    zeros,
)

STAGE = 272  # floats from row to row: a head dim of at most 256, and one cache line
STAGE_BYTES = 4 * STAGE
GROUP = 16  # keys multiplied at a time
WIDE = REGISTERS == 32  # 16 sums in registers at once; else 8


@inline
def _stage_vector(kind, source, target, factor):
    vector = load_as(kind, source)
    store(target, vector * splat(factor) if size_of(kind) == 1 else vector)


@inline
def stage_row(kind, source, columns, target, factor, ahead=0):
    """One row of numbers to float32; columns up to the next multiple of WIDTH become 0. int8 is times `factor`.

    ahead: 0, or how many bytes further on cache lines are asked for, as many as are read.
    """
    size = size_of(kind)
    whole = columns - columns % WIDTH
    fours = columns - columns % (4 * WIDTH)
    for column in range(0, fours, 4 * WIDTH):
        if ahead:
            for line in range(0, 4 * WIDTH * size, 64):
                prefetch(source + column * size + ahead + line)
        for part in range(0, 4 * WIDTH, WIDTH):
            _stage_vector(kind, source + (column + part) * size, target + 4 * (column + part), factor)
    for column in range(fours, whole, WIDTH):
        _stage_vector(kind, source + column * size, target + 4 * column, factor)
    if whole < columns:
        store(target + 4 * whole, splat(np.float32(0.0)))
        for column in range(whole, columns):
            value = load_scalar(kind, source + column * size)
            if size == 1:
                value = value * factor
            store_scalar(FP32, target + 4 * column, value)


# The products of decoding also keep the memory busy: at each of their steps they ask for `lines` cache lines from
# `ahead` on. Nothing is asked for by default.


@inline
def _rows(tile, c, c_stride, a, b, b_stride, n, add, ahead, lines):
    for _ in range(n):
        tile = rank_one(FP32, tile, a, STAGE, b)
        a += 4
        b += b_stride
        for _ in range(lines):
            prefetch(ahead)
            ahead += 64
    if add:
        tile = add_tile(tile, c, c_stride)
    store_tile(tile, c, c_stride)


@inline
def _columns(kind, tile, c, c_stride, a, a_stride, b, b_stride, n, ahead, lines):
    for _ in range(n):
        tile = rank_one(kind, tile, a, 1, b)
        a += a_stride
        b += b_stride
        for _ in range(lines):
            prefetch(ahead)
            ahead += 64
    store_tile(add_tile(tile, c, c_stride), c, c_stride)


@jit
def product_rows(c, c_stride, a, b, b_stride, n, vectors, add, ahead=0, lines=0):
    """C (GROUP, vectors * WIDTH) = A B for GROUP staged rows of A, or C += A B with `add`. Strides in bytes."""
    j = 0
    if WIDE:
        while vectors - j >= 4:
            for i in range(0, GROUP, 4):
                here, there = c + i * c_stride + j * VECTOR_BYTES, a + i * STAGE_BYTES
                _rows(zeros(4, 4), here, c_stride, there, b + j * VECTOR_BYTES, b_stride, n, add, ahead, lines)
                ahead += 64 * lines * n
            j += 4
        while vectors - j >= 2:
            for i in range(0, GROUP, 8):
                here, there = c + i * c_stride + j * VECTOR_BYTES, a + i * STAGE_BYTES
                _rows(zeros(8, 2), here, c_stride, there, b + j * VECTOR_BYTES, b_stride, n, add, ahead, lines)
                ahead += 64 * lines * n
            j += 2
        if vectors > j:
            here = c + j * VECTOR_BYTES
            _rows(zeros(16, 1), here, c_stride, a, b + j * VECTOR_BYTES, b_stride, n, add, ahead, lines)
    else:
        while vectors - j >= 2:
            for i in range(0, GROUP, 4):
                here, there = c + i * c_stride + j * VECTOR_BYTES, a + i * STAGE_BYTES
                _rows(zeros(4, 2), here, c_stride, there, b + j * VECTOR_BYTES, b_stride, n, add, ahead, lines)
                ahead += 64 * lines * n
            j += 2
        if vectors > j:
            for i in range(0, GROUP, 8):
                here, there = c + i * c_stride + j * VECTOR_BYTES, a + i * STAGE_BYTES
                _rows(zeros(8, 1), here, c_stride, there, b + j * VECTOR_BYTES, b_stride, n, add, ahead, lines)
                ahead += 64 * lines * n


@inline
def _strip(kind, many, one, height, c, c_stride, a, a_stride, b, b_stride, n, rows, ahead, lines):
    """`_columns` down all rows, with tiles of `height` rows as long as there are so many. Returns `ahead` moved on."""
    i = 0
    while rows - i >= height:
        _columns(kind, many, c + i * c_stride, c_stride, a + 4 * i, a_stride, b, b_stride, n, ahead, lines)
        ahead += 64 * lines * n
        i += height
    while rows > i:
        _columns(kind, one, c + i * c_stride, c_stride, a + 4 * i, a_stride, b, b_stride, n, ahead, lines)
        ahead += 64 * lines * n
        i += 1
    return ahead


@jit
def product_columns_of(kind, c, c_stride, a, a_stride, b, b_stride, n, rows, vectors, ahead=0, lines=0):
    """C (rows, vectors * WIDTH) += A^T B for A (n, rows) and B of a kind. Strides in bytes."""
    wide = WIDTH * size_of(kind)
    j = 0
    if WIDE:
        while vectors - j >= 4:
            here, there = c + j * VECTOR_BYTES, b + j * wide
            ahead = _strip(
                kind, zeros(4, 4), zeros(1, 4), 4, here, c_stride, a, a_stride, there, b_stride, n, rows, ahead, lines
            )
            j += 4
    while vectors - j >= 2:
        here, there = c + j * VECTOR_BYTES, b + j * wide
        ahead = _strip(
            kind, zeros(4, 2), zeros(1, 2), 4, here, c_stride, a, a_stride, there, b_stride, n, rows, ahead, lines
        )
        j += 2
    if vectors > j:
        here, there = c + j * VECTOR_BYTES, b + j * wide
        _strip(kind, zeros(8, 1), zeros(1, 1), 8, here, c_stride, a, a_stride, there, b_stride, n, rows, ahead, lines)


@inline
def product_columns(c, c_stride, a, a_stride, b, b_stride, n, rows, vectors):
    """C (rows, vectors * WIDTH) += A^T B for A (n, rows) and B of float32. Strides in bytes."""
    product_columns_of(FP32, c, c_stride, a, a_stride, b, b_stride, n, rows, vectors)


def _shared(terms):
    """`product_rows` for WIDTH // terms columns, whose sums share the lanes of one vector (see simd.rank_shared).

    b: n // terms vectors with lanes (column, term); c: (GROUP, WIDTH // terms), dense.
    """
    step = 4 * terms

    @inline
    def product(c, a, b, n, ahead, lines):
        tile = zeros(16, 1)
        for _ in range(0, n, terms):
            tile = rank_shared(tile, a, STAGE, b, terms)
            a += step
            b += VECTOR_BYTES
            for _ in range(lines):
                prefetch(ahead)
                ahead += 64
        store_tile(fold(tile, terms), c, VECTOR_BYTES)

    return product


_product_2, _product_4, _product_8, _product_16 = (
    _shared(terms if terms <= WIDTH else WIDTH) for terms in (2, 4, 8, 16)
)


@jit
def product_rows_shared(c, a, b, n, terms, ahead=0, lines=0):
    """GROUP staged rows of A times B, whose WIDTH // terms columns lie in one vector with lanes (column, term)."""
    if terms == 2:
        _product_2(c, a, b, n, ahead, lines)
    elif terms == 4:
        _product_4(c, a, b, n, ahead, lines)
    elif terms == 8:
        _product_8(c, a, b, n, ahead, lines)
    else:
        _product_16(c, a, b, n, ahead, lines)


@inline
def steps_of_rows(n, vectors, terms):
    """How many steps `product_rows` or `product_rows_shared` takes."""
    if terms > 1:
        return (n + terms - 1) // terms
    if WIDE:
        return n * (vectors // 4 * 4 + vectors % 4 // 2 * 2 + vectors % 2)
    return n * (vectors // 2 * 4 + vectors % 2 * 2)


@inline
def steps_of_columns(rows, vectors):
    """How many steps `product_columns` takes for GROUP rows of A and B, about."""
    across = 4 if WIDE else 2
    return GROUP * ((vectors + across - 1) // across) * ((rows + 3) // 4)
