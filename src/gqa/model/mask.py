"""Masks of transformers' models, and what they come down to where the op can do without one."""

# B batch · T query tokens · S key tokens

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers.masking_utils import and_masks, causal_mask_function, sdpa_mask, sliding_window_overlay

_PLAIN = "_gqa_plain"


class Plain(NamedTuple):
    """A mask in the terms of `gqa.attention`, each None where it hides nothing: sequence b sees the keys from
    kv_starts[b] up to kv_lengths[b], both (B,); with q_start, which is the first query's position, no query sees keys
    behind its own position, and with window none further back than that; and of these it sees those that `seen`
    (B, 1, 1, S) is True for. The kernels then skip what a mask would only hide."""

    q_start: int | None
    window: int | None = None
    kv_starts: torch.Tensor | None = None
    kv_lengths: torch.Tensor | None = None
    seen: torch.Tensor | None = None


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
    query that sees every key.
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
        known, seen = Plain(q_start=None), mask[:, 0, 0]
    else:
        causal, window = _pattern(mask_function)
        if not causal or not isinstance(q_offset, int):
            return mask
        known, seen = Plain(q_offset - kv_offset, window), None
        if attention_mask is not None:
            seen = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    if seen is not None:
        if seen.shape != (batch_size, kv_length):
            return mask
        starts, lengths = _ends(seen)
        told = _readable(mask) and _between(starts, lengths, seen)
        known = known._replace(kv_starts=starts, kv_lengths=lengths, seen=None if told else seen[:, None, None])
    setattr(mask, _PLAIN, known)
    return mask


def plain(mask: torch.Tensor | None) -> Plain | None:
    """What `attention_mask` noted on this very mask. A mask that was changed on its way is another tensor, without.

    Nor do notes go with tensors that torch.compile traces: there a single query's mask is told by itself, and all
    layers that share it share what that takes. So a static cache is read no further than it is filled.
    """
    if torch.compiler.is_compiling():
        if mask is None or mask.dtype != torch.bool or mask.shape[1:3] != (1, 1):
            return None
        starts, lengths = _ends(mask[:, 0, 0])
        return Plain(None, None, starts, lengths, mask)
    return getattr(mask, _PLAIN, None)


def _pattern(mask_function: Any) -> tuple[bool, int | None]:
    """Whether transformers' mask function is its causal one, alone or with a sliding window, and the window.

    The latter is a closure that says nothing of itself. It is known by the code of its parts; where that is ever
    another, the window stays in the mask.
    """
    if mask_function is causal_mask_function:
        return True, None
    parts = _inside(mask_function, and_masks())
    if isinstance(parts, tuple) and len(parts) == 2 and parts[1] is causal_mask_function:
        window = _inside(parts[0], sliding_window_overlay(1))
        return isinstance(window, int), window
    return False, None


def _inside(function: Any, like: Any) -> Any:
    """The one thing that a closure holds, if it has the code of another; else None."""
    if getattr(function, "__code__", None) is not like.__code__ or len(function.__closure__ or ()) != 1:
        return None
    return function.__closure__[0].cell_contents


def _readable(mask: torch.Tensor) -> bool:
    """Whether the host may look at a mask's values. It would wait for a GPU, so there not in a step; for a prompt or
    in training it may, where transformers has looked at the padding just before. Nobody may while a graph is made."""
    if type(mask) is not torch.Tensor:
        return False
    if mask.device.type == "cpu":
        return True
    return mask.shape[2] > 1 and not (mask.device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _ends(seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row of (B, S): the first True, and one past the last; all of a row without any."""
    flags = seen.byte()
    return flags.argmax(dim=1), seen.shape[1] - flags.flip(1).argmax(dim=1)


def _between(starts: torch.Tensor, lengths: torch.Tensor, seen: torch.Tensor) -> bool:
    """Whether each row of (B, S) is True between its ends throughout."""
    keys = torch.arange(seen.shape[1], device=seen.device)
    return torch.equal(seen, (keys >= starts[:, None]) & (keys < lengths[:, None]))
