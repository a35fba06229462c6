"""The oracle: grouped-query attention written for the reader, with every option, differentiable by autograd.

Queries are grouped as (B, H, G, T, D), so K and V stay at H heads. Scores are materialised: (B, H, G, T, S).
"""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim of q, k · Dv head dim of v

from __future__ import annotations

import torch

from gqa.ops.visible import visible_keys


def attention(
    q: torch.Tensor,  # (B, H*G, T, D)
    k: torch.Tensor,  # (B, H, S, D), or a pool (blocks, H, block, D)
    v: torch.Tensor,  # (B, H, S, Dv), or a pool (blocks, H, block, Dv)
    *,
    causal: bool,
    q_start: int,
    q_starts: torch.Tensor | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    kv_lengths: torch.Tensor | None,
    kv_starts: torch.Tensor | None,
    block_table: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out[n] = sum_s p[s] v[n // G, s], p = softmax_s(softcap(scale * q[n] . k[n // G, s]) + mask), lse = its log-sum.

    The options are those of `gqa.attention`. Returns out (B, H*G, T, Dv) in q's dtype, and lse (B, H*G, T) in the
    dtype computed in: float64 for float64 inputs, else float32.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    k = _numbers(k, k_scale, block_table, dtype)
    v = _numbers(v, v_scale, block_table, dtype)
    B, HG, T, D = q.shape
    H, S = k.shape[1:3]
    G = HG // H

    # Keys that no query may see can be uninitialised memory, and 0 * nan is nan.
    held = visible_keys(T, S, device=q.device, kv_lengths=kv_lengths, kv_starts=kv_starts)  # (B, 1, 1, S)
    if held is not None:
        k = k.masked_fill(~held.transpose(2, 3), 0)
        v = v.masked_fill(~held.transpose(2, 3), 0)

    # One matrix product per KV head for its G*T query rows.
    scores = (q.to(dtype).reshape(B, H, G * T, D) @ k.transpose(2, 3)).view(B, H, G, T, S) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        grouped = _grouped(mask, H, G)
        scores = scores.masked_fill(~grouped, -torch.inf) if mask.dtype == torch.bool else scores + grouped.to(dtype)
    visible = visible_keys(
        T,
        S,
        device=q.device,
        causal=causal,
        q_start=q_start,
        q_starts=q_starts,
        window=window,
        kv_lengths=kv_lengths,
        kv_starts=kv_starts,
    )
    if visible is not None:
        scores = scores.masked_fill(~visible[:, :, None], -torch.inf)

    # The shift cancels out of the softmax, so it needs no gradient.
    shift = scores.detach().amax(dim=-1, keepdim=True)
    if sinks is not None:
        sinks = sinks.to(dtype).view(1, H, G, 1, 1)
        shift = torch.maximum(shift, sinks.detach())
    shift = shift.masked_fill(shift == -torch.inf, 0)
    weights = torch.exp(scores - shift)
    total = weights.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - shift)

    empty = total == 0  # no visible key: out is zero, lse is -inf
    total = total.masked_fill(empty, 1)
    out = (weights.view(B, H, G * T, S) @ v).view(B, H, G, T, -1) / total
    lse = (shift + torch.log(total)).masked_fill(empty, -torch.inf)
    return out.reshape(B, HG, T, -1).to(q.dtype), lse.reshape(B, HG, T)


def _numbers(
    x: torch.Tensor, scale: torch.Tensor | None, block_table: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """K or V as (B, H, S, D) numbers: pages gathered in the order of the table, int8 times the scale of its token."""
    if block_table is not None:
        table = block_table.clamp(min=0)  # entries past a sequence's length are never visible and -1 by custom
        x = x[table].transpose(1, 2).flatten(2, 3)  # (B, max_blocks, H, block, D) -> (B, H, S, D)
        scale = None if scale is None else scale[table].transpose(1, 2).flatten(2, 3)
    x = x.to(dtype)
    return x if scale is None else x * scale.to(dtype)[..., None]


def _grouped(mask: torch.Tensor, kv_heads: int, group: int) -> torch.Tensor:
    """A mask broadcastable to (B, H*G, T, S) as one broadcastable to (B, H, G, T, S)."""
    mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    return mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (kv_heads, group))
