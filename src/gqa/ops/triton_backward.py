"""The backward kernels in Triton: the gradients of q, k and v from those of the output.

Both form the probabilities anew, P = exp2(score - lse), and with them

    dP = dO V^T        dS = P * (dP - delta), times the slope of a cap        delta = sum(dO * out) - d_lse

`differentiate_rows`: a program per tile of packed query rows of one KV head walks the keys that the tile sees and sums
dQ = scale * dS K. It also writes the delta of its rows.
`differentiate_keys`: a program per block of keys of one KV head walks all tokens of all G queries that see the block
and sums dV = P^T dO and dK = scale * dS^T Q in registers. Scores lie key-major there, [key][token], as the products
with dO and Q want them. So a sum has one program and one order: there are no atomics, the bits are the same on every
run, and nothing has H*G heads of S tokens.
"""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim of q, k · Dv head dim of v

from __future__ import annotations

import triton
import triton.language as tl

from gqa.ops.triton_parts import LOG2_E, first_position, held_keys, load_block, seen_by, sequence_of, tanh

# Numbers that change from call to call of one model, such as lengths, must not compile it anew.
_VARYING = (
    "lse_batch", "lse_head", "mask_batch", "mask_head", "mask_token", "sequences", "total_queries", "total_keys",
    "query_tokens", "key_tokens", "q_start", "window", "scale", "softcap",
)  # fmt: skip


@triton.jit
def probabilities(products, lse, masked, scale, softcap):
    """(P, the tanh of a cap) of raw products q . k; lse in base 2, broadcast to the products; masked: mask or None."""
    capped = products
    if softcap is not None:
        capped = tanh(products * (scale / softcap))
        scores = capped * (softcap * LOG2_E)
    else:
        scores = products * (scale * LOG2_E)
    if masked is None:
        weights = tl.exp2(scores - lse)
    elif masked.dtype == tl.float32:
        # No probability exceeds 1, but the rounding of scores beyond 1e8 can make any number of it.
        weights = tl.exp2(tl.minimum(scores + masked * LOG2_E - lse, 0))
    else:
        weights = tl.where(masked != 0, tl.exp2(scores - lse), 0.0)
    return weights, capped


@triton.jit
def base_2(lse):
    """A row's lse as the probabilities take it: +inf for a row that sees nothing, which makes all of them 0."""
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)


@triton.jit(do_not_specialize=_VARYING)
def differentiate_rows(
    q, k, v, out, d_out, lse, d_lse, delta, dq,
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
    """dQ and delta of one tile of rows m = t * G + g.

    Programs: tile * B * H + sequence * H + KV head; tile * H + KV head in ragged batches, where tiles are numbered over
    all sequences. Later tiles see more keys, so they go first. All strides are in elements, and the last dimensions of
    q, k, v, out, d_out and dq are dense; lse, d_lse (may be None) and delta have the strides of lse.
    """
    unit = tl.program_id(0)
    head = (unit % kv_heads).to(tl.int64)
    if q_offsets is not None:
        sequence, tile, first_query, query_tokens = sequence_of(
            tl.num_programs(0) // kv_heads - 1 - unit // kv_heads,
            q_offsets, total_queries, sequences, group, BLOCK_ROWS, SEQUENCES,
        )  # fmt: skip
        if sequence == sequences:
            return
        first_key = tl.minimum(tl.maximum(tl.load(k_offsets + sequence).to(tl.int32), 0), total_keys)
        end_key = tl.minimum(tl.load(k_offsets + sequence + 1).to(tl.int32), total_keys)
        key_tokens = tl.maximum(end_key - first_key, 0)
        batch = tl.full([], 0, tl.int64)
    else:
        first_query = 0
        first_key = 0
        tile = tl.cdiv(query_tokens * group, BLOCK_ROWS) - 1 - unit // (kv_heads * sequences)
        sequence = unit // kv_heads % sequences
        batch = sequence.to(tl.int64)

    # The tile's rows: which token, which head, where in memory.
    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_held = row < query_tokens * group
    token = row // group
    query_head = head * group + row % group
    at_token = (first_query + token).to(tl.int64)
    dim = tl.arange(0, DIMS)
    v_dim = tl.arange(0, V_DIMS)
    q_rows = q + (batch * q_batch + query_head * q_head + at_token * q_token)[:, None]
    queries = load_block(q_rows, dim[None, :], row_held, dim < HEAD_DIM, True, DIMS != HEAD_DIM)
    d_out_rows = d_out + (batch * d_out_batch + query_head * d_out_head + at_token * d_out_token)[:, None]
    d_outs = load_block(d_out_rows, v_dim[None, :], row_held, v_dim < V_HEAD_DIM, True, V_DIMS != V_HEAD_DIM)
    out_rows = out + (batch * out_batch + query_head * out_head + at_token * out_token)[:, None]
    outs = load_block(out_rows, v_dim[None, :], row_held, v_dim < V_HEAD_DIM, True, V_DIMS != V_HEAD_DIM)
    number_of_row = batch * lse_batch + query_head * lse_head + at_token
    row_delta = tl.sum(outs.to(tl.float32) * d_outs.to(tl.float32), 1)
    if d_lse is not None:
        row_delta -= tl.load(d_lse + number_of_row, mask=row_held, other=0)
    tl.store(delta + number_of_row, row_delta, mask=row_held)
    row_lse = base_2(tl.load(lse + number_of_row, mask=row_held, other=float("-inf")))

    # The keys that any row of the tile sees are [first, end), those that all rows see [all_first, all_end).
    start = first_position(sequence, query_tokens, key_tokens, q_start, q_starts)
    first, end = held_keys(sequence, key_tokens, kv_lengths, kv_starts)
    lowest = start + (tile * BLOCK_ROWS) // group
    highest = start + tl.minimum((tile * BLOCK_ROWS + BLOCK_ROWS - 1) // group, query_tokens - 1)
    all_first = first
    all_end = end
    if CAUSAL:
        all_end = tl.minimum(end, lowest + 1)
        end = tl.minimum(end, highest + 1)
    if window is not None:
        all_first = tl.maximum(first, highest - window + 1)
        first = tl.maximum(first, lowest - window + 1)
    blocks = tl.cdiv(tl.maximum(end - first, 0), BLOCK_KEYS)
    whole_first = tl.minimum(tl.cdiv(tl.maximum(all_first - first, 0), BLOCK_KEYS), blocks)
    whole_end = tl.maximum(tl.maximum(tl.minimum(all_end, end) - first, 0) // BLOCK_KEYS, whole_first)
    whole = whole_end - whole_first

    number = tl.arange(0, BLOCK_KEYS)
    k_tile = number[:, None] * k_token + dim[None, :]
    v_tile = number[:, None] * v_token + v_dim[None, :]
    k_rows = k + batch * k_batch + head * k_head
    v_rows = v + batch * v_batch + head * v_head
    summed = tl.zeros([BLOCK_ROWS, DIMS], tl.float32)
    # Two loops: over blocks that all rows see whole, without a question asked, then over the others.
    for edge in tl.static_range(0, 2):
        for i in range(0, blocks - whole if edge else whole):
            if edge:
                block = tl.where(i < whole_first, i, i + whole)
            else:
                block = whole_first + i
            at = first + block * BLOCK_KEYS
            key = at + number
            held = key < end
            at_key = (first_key + at).to(tl.int64)
            keys = load_block(k_rows + at_key * k_token, k_tile, held, dim < HEAD_DIM, edge == 1, DIMS != HEAD_DIM)
            values = load_block(
                v_rows + at_key * v_token, v_tile, held, v_dim < V_HEAD_DIM, edge == 1, V_DIMS != V_HEAD_DIM
            )
            masked = None
            if mask is not None:
                mask_rows = mask + (batch * mask_batch + query_head * mask_head + token.to(tl.int64) * mask_token)
                masked = tl.load(
                    mask_rows[:, None] + (key.to(tl.int64) * mask_key)[None, :],
                    mask=row_held[:, None] & held[None, :],
                    other=0,
                )
            products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            slopes = tl.dot(d_outs, tl.trans(values), input_precision=PRECISION)
            weights, capped = probabilities(products, row_lse[:, None], masked, scale, softcap)
            if edge:
                seen = held[None, :]
                if CAUSAL or window is not None:
                    seen = seen & seen_by((start + token)[:, None], key[None, :], window, CAUSAL)
                weights = tl.where(seen, weights, 0.0)
            slopes = weights * (slopes - row_delta[:, None])
            if softcap is not None:
                slopes *= 1 - capped * capped
            summed = tl.dot(slopes.to(keys.dtype), keys, summed, input_precision=PRECISION)

    dq_rows = dq + (batch * dq_batch + query_head * dq_head + at_token * dq_token)[:, None]
    tl.store(
        dq_rows + dim[None, :],
        (summed * scale).to(dq.dtype.element_ty),
        mask=row_held[:, None] & (dim < HEAD_DIM)[None, :],
    )


@triton.jit(do_not_specialize=_VARYING)
def differentiate_keys(
    q, k, v, d_out, lse, delta, dk, dv,
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
    """dK and dV of one block of keys; zeros for keys that nobody sees.

    Programs: block * B * H + sequence * H + KV head; block * H + KV head in ragged batches, where blocks are numbered
    over all sequences. Under a causal mask earlier blocks are seen by more, and go first. Strides as in
    `differentiate_rows`; a block of rows here is BLOCK_ROWS tokens of one query head.
    """
    unit = tl.program_id(0)
    head = (unit % kv_heads).to(tl.int64)
    if k_offsets is not None:
        sequence, tile, first_key, key_tokens = sequence_of(
            unit // kv_heads, k_offsets, total_keys, sequences, 1, BLOCK_KEYS, SEQUENCES
        )
        if sequence == sequences:
            return
        first_query = tl.minimum(tl.maximum(tl.load(q_offsets + sequence).to(tl.int32), 0), total_queries)
        end_query = tl.minimum(tl.load(q_offsets + sequence + 1).to(tl.int32), total_queries)
        query_tokens = tl.maximum(end_query - first_query, 0)
        batch = tl.full([], 0, tl.int64)
    else:
        first_query = 0
        first_key = 0
        tile = unit // (kv_heads * sequences)
        sequence = unit // kv_heads % sequences
        batch = sequence.to(tl.int64)

    start = first_position(sequence, query_tokens, key_tokens, q_start, q_starts)
    first, end = held_keys(sequence, key_tokens, kv_lengths, kv_starts)
    at = tile * BLOCK_KEYS
    key = at + tl.arange(0, BLOCK_KEYS)
    key_held = (key >= first) & (key < end)
    dim = tl.arange(0, DIMS)
    v_dim = tl.arange(0, V_DIMS)
    at_key = (first_key + key).to(tl.int64)
    k_rows = k + batch * k_batch + head * k_head + (at_key * k_token)[:, None]
    keys = load_block(k_rows, dim[None, :], key_held, dim < HEAD_DIM, True, DIMS != HEAD_DIM)
    v_rows = v + batch * v_batch + head * v_head + (at_key * v_token)[:, None]
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
    edges = end_block - first_block - whole

    number = tl.arange(0, BLOCK_ROWS)
    q_tile = number[:, None] * q_token + dim[None, :]
    d_out_tile = number[:, None] * d_out_token + v_dim[None, :]
    dk_sum = tl.zeros([BLOCK_KEYS, DIMS], tl.float32)
    dv_sum = tl.zeros([BLOCK_KEYS, V_DIMS], tl.float32)
    # Two loops: over blocks of tokens that see the whole block, without a question asked, then over the others; each
    # is one loop over all query heads of the group, so that its loads are always under way.
    for edge in tl.static_range(0, 2):
        count = edges if edge else whole
        for i in range(0, group * count):
            turn = i // tl.maximum(count, 1)
            block = i - turn * count
            if edge:
                block += first_block
                block = tl.where(block < whole_first, block, block + whole)
            else:
                block += whole_first
            token = block * BLOCK_ROWS + number
            held = token < query_tokens
            query_head = head * group + turn
            at_query = (first_query + block * BLOCK_ROWS).to(tl.int64)
            q_rows = q + batch * q_batch + query_head * q_head + at_query * q_token
            queries = load_block(q_rows, q_tile, held, dim < HEAD_DIM, edge == 1, DIMS != HEAD_DIM)
            d_out_rows = d_out + batch * d_out_batch + query_head * d_out_head + at_query * d_out_token
            d_outs = load_block(d_out_rows, d_out_tile, held, v_dim < V_HEAD_DIM, edge == 1, V_DIMS != V_HEAD_DIM)
            rows = batch * lse_batch + query_head * lse_head + at_query
            if edge:
                row_lse = tl.load(lse + rows + number, mask=held, other=float("-inf"))
                row_delta = tl.load(delta + rows + number, mask=held, other=0)
            else:
                row_lse = tl.load(lse + rows + number)
                row_delta = tl.load(delta + rows + number)
            masked = None
            if mask is not None:
                mask_rows = mask + batch * mask_batch + query_head * mask_head
                masked = tl.load(
                    mask_rows + (token.to(tl.int64) * mask_token)[None, :] + (key.to(tl.int64) * mask_key)[:, None],
                    mask=held[None, :] & key_held[:, None],
                    other=0,
                )
            products = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
            slopes = tl.dot(values, tl.trans(d_outs), input_precision=PRECISION)
            weights, capped = probabilities(products, base_2(row_lse)[None, :], masked, scale, softcap)
            if edge and (CAUSAL or window is not None):
                weights = tl.where(seen_by((start + token)[None, :], key[:, None], window, CAUSAL), weights, 0.0)
            dv_sum = tl.dot(weights.to(d_outs.dtype), d_outs, dv_sum, input_precision=PRECISION)
            slopes = weights * (slopes - row_delta[None, :])
            if softcap is not None:
                slopes *= 1 - capped * capped
            dk_sum = tl.dot(slopes.to(queries.dtype), queries, dk_sum, input_precision=PRECISION)

    # What the sums hold of keys that are not held is arbitrary; it is theirs alone.
    exists = (key < key_tokens)[:, None]
    dk_rows = dk + batch * dk_batch + head * dk_head + (at_key * dk_token)[:, None]
    tl.store(
        dk_rows + dim[None, :],
        tl.where(key_held[:, None], dk_sum * scale, 0.0).to(dk.dtype.element_ty),
        mask=exists & (dim < HEAD_DIM)[None, :],
    )
    dv_rows = dv + batch * dv_batch + head * dv_head + (at_key * dv_token)[:, None]
    tl.store(
        dv_rows + v_dim[None, :],
        tl.where(key_held[:, None], dv_sum, 0.0).to(dv.dtype.element_ty),
        mask=exists & (v_dim < V_HEAD_DIM)[None, :],
    )
