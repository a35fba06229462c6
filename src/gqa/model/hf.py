"""The op and our cache inside transformers' models.

    gqa.hf.register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="gqa")
    model.generate(**inputs, past_key_values=gqa.hf.GqaCache())

Nothing here changes models that do not ask for it: no default cache, no other implementation is touched.
"""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from gqa.errors import GqaError
from gqa.model.cache import GqaCache, GqaCacheLayer
from gqa.ops.api import attention

__all__ = ["GqaCache", "GqaCacheLayer", "attention_forward", "register"]

NAME = "gqa"


def register() -> None:
    """Make `attn_implementation="gqa"` known to transformers; call it before from_pretrained. Harmless when repeated.

    The mask function goes with it: without one, transformers passes no mask at all, and padding and causality are
    lost in silence. Ours is transformers' own boolean one, which knows padding, windows, chunks, static caches and
    packed position_ids, and says None where `attention_forward` can tell the rest from the shapes.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query (B, H*G, T, D), key and value (B, H, S, D) -> (B, T, H*G, D), None.

    The kwarg `sliding_window` needs nothing: the mask has it, and is None only where every key is inside the window.
    Raises GqaError for what the op has not: dropout, a position bias, transformers' paged cache.
    """
    if dropout:
        raise GqaError("the op has no attention dropout", got=dropout, hint="set attention_dropout=0.0 in the config")
    for name in ("position_bias", "cache"):
        if others.get(name) is not None:
            raise GqaError(f"the op does not take transformers' `{name}`", hint='use attn_implementation="sdpa"')
    if torch.is_autocast_enabled(query.device.type):
        # Under autocast, q and k leave the rotary embedding in float32 while v is still in low precision.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)

    # No mask means: one query sees all keys; several are causal from the first key on, which covers S == T as well
    # as the prefill of a static cache, whose keys after the first T are still empty.
    causal = attention_mask is None and query.shape[2] > 1
    if causal:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    out = attention(
        query, key, value, causal=causal, q_start=0 if causal else None, scale=scaling, softcap=softcap,
        mask=attention_mask, sinks=s_aux,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None
