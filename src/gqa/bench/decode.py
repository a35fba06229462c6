"""Time per decoded token against context, and the cache's real weight."""

# B batch · T query tokens · H KV heads · D head dim of k · Dv head dim of v

from __future__ import annotations

import time
from typing import Any

import torch

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
    for name, count in (("context_tokens", context_tokens), ("repeats", repeats)):
        if count < 1:
            raise GqaError(f"{name} must be positive", got=count, allowed="1 or more")
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    cache = GqaCache(capacity=context_tokens + 1, config=model.config)
    seconds = []
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            model(input_ids=token, past_key_values=cache)  # the model itself says what its cache looks like
            _fill(cache, context_tokens)
            held = cache.nbytes_used
            for step in range(-WARM_UP_STEPS, repeats):
                start = time.perf_counter()
                logits = model(input_ids=token, past_key_values=cache).logits
                logits[0, -1, 0].item()  # waits for the device
                elapsed = time.perf_counter() - start
                cache.crop(-1)
                if step >= 0:
                    seconds.append(elapsed)
                    progress("decode", step + 1, repeats, f"{context_tokens} tokens")
    finally:
        model.train(was_training)
    p20, p50, p80 = torch.tensor(seconds, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return {
        "context_tokens": context_tokens,
        "repeats": repeats,
        "cache_bytes_measured": held,
        "seconds_per_token_p20": float(p20),
        "seconds_per_token_p50": float(p50),
        "seconds_per_token_p80": float(p80),
    }


def _fill(cache: GqaCache, tokens: int) -> None:
    """Random keys and values, until every layer has seen `tokens`."""
    random = torch.Generator().manual_seed(0)
    for layer in cache.blocks:
        fresh = []
        for held in layer.views():
            B, H, _, D = held.shape
            fresh.append(torch.randn(B, H, tokens - layer.length, D, generator=random).to(held))
        layer.append(*fresh)
