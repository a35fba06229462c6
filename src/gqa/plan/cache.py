"""How many bytes the KV cache takes.

Letters: B requests, S tokens of context, H KV heads, G queries per KV head, D head dim of k, Dv head dim of v.
"""

from __future__ import annotations

import dataclasses

from gqa.config import LayerShape, ModelShape
from gqa.plan.kv_dtype import KvDtype

FP32_BYTES = 4


def row_elements(layer: LayerShape) -> int:
    """Numbers that one token adds to one layer's cache: H * (D + Dv); nothing where it shares an earlier layer's.

    Under latent attention D, as the value is part of the stored row (DeepSeek-V2, arXiv 2405.04434, section 2.1.2),
    and the key of a lightning indexer where there is one.
    """
    if layer.shares_cache:
        return 0
    if layer.kind == "mla":
        return layer.head_dim + layer.index_dim
    return layer.kv_heads * (layer.head_dim + layer.v_head_dim)


def row_bytes(layer: LayerShape, dtype: KvDtype) -> int:
    """The same in bytes, with the scales of a quantised cache."""
    heads = layer.kv_heads
    if not row_elements(layer):
        return 0
    if layer.kind == "mla":
        index = dtype.bytes_of(layer.index_dim, 1) if layer.index_dim else 0
        return dtype.bytes_of(layer.head_dim, 1) + index
    return bytes_of_heads(heads, layer.head_dim, dtype) + bytes_of_heads(heads, layer.v_head_dim, dtype)


def served_row_bytes(layer: LayerShape, dtype: KvDtype) -> int:
    """The same in vLLM and SGLang, which keep an indexer's key in fp8 with a float32 scale, and, where there is one, an
    fp8 latent with its rotary part in bf16 and scales: 656 bytes for 512 + 64 numbers (DeepSeek-V3.2)."""
    if layer.kind != "mla" or not layer.index_dim or layer.shares_cache:
        return row_bytes(layer, dtype)
    rope = layer.head_dim - layer.v_head_dim
    fp8 = layer.v_head_dim + layer.v_head_dim // 128 * FP32_BYTES + 2 * rope
    return (fp8 if dtype.name == "fp8" else dtype.bytes_of(layer.head_dim, 1)) + layer.index_dim + FP32_BYTES


def bytes_of_heads(heads: int, dim: int, dtype: KvDtype) -> int:
    """One token's K, or V, of `heads` heads of `dim` numbers."""
    return dtype.bytes_of(heads * dim, heads)


def kept_tokens(layer: LayerShape, context: int) -> int:
    """Tokens of a context of S that one layer keeps: S, or at most the window or chunk."""
    return context if layer.window is None else min(context, layer.window)


def state_bytes(shape: ModelShape, dtype: KvDtype) -> int:
    """Bytes that the layers with a constant state keep for one request: sum of channels * taps * bytes + recurrent * 4.

    No cache's quantisation applies to them: a convolution's inputs take two bytes at least."""
    states = [(layer.state, count) for layer, count in shape.counted_layers if layer.state is not None]
    return sum(n * (s.channels * s.taps * dtype.state_element_bytes + s.recurrent * FP32_BYTES) for s, n in states)


def kv_bytes_per_token(shape: ModelShape, dtype: KvDtype) -> int:
    """Bytes that one token of one request writes, over all layers: sum of H * (D + Dv) * bytes, and scales."""
    return sum(count * row_bytes(layer, dtype) for layer, count in shape.counted_layers)


def kv_bytes(shape: ModelShape, context: int, batch: int, dtype: KvDtype) -> int:
    """Bytes that B requests of S tokens keep: B * (sum of min(S, window) * H * (D + Dv) * bytes + constant states)."""
    kept = sum(n * kept_tokens(layer, context) * row_bytes(layer, dtype) for layer, n in shape.counted_layers)
    return batch * (kept + state_bytes(shape, dtype))


def as_multi_head(shape: ModelShape) -> ModelShape:
    """The same model with one KV head per query head, keeping K and V in full.

    For latent attention these are the heads it expands its latent to: D = nope + rope dims, Dv its value dims.
    """
    if shape.latent is None:
        layers = tuple(dataclasses.replace(layer, kv_heads=layer.query_heads) for layer in shape.layers)
        return dataclasses.replace(shape, layers=layers)
    head_dim = shape.latent.nope_dim + shape.latent.rope_dim
    layers = tuple(
        dataclasses.replace(
            layer,
            kind="full",
            kv_heads=layer.query_heads,
            head_dim=head_dim,
            v_head_dim=shape.latent.v_dim,
            index_dim=0,
        )
        if layer.kind == "mla"
        else layer
        for layer in shape.layers
    )
    return dataclasses.replace(shape, layers=layers)
