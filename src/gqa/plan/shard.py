"""What one of several devices holds under tensor parallelism."""

from __future__ import annotations

import dataclasses

from gqa.config import LayerShape, ModelShape
from gqa.errors import GqaError


def shard(shape: ModelShape, ranks: int) -> ModelShape:
    """The attention of the fullest of `ranks` devices: H*G / ranks query heads and max(1, H / ranks) KV heads.

    Below the number of devices KV heads are repeated, so that some have a copy of the same one; a latent row is whole
    on every device; constant states are split. Raises GqaError if heads cannot be split evenly.
    """
    layers = tuple(_layer(shape, layer, ranks) for layer in shape.layers)
    return dataclasses.replace(shape, layers=layers)


def _layer(shape: ModelShape, layer: LayerShape, ranks: int) -> LayerShape:
    state = layer.state
    if state is not None:
        state = dataclasses.replace(state, channels=-(-state.channels // ranks), recurrent=-(-state.recurrent // ranks))
    if not layer.query_heads:
        return dataclasses.replace(layer, state=state)
    if layer.query_heads % ranks:
        raise GqaError(
            f"{shape.name} cannot be split evenly over {ranks} devices",
            got=f"{layer.query_heads} query heads",
            allowed=", ".join(str(n) for n in range(1, layer.query_heads + 1) if layer.query_heads % n == 0),
        )
    if layer.kind != "mla" and layer.kv_heads % ranks and ranks % layer.kv_heads:
        raise GqaError(
            f"{layer.kv_heads} KV heads of {shape.name} cannot be shared out to {ranks} devices",
            allowed="a divisor or a multiple of the KV heads",
        )
    kv_heads = 1 if layer.kind == "mla" else max(1, layer.kv_heads // ranks)
    return dataclasses.replace(layer, query_heads=layer.query_heads // ranks, kv_heads=kv_heads, state=state)
