"""Time per decoded token against context, and the cache's real weight."""

# B batch · T query tokens · H KV heads · D head dim of k · Dv head dim of v

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from gqa.bench.timing import take_turns
from gqa.errors import GqaError
from gqa.model.hf import GqaCache
from gqa.progress import Progress, silent

WARM_UP_STEPS = 3


def measure_decode(
    model: Any, context_tokens: int, *, repeats: int = 24, progress: Progress = silent
) -> dict[str, int | float]:
    """Decode one token, batch 1, behind a cache of `context_tokens` tokens; take it back; repeat.

    model: a transformers causal language model, in the attention implementation to be measured. Its cache is ours,
    filled with random keys and values: time does not depend on their values, and no prompt needs to be computed. So
    the context may exceed max_position_embeddings: text beyond it would be poor, the time is right.

    Returns context_tokens, repeats, cache_bytes_measured (of the tokens held, summed over the cache's own tensors)
    and seconds_per_token_p20, _p50, _p80. Raises GqaError for counts below 1.
    """
    with evaluating(model):
        cache = filled_cache(model, context_tokens)
        held = cache.nbytes_used
        timed = take_turns(
            {"decode": lambda _: decode_step(model, cache)},
            repeats=repeats,
            warm_up=WARM_UP_STEPS,
            after={"decode": lambda: cache.crop(-1)},
            on_round=lambda done: progress("decode", done, repeats, f"{context_tokens} tokens"),
        )["decode"]
    return {
        "context_tokens": context_tokens,
        "repeats": timed.repeats,
        "cache_bytes_measured": held,
        "seconds_per_token_p20": timed.p20,
        "seconds_per_token_p50": timed.p50,
        "seconds_per_token_p80": timed.p80,
    }


def decode_step(model: Any, cache: Any, token: int = 0) -> torch.Tensor:
    """The logits (vocabulary,) of one more token, when the device has them; the cache keeps the token."""
    ids = torch.full((1, 1), token, dtype=torch.long, device=model.device)
    logits = model(input_ids=ids, past_key_values=cache).logits[0, -1]
    logits[0].item()
    return logits


def filled_cache(model: Any, context_tokens: int) -> GqaCache:
    """Our cache, with room for one token more, after `context_tokens` tokens of random keys and values."""
    if context_tokens < 1:
        raise GqaError("context_tokens must be positive", got=context_tokens, allowed="1 or more")
    cache = GqaCache(capacity=context_tokens + 1, config=model.config)
    decode_step(model, cache)  # the model itself says what its cache looks like
    random = torch.Generator().manual_seed(0)
    for layer in cache.blocks:
        fresh = []
        for held in layer.views():
            B, H, _, D = held.shape
            fresh.append(torch.randn(B, H, context_tokens - layer.length, D, generator=random).to(held))
        layer.append(*fresh)
    return cache


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Eval mode and no autograd meanwhile."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)
