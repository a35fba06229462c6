"""How many bytes the KV cache takes.

Letters: B requests, S tokens of context, H KV heads, G queries per KV head, D head dim of k, Dv head dim of v.
"""

from __future__ import annotations

import dataclasses

from gqa.config import LayerShape, ModelShape

RECURRENT_BYTES = 4  # of a number of a recurrent state: transformers and vLLM keep them in fp32


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


def kept_tokens(layer: LayerShape, context: int) -> int:
    """Tokens of a context of S that one layer keeps: S, or at most the window or chunk."""
    return context if layer.window is None else min(context, layer.window)


def state_bytes(shape: ModelShape, bytes_per_element: int) -> int:
    """Bytes that the layers with a constant state keep for one request: sum of channels * taps * bytes + recurrent * 4.

    A quantised cache keeps the convolution's inputs in two bytes all the same."""
    states = [layer.state for layer in shape.layers if layer.state is not None]
    element = max(bytes_per_element, 2)
    return sum(s.channels * s.taps * element + s.recurrent * RECURRENT_BYTES for s in states)


def kv_bytes_per_token(shape: ModelShape, bytes_per_element: int) -> int:
    """Bytes that one token of one request writes, over all layers: sum of H * (D + Dv) * bytes."""
    return bytes_per_element * sum(row_elements(layer) for layer in shape.layers)


def kv_bytes(shape: ModelShape, context: int, batch: int, bytes_per_element: int) -> int:
    """Bytes that B requests of S tokens keep: B * (sum of min(S, window) * H * (D + Dv) * bytes + constant states)."""
    kept = sum(kept_tokens(layer, context) * row_elements(layer) for layer in shape.layers)
    return batch * (kept * bytes_per_element + state_bytes(shape, bytes_per_element))


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
