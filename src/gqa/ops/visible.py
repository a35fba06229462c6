"""Which key each query may see, as one boolean tensor: what causality, windows and ragged lengths have in common."""

# B batch · T query tokens · S key tokens

from __future__ import annotations

import torch


def visible_keys(
    query_tokens: int,
    key_tokens: int,
    *,
    device: torch.device,
    causal: bool = False,
    q_start: int = 0,
    q_starts: torch.Tensor | None = None,
    window: int | None = None,
    kv_lengths: torch.Tensor | None = None,
    kv_starts: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """True where query t may see key s; None where every query sees every key.

    Query t of sequence b sits at position p = q_starts[b] + t (q_start + t without q_starts). Key s is visible when
    s <= p (causal), s > p - window (window), s < kv_lengths[b] and s >= kv_starts[b], each where it is given.
    The result is (1 or B, 1, 1 or T, S), to broadcast over heads: it never grows with their number.
    """
    key = torch.arange(key_tokens, device=device)
    conditions = []
    if causal or window is not None:
        query = torch.arange(query_tokens, device=device)
        position = query + q_start if q_starts is None else q_starts[:, None] + query  # (T) or (B, T)
        position = position.reshape(-1, 1, query_tokens, 1)
        if causal:
            conditions.append(key <= position)
        if window is not None:
            conditions.append(key > position - window)
    if kv_lengths is not None:
        conditions.append(key < kv_lengths.reshape(-1, 1, 1, 1))
    if kv_starts is not None:
        conditions.append(key >= kv_starts.reshape(-1, 1, 1, 1))
    if not conditions:
        return None
    result = conditions[0]
    for condition in conditions[1:]:
        result = result & condition
    return result
