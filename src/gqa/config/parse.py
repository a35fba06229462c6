"""config.json -> ModelShape. What is not understood is an error that names the key, never a guess.

Key names come from the config classes of transformers 5.23; what a class assumes for an absent key is in
data/model_types.toml.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import re
import tomllib
from collections.abc import Mapping
from typing import Any

from gqa.config.shape import Details, Experts, Latent, LayerKind, LayerShape, ModelShape
from gqa.errors import GqaError

MAX_LAYERS = 1 << 14
MAX_HEADS = 1 << 20
MAX_WIDTH = 1 << 24
MAX_TOKENS = 1 << 40

# One meaning, several spellings; the first is the usual one.
HEADS = ("num_attention_heads", "n_head", "n_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads")
HEAD_DIM = ("head_dim",)
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HIDDEN = ("hidden_size", "n_embd", "d_model", "n_embed")
INTERMEDIATE = ("intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim")
CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
DTYPE = ("dtype", "torch_dtype")

NESTED = ("text_config", "llm_config", "language_config")
# Keys that a multimodal config may keep outside its text_config.
SHARED_WITH_NESTED = ("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config")

_PARTIAL = "partial_rotary_factor"

_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}

# Keys of attention that keeps something else than K and V of every layer's own heads.
_NOT_UNDERSTOOD = re.compile(
    r"""(attention_chunk_size | use_bidirectional_attention
        | layers?_block_types? | block_types? | attention_types | attn_type_list
        | hybrid_\w+ | full_attention_interval | attn_layer_\w+ | full_attn_idxs
        | num_kv_shared_layers | cross_attention_layers | cla_\w+ | index_topk
        | (mamba|ssm|linear|conv|lru|rwkv|xlstm)_\w+ | state_size
        | \w*(swa|global|local)_\w*head\w* | \w*heads?_per_layer
        | \w*(key_value|kv)_(heads?|groups?)\w* | \w*multi_query_group\w* )""",
    re.VERBOSE,
)
_LAYER_KINDS: dict[str, LayerKind] = {"full_attention": "full", "sliding_attention": "sliding"}


def parse_config(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape that a raw config.json describes.

    config: the JSON object as Python values; name: what to call the model in messages.
    Raises GqaError for missing, absurd or contradictory values and for kinds of attention that are not known.
    """
    return _Parser(config, name).shape()


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the text decoder: itself, or its `text_config`."""
    for key in NESTED:
        part = config.get(key)
        if isinstance(part, Mapping) and part:
            return part
    return config


@functools.cache
def model_types() -> dict[str, dict[str, Any]]:
    """The table of data/model_types.toml."""
    return tomllib.loads(importlib.resources.files("gqa").joinpath("data", "model_types.toml").read_text("utf-8"))


class _Parser:
    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        if not isinstance(config, Mapping):
            raise GqaError(f"the config of {name} is not a JSON object", got=type(config).__name__)
        self.name = name
        part = text_part(config)
        outer = {} if part is config else {key: config[key] for key in SHARED_WITH_NESTED if key in config}
        self.model_type = part.get("model_type", config.get("model_type", ""))
        if not isinstance(self.model_type, str):
            raise self.error("model_type", self.model_type, "a text")
        self.facts: dict[str, Any] = model_types().get(self.model_type, {})
        given = {**outer, **part}
        # An explicit null is taken at its word, as transformers does: a class default fills absent keys only.
        self.config = given | {
            key: value
            for key, value in self.facts.get("defaults", {}).items()
            if not any(spelling in given for spelling in _spellings(key))
        }

    def shape(self) -> ModelShape:
        self.refuse_unknown()
        hidden = self.number(HIDDEN, MAX_WIDTH)
        heads = self.number(HEADS, MAX_HEADS)
        count = self.number(LAYERS, MAX_LAYERS)
        latent = self.latent()
        layers = self.latent_layers(latent, heads, count) if latent else self.layers(hidden, heads, count)
        quantised = self.quantised()
        intermediate = self.number_or_none(INTERMEDIATE, MAX_WIDTH)
        if intermediate is None and "widening" in self.facts:
            intermediate = self.facts["widening"] * hidden
        return ModelShape(
            name=self.name,
            model_type=self.model_type,
            hidden=hidden,
            layers=layers,
            vocab=self.number_or_none(("vocab_size",), MAX_WIDTH),
            intermediate=intermediate,
            context=self.number_or_none(CONTEXT, MAX_TOKENS),
            tied_embeddings=self.flag_or_none("tie_word_embeddings"),
            weight_dtype=None if quantised else self.dtype(),
            quantised=quantised,
            experts=self.experts(count, intermediate),
            latent=latent,
            details=self.details(),
        )

    def refuse_unknown(self) -> None:
        for key, value in self.config.items():
            known = key in KV_HEADS
            if not known and value and _NOT_UNDERSTOOD.fullmatch(str(key)):
                raise GqaError(
                    f"the config of {self.name} has a kind of attention that is not understood",
                    got=f"{key} = {_short(value)}",
                    allowed="full and sliding-window attention, latent attention (kv_lora_rank)",
                )
        if self.config.get("is_encoder_decoder"):
            raise GqaError(f"{self.name} is an encoder-decoder", got="is_encoder_decoder = true", allowed="decoders")

    def layers(self, hidden: int, heads: int, count: int) -> tuple[LayerShape, ...]:
        kv_heads = self.kv_heads(heads)
        head_dim = self.number_or_none(HEAD_DIM, MAX_WIDTH)
        if head_dim is None:
            if hidden % heads:
                raise GqaError(
                    f"the config of {self.name} gives no head_dim and {heads} heads do not divide hidden_size {hidden}",
                    hint="add head_dim to the config",
                )
            head_dim = hidden // heads
        v_head_dim = self.number_or_none(("v_head_dim",), MAX_WIDTH) or head_dim
        alibi = bool(self.flag_or_none("alibi"))
        rotary_dim = 0 if alibi or self.facts.get("positions") else self.rotary_dim(head_dim)
        full = LayerShape("full", heads, kv_heads, head_dim, v_head_dim, None, rotary_dim, alibi)
        slides = self.sliding_layers(count)
        if not any(slides):
            return (full,) * count
        window = self.number(("sliding_window",), MAX_TOKENS)
        sliding = dataclasses.replace(full, kind="sliding", window=window)
        return tuple(sliding if slide else full for slide in slides)

    def rotary_dim(self, head_dim: int) -> int | None:
        """How many of a head's dimensions the rotary embedding turns; None for all."""
        rope = self.config.get("rope_parameters")
        spellings = [rope.get(_PARTIAL)] if isinstance(rope, Mapping) else []
        factor = next((value for value in (*spellings, self.config.get(_PARTIAL)) if value is not None), 1.0)
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor <= 1:
            raise self.error(_PARTIAL, factor, "a number from 0 to 1")
        return None if factor == 1 else int(head_dim * factor)

    def kv_heads(self, heads: int) -> int:
        multi_query = self.flag_or_none("multi_query") and not self.flag_or_none("new_decoder_architecture")
        given = self.number_or_none(KV_HEADS, MAX_HEADS)  # read even if unused, so that nonsense is refused
        unless = self.facts.get("multi_query_unless")
        by_flag = unless is not None and not self.config.get(unless)  # whatever the config says beside it
        kv_heads = 1 if multi_query else heads if by_flag else given or heads
        if heads % kv_heads:
            raise GqaError(
                f"the config of {self.name} has {kv_heads} KV heads, which do not divide {heads} query heads",
                allowed="a divisor of the query heads",
            )
        return kv_heads

    def sliding_layers(self, count: int) -> list[bool]:
        """For each layer, whether it slides."""
        off = self.flag_or_none("use_sliding_window") is False
        given = self.config.get("layer_types")
        if given is not None:
            if not isinstance(given, list) or len(given) != count:
                raise self.error("layer_types", given, f"a list of {count} layer types")
            for index, kind in enumerate(given):
                if not isinstance(kind, str) or kind not in _LAYER_KINDS:
                    raise self.error(f"layer_types[{index}]", kind, ", ".join(_LAYER_KINDS))
            return [_LAYER_KINDS[kind] == "sliding" and not off for kind in given]
        if off or self.config.get("sliding_window") is None:
            return [False] * count
        match self.facts.get("slides"):
            case "all":
                return [True] * count
            case "pattern":  # each n-th layer is full
                every = self.number(("sliding_window_pattern",), MAX_LAYERS)
                return [(index + 1) % every != 0 for index in range(count)]
            case "after":
                first = self.number(("max_window_layers",), MAX_TOKENS, least=0)
                return [index >= first for index in range(count)]
        raise GqaError(
            f"the config of {self.name} has a sliding window, but not which layers slide",
            got=f"sliding_window = {_short(self.config['sliding_window'])}, model_type {self.model_type!r}",
            hint="add layer_types, a list of full_attention and sliding_attention",
        )

    def latent(self) -> Latent | None:
        if self.config.get("kv_lora_rank") is None:
            return None
        return Latent(
            q_rank=self.number_or_none(("q_lora_rank",), MAX_WIDTH),
            kv_rank=self.number(("kv_lora_rank",), MAX_WIDTH),
            rope_dim=self.number(("qk_rope_head_dim",), MAX_WIDTH),
            nope_dim=self.number(("qk_nope_head_dim",), MAX_WIDTH),
            v_dim=self.number(("v_head_dim",), MAX_WIDTH),
        )

    def latent_layers(self, latent: Latent, heads: int, count: int) -> tuple[LayerShape, ...]:
        for key in ("layer_types", "sliding_window"):
            if self.config.get(key) is not None:
                raise self.error(key, self.config[key], "null together with kv_lora_rank")
        row = latent.kv_rank + latent.rope_dim
        return (LayerShape("mla", heads, 1, row, latent.kv_rank),) * count

    def experts(self, count: int, intermediate: int | None) -> Experts | None:
        total = self.number_or_none(EXPERTS, MAX_HEADS, least=0) or 0
        if total <= 1 or intermediate is None:
            return None
        width = self.number_or_none(("moe_intermediate_size",), MAX_WIDTH) or intermediate
        shared = self.number_or_none(("n_shared_experts",), MAX_HEADS, least=0) or 0
        per_token = self.number(("num_experts_per_tok",), MAX_HEADS)
        if per_token > total:
            raise self.error("num_experts_per_tok", per_token, f"1 to {total}")
        return Experts(total, per_token, width, shared * width, self.expert_layers(count))

    def expert_layers(self, count: int) -> int:
        """In how many of `count` layers the MLP is a mixture."""
        first = self.number_or_none(("first_k_dense_replace",), MAX_LAYERS, least=0) or 0
        step = self.number_or_none(("decoder_sparse_step",), MAX_LAYERS) or 1
        dense = self.config.get("mlp_only_layers") or []
        if not isinstance(dense, list) or not all(type(index) is int for index in dense):
            raise self.error("mlp_only_layers", dense, "a list of layer numbers")
        return sum(index not in dense and (index + 1) % step == 0 for index in range(first, count))

    def details(self) -> Details | None:
        facts = self.facts
        if "gated" not in facts:
            return None

        def holds(field: str) -> bool:
            value = facts.get(field, False)
            return bool(self.flag_or_none(value)) if isinstance(value, str) else value

        norms = [count for key, count in facts.get("norms_if", {}).items() if self.flag_or_none(key)]
        return Details(
            gated=facts["gated"],
            norms=norms[0] if norms else facts["norms"],
            norm_bias=holds("norm_bias"),
            qkv_bias=holds("qkv_bias"),
            o_bias=holds("o_bias"),
            mlp_bias=holds("mlp_bias"),
            expert_bias=holds("expert_bias"),
            qk_norm=facts.get("qk_norm", ""),
            sinks=holds("sinks"),
            positions=holds("positions"),
        )

    def dtype(self) -> str | None:
        text = next((self.config[key] for key in DTYPE if self.config.get(key) is not None), None)
        return _DTYPES.get(text.removeprefix("torch.")) if isinstance(text, str) else None

    def quantised(self) -> str | None:
        value = self.config.get("quantization_config")
        if not value:
            return None
        return str(value.get("quant_method", "unknown")) if isinstance(value, Mapping) else "unknown"

    def number(self, keys: tuple[str, ...], most: int, least: int = 1) -> int:
        value = self.number_or_none(keys, most, least)
        if value is None:
            raise GqaError(
                f"the config of {self.name} has no {keys[0]}",
                got=f"keys {_short(sorted(map(str, self.config)))}",
                hint="is this the config.json of a decoder model?",
            )
        return value

    def number_or_none(self, keys: tuple[str, ...], most: int, least: int = 1) -> int | None:
        found: dict[str, int] = {}
        for key in keys:
            value = self.config.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise self.error(key, value, f"a whole number from {least} to {most}")
            found[key] = value
        if len(set(found.values())) > 1:
            raise GqaError(f"the config of {self.name} contradicts itself", got=found)
        return next(iter(found.values()), None)

    def flag_or_none(self, key: str) -> bool | None:
        value = self.config.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, value, "true, false")
        return value

    def error(self, key: str, value: object, allowed: str) -> GqaError:
        return GqaError(f"{key} in the config of {self.name} makes no sense", got=_short(value), allowed=allowed)


def _spellings(key: str) -> tuple[str, ...]:
    return next((keys for keys in (HEADS, KV_HEADS, CONTEXT, EXPERTS) if key in keys), (key,))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
