"""Our caches as transformers' models take them: `past_key_values=gqa.hf.GqaCache()`."""

# B batch · T query tokens · S key tokens · H KV heads · D head dim of k · Dv head dim of v

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs
from transformers.configuration_utils import PreTrainedConfig

from gqa.cache.contiguous import ContiguousLayer
from gqa.errors import GqaError


class GqaCacheLayer(CacheLayerMixin):
    """One `ContiguousLayer` as transformers' models call it. `keys` and `values` are views of the tokens held."""

    is_croppable = True

    def __init__(self, capacity: int = 0, window: int | None = None) -> None:
        super().__init__()
        self.block = ContiguousLayer(capacity, window)
        self.is_sliding = window is not None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.update(key_states[:, :, :0], value_states[:, :, :0])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        seen = self.block.append(key_states, value_states)
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self._refresh()
        return seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys the next update returns, and the position of the first of them."""
        return self.block.held + query_length, self.block.length - self.block.held

    def get_seq_length(self) -> int:
        return self.block.length

    def get_max_length(self) -> int:
        return -1  # transformers' word for: grows without end

    def reset(self) -> None:
        self.block.reset()
        self._refresh()

    def crop(self, tokens_to_remove: int) -> None:
        """transformers counts backwards: -2 removes the last two tokens."""
        self.block.crop(self.block.length - abs(tokens_to_remove))
        self._refresh()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.keys is not None:
            self.batch_select_indices(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.block.select(indices)
        self._refresh()

    def offload(self) -> None:
        raise GqaError("GqaCache stays on its device", hint='use cache_implementation="offloaded" for offloading')

    def _refresh(self) -> None:
        if self.is_initialized:
            self.keys, self.values = self.block.views()


class GqaCache(Cache):
    """Our preallocated cache as `past_key_values=`: a step writes its token, where DynamicCache copies everything.

    capacity: tokens to allocate at first; it grows by doubling beyond.
    config: the model's; with it, layers with a sliding window keep no more tokens than that. Without it, every layer
    keeps all tokens, which is right for any model, and heavier for those.
    Raises GqaError for a config whose layers are not all attention with keys and values of their own.
    """

    def __init__(self, capacity: int = 0, config: PreTrainedConfig | None = None) -> None:
        if config is None:
            super().__init__(layer_class_to_replicate=partial(GqaCacheLayer, capacity))  # type: ignore[arg-type]
            return
        types, arguments = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        if strange := sorted(set(types) - {"full_attention", "sliding_attention"}):
            raise GqaError(
                "GqaCache does not serve all layers of this model",
                got=", ".join(strange),
                allowed="full_attention, sliding_attention",
                hint="leave past_key_values to transformers",
            )
        super().__init__(layers=[GqaCacheLayer(capacity, one.get("sliding_window")) for one in arguments])

    @property
    def blocks(self) -> list[ContiguousLayer]:
        return [layer.block for layer in self.layers if isinstance(layer, GqaCacheLayer)]

    @property
    def nbytes_used(self) -> int:
        """Bytes of the tokens held, over all layers: what `gqa plan` predicts for this many tokens."""
        return sum(block.nbytes_used for block in self.blocks)

    @property
    def nbytes_allocated(self) -> int:
        """Bytes of the blocks, used or not."""
        return sum(block.nbytes_allocated for block in self.blocks)
