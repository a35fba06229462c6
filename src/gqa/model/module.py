"""An attention layer of our own: projections, rotary embedding, cache and the op."""

# B batch · T query tokens · S key tokens · E hidden size · H KV heads · G queries per KV head · D head dim

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gqa.cache.contiguous import ContiguousCache
from gqa.cache.int8 import Int8Cache
from gqa.cache.paged import PagedCache
from gqa.cache.stored import operands
from gqa.errors import GqaError
from gqa.ops.api import attention


class GroupedQueryAttention(nn.Module):
    """y = o_proj(attention(rotary(q_proj(x)), rotary(k_proj(x)), v_proj(x))), (B, T, E) -> (B, T, E).

    hidden       E, size of the input and the output
    query_heads  H*G; query head n reads KV head n // G
    kv_heads     H: query_heads for MHA, 1 for MQA, any divisor of query_heads between
    head_dim     D, by default hidden // query_heads
    bias         of all four projections
    rope_theta   base of the rotary embedding in the half-split convention (dimension f turns with f + D/2, as in
                 Llama checkpoints of transformers); None for no positions at all
    causal, window, impl
                 as in `gqa.attention`

    The parameters are named like a Llama layer's `self_attn`, so its weights load with load_state_dict.
    Raises GqaError when heads do not divide, or D is odd under a rotary embedding.
    """

    def __init__(
        self,
        hidden: int,
        query_heads: int,
        kv_heads: int,
        head_dim: int | None = None,
        *,
        bias: bool = False,
        rope_theta: float | None = 10000.0,
        causal: bool = True,
        window: int | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        for name, value in (("hidden", hidden), ("query_heads", query_heads), ("kv_heads", kv_heads)):
            if value < 1:
                raise GqaError(f"{name} must be positive", got=value, allowed="1 or more")
        if query_heads % kv_heads:
            raise GqaError(
                f"{kv_heads} KV heads do not divide {query_heads} query heads",
                allowed=", ".join(str(n) for n in range(1, query_heads + 1) if query_heads % n == 0),
            )
        if head_dim is None and hidden % query_heads:
            raise GqaError(f"{query_heads} query heads do not divide a hidden size of {hidden}", hint="pass head_dim")
        head_dim = hidden // query_heads if head_dim is None else head_dim
        if rope_theta is not None and head_dim % 2:
            raise GqaError("a rotary embedding turns pairs of dimensions", got=f"head_dim={head_dim}", allowed="even")
        self.query_heads, self.kv_heads, self.head_dim = query_heads, kv_heads, head_dim
        self.rope_theta, self.causal, self.window, self.impl = rope_theta, causal, window, impl
        self.q_proj = nn.Linear(hidden, query_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(query_heads * head_dim, hidden, bias=bias)

    def forward(
        self,
        x: torch.Tensor,
        *,
        cache: ContiguousCache | Int8Cache | PagedCache | None = None,
        layer: int = 0,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x (B, T, E) -> (B, T, E).

        With a cache, x continues the tokens that the cache holds for `layer`, and is added to them. mask: as in
        `gqa.attention`, over all S keys.
        """
        past = 0 if cache is None else cache.layer_length(layer)
        q, k, v = (
            projection(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, T, D)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.rope_theta is not None:
            cos, sin = rotary_angles(past, x.shape[1], self.head_dim, self.rope_theta, x.dtype, x.device)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        options: dict[str, Any] = {}
        if cache is not None:
            keys, values = cache.update(layer, k, v)
            k, v, mask, options = operands(keys, values, mask)
        options |= {"causal": self.causal, "q_start": past, "window": self.window, "mask": mask, "impl": self.impl}
        out = attention(q, k, v, **options)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"query_heads={self.query_heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}"


def rotary_angles(
    first: int, tokens: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each (tokens, D/2), of position * theta ** (-2f / D), for positions first, first + 1, ...

    Angles are computed in float32 whatever the dtype: bf16 cannot tell large positions apart.
    Source: Su et al. 2021, arXiv 2104.09864.
    """
    frequency = 1 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    position = torch.arange(first, first + tokens, dtype=torch.float32, device=device)
    angle = position[:, None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (f, f + D/2) of x (B, heads, T, D) by its position's angle (T, D/2)."""
    real, imaginary = x.chunk(2, dim=-1)
    return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1)
