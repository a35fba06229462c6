"""FLOPs of a decode step; a multiply and an add are two.

Letters: B requests, S tokens of context, H*G query heads, D head dim of k, Dv head dim of v.
"""

from __future__ import annotations

from gqa.config import ModelShape
from gqa.plan.cache import kept_tokens
from gqa.plan.parameters import active_parameters


def attention_core_flops(shape: ModelShape, context: int, batch: int) -> int:
    """Scores and weighted sums of one new token per request: B * sum of 2 * H*G * (D + Dv) * min(S, window).

    The KV heads do not enter: every query head works through its own scores. Latent attention is counted in its
    absorbed form, in which each query head works on the latent itself.
    """
    per_request = sum(
        2 * layer.query_heads * (layer.head_dim + layer.v_head_dim) * kept_tokens(layer, context)
        for layer in shape.layers
    )
    return batch * per_request


def decode_flops(shape: ModelShape, context: int, batch: int) -> int | None:
    """One token for each of B requests: B * 2 * active parameters, plus the attention core. None if unknown."""
    active = active_parameters(shape)
    if active is None:
        return None
    return batch * 2 * active + attention_core_flops(shape, context, batch)
