r"""Backward on a CPU: the gradients of q, k and v from those of the output, in one pass over the scores.

A task is a tile of one KV head's query rows (row = t * G + g). It walks the keys in blocks and forms their scores anew:

    P  = exp2(K Q^T - lse)                     dV += P dO
    dP = V dO^T                                dK += dS Q
    dS = P * (dP - delta) * scale              dQ += dS^T K        delta = sum(dO * out) - d_lse

All lie key-major, [key][row]: lanes are rows. dQ is the task's own and stays in its scratch. dK and dV are sums over
all G queries and all tokens, kept once per KV head in float32. Tiles of a head add to them in turns, block by block:
a block's `turn` counts the tiles that are done with it. So the sums need neither copies nor locks, and their order,
hence every bit of the result, is the same whatever the number of threads. Tasks are taken in order and wait only for
earlier ones; several heads are worked on abreast, so that they hardly ever do.
"""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim of q, k · Dv head dim of v

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from gqa.ops.job import fields, places, viewer
from gqa.ops.rows import (
    LOG2_E,
    NEGATIVE,
    ZERO,
    find_mask_rows,
    limits,
    load_bias,
    visible_range,
)
from gqa.ops.simd import (
    FP32,
    VECTOR_BYTES,
    WIDTH,
    Kind,
    exp2,
    fetch_add,
    fma,
    jit,
    load,
    load_as,
    load_scalar,
    size_of,
    splat,
    store,
    store_as,
    store_scalar,
    tanh,
    where_less,
)
from gqa.ops.tiles import GROUP, STAGE_BYTES, WIDE, product_columns, product_rows, stage_row

BLOCK = 64  # keys of one step
MAX_ROWS = 128  # query rows of a tile
PANEL = 4 if WIDE else 2  # vectors that a product takes at once: transposed rows lie in dense panels of them
PANEL_ROWS = PANEL * WIDTH
PANEL_BYTES = PANEL * VECTOR_BYTES
UNSEEN = np.float32(3e38)  # for an lse of -inf: all probabilities become 0
ONE = np.float32(1.0)


_INTEGERS = """
    next_worker next_task counters tasks scratch
    units abreast kv_heads group tokens keys head_dim v_head_dim rows tiles blocks
    q q_batch q_head q_token k k_batch k_head k_token v v_batch v_head v_token
    out out_batch out_head out_token d_out d_out_batch d_out_head d_out_token lse d_lse
    dq dq_batch dq_head dq_token dk dk_head dk_token dv dv_head dv_token delta turns
    causal q_start q_starts window lengths starts capped
    mask mask_kind mask_batch mask_head mask_token mask_key
"""


class Job(ctypes.Structure):
    """One call: addresses, strides (bytes) and options. Absent tensors are 0. The first two fields are counters."""

    _fields_ = fields(_INTEGERS, "scale softcap")


view = viewer(Job)


_PANELS = -(-MAX_ROWS // PANEL_ROWS) * PANEL_BYTES * 256
# A worker's scratch.
_PLACES = places(
    {
        "Q_ROWS": MAX_ROWS * STAGE_BYTES,
        "DO_ROWS": MAX_ROWS * STAGE_BYTES,
        "Q_PANELS": _PANELS,
        "DO_PANELS": _PANELS,
        "K_ROWS": BLOCK * STAGE_BYTES,
        "V_ROWS": BLOCK * STAGE_BYTES,
        "SCORES": BLOCK * STAGE_BYTES,
        "SLOPES": BLOCK * STAGE_BYTES,
        "BIAS": BLOCK * STAGE_BYTES,
        "DQ_ROWS": MAX_ROWS * STAGE_BYTES,
        "LSE": 4 * MAX_ROWS,
        "DELTA": 4 * MAX_ROWS,
        "LOW": 4 * MAX_ROWS,
        "HIGH": 4 * MAX_ROWS,
        "FIRST_KEY": 8 * MAX_ROWS,
        "END_KEY": 8 * MAX_ROWS,
        "MASK_ROWS": 8 * MAX_ROWS,
    }
)
Q_ROWS, DO_ROWS, Q_PANELS, DO_PANELS, DQ_ROWS, K_ROWS, V_ROWS = (
    _PLACES[name] for name in ("Q_ROWS", "DO_ROWS", "Q_PANELS", "DO_PANELS", "DQ_ROWS", "K_ROWS", "V_ROWS")
)
SCORES, SLOPES, BIAS, LSE, DELTA = (_PLACES[name] for name in ("SCORES", "SLOPES", "BIAS", "LSE", "DELTA"))
LOW, HIGH, FIRST_KEY, END_KEY, MASK_ROWS = (
    _PLACES[name] for name in ("LOW", "HIGH", "FIRST_KEY", "END_KEY", "MASK_ROWS")
)
SCRATCH_BYTES = _PLACES["SCRATCH_BYTES"]


@jit
def transpose(source, columns, padded, target, factor):
    """Staged rows times `factor` into panels: [panel][column][PANEL_ROWS]."""
    for row in range(padded):
        panel = row // PANEL_ROWS
        place = target + panel * columns * PANEL_BYTES + 4 * (row - panel * PANEL_ROWS)
        for column in range(columns):
            number = load_scalar(FP32, source + row * STAGE_BYTES + 4 * column)
            store_scalar(FP32, place + column * PANEL_BYTES, number * factor)


@jit
def dot(kind, staged, other, columns, sums):
    """A staged row times a row in memory; `sums`: room for a vector."""
    size, whole = size_of(kind), columns - columns % WIDTH
    total = splat(ZERO)
    for column in range(0, whole, WIDTH):
        total = fma(load(staged + 4 * column), load_as(kind, other + column * size), total)
    store(sums, total)
    result = ZERO
    for lane in range(WIDTH):
        result += load_scalar(FP32, sums + 4 * lane)
    for column in range(whole, columns):
        result += load_scalar(FP32, staged + 4 * column) * load_scalar(kind, other + column * size)
    return result


@jit
def load_rows(kind, job, sequence, head, first, rows, padded, here):
    """A tile's rows of q and d_out, as rows and as panels; their lse, in log 2, and delta; zeros for dQ."""
    columns, v_columns = job.head_dim, job.v_head_dim
    for row in range(padded):
        at = here + row * STAGE_BYTES
        q_row, do_row, dq_row = at + Q_ROWS, at + DO_ROWS, at + DQ_ROWS
        for place in range(0, 4 * columns, VECTOR_BYTES):
            store(dq_row + place, splat(ZERO))
        lse, delta = NEGATIVE, ZERO
        if row < rows:
            token = (first + row) // job.group
            query = head * job.group + first + row - token * job.group
            number = 4 * ((sequence * job.kv_heads * job.group + query) * job.tokens + token)
            q = job.q + sequence * job.q_batch + query * job.q_head + token * job.q_token
            out = job.out + sequence * job.out_batch + query * job.out_head + token * job.out_token
            d_out = job.d_out + sequence * job.d_out_batch + query * job.d_out_head + token * job.d_out_token
            stage_row(kind, q, columns, q_row, ONE)
            stage_row(kind, d_out, v_columns, do_row, ONE)
            lse = load_scalar(FP32, job.lse + number) * LOG2_E
            delta = dot(kind, do_row, out, v_columns, here + LOW)
            if job.d_lse:
                delta -= load_scalar(FP32, job.d_lse + number)
            store_scalar(FP32, job.delta + number, delta)
        else:
            for place in range(0, 4 * columns, VECTOR_BYTES):
                store(q_row + place, splat(ZERO))
            for place in range(0, 4 * v_columns, VECTOR_BYTES):
                store(do_row + place, splat(ZERO))
        store_scalar(FP32, here + LSE + 4 * row, UNSEEN if lse == NEGATIVE else lse)
        store_scalar(FP32, here + DELTA + 4 * row, delta)
    factor = np.float32(job.scale / job.softcap) if job.capped else np.float32(job.scale) * LOG2_E
    transpose(here + Q_ROWS, columns, padded, here + Q_PANELS, factor)
    transpose(here + DO_ROWS, v_columns, padded, here + DO_PANELS, ONE)


@jit
def times_panels(a, panels, columns, low, high, vectors, target):
    """target [key][row] = rows of A times transposed rows, for the keys [low, high) of a block."""
    for j in range(0, vectors, PANEL):
        panel = panels + j * VECTOR_BYTES * columns
        for i in range(low, high, GROUP):
            product_rows(
                target + i * STAGE_BYTES + j * VECTOR_BYTES, STAGE_BYTES, a + i * STAGE_BYTES, panel, PANEL_BYTES,
                columns, min(PANEL, vectors - j), False,
            )  # fmt: skip


@jit
def add_to_keys(weights, rows_at, rows, columns, low, high, target, stride):
    """target [key] += weights [key][row] times rows, for the keys [low, high) of a block."""
    vectors = (columns + WIDTH - 1) // WIDTH
    for j in range(0, vectors, PANEL):
        for i in range(low, high, GROUP):
            product_rows(
                target + i * stride + j * VECTOR_BYTES, stride, weights + i * STAGE_BYTES,
                rows_at + j * VECTOR_BYTES, STAGE_BYTES, rows, min(PANEL, vectors - j), True,
            )  # fmt: skip


@jit
def differentiate(job, low, high, vectors, partial, here):
    """SCORES to probabilities P, and SLOPES from dP to dS, for the keys [low, high) of a block."""
    for j in range(vectors):
        lanes = j * VECTOR_BYTES
        lse, delta = load(here + LSE + lanes), load(here + DELTA + lanes)
        first, end = load(here + LOW + lanes), load(here + HIGH + lanes)
        for i in range(low, high):
            place = here + i * STAGE_BYTES + lanes
            score, slope = load(place + SCORES), splat(np.float32(job.scale))
            if job.capped:
                capped = tanh(score)
                slope = slope * (splat(ONE) - capped * capped)
                score = capped * splat(np.float32(job.softcap) * LOG2_E)
            if job.mask_kind:
                score = score + load(place + BIAS)
            # No probability exceeds 1, but the rounding of scores beyond 1e8 can make any number of it.
            score = score - lse
            p = exp2(where_less(splat(ZERO), score, splat(ZERO), score))
            if partial:
                key = splat(np.float32(i))
                p = where_less(key, end, p, splat(ZERO))
                p = where_less(key, first, splat(ZERO), p)
            store(place + SCORES, p)
            store(place + SLOPES, p * (load(place + SLOPES) - delta) * slope)


@jit
def clear(address, vectors, low, high):
    """Zeros for the keys [low, high) of a block."""
    for i in range(low, high):
        for j in range(vectors):
            store(address + i * STAGE_BYTES + j * VECTOR_BYTES, splat(ZERO))


@jit
def store_queries(kind, job, sequence, head, first, rows, here):
    """A tile's dQ to memory, as numbers of a kind."""
    size, whole = size_of(kind), job.head_dim - job.head_dim % WIDTH
    for row in range(rows):
        token = (first + row) // job.group
        query = head * job.group + first + row - token * job.group
        source = here + DQ_ROWS + row * STAGE_BYTES
        target = job.dq + sequence * job.dq_batch + query * job.dq_head + token * job.dq_token
        for column in range(0, whole, WIDTH):
            store_as(kind, target + column * size, load(source + 4 * column))
        for column in range(whole, job.head_dim):
            store_scalar(kind, target + column * size, load_scalar(FP32, source + 4 * column))


@jit
def run_task(kind, job, task, here):
    # Heads come in batches of `abreast`: first all their first tiles, then all their second ones, and so on.
    batch = task // (job.abreast * job.tiles)
    within = task - batch * job.abreast * job.tiles
    heads = min(job.abreast, job.units - batch * job.abreast)
    tile = within // heads
    unit = batch * job.abreast + within - tile * heads
    sequence = unit // job.kv_heads
    head = unit - sequence * job.kv_heads
    first = tile * job.rows
    rows = min(job.rows, job.tokens * job.group - first)
    vectors = (rows + WIDTH - 1) // WIDTH
    columns = (job.head_dim + WIDTH - 1) // WIDTH

    lowest, highest, inner_low, inner_high = visible_range(job, sequence, first, rows, here + FIRST_KEY, here + END_KEY)
    load_rows(kind, job, sequence, head, first, rows, vectors * WIDTH, here)
    if job.mask_kind:
        find_mask_rows(job, sequence, head, first, rows, here + MASK_ROWS)
    k = job.k + sequence * job.k_batch + head * job.k_head
    v = job.v + sequence * job.v_batch + head * job.v_head
    dk, dv = job.dk + unit * job.dk_head, job.dv + unit * job.dv_head
    turns = job.turns + 8 * unit * job.blocks

    for block in range(job.blocks):
        key = block * BLOCK
        low, high = max(lowest - key, 0), min(highest - key, BLOCK)  # the block's keys that any row sees
        turn = turns + 8 * block
        seen = low < high
        if seen and job.mask_kind:
            bias = here + BIAS + low * STAGE_BYTES
            seen = load_bias(job, key + low, high - low, rows, here + MASK_ROWS, bias, STAGE_BYTES)
        if seen:
            for i in range(low, high):
                stage_row(kind, k + (key + i) * job.k_token, job.head_dim, here + K_ROWS + i * STAGE_BYTES, ONE)
                stage_row(kind, v + (key + i) * job.v_token, job.v_head_dim, here + V_ROWS + i * STAGE_BYTES, ONE)
            # Products take GROUP keys at a time; what they make of keys that are not there is replaced by zeros.
            begin, end = low - low % GROUP, (high + GROUP - 1) // GROUP * GROUP
            times_panels(here + K_ROWS, here + Q_PANELS, job.head_dim, begin, end, vectors, here + SCORES)
            times_panels(here + V_ROWS, here + DO_PANELS, job.v_head_dim, begin, end, vectors, here + SLOPES)
            partial = key + low < inner_low or key + high > inner_high
            if partial:
                lanes = vectors * WIDTH
                limits(key, BLOCK, rows, lanes, lanes, here + FIRST_KEY, here + END_KEY, here + LOW, here + HIGH)
            differentiate(job, low, high, vectors, partial, here)
            for part in (SCORES, SLOPES):
                clear(here + part, vectors, begin, low)
                clear(here + part, vectors, high, end)
            product_columns(
                here + DQ_ROWS, STAGE_BYTES, here + SLOPES + low * STAGE_BYTES, STAGE_BYTES,
                here + K_ROWS + low * STAGE_BYTES, STAGE_BYTES, high - low, rows, columns,
            )  # fmt: skip
        while fetch_add(turn, 0) < tile:
            pass
        if seen:
            at_k, at_v = dk + key * job.dk_token, dv + key * job.dv_token
            add_to_keys(here + SCORES, here + DO_ROWS, rows, job.v_head_dim, begin, end, at_v, job.dv_token)
            add_to_keys(here + SLOPES, here + Q_ROWS, rows, job.head_dim, begin, end, at_k, job.dk_token)
        fetch_add(turn, 1)
    store_queries(kind, job, sequence, head, first, rows, here)


@jit
def work(kind, address):
    """What every thread of a call runs: take tasks until there are none."""
    job = view(address)
    here = job.scratch + fetch_add(job.counters, 1) * SCRATCH_BYTES
    task = fetch_add(job.counters + 8, 1)
    while task < job.tasks:
        run_task(kind, job, task, here)
        task = fetch_add(job.counters + 8, 1)


def entry(build: str, kind: Kind) -> Any:
    """For gqa.ops.compiled."""

    def backward(job):
        build  # noqa: B018
        work(kind, job)

    return backward
