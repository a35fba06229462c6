"""torch's scaled_dot_product_attention with K and V never repeated in memory.

Three routes, chosen by shape:
- folded: the G queries of a KV head become rows of one matrix, (B, H*G, T, D) -> (B, H, G*T, D). K and V are then
  read once per group. Decode, and any call where all T query rows see the same keys.
- native: `enable_gqa` on CPU, for masked and causal prefill. torch's CPU kernel indexes K and V by n // G, forward and
  backward, and allocates dK and dV at H heads (a test measures it).
- per query of the group: on other devices torch may answer `enable_gqa` with a repeat, so G calls over the H heads.
"""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from gqa.ops.visible import visible_keys


def unserved(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softcap: float | None,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    block_table: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    return_lse: bool,
) -> str | None:
    """The first thing asked for that this implementation cannot do, or None."""
    if softcap is not None:
        return "softcap"
    if sinks is not None:
        return "sinks"
    if return_lse:
        return "return_lse"
    if block_table is not None:
        return "block_table"
    if k_scale is not None:
        return "k_scale and v_scale"
    if v.shape[3] != k.shape[3]:
        return "a head dim of v that differs from that of q and k"  # torch would repeat K and V
    if k.stride(3) != 1 or v.stride(3) != 1:
        return "k or v strided in their last dimension"  # torch would repeat K and V
    if mask is not None and mask.requires_grad:
        return "a mask that requires grad"  # torch would repeat K and V
    return None


def attention(
    q: torch.Tensor,  # (B, H*G, T, D)
    k: torch.Tensor,  # (B, H, S, D)
    v: torch.Tensor,  # (B, H, S, D)
    *,
    causal: bool,
    q_start: int,
    q_starts: torch.Tensor | None,
    window: int | None,
    scale: float,
    mask: torch.Tensor | None,
    kv_lengths: torch.Tensor | None,
    kv_starts: torch.Tensor | None,
) -> torch.Tensor:
    """out (B, H*G, T, D); the options are those of `gqa.attention`, less what `unserved` names."""
    T, S = q.shape[2], k.shape[2]
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
        if mask.dtype not in (torch.bool, q.dtype):
            mask = mask.to(q.dtype)

    if q_starts is None:
        # Leave out the keys that no query sees: a view, and often what remains needs no mask.
        low = 0 if window is None else max(0, q_start - window + 1)
        high = min(S, q_start + T) if causal else S
        if low < high and (low > 0 or high < S):
            k, v = k[:, :, low:high], v[:, :, low:high]
            mask = mask if mask is None or mask.shape[3] == 1 else mask[..., low:high]
            kv_lengths = None if kv_lengths is None else kv_lengths - low
            kv_starts = None if kv_starts is None else kv_starts - low
            q_start, S = q_start - low, high - low
        causal = causal and q_start < S - 1
        window = window if window is not None and q_start + T > window else None

    # torch's is_causal puts query t at position t, whatever S is.
    plain = mask is None and q_starts is None and window is None and kv_lengths is None and kv_starts is None
    if plain and causal and q_start == 0:
        return _ungrouped(q, k, v, None, scale, is_causal=True)
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
        if mask is None:
            mask = visible
        else:
            mask = mask & visible if mask.dtype == torch.bool else mask.masked_fill(~visible, -torch.inf)
    if mask is None or T == 1:
        return _folded(q, k, v, mask, scale)
    return _ungrouped(q, k, v, mask, scale, is_causal=False)


def _folded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    B, HG, T, D = q.shape
    H = k.shape[1]
    if mask is not None and mask.shape[1] != 1:
        mask = mask.reshape(mask.shape[0], H, HG // H, mask.shape[3])  # T is 1
    out = scaled_dot_product_attention(q.reshape(B, H, HG // H * T, D), k, v, attn_mask=mask, scale=scale)
    return _zero_where_blind(out, mask).reshape(B, HG, T, D)


def _ungrouped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float, *, is_causal: bool
) -> torch.Tensor:
    if q.device.type == "cpu":
        q = q if q.stride(3) == 1 else q.contiguous()
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=True)
    return per_query_of_group(q, k, v, mask, scale, is_causal=is_causal)


def per_query_of_group(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float, *, is_causal: bool
) -> torch.Tensor:
    """G calls, each with one query head of every group, so that no call has more query heads than KV heads."""
    H = k.shape[1]
    groups = q.unflatten(1, (H, -1)).unbind(2)
    outs = []
    for g, heads in enumerate(groups):
        part = mask if mask is None or mask.shape[1] == 1 else mask.unflatten(1, (H, -1))[:, :, g]
        out = scaled_dot_product_attention(heads, k, v, attn_mask=part, is_causal=is_causal, scale=scale)
        outs.append(_zero_where_blind(out, part))
    return torch.stack(outs, dim=2).flatten(1, 2)


def _zero_where_blind(out: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Zeros for rows with no visible key. torch's CPU kernel gives them itself; not every GPU backend does."""
    if mask is None or out.device.type == "cpu":
        return out
    seen = mask if mask.dtype == torch.bool else mask > -torch.inf
    return out.masked_fill(~seen.any(dim=-1, keepdim=True), 0)
