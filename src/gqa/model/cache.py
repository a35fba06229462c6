"""Our caches as transformers' models take them: `past_key_values=gqa.hf.GqaCache()`."""

# B batch · T query tokens · S key tokens · H KV heads · D head dim of k · Dv head dim of v

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.configuration_utils import PreTrainedConfig

from gqa.cache.contiguous import ContiguousCache, ContiguousLayer
from gqa.cache.int8 import Int8Cache, Int8Layer
from gqa.cache.paged import PagedCache, PagedLayer
from gqa.cache.pool import BlockPool
from gqa.config import parse_config
from gqa.errors import GqaError


class GqaCacheLayer(CacheLayerMixin):
    """One layer of a `GqaCache`."""

    is_croppable = True

    def __init__(self, block: ContiguousLayer | Int8Layer | PagedLayer) -> None:
        # transformers' __init__ would only set keys and values.
        self.block: Any = block
        self.is_initialized = False
        self.is_sliding = not isinstance(block, PagedLayer) and block.window is not None

    @property
    def keys(self) -> Any:
        """What it holds, as attention reads it: a view of the tokens (contiguous), or `Stored`."""
        return self.block.stored()[0] if self.is_initialized else None

    @property
    def values(self) -> Any:
        return self.block.stored()[1] if self.is_initialized else None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.update(key_states[:, :, :0], value_states[:, :, :0])

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if key_states.dtype != value_states.dtype:  # under autocast the rotary embedding leaves keys in float32
            key_states = key_states.to(value_states.dtype)
        seen = self.block.append(key_states, value_states)
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        return seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys the next update returns, and the position of the first of them."""
        return self.block.span(query_length)

    def get_seq_length(self) -> int:
        return self.block.length

    def get_max_length(self) -> int:
        return -1  # transformers' word for: grows without end

    def reset(self) -> None:
        raise _whole("reset")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        raise _whole("reorder_cache")

    def offload(self) -> None:
        raise GqaError("GqaCache stays on its device", hint='use cache_implementation="offloaded" for offloading')


class GqaCache(Cache):
    """Our caches as `past_key_values=`: a step writes its token, where DynamicCache copies everything.

    capacity: tokens to allocate at first; it grows by doubling beyond.
    config: the model's; with it, layers with a sliding window keep no more tokens than that. Without it, every layer
    keeps all tokens, which is right for any model, and heavier for those.
    kind: how the tokens are held:
        "contiguous"   as they are
        "int8"         in int8 with a scale per token and head: about a quarter of fp32, half of bf16, and a rounding
                       of at most 1/254 of a row's largest number
        "paged"        as they are, in blocks of 16 tokens. Beams and copies of a prompt share what they have in
                       common. All layers keep all tokens: the mask applies a window
    pool: for "paged", a `BlockPool` to share with other caches; `reset` gives its blocks back. With dtype=torch.int8 it
    holds tokens as "int8" does. By default one of the cache's own, which grows and holds them as they are.

    Paged caches over one pool `join`, each with sequences of its own length. The model then goes forward one token per
    step, and must be told position_ids (B, 1), `lengths` before the step, which it would else take to be all alike.

    int8 and paged caches need attn_implementation="gqa"; another one raises GqaError when it meets them.
    Raises GqaError for a config whose layers are not all attention with keys and values of their own.
    """

    def __init__(
        self,
        capacity: int = 0,
        config: PreTrainedConfig | None = None,
        kind: Literal["contiguous", "paged", "int8"] = "contiguous",
        *,
        pool: BlockPool | None = None,
    ) -> None:
        windows = [] if config is None else _windows(config)
        if pool is not None and kind != "paged":
            raise GqaError(f"a {kind} cache has no pool", hint='GqaCache(kind="paged", pool=pool)')
        if kind == "paged":
            self.store = PagedCache(capacity, pool=pool)
        elif kind in _GROWING:
            self.store = _GROWING[kind](capacity, windows)
        else:
            raise GqaError("an unknown kind of cache", got=repr(kind), allowed="contiguous, paged, int8")
        self.kind = kind
        self._makes_layers = config is None
        if config is None:
            super().__init__(layer_class_to_replicate=GqaCacheLayer)
        else:
            super().__init__(layers=[GqaCacheLayer(self.store.layer(index)) for index in range(len(windows))])

    @property
    def layer_class_to_replicate(self) -> Any:
        """What transformers calls for a layer it has not seen yet. Made when asked for: a cache that held a method of
        its own would keep its memory until Python looks for cycles."""
        return self._new_layer if self._makes_layers else None

    @layer_class_to_replicate.setter
    def layer_class_to_replicate(self, value: Any) -> None:
        """transformers' __init__ sets one."""

    @property
    def blocks(self) -> list[Any]:
        """The layers of the store."""
        return self.store.layers

    @property
    def nbytes_used(self) -> int:
        """Bytes of the tokens held, over all layers: what `gqa plan` predicts for this many tokens; of a paged cache,
        of the blocks they lie in."""
        return self.store.nbytes_used

    @property
    def nbytes_allocated(self) -> int:
        """Bytes of the memory taken, used or not."""
        return self.store.nbytes_allocated

    def crop(self, tokens_to_remove: int) -> None:
        """transformers counts backwards: -2 removes the last two tokens."""
        self.store.crop(self.store.length - abs(tokens_to_remove))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence of a paged cache."""
        return self._paged().lengths

    def join(self, other: GqaCache) -> None:
        """Take over the sequences of another paged cache over the same pool; the other is empty then."""
        self._paged().join(other._paged())
        mine: list[Any] = self.layers
        theirs: list[Any] = other.layers
        while len(mine) < len(theirs):
            mine.append(self._new_layer())
        for layer, joined in zip(mine, theirs, strict=False):
            layer.is_initialized |= joined.is_initialized

    def fork(self) -> GqaCache:
        """Another paged cache over the same pool that begins with these tokens, in the same blocks."""
        twin = GqaCache(kind="paged", pool=self._paged().pool)
        twin.store = self._paged().fork()
        layers: list[Any] = self.layers
        for layer in layers:
            copied = twin._new_layer()
            copied.is_initialized = layer.is_initialized
            twin.layers.append(copied)
        return twin

    def reset(self) -> None:
        """Forget all tokens."""
        self.store.reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self.store.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.store.select(indices)

    def _paged(self) -> PagedCache:
        if not isinstance(self.store, PagedCache):
            raise GqaError(f"the sequences of a {self.kind} cache go together", hint='GqaCache(kind="paged")')
        return self.store

    def _new_layer(self) -> GqaCacheLayer:
        return GqaCacheLayer(self.store.layer(len(self.layers)))


_GROWING = {"contiguous": ContiguousCache, "int8": Int8Cache}


def _windows(config: PreTrainedConfig) -> list[int | None]:
    """Per layer, the tokens that its window holds; None for all."""
    layers = parse_config(config.to_dict(), config.model_type).layers
    kinds: set[str] = {layer.kind for layer in layers}
    kinds |= {"shared cache" for layer in layers if layer.shares_cache} | {"state" for layer in layers if layer.state}
    if strange := sorted(kinds - {"full", "sliding"}):
        raise GqaError(
            "GqaCache does not serve all layers of this model",
            got=", ".join(strange),
            allowed="full, sliding",
            hint="leave past_key_values to transformers",
        )
    return [layer.window for layer in layers]


def _whole(method: str) -> GqaError:
    return GqaError(f"the layers of a GqaCache change together, not by {method}() of one", hint="call the cache's own")
