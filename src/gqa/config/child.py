"""The config.json of a converted model: the parent's, edited where fewer KV heads show."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from gqa.config.parse import DTYPE, KV_HEADS, model_types, parse_config, text_part
from gqa.config.shape import ModelShape, check_kv_heads
from gqa.errors import GqaError

# The rotary key of transformers 5, and per layer kind where the kinds differ.
_ROPE = "rope_parameters"
_OLD_CONTEXT = "original_max_position_embeddings"
_ROPE_OF_KIND = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}


def child_config(config: Mapping[str, Any], kv_heads: int) -> dict[str, Any]:
    """A deep copy of a raw config.json with `kv_heads` KV heads.

    Beside transformers 5's nested spelling it carries the older one (`rope_theta`, `rope_scaling`, `torch_dtype`)
    and an explicit `head_dim`: older consumers that miss those take defaults in silence (vLLM issue 42624).
    All other keys stay as they are; a multimodal config is edited inside its text_config.
    Raises GqaError like parse_config and check_kv_heads, and where the architecture's class cannot be told the number.
    """
    shape = parse_config(config, "the model")
    check_kv_heads(shape, kv_heads)
    facts = model_types().get(shape.model_type, {})
    child = copy.deepcopy(dict(config))
    part = text_part(child)
    assert isinstance(part, dict)  # a deep copy of JSON
    own = facts.get("kv_heads", KV_HEADS[0])
    part.update(dict.fromkeys([own, *(key for key in KV_HEADS if part.get(key) is not None)], kv_heads))
    if not facts.get("head_dim_derived"):
        part["head_dim"] = shape.head_dim
    if "multi_query_unless" in facts and not part.get(facts["multi_query_unless"]):
        _set_multi_query(part, shape, kv_heads)
    _add_legacy_rope(part)
    for level in (child, part):
        new, old = DTYPE
        if level.get(new) is not None:
            level.setdefault(old, level[new])
    return child


def _set_multi_query(part: dict[str, Any], shape: ModelShape, kv_heads: int) -> None:
    """A class that knows one KV head or all of them, by a flag."""
    if kv_heads not in (1, shape.query_heads):
        raise GqaError(
            f"the class of this {shape.model_type} model knows one KV head or all, nothing between",
            got=f"{kv_heads} KV heads",
            allowed=f"1, {shape.query_heads}",
        )
    part["multi_query"] = kv_heads == 1


def _add_legacy_rope(part: dict[str, Any]) -> None:
    rope = part.get(_ROPE)
    if not isinstance(rope, dict):
        return
    if any(kind in rope for kind in _ROPE_OF_KIND):
        of_kind = {kind: value for kind, value in rope.items() if isinstance(value, dict)}
        for kind, key in _ROPE_OF_KIND.items():
            if of_kind.get(kind, {}).get("rope_theta") is not None:
                part.setdefault(key, of_kind[kind]["rope_theta"])
        rope = of_kind.get("full_attention", {})
    else:
        for key in ("rope_theta", "partial_rotary_factor"):
            if rope.get(key) is not None:
                part.setdefault(key, rope[key])
    if rope.get("rope_type", "default") != "default":
        scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
        if scaling["rope_type"] == "longrope":  # transformers 4 wants it so, and the old context beside it
            scaling["type"] = scaling.pop("rope_type")
            if _OLD_CONTEXT in scaling:
                part.setdefault(_OLD_CONTEXT, scaling.pop(_OLD_CONTEXT))
        part.setdefault("rope_scaling", scaling)
