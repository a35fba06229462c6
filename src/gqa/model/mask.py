"""Masks of transformers' models, and what they come down to where the op can do without one."""

# B batch · T query tokens · S key tokens

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask

_PLAIN = "_gqa_plain"


class Plain(NamedTuple):
    """A mask in the op's own terms: sequence b sees keys from kv_starts[b] on, (B,); with q_start also none behind
    the query's own position, which is q_start for the first. The kernel then skips what a mask would only hide."""

    kv_starts: torch.Tensor
    q_start: int | None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **options: Any,
) -> torch.Tensor | None:
    """transformers' mask interface: a boolean mask (B, 1, T, S), or None where attention needs none.

    It is transformers' own for SDPA, which knows padding, windows, chunks, static caches and packed position_ids, and
    says None where the rest can be told from the shapes. Two things are added, for masks of the usual patterns on the
    CPU, where reading them costs microseconds once per step: None for a single query that sees every key, and a note
    on the mask, for `plain`, where all it hides lies in front (left padding, a token that has left the window).
    """
    mask = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size,
        allow_is_causal_skip, **options,
    )  # fmt: skip
    if mask is None or not allow_is_causal_skip or mask.device.type != "cpu" or torch.compiler.is_compiling():
        return mask
    if q_length == 1:
        if mask.all():
            return None
        visible, q_start = mask[:, 0, 0], None
    else:
        # All keys from the first to the query's own are there: the last query sits at the last key.
        whole = isinstance(q_offset, int) and q_offset + q_length == kv_length
        if mask_function is not causal_mask_function or attention_mask is None or not whole:
            return mask
        visible, q_start = attention_mask[:, :kv_length].bool(), q_offset
    if visible.shape == (batch_size, kv_length) and (starts := _starts(visible)) is not None:
        setattr(mask, _PLAIN, Plain(starts, q_start))
    return mask


def plain(mask: torch.Tensor | None) -> Plain | None:
    """What `attention_mask` noted on this very mask. A mask that was changed on its way is another tensor, without."""
    return getattr(mask, _PLAIN, None)


def _starts(visible: torch.Tensor) -> torch.Tensor | None:
    """The first True of each row of (B, S), if no False follows it; else None."""
    starts = visible.byte().argmax(dim=1)
    keys = torch.arange(visible.shape[1])
    return starts if torch.equal(visible, keys >= starts[:, None]) else None
