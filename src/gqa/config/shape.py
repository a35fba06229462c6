"""The shape of a model: what arithmetic and kernels need to know, and nothing of how a config spells it.

Letters: H KV heads, G queries per KV head, H*G query heads, D head dim of q and k, Dv head dim of v, L layers.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from typing import Literal

from gqa.errors import GqaError

LayerKind = Literal["full", "sliding", "chunked", "mla", "linear", "none"]


@dataclasses.dataclass(frozen=True)
class State:
    """What a layer keeps for a request however long its context: the last `taps` inputs of a convolution over
    `channels` (in the dtype of the activations), and `recurrent` numbers (in fp32 in transformers and llama.cpp; in
    other engines only where `fp32`)."""

    channels: int
    taps: int
    recurrent: int
    fp32: bool = True


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """The attention of one layer.

    kind `full` keeps every token's K and V; `sliding` keeps the last `window` tokens, the newest included; `chunked`
    those of the current chunk of `window` tokens; `mla` (multi-head latent attention) keeps one row of `head_dim`
    numbers per token, of which the first `v_head_dim` serve as the value too, so that it counts as a single KV head;
    `linear` has no KV heads, only a `state`; `none` is a layer without any of it. A layer that runs attention and a
    state-space model side by side is of its attention's kind and has a state.

    rotary_dim: the first dimensions of a head that the rotary embedding turns, None for all; alibi: scores fall off
    with distance, at a slope that belongs to the query head's number. shares_cache: it reads the K and V of an
    earlier layer and stores none. index_dim, index_topk: numbers per token of a lightning indexer's keys beside the
    cache, and the tokens that it selects for the attention (DeepSeek-V3.2); 0 for none.
    """

    kind: LayerKind
    query_heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    window: int | None = None
    rotary_dim: int | None = None
    alibi: bool = False
    state: State | None = None
    shares_cache: bool = False
    index_dim: int = 0
    index_topk: int = 0


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts: `per_token` of `total` MLPs of width `intermediate` run for a token, and beside them
    one of width `shared_intermediate` for every token (0: none), in `layers` of the model's layers."""

    total: int
    per_token: int
    intermediate: int
    shared_intermediate: int
    layers: int


@dataclasses.dataclass(frozen=True)
class Latent:
    """The inner widths of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).
    q_rank is None where queries are projected in one step."""

    q_rank: int | None
    kv_rank: int
    rope_dim: int
    nope_dim: int
    v_dim: int


@dataclasses.dataclass(frozen=True)
class Details:
    """What the model type adds to the matrices: the meaning of each field is told in data/model_types.toml."""

    gated: bool
    norms: int
    norm_bias: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    expert_bias: bool
    qk_norm: Literal["", "head", "width"]
    sinks: bool
    positions: bool


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """A decoder's shape. None stands for what the config does not tell; figures that need it are then None too.

    name:            for the reader
    model_type:      Hugging Face's name of the architecture
    hidden:          width of the residual stream
    layers:          a LayerShape per layer
    vocab:           rows of the embedding
    intermediate:    width of a dense MLP
    context:         longest context the model was made for, in tokens
    tied_embeddings: the output matrix is the input embedding
    weight_dtype:    dtype name of the stored weights (`bf16`), None if unknown or quantised
    quantised:       name of the quantisation of the stored weights, None for plain ones
    details:         None for a model type that data/model_types.toml does not know
    """

    name: str
    model_type: str
    hidden: int
    layers: tuple[LayerShape, ...]
    vocab: int | None
    intermediate: int | None
    context: int | None
    tied_embeddings: bool | None
    weight_dtype: str | None = None
    quantised: str | None = None
    experts: Experts | None = None
    latent: Latent | None = None
    details: Details | None = None

    @property
    def attention(self) -> tuple[LayerShape, ...]:
        """The layers that have attention heads."""
        return tuple(layer for layer in self.layers if layer.query_heads)

    @functools.cached_property
    def counted_layers(self) -> tuple[tuple[LayerShape, int], ...]:
        """Each different layer once, and how many there are of it: most models have one or two."""
        return tuple(collections.Counter(self.layers).items())

    @property
    def query_heads(self) -> int:
        """H*G, equal in every layer with attention."""
        return self._of_every_layer("query_heads")

    @property
    def kv_heads(self) -> int:
        """H, equal in every layer with attention (1 under latent attention)."""
        return self._of_every_layer("kv_heads")

    @property
    def head_dim(self) -> int:
        """D, equal in every layer with attention."""
        return self._of_every_layer("head_dim")

    @property
    def is_latent(self) -> bool:
        return self.latent is not None

    @property
    def dial(self) -> tuple[int, ...]:
        """The numbers of KV heads that every layer can have; empty for latent attention and without attention."""
        if self.is_latent or not self.attention:
            return ()
        return kv_head_choices(math.gcd(*(layer.query_heads for layer in self.attention)))

    def with_kv_heads(self, kv_heads: int) -> ModelShape:
        """The same model with `kv_heads` in every layer with attention. Raises GqaError like check_kv_heads."""
        check_kv_heads(self, kv_heads)
        layers = tuple(
            dataclasses.replace(layer, kv_heads=kv_heads) if layer.query_heads else layer for layer in self.layers
        )
        return dataclasses.replace(self, layers=layers)

    def without_windows(self) -> ModelShape:
        """The same model with every sliding or chunked layer keeping all tokens, as an engine that does not know
        windows runs it."""
        layers = tuple(
            dataclasses.replace(layer, kind="full", window=None) if layer.window is not None else layer
            for layer in self.layers
        )
        return dataclasses.replace(self, layers=layers)

    def _of_every_layer(self, field: str) -> int:
        values = sorted({getattr(layer, field) for layer in self.attention})
        if len(values) != 1:
            raise GqaError(
                f"{self.name} has no single {field} of its attention",
                got=" and ".join(map(str, values)) or "no layer with attention heads",
                allowed="a model whose layers have the same heads",
                hint="gqa plan works on such a model",
            )
        return values[0]


def kv_head_choices(query_heads: int) -> tuple[int, ...]:
    """The stops of the dial: every divisor of the query heads, from 1 (MQA) up to all of them (MHA)."""
    small = [n for n in range(1, int(query_heads**0.5) + 1) if query_heads % n == 0]
    return tuple(sorted({*small, *(query_heads // n for n in small)}))


def check_kv_heads(shape: ModelShape, kv_heads: int) -> None:
    """Raise GqaError unless `kv_heads` is a stop of this model's dial."""
    if shape.is_latent:
        raise GqaError(
            f"{shape.name} uses latent attention, which has no KV heads to turn",
            hint="leave out --kv-heads",
        )
    if not shape.attention:
        raise GqaError(f"{shape.name} has no attention, and so no KV heads to turn", hint="leave out --kv-heads")
    choices = shape.dial
    heads = choices[-1]
    allowed = ", ".join(map(str, choices))
    if type(kv_heads) is not int or kv_heads < 1:
        raise GqaError("KV heads must be a positive whole number", got=repr(kv_heads), allowed=allowed)
    if kv_heads in choices:
        return
    nearest = min(choices, key=lambda choice: abs(choice - kv_heads))
    relation = "are more than the" if kv_heads > heads else "do not divide"
    raise GqaError(
        f"{kv_heads} KV heads {relation} {heads} query heads",
        allowed=allowed,
        hint=f"the same command with --kv-heads {nearest}",
    )
