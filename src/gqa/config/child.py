"""The config.json of a converted model: the parent's, edited where fewer KV heads show."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from gqa.config.legacy import add_legacy_keys
from gqa.config.parse import KV_HEADS, model_types, parse_config, text_part
from gqa.config.shape import ModelShape, check_kv_heads
from gqa.errors import GqaError


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
    add_legacy_keys(child)
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
