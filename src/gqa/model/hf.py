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
from transformers.masking_utils import sdpa_mask

from gqa.cache.stored import Stored
from gqa.errors import GqaError
from gqa.model import default_cache
from gqa.model.cache import GqaCache, GqaCacheLayer
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


def attention_mask(*args: Any, allow_is_causal_skip: bool = True, **options: Any) -> torch.Tensor | None:
    """transformers' mask interface: a boolean mask (B, 1, T, S), or None where `attention_forward` needs none.

    It is transformers' own for SDPA, which knows padding, windows, chunks, static caches and packed position_ids, and
    says None where the rest can be told from the shapes. One None is added, for a single query that sees every key,
    as behind a window that is full: to find out takes microseconds once per step and saves the mask in every layer.
    """
    mask = sdpa_mask(*args, allow_is_causal_skip=allow_is_causal_skip, **options)
    if mask is None or mask.shape[2] > 1 or not allow_is_causal_skip:
        return mask
    if mask.device.type != "cpu" or torch.compiler.is_compiling():  # reading it would wait for the GPU, break a graph
        return mask
    return None if mask.all() else mask


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
    extent: dict[str, Any] = {}
    if isinstance(key, Stored):
        assert isinstance(value, Stored)
        key, value, attention_mask, extent = _read(key, value, attention_mask)
    assert isinstance(value, torch.Tensor)

    # No mask means: one query sees all keys; several are causal from the first key on, which covers S == T as well
    # as the prefill of a cache with room for more, whose keys after the first T are still empty.
    causal = attention_mask is None and query.shape[2] > 1
    if causal:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    out = attention(
        query, key, value, causal=causal, q_start=0 if causal else None, scale=scaling, softcap=softcap,
        mask=attention_mask, sinks=s_aux, **extent,
    )  # fmt: skip
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


def _read(
    key: Stored, value: Stored, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, dict[str, Any]]:
    """The tensors of stored keys and values, the mask as wide as they are, and the op's options that go with them."""
    tokens = key.data.shape[2] if key.block_table is None else key.data.shape[2] * key.block_table.shape[1]
    if mask is not None and mask.shape[3] < tokens:
        mask = torch.nn.functional.pad(mask, (0, tokens - mask.shape[3]))  # False: the room behind the last key
    extent = {
        "k_scale": key.scale,
        "v_scale": value.scale,
        "block_table": key.block_table,
        "kv_lengths": key.lengths,
    }
    return key.data, value.data, mask, extent
