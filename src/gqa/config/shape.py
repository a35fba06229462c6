"""The shape of a model: what arithmetic and kernels need to know, and nothing of how a config spells it.

Letters: H KV heads, G queries per KV head, H*G query heads, D head dim of q and k, Dv head dim of v, L layers.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from gqa.errors import GqaError

LayerKind = Literal["full", "sliding", "mla"]


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """The attention of one layer.

    kind `full` keeps every token's K and V; `sliding` keeps the last `window` tokens, the newest included;
    `mla` (multi-head latent attention) keeps one row of `head_dim` numbers per token, of which the first
    `v_head_dim` serve as the value too, so that it counts as a single KV head.

    rotary_dim: the first dimensions of a head that the rotary embedding turns, None for all; alibi: scores fall off
    with distance, at a slope that belongs to the query head's number.
    """

    kind: LayerKind
    query_heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    window: int | None = None
    rotary_dim: int | None = None
    alibi: bool = False


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
    def query_heads(self) -> int:
        """H*G, equal in every layer."""
        return self._of_every_layer("query_heads")

    @property
    def kv_heads(self) -> int:
        """H, equal in every layer (1 under latent attention)."""
        return self._of_every_layer("kv_heads")

    @property
    def head_dim(self) -> int:
        """D, equal in every layer."""
        return self._of_every_layer("head_dim")

    @property
    def is_latent(self) -> bool:
        return self.latent is not None

    def with_kv_heads(self, kv_heads: int) -> ModelShape:
        """The same model at another setting of the dial. Raises GqaError if `kv_heads` does not divide H*G."""
        check_kv_heads(self, kv_heads)
        layers = tuple(dataclasses.replace(layer, kv_heads=kv_heads) for layer in self.layers)
        return dataclasses.replace(self, layers=layers)

    def without_windows(self) -> ModelShape:
        """The same model with every sliding layer keeping all tokens, as an engine without windows runs it."""
        layers = tuple(
            dataclasses.replace(layer, kind="full", window=None) if layer.kind == "sliding" else layer
            for layer in self.layers
        )
        return dataclasses.replace(self, layers=layers)

    def _of_every_layer(self, field: str) -> int:
        values = {getattr(layer, field) for layer in self.layers}
        assert len(values) == 1, f"{field} differs between layers"
        return values.pop()


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
    heads = shape.query_heads
    choices = kv_head_choices(heads)
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
