"""Masks of transformers' models, and what they come down to where the op can do without one."""

# B batch · T query tokens · S key tokens

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask

_PLAIN = "_gqa_plain"


class Plain(NamedTuple):
    """A mask in the op's own terms: sequence b sees the keys from kv_starts[b] up to kv_lengths[b], both (B,); with
    q_start, which is the first query's position, none behind a query's own; and of these, where there is `seen`
    (B, 1, 1, S), those that it is True for. The kernel then skips what a mask would only hide."""

    kv_starts: torch.Tensor
    kv_lengths: torch.Tensor
    q_start: int | None
    seen: torch.Tensor | None


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
    says None where the rest can be told from the shapes. Two things are added for masks of the usual patterns: a note
    on the mask, for `plain`; and on the CPU, where reading it costs microseconds once per step, None for a single
    query that sees every key. Elsewhere reading it would make the host wait for the device, so it is not read.
    """
    mask = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size,
        allow_is_causal_skip, **options,
    )  # fmt: skip
    if mask is None or not allow_is_causal_skip or torch.compiler.is_compiling():
        return mask
    if q_length == 1:
        if _readable(mask) and mask.all():
            return None
        seen, q_start = mask[:, 0, 0], None
    else:
        # All keys from the first to the query's own are there: the last query sits at the last key.
        whole = isinstance(q_offset, int) and q_offset + q_length == kv_length
        if mask_function is not causal_mask_function or attention_mask is None or not whole:
            return mask
        seen, q_start = attention_mask[:, :kv_length].bool(), q_offset
    if seen.shape == (batch_size, kv_length):
        starts, lengths = _ends(seen)
        told = _readable(mask) and _between(starts, lengths, seen)
        setattr(mask, _PLAIN, Plain(starts, lengths, q_start, None if told else seen[:, None, None]))
    return mask


def plain(mask: torch.Tensor | None) -> Plain | None:
    """What `attention_mask` noted on this very mask. A mask that was changed on its way is another tensor, without.

    Nor do notes go with tensors that torch.compile traces: there a single query's mask is told by itself, and all
    layers that share it share what that takes. So a static cache is read no further than it is filled.
    """
    if torch.compiler.is_compiling():
        if mask is None or mask.dtype != torch.bool or mask.shape[1:3] != (1, 1):
            return None
        return Plain(*_ends(mask[:, 0, 0]), None, mask)
    return getattr(mask, _PLAIN, None)


def _readable(mask: torch.Tensor) -> bool:
    return mask.device.type == "cpu"


def _ends(seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row of (B, S): the first True, and one past the last; all of a row without any."""
    flags = seen.byte()
    return flags.argmax(dim=1), seen.shape[1] - flags.flip(1).argmax(dim=1)


def _between(starts: torch.Tensor, lengths: torch.Tensor, seen: torch.Tensor) -> bool:
    """Whether each row of (B, S) is True between its ends throughout."""
    keys = torch.arange(seen.shape[1], device=seen.device)
    return torch.equal(seen, (keys >= starts[:, None]) & (keys < lengths[:, None]))
