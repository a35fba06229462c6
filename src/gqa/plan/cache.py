"""How many bytes the KV cache takes.

Letters: B requests, S tokens of context, H KV heads, G queries per KV head, D head dim of k, Dv head dim of v.
"""

from __future__ import annotations

import dataclasses

from gqa.config import LayerShape, ModelShape


def row_elements(layer: LayerShape) -> int:
    """Numbers that one token adds to one layer's cache: H * (D + Dv).

    Under latent attention D, as the value is part of the stored row (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).
    """
    if layer.kind == "mla":
        return layer.head_dim
    return layer.kv_heads * (layer.head_dim + layer.v_head_dim)


def kept_tokens(layer: LayerShape, context: int) -> int:
    """Tokens of a context of S that one layer keeps: S, or at most the window."""
    return context if layer.window is None else min(context, layer.window)


def kv_bytes_per_token(shape: ModelShape, bytes_per_element: int) -> int:
    """Bytes that one token of one request writes, over all layers: sum of H * (D + Dv) * bytes."""
    return bytes_per_element * sum(row_elements(layer) for layer in shape.layers)


def kv_bytes(shape: ModelShape, context: int, batch: int, bytes_per_element: int) -> int:
    """Bytes of the cache of B requests of S tokens: B * sum of min(S, window) * H * (D + Dv) * bytes."""
    kept = sum(kept_tokens(layer, context) * row_elements(layer) for layer in shape.layers)
    return batch * kept * bytes_per_element


def as_multi_head(shape: ModelShape) -> ModelShape:
    """The same model with one KV head per query head, keeping K and V in full.

    For latent attention these are the heads it expands its latent to: D = nope + rope dims, Dv its value dims.
    """
    if shape.latent is None:
        return shape.with_kv_heads(shape.query_heads)
    head_dim = shape.latent.nope_dim + shape.latent.rope_dim
    layers = tuple(
        dataclasses.replace(
            layer, kind="full", kv_heads=layer.query_heads, head_dim=head_dim, v_head_dim=shape.latent.v_dim
        )
        for layer in shape.layers
    )
    return dataclasses.replace(shape, layers=layers)
