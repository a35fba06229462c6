"""The op as torch knows it: `torch.ops.gqa.attention` and `torch.ops.gqa.attention_with_lse`.

They are composite: torch.compile, fake tensors, autograd and export look through them to the implementation that
`impl` names. So no gradient is recomputed, and there is one formula to keep right. An implementation that torch
cannot look into registers an op of its own, with its own fake kernel and backward, and is called from here.
"""

from __future__ import annotations

from typing import Any

import torch

from gqa.ops import reference, sdpa

# What follows q, k and v, in order; `impl` comes last and is never "auto".
_SCHEMA = (
    "Tensor q, Tensor k, Tensor v, bool causal, SymInt q_start, Tensor? q_starts, int? window, float scale, "
    "float? softcap, Tensor? mask, Tensor? sinks, Tensor? kv_lengths, Tensor? kv_starts, Tensor? block_table, "
    "Tensor? k_scale, Tensor? v_scale, str impl"
)
_NAMES = tuple(argument.split()[-1] for argument in _SCHEMA.split(", "))[3:]


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any) -> torch.Tensor:
    named = dict(zip(_NAMES, options, strict=True))
    if named.pop("impl") == "sdpa":
        for absent in ("softcap", "sinks", "block_table", "k_scale", "v_scale"):
            assert named.pop(absent) is None, absent
        return sdpa.attention(q, k, v, **named)
    return reference.attention(q, k, v, **named)[0]


def _attention_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    named = dict(zip(_NAMES, options, strict=True))
    assert named.pop("impl") == "reference"
    return reference.attention(q, k, v, **named)


# The library lives as long as this module: torch forgets the ops when it is collected.
_LIBRARY = torch.library.Library("gqa", "DEF")
_LIBRARY.define(f"attention({_SCHEMA}) -> Tensor")
_LIBRARY.define(f"attention_with_lse({_SCHEMA}) -> (Tensor, Tensor)")
_LIBRARY.impl("attention", _attention, "CompositeImplicitAutograd")
_LIBRARY.impl("attention_with_lse", _attention_with_lse, "CompositeImplicitAutograd")

attention = torch.ops.gqa.attention.default
attention_with_lse = torch.ops.gqa.attention_with_lse.default
