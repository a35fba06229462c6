"""Attention spelled out in Python loops, in float64: it shares no line with the package.

B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D, Dv head dims
"""

import math

import torch


def naive_bias(
    B, HG, T, S, *, causal=False, q_start=None, window=None, mask=None, kv_lengths=None, kv_starts=None, **_
):  # fmt: skip
    """(B, H*G, T, S) float64 to add to the scores: -inf where a key is not visible."""
    full = None if mask is None else mask.expand(B, HG, T, S)
    bias = torch.zeros(B, HG, T, S, dtype=torch.float64)
    for b in range(B):
        start = S - T if q_start is None else int(q_start[b]) if torch.is_tensor(q_start) else q_start
        for t in range(T):
            for s in range(S):
                hidden = (
                    (causal and s > start + t)
                    or (window is not None and s <= start + t - window)
                    or (kv_lengths is not None and s >= int(kv_lengths[b]))
                    or (kv_starts is not None and s < int(kv_starts[b]))
                )
                if hidden:
                    bias[b, :, t, s] = -math.inf
    if full is not None:
        bias = bias.masked_fill(~full, -math.inf) if full.dtype == torch.bool else bias + full.double()
    return bias


def unpage(pool, block_table):
    """A pool (blocks, H, block, ...) as (B, H, S, ...); blocks below zero become zeros."""
    H, block = pool.shape[1:3]
    B, most = block_table.shape
    out = torch.zeros(B, H, most * block, *pool.shape[3:], dtype=pool.dtype)
    for b in range(B):
        for i in range(most):
            if block_table[b, i] >= 0:
                out[b, :, i * block : (i + 1) * block] = pool[int(block_table[b, i])]
    return out


def naive_attention(
    q, k, v, *, scale=None, softcap=None, sinks=None, block_table=None, k_scale=None, v_scale=None, **options
):  # fmt: skip
    """out (B, H*G, T, Dv) and lse (B, H*G, T), both float64."""
    k, v = k.double(), v.double()
    if k_scale is not None and v_scale is not None:
        k, v = k * k_scale.double()[..., None], v * v_scale.double()[..., None]
    if block_table is not None:
        k, v = unpage(k, block_table), unpage(v, block_table)
    B, HG, T, D = q.shape
    H, S = k.shape[1:3]
    G = HG // H
    bias = naive_bias(B, HG, T, S, **options)
    out = torch.zeros(B, HG, T, v.shape[3], dtype=torch.float64)
    lse = torch.full((B, HG, T), -math.inf, dtype=torch.float64)
    for b in range(B):
        for n in range(HG):
            for t in range(T):
                visible = [s for s in range(S) if bias[b, n, t, s] > -math.inf]
                scores = k[b, n // G, visible] @ q[b, n, t].double() * (D**-0.5 if scale is None else scale)
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                scores = scores + bias[b, n, t, visible]
                logits = scores if sinks is None else torch.cat([scores, sinks[n : n + 1].double()])
                if len(logits):
                    lse[b, n, t] = torch.logsumexp(logits, 0)
                    out[b, n, t] = torch.exp(scores - lse[b, n, t]) @ v[b, n // G, visible]
    return out, lse


def plain_attention(q, k, v, *, scale=None, **options):
    """What anyone would write in the tensors' own dtype: the yardstick of precision for a faster implementation."""
    G = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(G, dim=1), v.repeat_interleave(G, dim=1)
    scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    B, HG, T, _ = q.shape
    scores = scores + naive_bias(B, HG, T, k.shape[2], **options).to(q.dtype)
    return torch.softmax(scores, dim=-1).nan_to_num(0) @ v


def assert_as_precise_as_plain(got, q, k, v, **options):
    """`got` errs against float64 at most twice as much as the plain computation, beside two roundings of a value."""
    want, _ = naive_attention(q, k, v, **options)
    plain = (plain_attention(q, k, v, **options).double() - want).abs().max()
    rounding = 2 * torch.finfo(q.dtype).eps * v.double().abs().max()
    error = (got.double() - want).abs().max()
    assert error <= 2 * plain + rounding, f"error {error:.3g}, plain {plain:.3g}, rounding {rounding:.3g}"
