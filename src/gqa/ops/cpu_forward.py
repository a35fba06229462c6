r"""Forward and decode on a CPU: one kernel, in Python, compiled by Numba.

Work is cut into tasks: a KV head of a sequence, a tile of its query rows (the G queries of every token, token-major:
row = t * G + g), and a range of keys. Each task walks its keys in blocks with an online softmax:

    K rows -> staged fp32    scores[key][row] = K Q^T           GROUP keys at a time
                             p = exp2(scores - max of row)      visibility, softcap and mask before it
    V rows -> staged fp32    acc[row] += p^T V                  a block of keys at a time

So every K/V element is read from memory once per tile of rows, which at decode is once per group. Scores lie
key-major: lanes are rows, and the softmax needs no sums across lanes. With fewer rows than lanes, the lanes of one
vector hold several keys (`terms` of them, see simd.rank_shared).

Where there are few tiles, as at decode, a tile's keys are split over several tasks; the last of them to finish merges
their partial results. Scores are kept in units of log 2.
"""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim of q, k · Dv head dim of v

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np

from gqa.ops.job import fields, places, viewer
from gqa.ops.rows import LOG2_E, LOWEST, NEGATIVE, ZERO, find_mask_rows, limits, load_bias, visible_range
from gqa.ops.simd import (
    FP32,
    VECTOR_BYTES,
    WIDTH,
    Kind,
    exp2,
    fetch_add,
    fma,
    inline,
    jit,
    load,
    load_int,
    load_scalar,
    maximum,
    prefetch,
    size_of,
    splat,
    store,
    store_as,
    store_scalar,
    swap,
    tanh,
    where_less,
)
from gqa.ops.tiles import (
    GROUP,
    STAGE,
    STAGE_BYTES,
    product_columns,
    product_columns_of,
    product_rows,
    product_rows_shared,
    stage_row,
    steps_of_columns,
    steps_of_rows,
)

MAX_ROWS = 128  # query rows of a tile
MOST_KEYS = 2048  # keys of one step of the online softmax, at most; fewer for many rows, whose scores have to stay near
SCORE_FLOATS = 8 * 1024
DIRECT_ROWS = 16  # query rows of a tile up to which V is multiplied where it lies
FEW_ROWS = 2  # as many rows leave a key so little arithmetic that only memory counts

LN_2 = np.float32(math.log(2.0))
ONE = np.float32(1.0)


_INTEGERS = """
    next_worker next_task counters tasks scratch
    kv_heads group tokens keys head_dim v_head_dim rows tiles splits split_keys partials partial_bytes arrivals
    q q_batch q_head q_token k k_batch k_head k_token v v_batch v_head v_token
    out out_batch out_head out_token lse
    causal q_start q_starts window lengths starts table table_batch page_tokens ahead capped sinks
    mask mask_kind mask_batch mask_head mask_token mask_key
    k_scale k_scale_batch k_scale_head k_scale_token v_scale v_scale_batch v_scale_head v_scale_token
"""


class Job(ctypes.Structure):
    """One call: addresses, strides (bytes) and options. Absent tensors are 0. The first two fields are counters."""

    _fields_ = fields(_INTEGERS, "scale softcap")


view = viewer(Job)


# A worker's scratch.
_PLACES = places(
    {
        "QUERIES": 4 * (STAGE * MAX_ROWS),
        "SCORES": 4 * SCORE_FLOATS,
        "BIAS": 4 * SCORE_FLOATS,
        "K_STAGE": GROUP * STAGE_BYTES,
        "V_STAGE": GROUP * STAGE_BYTES,
        "SUMS": MAX_ROWS * STAGE_BYTES,
        "HIGHEST": 4 * MAX_ROWS,
        "TOTAL": 4 * MAX_ROWS,
        "SHRINK": 4 * MAX_ROWS,
        "LOW": 4 * MAX_ROWS,
        "HIGH": 4 * MAX_ROWS,
        "KEY_OF_LANE": 64,
        "FIRST_KEY": 8 * MAX_ROWS,
        "END_KEY": 8 * MAX_ROWS,
        "MASK_ROW": 8 * MAX_ROWS,
    }
)
QUERIES, SCORES, BIAS, K_STAGE, V_STAGE, SUMS = (
    _PLACES[name] for name in ("QUERIES", "SCORES", "BIAS", "K_STAGE", "V_STAGE", "SUMS")
)
HIGHEST, TOTAL, SHRINK, LOW, HIGH = (_PLACES[name] for name in ("HIGHEST", "TOTAL", "SHRINK", "LOW", "HIGH"))
KEY_OF_LANE, FIRST_KEY, END_KEY, MASK_ROW = (
    _PLACES[name] for name in ("KEY_OF_LANE", "FIRST_KEY", "END_KEY", "MASK_ROW")
)
SCRATCH_BYTES = _PLACES["SCRATCH_BYTES"]


@inline
def lanes_of(rows):
    """How rows of queries fill lanes: (rows padded, vectors per key, keys per vector)."""
    if rows > WIDTH // 2:
        vectors = (rows + WIDTH - 1) // WIDTH
        return vectors * WIDTH, vectors, 1
    padded = 1
    while padded < rows:
        padded *= 2
    return padded, 1, WIDTH // padded


@inline
def across(vector, rows, largest):
    """Combine the lanes of the several keys that a vector holds, by maximum or sum: all keys' lanes get the result."""
    if WIDTH > 8 and rows <= 8:
        other = swap(vector, 8)
        vector = maximum(vector, other) if largest else vector + other
    if WIDTH > 4 and rows <= 4:
        other = swap(vector, 4)
        vector = maximum(vector, other) if largest else vector + other
    if rows <= 2:
        other = swap(vector, 2)
        vector = maximum(vector, other) if largest else vector + other
    if rows <= 1:
        other = swap(vector, 1)
        vector = maximum(vector, other) if largest else vector + other
    return vector


@jit
def load_queries(kind, job, sequence, head, first, rows, padded, terms, here):
    """Rows of q times the scale into QUERIES: [d][row], or [d // terms][row][d % terms] where lanes are shared."""
    size = size_of(kind)
    columns = job.head_dim
    whole = (columns + terms - 1) // terms * terms
    queries = here + QUERIES
    for place in range(0, 4 * whole * padded, VECTOR_BYTES):
        store(queries + place, splat(ZERO))
    factor = np.float32(job.scale / job.softcap) if job.capped else np.float32(job.scale) * LOG2_E
    for row in range(rows):
        token = (first + row) // job.group
        query = first + row - token * job.group
        source = job.q + sequence * job.q_batch + (head * job.group + query) * job.q_head + token * job.q_token
        target = queries + 4 * row * terms
        for d in range(0, columns, terms):
            for term in range(min(terms, columns - d)):
                store_scalar(FP32, target + 4 * term, load_scalar(kind, source + (d + term) * size) * factor)
            target += 4 * padded * terms


# A tensor of tokens in a kernel: its address, and the strides of its batch (or page), head and token in bytes.


@inline
def keys_of(job):
    return job.k, job.k_batch, job.k_head, job.k_token


@inline
def values_of(job):
    return job.v, job.v_batch, job.v_head, job.v_token


@inline
def key_scales_of(job):
    return job.k_scale, job.k_scale_batch, job.k_scale_head, job.k_scale_token


@inline
def value_scales_of(job):
    return job.v_scale, job.v_scale_batch, job.v_scale_head, job.v_scale_token


@inline
def address_of(tensor, job, sequence, head, key):
    """Where one token's K, V or scale lies: in the tensor of its sequence, or in the page that the table names."""
    base, outer, head_stride, token_stride = tensor
    if job.table:
        page = max(0, load_int(job.table + sequence * job.table_batch + 8 * (key // job.page_tokens), 8))
        return base + page * outer + head * head_stride + (key % job.page_tokens) * token_stride
    return base + sequence * outer + head * head_stride + key * token_stride


@jit
def stage_rows(kind, tensor, scales, columns, job, sequence, head, key, count, ahead, target):
    """`count` rows of K or V from `key` on, as float32; asks for those `ahead` keys later meanwhile."""
    source, factor = address_of(tensor, job, sequence, head, key), ONE
    for i in range(count):
        if job.table:
            source = address_of(tensor, job, sequence, head, key + i)
        if size_of(kind) == 1:
            factor = load_scale(scales, job, sequence, head, key, i)
        stage_row(kind, source, columns, target + i * STAGE_BYTES, factor, ahead * tensor[3])
        source += tensor[3]


@inline
def load_scale(scales, job, sequence, head, key, i):
    """The scale of token key + i; with the first of a group, asks for those to come."""
    place = address_of(scales, job, sequence, head, key + i)
    if i == 0:
        prefetch(place + job.ahead * scales[3])
    return load_scalar(FP32, place)


@jit
def softmax(job, key, count, rows, padded, vectors, terms, partial, here):
    """SCORES to probabilities relative to the rows' highest scores; updates HIGHEST, TOTAL and SHRINK.

    Returns whether a highest score changed, by which the sums so far must shrink.
    """
    scores, width = here + SCORES, 4 * padded
    if partial:
        limits(key, count, rows, padded, vectors * WIDTH, here + FIRST_KEY, here + END_KEY, here + LOW, here + HIGH)
    number = load(here + KEY_OF_LANE)
    for j in range(vectors):
        lanes = 4 * WIDTH * j
        before = load(here + HIGHEST + lanes)
        highest = before
        if partial or job.capped or job.mask_kind:
            low, high = load(here + LOW + lanes), load(here + HIGH + lanes)
            for i in range(0, count, terms):
                score = load(scores + i * width + lanes)
                if job.capped:
                    score = tanh(score) * splat(np.float32(job.softcap) * LOG2_E)
                if job.mask_kind:
                    score = score + load(here + BIAS + i * width + lanes)
                if partial:
                    here_key = number + splat(np.float32(i))
                    score = where_less(here_key, high, score, splat(NEGATIVE))
                    score = where_less(here_key, low, splat(NEGATIVE), score)
                store(scores + i * width + lanes, score)
                highest = maximum(score, highest)
        else:
            for i in range(0, count, terms):
                highest = maximum(load(scores + i * width + lanes), highest)
        if terms > 1:
            highest = across(highest, padded, True)
        shift = where_less(highest, splat(LOWEST), splat(ZERO), highest)
        shrink = exp2(before - shift)
        total = load(here + TOTAL + lanes) * shrink
        for i in range(0, count, terms):
            p = exp2(load(scores + i * width + lanes) - shift)
            store(scores + i * width + lanes, p)
            total = total + p
        store(here + HIGHEST + lanes, highest)
        store(here + TOTAL + lanes, total)
        store(here + SHRINK + lanes, shrink)
    changed = False
    for row in range(rows):
        changed = changed or load_scalar(FP32, here + SHRINK + 4 * row) != ONE
    return changed


@jit
def finish_row(kind, job, sequence, head, row, sums, vectors, total, highest):
    """out and lse of one row from its sums of p V, its total of p and its highest score."""
    token = row // job.group
    query = head * job.group + row - token * job.group
    if job.sinks:
        sink = load_scalar(FP32, job.sinks + 4 * query) * LOG2_E
        raised = max(highest, sink)
        if raised >= LOWEST:
            shrink = np.float32(math.exp2(highest - raised))
            total = total * shrink + np.float32(math.exp2(sink - raised))
            for place in range(0, vectors * VECTOR_BYTES, VECTOR_BYTES):
                store(sums + place, load(sums + place) * splat(shrink))
            highest = raised
    if job.lse:
        place = job.lse + 4 * ((sequence * job.kv_heads * job.group + query) * job.tokens + token)
        lse = NEGATIVE if total == ZERO else highest * LN_2 + np.float32(math.log(total))
        store_scalar(FP32, place, lse)
    inverse = ZERO if total == ZERO else ONE / total
    target = job.out + sequence * job.out_batch + query * job.out_head + token * job.out_token
    size, columns = size_of(kind), job.v_head_dim
    whole = columns - columns % WIDTH
    for column in range(0, whole, WIDTH):
        store_as(kind, target + column * size, load(sums + 4 * column) * splat(inverse))
    for column in range(whole, columns):
        store_scalar(kind, target + column * size, load_scalar(FP32, sums + 4 * column) * inverse)


@jit
def merge(kind, job, unit, sequence, head, first, rows, vectors):
    """The partial results of a tile's splits into its output. Partials: per split (highest, total, sums) per row."""
    row_bytes = 8 + vectors * VECTOR_BYTES
    base = job.partials + unit * job.splits * job.partial_bytes
    for row in range(rows):
        place = base + row * row_bytes
        highest = NEGATIVE
        for split in range(job.splits):
            highest = max(highest, load_scalar(FP32, place + split * job.partial_bytes))
        if highest < LOWEST:
            highest = load_scalar(FP32, place)
            shift = ZERO
        else:
            shift = highest
        total = ZERO
        for split in range(job.splits):
            here = place + split * job.partial_bytes
            factor = np.float32(math.exp2(load_scalar(FP32, here) - shift))
            total += factor * load_scalar(FP32, here + 4)
            for column in range(8, row_bytes, VECTOR_BYTES):
                before = splat(ZERO) if split == 0 else load(place + column)
                store(place + column, fma(load(here + column), splat(factor), before))
        finish_row(kind, job, sequence, head, first + row, place + 8, vectors, total, highest)


@jit
def scale_weights(job, sequence, head, key, count, padded, weights):
    """Probabilities times the scales of int8 values."""
    for i in range(count):
        factor = load_scale(value_scales_of(job), job, sequence, head, key, i)
        for row in range(padded):
            weight = weights + 4 * (i * padded + row)
            store_scalar(FP32, weight, load_scalar(FP32, weight) * factor)


@inline
def plan_reads(kind, job, rows, vectors, terms, columns, begin):
    """How K and V of a tile are read, and how cache lines are asked for ahead of time.

    Returns (staged, key_lines, value_lines, direct). Lines are asked for while rows are staged, `staged` keys on, or at
    each step of the products, so many of K and of V: these leave the memory idle else, and pages are found there, but
    only tokens next to each other lie where the steps ask. direct: the rows of V are multiplied where they lie, as few
    rows of queries are not worth staging them for.
    """
    size = size_of(kind)
    dense = job.k_token == job.head_dim * size and job.v_token == job.v_head_dim * size
    if job.table:
        dense = dense and job.page_tokens % GROUP == 0 and begin % GROUP == 0
    direct = rows <= DIRECT_ROWS and job.v_head_dim % WIDTH == 0 and dense
    staged = key_lines = value_lines = 0
    if job.ahead and dense:
        value_lines = lines_per_step(GROUP * job.v_token, steps_of_columns(rows, columns))
        if job.table or (rows > FEW_ROWS and size == 4):
            key_lines = lines_per_step(GROUP * job.k_token, steps_of_rows(job.head_dim, vectors, terms))
        else:
            staged = job.ahead
    elif not job.table:
        staged = job.ahead
    return staged, key_lines, value_lines, direct


@inline
def lines_per_step(size, steps):
    return (size // 64 + steps - 1) // steps


@jit
def run_task(q_kind, kv_kind, job, task, here):
    split = task % job.splits
    unit = task // job.splits
    tile = job.tiles - 1 - unit % job.tiles  # under causality the last tiles have most keys: longest first
    sequence = unit // job.tiles // job.kv_heads
    head = unit // job.tiles % job.kv_heads
    first = tile * job.rows
    rows = min(job.rows, job.tokens * job.group - first)
    padded, vectors, terms = lanes_of(rows)
    columns = (job.v_head_dim + WIDTH - 1) // WIDTH

    lowest, highest, inner_low, inner_high = visible_range(job, sequence, first, rows, here + FIRST_KEY, here + END_KEY)
    begin, end = lowest, highest
    if job.splits > 1:
        begin = max(begin, split * job.split_keys)
        end = min(end, (split + 1) * job.split_keys)

    for place in range(0, vectors * VECTOR_BYTES, VECTOR_BYTES):
        store(here + HIGHEST + place, splat(NEGATIVE))
        store(here + TOTAL + place, splat(ZERO))
    for row in range(rows):
        for place in range(0, columns * VECTOR_BYTES, VECTOR_BYTES):
            store(here + SUMS + row * STAGE_BYTES + place, splat(ZERO))

    if begin < end:
        load_queries(q_kind, job, sequence, head, first, rows, padded, terms, here)
        store(here + KEY_OF_LANE, splat(ZERO))
        if terms > 1:
            for lane in range(WIDTH):
                store_scalar(FP32, here + KEY_OF_LANE + 4 * lane, np.float32(lane // padded))
        if job.mask_kind:
            find_mask_rows(job, sequence, head, first, rows, here + MASK_ROW)

    staged, key_lines, value_lines, direct = plan_reads(kv_kind, job, rows, vectors, terms, columns, begin)
    block = min(MOST_KEYS, SCORE_FLOATS // padded // GROUP * GROUP)
    for key in range(begin, end, block):
        count = min(block, end - key)
        if job.mask_kind and not load_bias(job, key, count, rows, here + MASK_ROW, here + BIAS, 4 * padded):
            continue
        for group in range(0, count, GROUP):
            some, soon = min(GROUP, count - group), min(key + group + job.ahead, end - 1)
            stage_rows(
                kv_kind, keys_of(job), key_scales_of(job), job.head_dim, job, sequence, head, key + group, some, staged,
                here + K_STAGE,
            )  # fmt: skip
            ahead = address_of(keys_of(job), job, sequence, head, soon)
            scores, queries, keys = here + SCORES + 4 * group * padded, here + QUERIES, here + K_STAGE
            if terms == 1:
                product_rows(
                    scores, 4 * padded, keys, queries, 4 * padded, job.head_dim, vectors, False, ahead, key_lines
                )
            else:
                product_rows_shared(scores, keys, queries, job.head_dim, terms, ahead, key_lines)
        partial = key < inner_low or key + count > inner_high or count % terms != 0
        if softmax(job, key, count, rows, padded, vectors, terms, partial, here):
            for row in range(rows):
                shrink = splat(load_scalar(FP32, here + SHRINK + 4 * row))
                for place in range(row * STAGE_BYTES, row * STAGE_BYTES + columns * VECTOR_BYTES, VECTOR_BYTES):
                    store(here + SUMS + place, load(here + SUMS + place) * shrink)
        for group in range(0, count, GROUP):
            some, soon = min(GROUP, count - group), min(key + group + job.ahead, end - 1)
            weights, sums = here + SCORES + 4 * group * padded, here + SUMS
            if direct:
                source = address_of(values_of(job), job, sequence, head, key + group)
                ahead = address_of(values_of(job), job, sequence, head, soon)
                if size_of(kv_kind) == 1:
                    scale_weights(job, sequence, head, key + group, some, padded, weights)
                product_columns_of(
                    kv_kind, sums, STAGE_BYTES, weights, 4 * padded, source, job.v_token, some, rows, columns,
                    ahead, value_lines,
                )  # fmt: skip
            else:
                stage_rows(
                    kv_kind, values_of(job), value_scales_of(job), job.v_head_dim, job, sequence, head, key + group,
                    some, 0 if job.table else job.ahead, here + V_STAGE,
                )  # fmt: skip
                product_columns(
                    sums, STAGE_BYTES, weights, 4 * padded, here + V_STAGE, STAGE_BYTES, some, rows, columns
                )

    if terms > 1:
        store(here + TOTAL, across(load(here + TOTAL), padded, False))
    if job.splits == 1:
        for row in range(rows):
            total = load_scalar(FP32, here + TOTAL + 4 * row)
            top = load_scalar(FP32, here + HIGHEST + 4 * row)
            finish_row(q_kind, job, sequence, head, first + row, here + SUMS + row * STAGE_BYTES, columns, total, top)
        return
    target = job.partials + (unit * job.splits + split) * job.partial_bytes
    for row in range(rows):
        store_scalar(FP32, target, load_scalar(FP32, here + HIGHEST + 4 * row))
        store_scalar(FP32, target + 4, load_scalar(FP32, here + TOTAL + 4 * row))
        target += 8
        for place in range(0, columns * VECTOR_BYTES, VECTOR_BYTES):
            store(target + place, load(here + SUMS + row * STAGE_BYTES + place))
        target += columns * VECTOR_BYTES
    if fetch_add(job.arrivals + 8 * unit, 1) == job.splits - 1:
        merge(q_kind, job, unit, sequence, head, first, rows, columns)


@jit
def work(q_kind, kv_kind, address):
    """What every thread of a call runs: take tasks until there are none."""
    job = view(address)
    here = job.scratch + fetch_add(job.counters, 1) * SCRATCH_BYTES
    task = fetch_add(job.counters + 8, 1)
    while task < job.tasks:
        run_task(q_kind, kv_kind, job, task, here)
        task = fetch_add(job.counters + 8, 1)


def entry(build: str, q_kind: Kind, kv_kind: Kind) -> Any:
    """`work` for these kinds of numbers, as gqa.ops.compiled wants it."""

    def forward(job):
        build  # noqa: B018
        work(q_kind, kv_kind, job)

    return forward
