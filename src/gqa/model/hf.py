"""The op and our cache inside transformers' models.

    gqa.hf.register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="gqa")
    model.generate(**inputs)

Only models with this attention implementation are served; everything else in the process stays as it is.
"""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from gqa.cache.stored import Stored, operands
from gqa.errors import GqaError
from gqa.model import default_cache
from gqa.model.cache import GqaCache, GqaCacheLayer
from gqa.model.mask import attention_mask, plain
from gqa.ops.api import attention

__all__ = ["NAME", "GqaCache", "GqaCacheLayer", "attention_forward", "attention_mask", "register"]

NAME = "gqa"


def register() -> None:
    """Make `attn_implementation="gqa"` known to transformers. Harmless when repeated.

    Call it before from_pretrained, or before set_attn_implementation("gqa") on a loaded model. With it, generate() of
    such a model keeps its keys and values in a `GqaCache`, unless told otherwise: see `default_cache`.

    The mask function goes with the attention function: without one, transformers passes no mask at all, and padding
    and causality are lost in silence.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    default_cache.install(NAME)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | Stored,
    value: torch.Tensor | Stored,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    cache: Any = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query (B, H*G, T, D), key and value (B, H, S, D) -> (B, T, H*G, D), None.

    key and value may be `Stored`, as our paged and int8 caches hand them over. The kwarg `sliding_window` needs
    nothing: the mask has it, and is None only where every key is inside the window.
    Raises GqaError for what the op has not: dropout, a position bias, transformers' paged cache.
    """
    if dropout:
        raise GqaError("the op has no attention dropout", got=dropout, hint="set attention_dropout=0.0 in the config")
    for name, unserved in (("position_bias", position_bias), ("cache", cache)):
        if unserved is not None:
            raise GqaError(f"the op does not take transformers' `{name}`", hint='use attn_implementation="sdpa"')
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = _as_under_autocast(query, key, value)
    options: dict[str, Any] = {}
    if attention_mask is not None and isinstance(key, Stored) and key.ragged:
        raise GqaError(
            "sequences of different lengths in one paged cache take no mask",
            got=f"{type(module).__name__} with padding or a sliding window shorter than the longest sequence",
            hint="run them apart",
        )
    if attention_mask is None:
        # No mask means: one query sees all keys; several are causal from the first key on, which covers S == T as well
        # as the prefill of a cache with room for more, whose keys after the first T are still empty.
        if query.shape[2] > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
            options = {"causal": True, "q_start": 0}
    elif (known := plain(attention_mask)) is not None:
        assert isinstance(key, Stored) or attention_mask.shape[3] == key.shape[2]
        attention_mask = known.seen
        options = {
            "causal": known.q_start is not None,
            "q_start": known.q_start,
            "window": known.window,
            "kv_starts": known.kv_starts,
            "kv_lengths": known.kv_lengths,
        }
    keys, values, attention_mask, stored = operands(key, value, attention_mask)
    # The lengths of a mask are no more than those of what is stored.
    options = stored | {name: option for name, option in options.items() if option is not None}
    out = attention(query, keys, values, scale=scaling, softcap=softcap, mask=attention_mask, sinks=s_aux, **options)
    return out.transpose(1, 2).contiguous(), None  # for one query this moves nothing


def _as_under_autocast(
    query: torch.Tensor, key: torch.Tensor | Stored, value: torch.Tensor | Stored
) -> tuple[torch.Tensor, torch.Tensor | Stored, torch.Tensor | Stored]:
    """Under autocast, q and k leave the rotary embedding in float32 while v is still in low precision. What a cache
    has stored stays as it is, and q follows it where it is not int8."""
    if isinstance(key, Stored):
        return query if key.scale is not None else query.to(key.data.dtype), key, value
    assert isinstance(value, torch.Tensor)
    dtype = torch.get_autocast_dtype(query.device.type)
    return query.to(dtype), key.to(dtype), value.to(dtype)
