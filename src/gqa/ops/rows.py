"""What the query rows of a tile may see: ranges of keys, and masks as numbers to add.

A tile is a run of one KV head's query rows, the G queries of every token, token-major: row = t * G + g. A `job` is
any that has the fields read here.
"""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head

from __future__ import annotations

import math

import numpy as np

from gqa.ops.simd import FP32, jit, load_int, load_scalar, store_int, store_scalar

BOOL_MASK, FLOAT_MASK = 1, 2  # a job's mask_kind; 0: no mask

LOG2_E = np.float32(math.log2(math.e))
NEGATIVE = np.float32(-math.inf)
LOWEST = np.float32(-np.finfo(np.float32).max)
ZERO = np.float32(0.0)


@jit
def visible_range(job, sequence, first, rows, first_key, end_key):
    """The keys [first, end) that causality, window and lengths leave to each row, as int64 at two addresses.

    Returns what holds them all, and what all of them hold: (lowest first, highest end, highest first, lowest end).
    """
    begin, end = 0, job.keys
    if job.starts:
        begin = max(begin, load_int(job.starts + 8 * sequence, 8))
    if job.lengths:
        end = min(end, load_int(job.lengths + 8 * sequence, 8))
    start = load_int(job.q_starts + 8 * sequence, 8) if job.q_starts else job.q_start
    lowest, highest, inner_low, inner_high = job.keys, 0, 0, job.keys
    for row in range(rows):
        position = start + (first + row) // job.group
        low = max(begin, position - job.window + 1) if job.window else begin
        high = min(end, position + 1) if job.causal else end
        if high <= low:
            low = high = 0
        else:
            lowest, highest = min(lowest, low), max(highest, high)
        inner_low, inner_high = max(inner_low, low), min(inner_high, high)
        store_int(first_key + 8 * row, low)
        store_int(end_key + 8 * row, high)
    return lowest, highest, inner_low, inner_high


@jit
def limits(key, count, rows, padded, lanes, first_key, end_key, low, high):
    """The rows' ranges relative to `key`, cut to [0, count], as float32 to compare with; rows past `rows` see none.

    Lanes hold `padded` rows, over and over where a vector holds several keys.
    """
    for lane in range(lanes):
        row = lane % padded
        begin, end = 0, 0
        if row < rows:
            begin = load_int(first_key + 8 * row, 8) - key
            end = load_int(end_key + 8 * row, 8) - key
        store_scalar(FP32, low + 4 * lane, np.float32(min(max(begin, 0), count)))
        store_scalar(FP32, high + 4 * lane, np.float32(min(max(end, 0), count)))


@jit
def find_mask_rows(job, sequence, head, first, rows, mask_rows):
    """Where each row's mask lies, in bytes from the mask's beginning, as int64."""
    for row in range(rows):
        token = (first + row) // job.group
        query = head * job.group + first + row - token * job.group
        place = sequence * job.mask_batch + query * job.mask_head + token * job.mask_token
        store_int(mask_rows + 8 * row, place)


@jit
def load_bias(job, key, count, rows, mask_rows, bias, stride):
    """The mask of some keys as numbers to add, in log 2: bias [key][row]. Returns whether any row sees any key."""
    seen = False
    for i in range(count):
        column = job.mask + (key + i) * job.mask_key
        for row in range(rows):
            place = column + load_int(mask_rows + 8 * row, 8)
            if job.mask_kind == BOOL_MASK:
                number = ZERO if load_int(place, 1) else NEGATIVE
            else:
                number = load_scalar(FP32, place)
                if number != NEGATIVE:
                    number = max(number * LOG2_E, LOWEST)  # the lowest number stays one: all keys of it are alike
            seen = seen or number != NEGATIVE
            store_scalar(FP32, bias + i * stride + 4 * row, number)
    return seen
