"""The backward kernels in Triton: the gradients of q, k and v from those of the output.

Both form the probabilities anew, P = exp2(score - lse), and with them

    dP = dO V^T        dS = P * (dP - delta), times the slope of a cap        delta = sum(dO * out) - d_lse

`differentiate_rows`: a program per tile of packed query rows of one KV head walks the keys that the tile sees and sums
dQ = scale * dS K. It also writes what the other kernel needs of its rows.
`differentiate_keys`: a program per block of keys of one KV head walks all tokens of all G queries that see the block
and sums dV = P^T dO and dK = scale * dS^T Q in registers. Scores lie key-major there, [key][token], as the products
with dO and Q want them. So a sum has one program and one order: there are no atomics, the bits are the same on every
run, and nothing has H*G heads of S tokens.
"""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim of q, k · Dv head dim of v

from __future__ import annotations

import triton
import triton.language as tl

from gqa.ops.triton_parts import (
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
    "lse_batch", "lse_head", "mask_batch", "mask_head", "mask_token", "sequences", "total_queries", "total_keys",
    "query_tokens", "key_tokens", "q_start", "window", "scale", "softcap",
)  # fmt: skip


@triton.jit
def probabilities(products, shift, masked, scale, softcap):
    """(P, the tanh of a cap) of products q . k, their rows' lse in base 2, and their mask or None."""
    capped = products
    if softcap is not None:
        capped = tanh(products * (scale / softcap))
        scores = capped * (softcap * LOG2_E)
    else:
        scores = products * (scale * LOG2_E)
    if masked is None:
        weights = tl.exp2(scores - shift)
    elif masked.dtype == tl.float32:
        # No probability exceeds 1, but the rounding of scores beyond 1e8 can make any number of it.
        weights = tl.exp2(tl.minimum(scores + masked * LOG2_E - shift, 0))
    else:
        weights = tl.where(masked != 0, tl.exp2(scores - shift), 0.0)
    return weights, capped


@triton.jit(do_not_specialize=_VARYING)
def differentiate_rows(
    q, k, v, out, d_out, lse, d_lse, shift, delta, dq,
    q_batch, q_head, q_token,
    k_batch, k_head, k_token,
    v_batch, v_head, v_token,
    out_batch, out_head, out_token,
    d_out_batch, d_out_head, d_out_token,
    dq_batch, dq_head, dq_token,
    lse_batch, lse_head,
    kv_heads, group, query_tokens, key_tokens, scale, softcap,
    q_start, q_starts, window, kv_lengths, kv_starts,
    mask, mask_batch, mask_head, mask_token, mask_key,
    q_offsets, k_offsets, sequences, total_queries, total_keys,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, V_DIMS: tl.constexpr,
    SEQUENCES: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """dQ, delta and shift of one tile of packed rows.

    Programs: (tile * B + sequence) * H + KV head; in ragged batches tile * H + KV head, with tiles numbered over all
    sequences. All strides are in elements, and the last dimensions of q, k, v, out, d_out and dq are dense. lse, d_lse
    (may be None), shift and delta have the strides of lse. shift: lse in base 2, and +inf for a row that sees nothing,
    which makes its probabilities 0.
    """
    unit = tl.program_id(0)
    head = (unit % kv_heads).to(tl.int64)
    unit = unit // kv_heads
    if q_offsets is not None:
        sequence, tile, first_query, query_tokens = sequence_of(
            tl.num_programs(0) // kv_heads - 1 - unit, q_offsets, total_queries, sequences, group, BLOCK_ROWS, SEQUENCES
        )
        if sequence == sequences:
            return
        first_key, key_tokens = span_of(sequence, k_offsets, total_keys)
        q += first_query.to(tl.int64) * q_token
        out += first_query.to(tl.int64) * out_token
        d_out += first_query.to(tl.int64) * d_out_token
        dq += first_query.to(tl.int64) * dq_token
        first_row = first_query.to(tl.int64)
        k += first_key.to(tl.int64) * k_token
        v += first_key.to(tl.int64) * v_token
    else:
        sequence = unit % sequences
        tile = tl.cdiv(query_tokens * group, BLOCK_ROWS) - 1 - unit // sequences  # later tiles see more: they go first
        q += sequence.to(tl.int64) * q_batch
        out += sequence.to(tl.int64) * out_batch
        d_out += sequence.to(tl.int64) * d_out_batch
        dq += sequence.to(tl.int64) * dq_batch
        first_row = sequence.to(tl.int64) * lse_batch
        k += sequence.to(tl.int64) * k_batch
        v += sequence.to(tl.int64) * v_batch
    k += head * k_head
    v += head * v_head

    _, row_held, token, query_head = packed_rows(tile, head, query_tokens, group, BLOCK_ROWS)
    at_token = token.to(tl.int64)
    dim = tl.arange(0, DIMS)
    v_dim = tl.arange(0, V_DIMS)
    q_rows = q + (query_head * q_head + at_token * q_token)[:, None]
    queries = load_block(q_rows, dim[None, :], row_held, dim < HEAD_DIM, True, DIMS != HEAD_DIM)
    d_out_rows = d_out + (query_head * d_out_head + at_token * d_out_token)[:, None]
    d_outs = load_block(d_out_rows, v_dim[None, :], row_held, v_dim < V_HEAD_DIM, True, V_DIMS != V_HEAD_DIM)
    out_rows = out + (query_head * out_head + at_token * out_token)[:, None]
    outs = load_block(out_rows, v_dim[None, :], row_held, v_dim < V_HEAD_DIM, True, V_DIMS != V_HEAD_DIM)

    place = first_row + query_head * lse_head + at_token
    row_delta = tl.sum(outs.to(tl.float32) * d_outs.to(tl.float32), 1)
    if d_lse is not None:
        row_delta -= tl.load(d_lse + place, mask=row_held, other=0)
    row_shift = tl.load(lse + place, mask=row_held, other=float("-inf"))
    row_shift = tl.where(row_shift == float("-inf"), float("inf"), row_shift * LOG2_E)
    tl.store(delta + place, row_delta, mask=row_held)
    tl.store(shift + place, row_shift, mask=row_held)

    start = first_position(sequence, query_tokens, key_tokens, q_start, q_starts)
    first, end = held_keys(sequence, key_tokens, kv_lengths, kv_starts)
    lowest = start + (tile * BLOCK_ROWS) // group
    highest = start + tl.minimum((tile * BLOCK_ROWS + BLOCK_ROWS - 1) // group, query_tokens - 1)
    first, end, all_first, all_end = seen_keys(first, end, lowest, highest, window, CAUSAL)
    blocks, whole_first, whole = whole_blocks(first, end, all_first, all_end, BLOCK_KEYS)

    number = tl.arange(0, BLOCK_KEYS)
    k_tile = number[:, None] * k_token + dim[None, :]
    v_tile = number[:, None] * v_token + v_dim[None, :]
    summed = tl.zeros([BLOCK_ROWS, DIMS], tl.float32)
    # Two loops: over blocks that all rows see whole, without a question asked, then over the others.
    for edge in tl.static_range(0, 2):
        for i in range(0, blocks - whole if edge else whole):
            block = tl.where(i < whole_first, i, i + whole) if edge else whole_first + i
            at = first + block * BLOCK_KEYS
            key = at + number
            held = key < end
            k_block = k + at.to(tl.int64) * k_token
            v_block = v + at.to(tl.int64) * v_token
            keys = load_block(k_block, k_tile, held, dim < HEAD_DIM, edge == 1, DIMS != HEAD_DIM)
            values = load_block(v_block, v_tile, held, v_dim < V_HEAD_DIM, edge == 1, V_DIMS != V_HEAD_DIM)
            masked = None
            if mask is not None:
                mask_rows = mask + sequence.to(tl.int64) * mask_batch + query_head * mask_head + at_token * mask_token
                masked = tl.load(
                    mask_rows[:, None] + (key.to(tl.int64) * mask_key)[None, :],
                    mask=row_held[:, None] & held[None, :],
                    other=0,
                )
            products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            slopes = tl.dot(d_outs, tl.trans(values), input_precision=PRECISION)
            weights, capped = probabilities(products, row_shift[:, None], masked, scale, softcap)
            if edge:
                seen = held[None, :]
                if CAUSAL or window is not None:
                    seen = seen & seen_by((start + token)[:, None], key[None, :], window, CAUSAL)
                weights = tl.where(seen, weights, 0.0)
            slopes = weights * (slopes - row_delta[:, None])
            if softcap is not None:
                slopes *= 1 - capped * capped
            summed = tl.dot(slopes.to(keys.dtype), keys, summed, input_precision=PRECISION)

    # The second program number is 0, which the compiler does not know: so it finds out once more where the rows lie,
    # and does not keep that in registers through the loops.
    _, row_held, token, query_head = packed_rows(tile + tl.program_id(1), head, query_tokens, group, BLOCK_ROWS)
    dq_rows = dq + (query_head * dq_head + token.to(tl.int64) * dq_token)[:, None]
    tl.store(
        dq_rows + dim[None, :],
        (summed * scale).to(dq.dtype.element_ty),
        mask=row_held[:, None] & (dim < HEAD_DIM)[None, :],
    )


@triton.jit(do_not_specialize=_VARYING)
def differentiate_keys(
    q, k, v, d_out, shift, delta, dk, dv,
    q_batch, q_head, q_token,
    k_batch, k_head, k_token,
    v_batch, v_head, v_token,
    d_out_batch, d_out_head, d_out_token,
    dk_batch, dk_head, dk_token,
    dv_batch, dv_head, dv_token,
    lse_batch, lse_head,
    kv_heads, group, query_tokens, key_tokens, scale, softcap,
    q_start, q_starts, window, kv_lengths, kv_starts,
    mask, mask_batch, mask_head, mask_token, mask_key,
    q_offsets, k_offsets, sequences, total_queries, total_keys,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, V_DIMS: tl.constexpr,
    SEQUENCES: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of keys, zeros for keys that nobody sees; after `differentiate_rows`.

    Programs: (block * B + sequence) * H + KV head; in ragged batches block * H + KV head, with blocks numbered over all
    sequences. Arguments as in `differentiate_rows`; a step's rows are BLOCK_ROWS tokens of one query head.
    """
    unit = tl.program_id(0)
    head = (unit % kv_heads).to(tl.int64)
    unit = unit // kv_heads
    first_head = head * group
    if k_offsets is not None:
        sequence, tile, first_key, key_tokens = sequence_of(
            unit, k_offsets, total_keys, sequences, 1, BLOCK_KEYS, SEQUENCES
        )
        if sequence == sequences:
            return
        first_query, query_tokens = span_of(sequence, q_offsets, total_queries)
        q += first_query.to(tl.int64) * q_token
        d_out += first_query.to(tl.int64) * d_out_token
        shift += first_query
        delta += first_query
        k += first_key.to(tl.int64) * k_token
        v += first_key.to(tl.int64) * v_token
        dk += first_key.to(tl.int64) * dk_token
        dv += first_key.to(tl.int64) * dv_token
    else:
        sequence = unit % sequences
        tile = unit // sequences  # under a causal mask earlier keys are seen by more: they go first
        q += sequence.to(tl.int64) * q_batch
        d_out += sequence.to(tl.int64) * d_out_batch
        shift += sequence.to(tl.int64) * lse_batch
        delta += sequence.to(tl.int64) * lse_batch
        k += sequence.to(tl.int64) * k_batch
        v += sequence.to(tl.int64) * v_batch
        dk += sequence.to(tl.int64) * dk_batch
        dv += sequence.to(tl.int64) * dv_batch
    q += first_head * q_head
    d_out += first_head * d_out_head
    shift += first_head * lse_head
    delta += first_head * lse_head
    if mask is not None:
        mask += sequence.to(tl.int64) * mask_batch + first_head * mask_head

    start = first_position(sequence, query_tokens, key_tokens, q_start, q_starts)
    first, end = held_keys(sequence, key_tokens, kv_lengths, kv_starts)
    at = tile * BLOCK_KEYS
    key = at + tl.arange(0, BLOCK_KEYS)
    key_held = (key >= first) & (key < end)
    dim = tl.arange(0, DIMS)
    v_dim = tl.arange(0, V_DIMS)
    k_rows = k + head * k_head + (key.to(tl.int64) * k_token)[:, None]
    keys = load_block(k_rows, dim[None, :], key_held, dim < HEAD_DIM, True, DIMS != HEAD_DIM)
    v_rows = v + head * v_head + (key.to(tl.int64) * v_token)[:, None]
    values = load_block(v_rows, v_dim[None, :], key_held, v_dim < V_HEAD_DIM, True, V_DIMS != V_HEAD_DIM)

    # The tokens that see any key of the block are [begin, stop), those that see all of them [all_begin, all_stop).
    lowest = tl.maximum(at, first)
    highest = tl.minimum(at + BLOCK_KEYS, end) - 1
    begin = 0
    all_begin = 0
    stop = query_tokens
    all_stop = query_tokens
    if CAUSAL:
        begin = tl.maximum(lowest - start, 0)
        all_begin = tl.maximum(highest - start, 0)
    if window is not None:
        stop = tl.minimum(query_tokens, highest - start + window)
        all_stop = tl.minimum(query_tokens, lowest - start + window)
    stop = tl.where(lowest <= highest, tl.maximum(stop, 0), 0)
    first_block = begin // BLOCK_ROWS
    end_block = tl.maximum(tl.cdiv(stop, BLOCK_ROWS), first_block)
    whole_first = tl.minimum(tl.maximum(tl.cdiv(all_begin, BLOCK_ROWS), first_block), end_block)
    whole_end = tl.maximum(tl.minimum(tl.maximum(all_stop, 0) // BLOCK_ROWS, end_block), whole_first)
    whole = whole_end - whole_first

    number = tl.arange(0, BLOCK_ROWS)
    q_tile = number[:, None] * q_token + dim[None, :]
    d_out_tile = number[:, None] * d_out_token + v_dim[None, :]
    dk_sum = tl.zeros([BLOCK_KEYS, DIMS], tl.float32)
    dv_sum = tl.zeros([BLOCK_KEYS, V_DIMS], tl.float32)
    # Two loops: over blocks of tokens that see the whole block of keys, without a question asked, then over the others.
    # Each goes on from one query head of the group to the next, so that its loads are always under way.
    for edge in tl.static_range(0, 2):
        count = end_block - first_block - whole if edge else whole
        query = tl.full([], 0, tl.int64)
        step = 0
        for _ in range(0, group * count):
            block = (first_block if edge else whole_first) + step
            if edge:
                block = tl.where(block < whole_first, block, block + whole)
            token = block * BLOCK_ROWS + number
            held = token < query_tokens
            at_token = (block * BLOCK_ROWS).to(tl.int64)
            q_block = q + query * q_head + at_token * q_token
            d_out_block = d_out + query * d_out_head + at_token * d_out_token
            queries = load_block(q_block, q_tile, held, dim < HEAD_DIM, edge == 1, DIMS != HEAD_DIM)
            d_outs = load_block(d_out_block, d_out_tile, held, v_dim < V_HEAD_DIM, edge == 1, V_DIMS != V_HEAD_DIM)
            place = query * lse_head + at_token
            if edge:  # rows that are not held are zeros of q and d_out: whatever their weight, they add nothing
                row_shift = tl.load(shift + place + number, mask=held, other=0)
                row_delta = tl.load(delta + place + number, mask=held, other=0)
            else:
                row_shift = tl.load(shift + place + number)
                row_delta = tl.load(delta + place + number)
            masked = None
            if mask is not None:
                mask_rows = mask + query * mask_head + token.to(tl.int64) * mask_token
                masked = tl.load(
                    mask_rows[None, :] + (key.to(tl.int64) * mask_key)[:, None],
                    mask=held[None, :] & key_held[:, None],
                    other=0,
                )
            step += 1
            query += (step == count).to(tl.int64)
            step = tl.where(step == count, 0, step)

            products = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
            slopes = tl.dot(values, tl.trans(d_outs), input_precision=PRECISION)
            weights, capped = probabilities(products, row_shift[None, :], masked, scale, softcap)
            if edge and (CAUSAL or window is not None):
                weights = tl.where(seen_by((start + token)[None, :], key[:, None], window, CAUSAL), weights, 0.0)
            dv_sum = tl.dot(weights.to(d_outs.dtype), d_outs, dv_sum, input_precision=PRECISION)
            slopes = weights * (slopes - row_delta[None, :])
            if softcap is not None:
                slopes *= 1 - capped * capped
            dk_sum = tl.dot(slopes.to(queries.dtype), queries, dk_sum, input_precision=PRECISION)

    # What the sums hold of keys that are not held is arbitrary, but it is theirs alone. As for 0, see above.
    key = (tile + tl.program_id(1)) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    key_held = ((key >= first) & (key < end))[:, None]
    exists = (key < key_tokens)[:, None]
    dk_rows = dk + head * dk_head + (key.to(tl.int64) * dk_token)[:, None]
    dv_rows = dv + head * dv_head + (key.to(tl.int64) * dv_token)[:, None]
    dk_sum = tl.where(key_held, dk_sum * scale, 0.0).to(dk.dtype.element_ty)
    dv_sum = tl.where(key_held, dv_sum, 0.0).to(dv.dtype.element_ty)
    tl.store(dk_rows + dim[None, :], dk_sum, mask=exists & (dim < HEAD_DIM)[None, :])
    tl.store(dv_rows + v_dim[None, :], dv_sum, mask=exists & (v_dim < V_HEAD_DIM)[None, :])
