"""The older spellings of a config.json, beside the ones that transformers 5 writes."""

from __future__ import annotations

from typing import Any

from gqa.config.parse import DTYPE, text_part

# The rotary key of transformers 5, and per layer kind where the kinds differ.
_ROPE = "rope_parameters"
_OLD_CONTEXT = "original_max_position_embeddings"
_ROPE_OF_KIND = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}


def add_legacy_keys(config: dict[str, Any]) -> None:
    """Add rope_theta, rope_scaling and torch_dtype to a raw config.json in place, where it has only the newer keys.

    A multimodal config is edited inside its text_config, too. Keys that are there stay as they are.
    """
    part = text_part(config)
    assert isinstance(part, dict)  # it comes from JSON
    _add_legacy_rope(part)
    for level in (config, part):
        new, old = DTYPE
        if level.get(new) is not None:
            level.setdefault(old, level[new])


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
