"""What the Triton kernels have in common: packed rows, visible ranges, scores.

A tile's rows are the queries that share one KV head, token by token: row m = t * G + g is query g of the group at
token t. So a tile of a few tokens reads its keys once for all G heads, whatever G is, and under a causal mask it spans
few positions.

Scores and their maxima are in base 2, as exp2 is what the hardware has; a natural score times LOG2_E.
"""

# T query tokens · S key tokens · G queries per KV head

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def sequence_of(tile, offsets, total, sequences, group, BLOCK: tl.constexpr, SEQUENCES: tl.constexpr):
    """(sequence, its tile, first token, tokens) of a tile numbered over all sequences of a ragged batch.

    A sequence of n tokens has ceil(n * group / BLOCK) tiles. `sequence` is `sequences` where there is no such tile.
    offsets: where sequences begin and the last one ends; what points outside the `total` tokens is moved inside.
    SEQUENCES: a power of two, no fewer than there are.
    """
    number = tl.arange(0, SEQUENCES)
    here = number < sequences
    first = tl.minimum(tl.maximum(tl.load(offsets + number, mask=here, other=0).to(tl.int32), 0), total)
    end = tl.minimum(tl.load(offsets + number + 1, mask=here, other=0).to(tl.int32), total)
    tokens = tl.maximum(end - first, 0)
    tiles = (tokens * group + BLOCK - 1) // BLOCK
    ends = tl.cumsum(tiles, 0)
    sequence = tl.sum((here & (ends <= tile)).to(tl.int32), 0)
    chosen = number == sequence
    tile -= tl.sum(tl.where(number < sequence, tiles, 0), 0)
    return sequence, tile, tl.sum(tl.where(chosen, first, 0), 0), tl.sum(tl.where(chosen, tokens, 0), 0)


@triton.jit
def span_of(sequence, offsets, total):
    """(first token, tokens) of a sequence of a ragged batch; see `sequence_of`."""
    first = tl.minimum(tl.maximum(tl.load(offsets + sequence).to(tl.int32), 0), total)
    end = tl.minimum(tl.load(offsets + sequence + 1).to(tl.int32), total)
    return first, tl.maximum(end - first, 0)


@triton.jit
def packed_rows(tile, head, query_tokens, group, BLOCK: tl.constexpr):
    """(row, whether there is such a row, token, query head) for the rows of a tile of KV head `head`."""
    row = tile * BLOCK + tl.arange(0, BLOCK)
    return row, row < query_tokens * group, row // group, head * group + row % group


@triton.jit
def held_keys(sequence, key_tokens, kv_lengths, kv_starts):
    """(first, end) of the keys that exist for a sequence."""
    first = 0
    end = key_tokens
    if kv_lengths is not None:
        end = tl.minimum(end, tl.load(kv_lengths + sequence).to(tl.int32))
    if kv_starts is not None:
        first = tl.maximum(first, tl.load(kv_starts + sequence).to(tl.int32))
    return first, end


@triton.jit
def first_position(sequence, query_tokens, key_tokens, q_start, q_starts):
    """Where a sequence's first query sits: q_starts of the sequence, q_start, or aligned at the end of the keys."""
    if q_starts is not None:
        return tl.load(q_starts + sequence).to(tl.int32)
    elif q_start is not None:
        return q_start
    else:
        return key_tokens - query_tokens


@triton.jit
def seen_keys(first, end, lowest, highest, window, CAUSAL: tl.constexpr):
    """(first, end, all_first, all_end) for queries at positions lowest to highest and the keys from first to end:
    [first, end) is what any of them sees, [all_first, all_end) what all of them see, which may be empty."""
    all_first = first
    all_end = end
    if CAUSAL:
        all_end = tl.minimum(end, lowest + 1)
        end = tl.minimum(end, highest + 1)
    if window is not None:
        all_first = tl.maximum(first, highest - window + 1)
        first = tl.maximum(first, lowest - window + 1)
    return first, end, all_first, all_end


@triton.jit
def whole_blocks(first, end, all_first, all_end, BLOCK: tl.constexpr):
    """(blocks, first whole one, how many are whole) of the blocks of keys that begin at `first`. A whole one is seen by
    all; those before and after it, edges, by some."""
    blocks = tl.cdiv(tl.maximum(end - first, 0), BLOCK)
    whole_first = tl.minimum(tl.cdiv(tl.maximum(all_first - first, 0), BLOCK), blocks)
    whole_end = tl.maximum(tl.minimum(all_end, end) - first, 0) // BLOCK
    return blocks, whole_first, tl.maximum(whole_end - whole_first, 0)


@triton.jit
def seen_by(positions, keys, window, CAUSAL: tl.constexpr):
    """Where causality and the window let a position see a key; `positions` and `keys` broadcast."""
    if CAUSAL and window is not None:
        return (keys <= positions) & (keys > positions - window)
    elif CAUSAL:
        return keys <= positions
    else:
        return keys > positions - window


@triton.jit
def load_block(base, offsets, rows_held, columns_held, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """A tile of memory; zeros where a row or a column is not held. Only what may be missing is asked about, as a plain
    load is the fastest."""
    if MASK_ROWS and MASK_COLUMNS:
        return tl.load(base + offsets, mask=rows_held[:, None] & columns_held[None, :], other=0)
    elif MASK_ROWS:
        return tl.load(base + offsets, mask=rows_held[:, None], other=0)
    elif MASK_COLUMNS:
        return tl.load(base + offsets, mask=columns_held[None, :], other=0)
    else:
        return tl.load(base + offsets)


@triton.jit
def tanh(x):
    """tanh, to a few roundings of the result itself: by its series near 0, where 1 - 2 / (exp(2x) + 1) cancels."""
    square = x * x
    # x - x^3/3 + 2x^5/15 - 17x^7/315 + 62x^9/2835 - 1382x^11/155925: the next term is below 2^-26 of x up to 0.3
    series = -1382 / 155925
    series = series * square + 62 / 2835
    series = series * square - 17 / 315
    series = series * square + 2 / 15
    series = series * square - 1 / 3
    near = x + x * square * series
    far = 1 - 2 / (tl.exp2(x * (2 * LOG2_E)) + 1)
    return tl.where(tl.abs(x) < 0.3, near, far)
