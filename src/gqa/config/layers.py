"""Which kind of attention each layer has: what a config lists, or the rule of its model type.

A plan of layers is a list of words, one per layer: `full`, `sliding`, `chunked`, `linear`, `hybrid` (attention and a
state-space model side by side) or `none`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gqa.config.values import MAX_LAYERS, MAX_TOKENS, Values, short
from gqa.errors import GqaError

# Where a config may list its layers, and the words of such lists (transformers 5.23 and what it reads of older ones).
LISTS = ("layer_types", "layers_block_type")
_WORDS = {
    "full_attention": "full",
    "attention": "full",
    "indexed_attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
    "linear_attention": "linear",
    "mamba": "linear",
    "conv": "linear",
    "recurrent": "linear",
    "hybrid": "hybrid",
    "moe": "none",
    "mlp": "none",
}
# Nemotron-H's and its kin's way to write them in one text.
_LETTERS = {"M": "linear", "*": "full", "-": "none", "E": "none"}


def plan_of_layers(values: Values, facts: Mapping[str, Any], count: int) -> list[str]:
    """A word for each of `count` layers; `facts`: the model type's row of data/model_types.toml."""
    listed = _listed(values, count)
    if listed is None:
        listed = _by_rule(values, facts, count)
    if values.flag_or_none("use_sliding_window") is False:
        listed = ["full" if word == "sliding" else word for word in listed]
    if facts.get("last_is_full") and listed[-1] == "sliding":
        listed[-1] = "full"
    return listed


def shared_layers(values: Values, count: int) -> list[bool]:
    """For each layer, whether it reads an earlier layer's K and V instead of storing its own."""
    last = values.number_or_none(("num_kv_shared_layers",), count - 1, least=0) or 0
    every = 1
    if values.flag_or_none("use_cla"):
        every = values.number(("cla_share_factor",), MAX_LAYERS)
    return [index >= count - last or index % every != 0 for index in range(count)]


def _listed(values: Values, count: int) -> list[str] | None:
    for key in LISTS:
        given = values.config.get(key)
        if given is None:
            continue
        if not isinstance(given, list) or len(given) != count:
            raise values.error(key, given, f"a list of {count} layer types")
        return [_word(values, f"{key}[{index}]", word) for index, word in enumerate(given)]
    letters = values.config.get("hybrid_override_pattern")
    if letters is None:
        return None
    if not isinstance(letters, str) or len(letters) != count or not set(letters) <= set(_LETTERS):
        raise values.error("hybrid_override_pattern", letters, f"{count} letters of {' '.join(_LETTERS)}")
    return [_LETTERS[letter] for letter in letters]


def _word(values: Values, key: str, word: object) -> str:
    if not isinstance(word, str) or word not in _WORDS:
        raise values.error(key, word, ", ".join(_WORDS))
    return _WORDS[word]


def _by_rule(values: Values, facts: Mapping[str, Any], count: int) -> list[str]:
    others = facts.get("others", "sliding")
    if others == "sliding" and values.config.get(facts.get("window", "sliding_window")) is None:
        return ["full"] * count
    if others == "chunked" and values.config.get("attention_chunk_size") is None:
        return ["full"] * count
    where = range(count)
    match facts.get("layers"):
        case "all":
            return [others] * count
        case "every":  # each n-th layer is full
            every = values.number((facts["every"],), MAX_LAYERS)
            return ["full" if (index + 1) % every == 0 else others for index in where]
        case "alternate":
            return [others if index % 2 else "full" for index in where]
        case "after":  # the first so many are full
            first = values.number(("max_window_layers",), MAX_TOKENS, least=0)
            return [others if index >= first else "full" for index in where]
        case "period":
            period = values.number(("attn_layer_period",), MAX_LAYERS)
            offset = values.number(("attn_layer_offset",), MAX_LAYERS, least=0)
            return ["full" if index % period == offset else others for index in where]
        case "named":  # a list of the layers that are full; absent: what `unnamed` says
            full = values.numbers_or_none(facts["named"], MAX_LAYERS)
            return [
                "full" if (full is None and facts["unnamed"] == "full") or index in (full or ()) else others
                for index in where
            ]
        case "flags":  # a list with a 1 for each full layer, or for each other one
            key, full = facts["flags"], facts["full_flag"]
            flags = values.numbers_or_none(key, 1)
            if flags is None or len(flags) != count:
                raise values.error(key, flags, f"a list of {count} zeros and ones")
            return ["full" if flag == full else others for flag in flags]
        case "no rope":  # layers without rotary embedding are full
            rotary = values.numbers_or_none("no_rope_layers", 1)
            every = values.number(("no_rope_layer_interval",), MAX_LAYERS)
            rotary = rotary or [int((index + 1) % every != 0) for index in where]
            if len(rotary) != count:
                raise values.error("no_rope_layers", rotary, f"a list of {count} zeros and ones")
            return [others if turns else "full" for turns in rotary]
        case "cycle":
            cycle = values.config.get("block_types")
            if not isinstance(cycle, list) or not cycle:
                raise values.error("block_types", cycle, "a list of layer types that repeats")
            words = [_word(values, "block_types", word) for word in cycle]
            cycled = [words[index % len(words)] for index in where]
            return [others if word == "full" else word for word in cycled]
    raise GqaError(
        f"the config of {values.name} has a sliding window, but not which layers slide",
        got=f"sliding_window = {short(values.config.get('sliding_window'))}, model_type {facts.get('name', '')!r}",
        hint="add layer_types, a list of full_attention and sliding_attention",
    )
