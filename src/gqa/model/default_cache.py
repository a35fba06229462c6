"""`model.generate()` of a model that runs our attention takes our cache when the user names none."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import DynamicCache, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

from gqa.errors import GqaError
from gqa.model.cache import GqaCache

# Room for this many new tokens is allocated at once; a longer answer makes the cache grow by doubling. Checkpoints
# allow answers as long as their context, which few use: that much memory must not be taken for each request.
MOST_NEW_TOKENS = 4096

_PLAIN_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)
_INSTALLED = "_gqa_default_cache"


def install(implementation: str) -> None:
    """Make generate() choose our cache for models whose attention implementation has this name. Once per process.

    transformers has no hook for this: the cache is made before the first forward, so neither the attention function
    nor the mask function is asked, and the names that `cache_implementation` may take are fixed. What remains is to
    wrap the one method in which generate() makes a cache. The wrapper lets it work, and acts only when it has made
    its plain default, a DynamicCache, for a model with our attention. So everything a user asks for is decided by
    transformers as before (a cache of theirs, a cache_implementation, use_cache=False, encoder-decoder models), and
    other models get what they always got.
    """
    mixin: Any = GenerationMixin
    original = mixin._prepare_cache_for_generation
    if getattr(original, _INSTALLED, False):
        return

    @functools.wraps(original)
    def prepare(
        self: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
        *more: Any,
    ) -> Any:
        given = model_kwargs.get("past_key_values")
        result = original(self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *more)
        made = model_kwargs.get("past_key_values")
        if made is given or type(made) is not DynamicCache or generation_config.cache_implementation is not None:
            return result
        config = self.config.get_text_config(decoder=True)
        if config._attn_implementation == implementation:
            ours = _cache(config, generation_config, generation_mode, max_cache_length)
            model_kwargs["past_key_values"] = made if ours is None else ours
        return result

    setattr(prepare, _INSTALLED, True)
    mixin._prepare_cache_for_generation = prepare


def _cache(config: Any, generation_config: Any, mode: Any, most_tokens: int) -> GqaCache | None:
    """Our cache for this generation, or None where it does not serve."""
    if torch.is_grad_enabled():  # somebody differentiates through generate(); a preallocated cache cannot
        return None
    prompt = most_tokens + 1 - (generation_config.max_new_tokens or most_tokens + 1)
    try:
        cache = GqaCache(min(most_tokens, prompt + MOST_NEW_TOKENS), config)
    except GqaError:  # layers of another kind: linear, chunked, shared
        return None
    # Assisted generation takes tokens back, and behind a sliding window those before them are gone.
    takes_back = mode == GenerationMode.ASSISTED_GENERATION or generation_config.is_assistant
    served = not any(cache.is_sliding) if takes_back else mode in _PLAIN_MODES
    return cache if served else None
