"""The forward kernel in Triton: a tile of packed query rows of one KV head against its keys, for prompts and decode.

A program reads each block of K and V once for all G heads of the group. Where there are too few tiles to fill the GPU,
the keys of a tile are split over several programs, whose parts `join` then weighs together; a split is a share of the
keys that the tile really sees, worked out on the GPU, so no length is ever read back to the host.
"""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim of q, k · Dv head dim of v

from __future__ import annotations

import triton
import triton.language as tl

from gqa.ops.triton_parts import (
    LN_2,
    LOG2_E,
    first_position,
    held_keys,
    load_block,
    packed_rows,
    seen_by,
    seen_keys,
    sequence_of,
    span_of,
    tanh,
    whole_blocks,
)

# Numbers that change from call to call of one model, such as lengths, must not compile it anew.
_VARYING = (
    "lse_batch", "lse_head", "query_tokens", "key_tokens", "scale", "softcap", "q_start", "window",
    "mask_batch", "mask_head", "mask_token", "table_batch", "sequences", "total_queries", "total_keys", "splits",
)  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def attend(
    q, k, v, out, lse,
    q_batch, q_head, q_token,
    k_batch, k_head, k_token,
    v_batch, v_head, v_token,
    out_batch, out_head, out_token,
    lse_batch, lse_head,
    group, query_tokens, key_tokens, scale, softcap,
    q_start, q_starts, window, kv_lengths, kv_starts, sinks,
    mask, mask_batch, mask_head, mask_token, mask_key,
    table, table_batch,
    k_scale, k_scale_batch, k_scale_head, k_scale_token,
    v_scale, v_scale_batch, v_scale_head, v_scale_token,
    q_offsets, k_offsets, sequences, total_queries, total_keys,
    splits, parts, part_lse,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, V_DIMS: tl.constexpr,
    PAGE: tl.constexpr, SEQUENCES: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, FEW_ROWS: tl.constexpr,
):  # fmt: skip
    """out[n, t] = sum_s p[n, t, s] v[n // G, s] for the rows of one tile, or the part of it over a share of the keys.

    Programs: (tile * splits + split, KV head, sequence); tiles of ragged batches are numbered over all sequences.
    All strides are in elements, and the last dimensions of q, k, v and out are dense. k and v are pools with `table`,
    whose batch stride is that of a page. lse may be None. With `parts`, float32 (splits, rows, Dv), out and lse wait
    for `join`.
    """
    split = tl.program_id(0) % splits
    tile = tl.program_id(0) // splits
    head = tl.program_id(1).to(tl.int64)
    if q_offsets is not None:
        sequence, tile, first_query, query_tokens = sequence_of(
            tile, q_offsets, total_queries, sequences, group, BLOCK_ROWS, SEQUENCES
        )
        if sequence == sequences:
            return
        first_key, key_tokens = span_of(sequence, k_offsets, total_keys)
        q += first_query.to(tl.int64) * q_token
        out += first_query.to(tl.int64) * out_token
        if lse is not None:
            lse += first_query
        k += first_key.to(tl.int64) * k_token
        v += first_key.to(tl.int64) * v_token
    else:
        sequence = tl.program_id(2)
        if CAUSAL:  # later tiles see more keys, so they go first
            tile = tl.num_programs(0) // splits - 1 - tile
        q += sequence.to(tl.int64) * q_batch
        out += sequence.to(tl.int64) * out_batch
        if lse is not None:
            lse += sequence.to(tl.int64) * lse_batch
        if table is None:
            k += sequence.to(tl.int64) * k_batch
            v += sequence.to(tl.int64) * v_batch
    k += head * k_head
    v += head * v_head
    if table is not None:
        table += sequence.to(tl.int64) * table_batch
    if k_scale is not None:
        k_scale += head * k_scale_head
        v_scale += head * v_scale_head
        if table is None:
            k_scale += sequence.to(tl.int64) * k_scale_batch
            v_scale += sequence.to(tl.int64) * v_scale_batch

    row, row_held, token, query_head = packed_rows(tile, head, query_tokens, group, BLOCK_ROWS)
    dim = tl.arange(0, DIMS)
    v_dim = tl.arange(0, V_DIMS)
    # int8 values come two to an int16, as tensor cores could not take single bytes from memory in rows.
    PAIRS: tl.constexpr = v.dtype.element_ty == tl.int16
    V_COLUMNS: tl.constexpr = V_HEAD_DIM // 2 if PAIRS else V_HEAD_DIM
    v_column = tl.arange(0, V_DIMS // 2 if PAIRS else V_DIMS)
    q_rows = q + (query_head * q_head + token.to(tl.int64) * q_token)[:, None]
    queries = load_block(q_rows, dim[None, :], row_held, dim < HEAD_DIM, True, DIMS != HEAD_DIM)

    start = first_position(sequence, query_tokens, key_tokens, q_start, q_starts)
    first, end = held_keys(sequence, key_tokens, kv_lengths, kv_starts)
    lowest = start + (tile * BLOCK_ROWS) // group
    highest = start + tl.minimum((tile * BLOCK_ROWS + BLOCK_ROWS - 1) // group, query_tokens - 1)
    first, end, all_first, all_end = seen_keys(first, end, lowest, highest, window, CAUSAL)
    if parts is not None:
        share = tl.cdiv(tl.cdiv(tl.maximum(end - first, 0), BLOCK_KEYS), splits) * BLOCK_KEYS
        first += split * share
        end = tl.minimum(end, first + share)
    blocks, whole_first, whole = whole_blocks(first, end, all_first, all_end, BLOCK_KEYS)
    # Two loops: over blocks that all rows see whole, without a question asked, then over the edges. At decode one asks
    # little and is not bound by it; there a second loop would begin with nothing on its way.
    ONE_LOOP: tl.constexpr = FEW_ROWS or mask is not None
    if ONE_LOOP:
        whole_first *= 0
        whole *= 0

    # A sink is a score without a value: where the sum begins.
    top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + query_head, mask=row_held, other=float("-inf")).to(tl.float32) * LOG2_E
        top = tl.where(split == 0, sink, top)
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    summed = tl.zeros([BLOCK_ROWS, V_DIMS], tl.float32)

    number = tl.arange(0, BLOCK_KEYS)
    k_tile = number[:, None] * k_token + dim[None, :]
    v_tile = number[:, None] * v_token + v_column[None, :]
    for edge in tl.static_range(1 if ONE_LOOP else 0, 2):
        for i in range(0, blocks - whole if edge else whole):
            block = tl.where(i < whole_first, i, i + whole) if edge else whole_first + i
            at = first + block * BLOCK_KEYS
            key = at + number
            held = key < end
            tile = tl.where(at < 0, 0, tile)  # never: but so the rows' numbers need no registers over the loop
            if table is None:
                keys = load_block(
                    k + at.to(tl.int64) * k_token, k_tile, held, dim < HEAD_DIM, edge == 1, DIMS != HEAD_DIM
                )
            else:
                page = tl.load(table + key // PAGE, mask=held, other=0).to(tl.int64)
                slot = key % PAGE
                keys = load_block(
                    k, (page * k_batch + slot * k_token)[:, None] + dim[None, :],
                    held, dim < HEAD_DIM, edge == 1, DIMS != HEAD_DIM,
                )  # fmt: skip
            scores = tl.dot(queries, tl.trans(keys.to(queries.dtype)), input_precision=PRECISION)
            if k_scale is not None:
                if table is None:
                    k_by = tl.load(k_scale + key.to(tl.int64) * k_scale_token, mask=held, other=0)
                    v_by = tl.load(v_scale + key.to(tl.int64) * v_scale_token, mask=held, other=0)
                else:
                    k_by = tl.load(k_scale + page * k_scale_batch + slot * k_scale_token, mask=held, other=0)
                    v_by = tl.load(v_scale + page * v_scale_batch + slot * v_scale_token, mask=held, other=0)
                scores *= k_by.to(tl.float32)[None, :]

            factor = scale * LOG2_E
            if softcap is not None:
                scores = softcap * tanh(scores * (scale / softcap))
                factor = LOG2_E
            if mask is not None:
                masked_at = (
                    mask + sequence.to(tl.int64) * mask_batch + (query_head * mask_head)[:, None]
                    + (token.to(tl.int64) * mask_token)[:, None] + (key.to(tl.int64) * mask_key)[None, :]
                )  # fmt: skip
                masked = tl.load(masked_at, mask=row_held[:, None] & held[None, :], other=0)
                if mask.dtype.element_ty == tl.float32:
                    # The largest numbers, as models have them in masks, stay finite in base 2. In base 2 already here:
                    # a GPU rounds a product and its sum at once, and beside a shift rounded before, numbers as large
                    # as these would leave a difference.
                    bounded = tl.minimum(tl.maximum(masked, -1e38), 1e38)
                    masked = tl.where(masked == float("-inf"), masked, bounded) * LOG2_E
                    scores = scores * factor + masked
                    factor = 1.0
                else:
                    scores = tl.where(masked != 0, scores, float("-inf"))
            if edge:
                seen = held[None, :]
                if CAUSAL or window is not None:
                    seen = seen & seen_by((start + token)[:, None], key[None, :], window, CAUSAL)
                scores = tl.where(seen, scores, float("-inf"))

            highest_score = tl.maximum(top, tl.max(scores, 1) * factor)
            shift = highest_score
            if edge:  # nothing seen so far: any finite shift gives exp2(-inf) = 0
                shift = tl.where(highest_score == float("-inf"), 0.0, highest_score)
            weights = tl.exp2(scores * factor - shift[:, None])
            kept = tl.exp2(top - shift)
            total = total * kept + tl.sum(weights, 1)
            summed = summed * kept[:, None]
            top = highest_score

            if table is None:
                values = load_block(
                    v + at.to(tl.int64) * v_token, v_tile, held, v_column < V_COLUMNS, edge == 1, V_DIMS != V_HEAD_DIM
                )
            else:
                values = load_block(
                    v, (page * v_batch + slot * v_token)[:, None] + v_column[None, :],
                    held, v_column < V_COLUMNS, edge == 1, V_DIMS != V_HEAD_DIM,
                )  # fmt: skip
            if PAIRS:
                values = tl.join(values.to(tl.int8), (values >> 8).to(tl.int8)).reshape(BLOCK_KEYS, V_DIMS)
            if v_scale is not None:
                weights *= v_by.to(tl.float32)[None, :]
                if queries.dtype == tl.float16:  # a weight times a scale may be too small for fp16
                    summed = tl.dot(weights, values.to(tl.float32), summed, input_precision="tf32")
                else:
                    summed = tl.dot(
                        weights.to(queries.dtype), values.to(queries.dtype), summed, input_precision=PRECISION
                    )
            else:
                summed = tl.dot(weights.to(values.dtype), values, summed, input_precision=PRECISION)

    row, row_held, token, query_head = packed_rows(tile, head, query_tokens, group, BLOCK_ROWS)
    seen_any = total > 0
    divided = summed / tl.where(seen_any, total, 1.0)[:, None]
    log_sum = tl.where(seen_any, top + tl.log2(tl.where(seen_any, total, 1.0)), float("-inf"))
    if parts is not None:
        rows = query_tokens.to(tl.int64) * group
        place = ((split.to(tl.int64) * tl.num_programs(2) + sequence) * tl.num_programs(1) + head) * rows + row
        tl.store(
            parts + place[:, None] * V_HEAD_DIM + v_dim[None, :],
            divided,
            mask=row_held[:, None] & (v_dim < V_HEAD_DIM)[None, :],
        )
        tl.store(part_lse + place, log_sum, mask=row_held)
    else:
        out_rows = out + (query_head * out_head + token.to(tl.int64) * out_token)[:, None]
        tl.store(
            out_rows + v_dim[None, :],
            divided.to(out.dtype.element_ty),
            mask=row_held[:, None] & (v_dim < V_HEAD_DIM)[None, :],
        )
        if lse is not None:
            tl.store(lse + query_head * lse_head + token, log_sum * LN_2, mask=row_held)


@triton.jit(do_not_specialize=("splits",))
def join(
    parts, part_lse, out, lse,
    out_batch, out_head, out_token, lse_batch, lse_head,
    group, splits,
    V_HEAD_DIM: tl.constexpr, V_DIMS: tl.constexpr, SPLITS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """out = sum_i w_i part_i with w = softmax over the splits of their log sums; lse is the log of them all.

    Programs: (row of a KV head, KV head, sequence). SPLITS: a power of two, no fewer than there are splits.
    """
    row = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2).to(tl.int64)
    units = tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * tl.num_programs(0)
    place = (sequence * tl.num_programs(1) + head) * tl.num_programs(0) + row
    number = tl.arange(0, SPLITS)
    logs = tl.load(part_lse + number * units + place, mask=number < splits, other=float("-inf"))
    top = tl.max(logs, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(logs - shift), 0)
    divisor = tl.where(total > 0, total, 1.0)

    v_dim = tl.arange(0, V_DIMS)
    summed = tl.zeros([V_DIMS], tl.float32)
    for begin in range(0, splits, AT_ONCE):
        some = begin + tl.arange(0, AT_ONCE)
        held = some < splits
        weights = tl.exp2(tl.load(part_lse + some * units + place, mask=held, other=float("-inf")) - shift) / divisor
        values = tl.load(
            parts + (some * units + place)[:, None] * V_HEAD_DIM + v_dim[None, :],
            mask=held[:, None] & (v_dim < V_HEAD_DIM)[None, :],
            other=0,
        )
        summed += tl.sum(weights[:, None] * values, 0)

    token = row // group
    query_head = head * group + row % group
    tl.store(
        out + sequence * out_batch + query_head * out_head + token.to(tl.int64) * out_token + v_dim,
        summed.to(out.dtype.element_ty),
        mask=v_dim < V_HEAD_DIM,
    )
    if lse is not None:
        natural = tl.where(total > 0, (shift + tl.log2(divisor)) * LN_2, float("-inf"))
        tl.store(lse + sequence * lse_batch + query_head * lse_head + token, natural)
