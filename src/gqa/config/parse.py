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
from typing import Any, cast

from gqa.config.layers import LISTS, plan_of_layers, shared_layers
from gqa.config.shape import Details, Experts, Latent, LayerKind, LayerShape, ModelShape
from gqa.config.state import state_of
from gqa.config.values import MAX_HEADS, MAX_LAYERS, MAX_TOKENS, MAX_WIDTH, Values, short
from gqa.errors import GqaError

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

# Keys of attention that keeps something else than K and V of every layer's own heads. A model type's row lists those
# that it understands.
_NOT_UNDERSTOOD = re.compile(
    r"""(attention_chunk_size | use_bidirectional_attention
        | layers?_block_types? | block_types? | block_configs? | attention_types | attn_type_list | per_layer_config
        | hybrid_\w+ | full_attention_interval | attn_layer_\w+ | full_attn_idxs
        | num_kv_shared_layers | cross_attention_layers | use_cla | cla_\w+ | index_\w+ | indexer_\w+
        | (mamba|ssm|linear|conv|lru|rwkv|xlstm)_\w+ | state_size | \w*attn_config
        | \w*(swa|sliding|global|local)_\w*(head|size|dim)\w* | \w*heads?_per_layer
        | \w*(key_value|kv|query)_(heads?|groups?)\w* | \w*multi_query_\w+ | kv_channels )""",
    re.VERBOSE,
)
# Keys of that kind that mean the same in every model.
_UNDERSTOOD = {*KV_HEADS, *LISTS}
_ALLOWED = "full, sliding-window, chunked, linear and latent attention, as model types of transformers spell them"


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


class _Parser(Values):
    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        if not isinstance(config, Mapping):
            raise GqaError(f"the config of {name} is not a JSON object", got=type(config).__name__)
        part = text_part(config)
        outer = {} if part is config else {key: config[key] for key in SHARED_WITH_NESTED if key in config}
        given = {**outer, **part}
        super().__init__(given, name)
        self.model_type = part.get("model_type", config.get("model_type", ""))
        if not isinstance(self.model_type, str):
            raise self.error("model_type", self.model_type, "a text")
        self.facts: dict[str, Any] = model_types().get(self.model_type, {})
        for usual, own in self.facts.get("spelled", {}).items():
            if own in given and usual not in given:
                given = given | {usual: given[own]}
        # An explicit null is taken at its word, as transformers does: a class default fills absent keys only.
        self.config = given | {
            key: value
            for key, value in self.facts.get("defaults", {}).items()
            if not any(spelling in given for spelling in _spellings(key))
        }

    def shape(self) -> ModelShape:
        self.refuse_unknown()
        hidden = self.number(HIDDEN, MAX_WIDTH)
        count = self.layer_count()
        heads = self.number_or_none(HEADS, MAX_HEADS)
        plan = plan_of_layers(self, {"name": self.model_type, **self.facts}, count)
        if heads is None and set(plan) - {"linear", "none"}:
            self.number(HEADS, MAX_HEADS)  # says that it is missing
        latent = self.latent()
        quantised = self.quantised()
        intermediate = self.intermediate(hidden)
        return ModelShape(
            name=self.name,
            model_type=self.model_type,
            hidden=hidden,
            layers=self.layers(plan, latent, hidden, heads or 0),
            vocab=self.number_or_none(("vocab_size",), MAX_WIDTH),
            intermediate=intermediate,
            context=self.number_or_none(CONTEXT, MAX_TOKENS),
            tied_embeddings=self.flag_or_none("tie_word_embeddings"),
            weight_dtype=None if quantised else self.dtype(),
            quantised=quantised,
            experts=self.experts(count, intermediate) if "gated" in self.facts else None,
            latent=latent,
            details=self.details(),
        )

    def refuse_unknown(self) -> None:
        own = re.compile(self.facts.get("understood", ""))
        for key, value in self.config.items():
            known = key in _UNDERSTOOD or own.fullmatch(str(key))
            if not known and value and _NOT_UNDERSTOOD.fullmatch(str(key)):
                raise GqaError(
                    f"the config of {self.name} has a kind of attention that is not understood",
                    got=f"{key} = {short(value)}, model_type {self.model_type!r}",
                    allowed=_ALLOWED,
                )
        if self.config.get("is_encoder_decoder"):
            raise GqaError(f"{self.name} is an encoder-decoder", got="is_encoder_decoder = true", allowed="decoders")

    def intermediate(self, hidden: int) -> int | None:
        """Width of the MLP, None where layers differ."""
        value = self.config.get(INTERMEDIATE[0])
        if isinstance(value, list) and len(set(map(repr, value))) > 1:
            return None
        reader = Values({INTERMEDIATE[0]: value[0]}, self.name) if isinstance(value, list) and value else self
        width = reader.number_or_none(INTERMEDIATE, MAX_WIDTH)
        return self.facts["widening"] * hidden if width is None and "widening" in self.facts else width

    def layer_count(self) -> int:
        """How many layers there are; a list that names every layer counts them where no key does."""
        letters = self.config.get("hybrid_override_pattern")
        listed = next((value for key in LISTS if isinstance(value := self.config.get(key), list)), None)
        count = self.number_or_none(LAYERS, MAX_LAYERS)
        if count is None and (letters or listed):
            count = len(letters if isinstance(letters, str) else listed or ())
        return (count or self.number(LAYERS, MAX_LAYERS)) * self.facts.get("attentions_per_layer", 1)

    def layers(self, plan: list[str], latent: Latent | None, hidden: int, heads: int) -> tuple[LayerShape, ...]:
        kinds = {word: self.layer(word, latent, hidden, heads) for word in dict.fromkeys(plan)}
        layers = [kinds[word] for word in plan]
        shares = shared_layers(self, len(plan))
        layers = [dataclasses.replace(a, shares_cache=True) if s else a for a, s in zip(layers, shares, strict=True)]
        blocks = self.config.get("block_configs")
        if blocks is not None:
            layers = [self.of_block(index, layer, blocks) for index, layer in enumerate(layers)]
        if own := self.part_or_none("per_layer_config"):
            layers = [self.with_own_heads(layer, own.part_or_none(str(index))) for index, layer in enumerate(layers)]
        return tuple(layers)

    def layer(self, word: str, latent: Latent | None, hidden: int, heads: int) -> LayerShape:
        """A layer of the kind that the word of a plan of layers stands for."""
        if word == "none":
            return _NO_ATTENTION
        kind = cast(LayerKind, "full" if word == "hybrid" else word)
        attention = _NO_ATTENTION
        if word != "linear":
            attention = self.latent_layer(latent, heads, kind) if latent else self.heads_layer(kind, hidden, heads)
        if word not in ("linear", "hybrid"):
            return attention
        if "state" not in self.facts:
            raise GqaError(
                f"the config of {self.name} has layers with a constant state, but not of which form",
                got=f"{short({key: self.config[key] for key in LISTS if key in self.config})}, model_type"
                f" {self.model_type!r}",
                allowed=", ".join(sorted(name for name, row in model_types().items() if "state" in row)),
            )
        head_dim = self.number_or_none(HEAD_DIM, MAX_WIDTH) or (hidden // heads if heads else 0)
        state = state_of(self.facts["state"], self, hidden, heads, head_dim)
        return dataclasses.replace(attention, kind="linear" if word == "linear" else attention.kind, state=state)

    def heads_layer(self, kind: LayerKind, hidden: int, heads: int) -> LayerShape:
        """A layer with heads of its own. Some model types give layers of one kind other heads: `of_full` and
        `of_sliding` of data/model_types.toml say under which keys."""
        own = self.facts.get(f"of_{kind}", {})
        switch = own.get("kv_heads_if")
        reads_kv = switch is None or bool(self.flag_or_none(switch))
        heads = self.number_or_none((own.get("heads", ""),), MAX_HEADS) or heads
        kv_heads = (self.number_or_none((own.get("kv_heads", ""),), MAX_HEADS) if reads_kv else None) or self.kv_heads(
            heads
        )
        _check_divides(self.name, kv_heads, heads)
        head_dim = self.number_or_none((own.get("head_dim", ""),), MAX_WIDTH) or self.number_or_none(
            HEAD_DIM, MAX_WIDTH
        )
        if head_dim is None:
            if hidden % heads:
                raise GqaError(
                    f"the config of {self.name} gives no head_dim and {heads} heads do not divide hidden_size {hidden}",
                    hint="add head_dim to the config",
                )
            head_dim = hidden * self.facts.get("head_dim_widening", 1) // heads
        v_head_dim = (
            self.number_or_none((own.get("v_head_dim", ""),), MAX_WIDTH)
            or self.number_or_none(("v_head_dim",), MAX_WIDTH)
            or head_dim
        )
        alibi = bool(self.flag_or_none("alibi"))
        rotary_dim = 0 if alibi or self.facts.get("positions") else self.rotary_dim(head_dim)
        return LayerShape(kind, heads, kv_heads, head_dim, v_head_dim, self.window(kind), rotary_dim, alibi)

    def window(self, kind: LayerKind) -> int | None:
        if kind == "sliding":
            return self.number((self.facts.get("window", "sliding_window"),), MAX_TOKENS)
        return self.number(("attention_chunk_size",), MAX_TOKENS) if kind == "chunked" else None

    def with_own_heads(self, layer: LayerShape, own: Values | None) -> LayerShape:
        """The layer with the keys that transformers 5 saves for it alone."""
        if own is None or not layer.query_heads:
            return layer
        if strange := set(own.config) - {KV_HEADS[0], HEAD_DIM[0]}:
            raise self.error("per_layer_config", dict(own.config), f"{KV_HEADS[0]}, {HEAD_DIM[0]}, not {min(strange)}")
        kv_heads = own.number_or_none(KV_HEADS, MAX_HEADS) or layer.kv_heads
        _check_divides(self.name, kv_heads, layer.query_heads)
        dim = own.number_or_none(HEAD_DIM, MAX_WIDTH)
        layer = dataclasses.replace(layer, kv_heads=kv_heads)
        return layer if dim is None else dataclasses.replace(layer, head_dim=dim, v_head_dim=dim)

    def of_block(self, index: int, layer: LayerShape, blocks: object) -> LayerShape:
        """The layer as Nemotron-NAS (DeciLM) writes it: its own queries per KV head, or no attention."""
        block = blocks[index] if isinstance(blocks, list) and index < len(blocks) else None
        attention = block.get("attention") if isinstance(block, Mapping) else None
        if not isinstance(attention, Mapping) or attention.get("replace_with_linear"):
            raise self.error(f"block_configs[{index}]", block, "attention with n_heads_in_group or no_op")
        if attention.get("no_op"):
            return _NO_ATTENTION
        group = Values(attention, f"{self.name}, block_configs[{index}]").number(("n_heads_in_group",), MAX_HEADS)
        if layer.query_heads % group:
            raise self.error(f"block_configs[{index}].n_heads_in_group", group, f"a divisor of {layer.query_heads}")
        return dataclasses.replace(layer, kv_heads=layer.query_heads // group)

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
        if "attn_config" in self.facts.get("understood", "") and (part := self.part_or_none("attn_config")):
            given = part.number_or_none(("kv_n_heads",), MAX_HEADS) or given
            multi_query = multi_query or part.config.get("attn_type") == "multiquery_attention"
        unless = self.facts.get("multi_query_unless")
        by_flag = unless is not None and not self.config.get(unless)  # whatever the config says beside it
        kv_heads = 1 if multi_query else heads if by_flag else given or heads
        _check_divides(self.name, kv_heads, heads)
        return kv_heads

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

    def latent_layer(self, latent: Latent, heads: int, kind: str) -> LayerShape:
        if kind != "full":
            raise self.error("layer_types", f"{kind} attention", "full attention together with kv_lora_rank")
        if self.config.get("sliding_window") is not None:
            raise self.error("sliding_window", self.config["sliding_window"], "null together with kv_lora_rank")
        dim = self.number_or_none(("index_head_dim",), MAX_WIDTH) or 0
        topk = self.number_or_none(("index_topk",), MAX_TOKENS) or 0
        return LayerShape(
            "mla", heads, 1, latent.kv_rank + latent.rope_dim, latent.kv_rank, index_dim=dim, index_topk=topk
        )

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


_NO_ATTENTION = LayerShape("none", 0, 0, 0, 0)


def _check_divides(name: str, kv_heads: int, heads: int) -> None:
    if heads % kv_heads:
        raise GqaError(
            f"the config of {name} has {kv_heads} KV heads, which do not divide {heads} query heads",
            allowed="a divisor of the query heads",
        )


def _spellings(key: str) -> tuple[str, ...]:
    return next((keys for keys in (HEADS, KV_HEADS, CONTEXT, EXPERTS) if key in keys), (key,))
