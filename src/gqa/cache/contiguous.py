"""A KV cache in one preallocated block per layer. A step writes its own tokens and copies nothing else."""

# B batch · H KV heads · S tokens held · T new tokens · D head dim of k · Dv head dim of v

from __future__ import annotations

import torch

from gqa.errors import GqaError


class ContiguousLayer:
    """Keys (B, H, capacity, D) and values (B, H, capacity, Dv) of one layer, of which `length` tokens are in use.

    The first `append` says batch, heads, head dims, dtype and device, and allocates `capacity` tokens or what it
    brings, if that is more. When full, the capacity at least doubles, so n tokens cost O(n) copies in all.
    """

    def __init__(self, capacity: int = 0) -> None:
        self.capacity = capacity
        self.length = 0
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add k (B, H, T, D) and v (B, H, T, Dv); return `views()`.

        Raises GqaError when they do not go with what is held, or when autograd would need them.
        """
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise GqaError(
                "a preallocated cache cannot be differentiated through",
                hint="run under torch.no_grad(), or train without a cache (use_cache=False)",
            )
        if self._keys is None or self._values is None:
            self._keys, self._values = (
                _empty(k, max(self.capacity, k.shape[2])),
                _empty(v, max(self.capacity, v.shape[2])),
            )
        _check("keys", k, self._keys)
        _check("values", v, self._values)
        if k.shape[2] != v.shape[2]:
            raise GqaError("keys and values differ in tokens", got=f"{k.shape[2]} and {v.shape[2]}")
        end = self.length + k.shape[2]
        if end > self._keys.shape[2]:
            capacity = max(end, 2 * self._keys.shape[2])
            self._keys, self._values = self._moved(self._keys, capacity), self._moved(self._values, capacity)
        self._keys[:, :, self.length : end] = k
        self._values[:, :, self.length : end] = v
        self.length, self.capacity = end, self._keys.shape[2]
        return self._keys[:, :, :end], self._values[:, :, :end]

    def views(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (B, H, S, D) and values (B, H, S, Dv) held: views, valid until the next change."""
        assert self._keys is not None
        assert self._values is not None
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def select(self, sequences: torch.Tensor) -> None:
        """Make sequence i of the batch a copy of the former sequences[i] (beam search; the batch may change size)."""
        if self._keys is not None and self._values is not None:
            self._keys = self._moved(self._keys, self.capacity, sequences)
            self._values = self._moved(self._values, self.capacity, sequences)

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens; the memory stays."""
        if not 0 <= length <= self.length:
            raise GqaError("a cache cannot be cropped to this length", got=length, allowed=f"0 to {self.length}")
        self.length = length

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        self.length = 0

    @property
    def nbytes_used(self) -> int:
        """Bytes of the tokens held: what a planner predicts."""
        return 0 if self._keys is None else sum(view.numel() * view.element_size() for view in self.views())

    @property
    def nbytes_allocated(self) -> int:
        return 0 if self._keys is None or self._values is None else self._keys.nbytes + self._values.nbytes

    def _moved(self, block: torch.Tensor, capacity: int, sequences: torch.Tensor | None = None) -> torch.Tensor:
        """The tokens in use, of these sequences, in a new block."""
        held = block[:, :, : self.length]
        if sequences is not None:
            held = held.index_select(0, sequences.to(block.device))
        moved = _empty(held, capacity)
        moved[:, :, : self.length] = held
        return moved


class ContiguousCache:
    """A `ContiguousLayer` per layer, made when a layer first shows up.

    capacity: tokens to allocate at first, for a cache whose final length is known.
    """

    def __init__(self, capacity: int = 0) -> None:
        if capacity < 0:
            raise GqaError("a cache's capacity is a number of tokens", got=capacity, allowed="0 or more")
        self.capacity = capacity
        self.layers: list[ContiguousLayer] = []

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append k (B, H, T, D) and v (B, H, T, Dv) to a layer; return all it holds, (B, H, S, D) and (B, H, S, Dv).

        The results are views into the cache: later steps of the same layer may move or overwrite them.
        """
        while len(self.layers) <= layer:
            self.layers.append(ContiguousLayer(self.capacity))
        return self.layers[layer].append(k, v)

    def layer_length(self, layer: int) -> int:
        """Tokens that one layer holds; 0 for a layer not seen yet."""
        return self.layers[layer].length if layer < len(self.layers) else 0

    @property
    def length(self) -> int:
        """Tokens held, those of a step in progress not counted until its last layer has them."""
        return min((layer.length for layer in self.layers), default=0)

    @property
    def nbytes_used(self) -> int:
        """Bytes of the tokens held, over all layers: what `gqa plan` predicts for this many tokens."""
        return sum(layer.nbytes_used for layer in self.layers)

    @property
    def nbytes_allocated(self) -> int:
        """Bytes of the blocks, used or not."""
        return sum(layer.nbytes_allocated for layer in self.layers)

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens of every layer."""
        for layer in self.layers:
            layer.crop(length)

    def reset(self) -> None:
        """Forget all tokens; the memory stays for the next sequence."""
        for layer in self.layers:
            layer.reset()

    def select(self, sequences: torch.Tensor) -> None:
        """Reorder, repeat or drop sequences of the batch, as beam search does."""
        for layer in self.layers:
            layer.select(sequences)


def _empty(like: torch.Tensor, capacity: int) -> torch.Tensor:
    B, H, _, D = like.shape
    # Blocks made in inference mode could not be written to outside of it.
    with torch.inference_mode(False):
        return torch.empty(B, H, capacity, D, dtype=like.dtype, device=like.device)


def _check(name: str, new: torch.Tensor, block: torch.Tensor) -> None:
    same = (new.dim() == 4 and new.shape[:2] == block.shape[:2] and new.shape[3] == block.shape[3]
            and new.dtype == block.dtype and new.device == block.device)  # fmt: skip
    if not same:
        B, H, _, D = block.shape
        raise GqaError(
            f"{name} do not go with those in the cache",
            got=f"{tuple(new.shape)} {new.dtype} on {new.device}",
            allowed=f"({B}, {H}, tokens, {D}) {block.dtype} on {block.device}",
        )
