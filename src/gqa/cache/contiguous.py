"""A KV cache in preallocated blocks, two per layer. A step writes its own tokens and copies nothing else."""

# B batch · H KV heads · S tokens held · T new tokens · D head dim of k · Dv head dim of v

from __future__ import annotations

import torch

from gqa.errors import GqaError


class ContiguousLayer:
    """Keys (B, H, capacity, D) and values (B, H, capacity, Dv) of one layer.

    The first `append` says batch, heads, head dims, dtype and device, and allocates `capacity` tokens or what it
    brings, if that is more. When full, the capacity at least doubles, so n tokens cost O(n) copies in all.

    window: keep only this many of the latest tokens. They slide through a block of about twice the window and move
    to a new one when they reach its end, which is once per window.

    length: tokens seen, which is the position of the next one. held: tokens kept, the latest.
    """

    def __init__(self, capacity: int = 0, window: int | None = None) -> None:
        self.window = window
        self.length = self.held = 0
        self._wanted = capacity if window is None else min(capacity, 2 * window)
        self._first = 0  # where in the block the held tokens begin
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None

    @property
    def capacity(self) -> int:
        """Tokens allocated."""
        return 0 if self._keys is None else self._keys.shape[2]

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add k (B, H, T, D) and v (B, H, T, Dv); return them behind all that was held, (B, H, held + T, D or Dv).

        The results are views: later steps may move or overwrite them. With a window, the oldest are dropped only
        after this, since the new queries may see them. Raises GqaError when k and v do not go with what is held, or
        when autograd would need them.
        """
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise GqaError(
                "a preallocated cache cannot be differentiated through",
                hint="run under torch.no_grad(), or train without a cache (use_cache=False)",
            )
        if self._keys is None or self._values is None:
            size = max(self._wanted, k.shape[2])
            self._keys, self._values = _empty(k, size), _empty(v, size)
        _check("keys", k, self._keys)
        _check("values", v, self._values)
        tokens = k.shape[2]
        if v.shape[2] != tokens:
            raise GqaError("keys and values differ in tokens", got=f"{tokens} and {v.shape[2]}")
        if self._first + self.held + tokens > self.capacity:
            roomy = 2 * (self.capacity if self.window is None else self.window)
            self._move(max(self.held + tokens, roomy))
        begin, end = self._first + self.held, self._first + self.held + tokens
        self._keys[:, :, begin:end] = k
        self._values[:, :, begin:end] = v
        views = self._keys[:, :, self._first : end], self._values[:, :, self._first : end]
        self.length += tokens
        self.held += tokens
        if self.window is not None and self.held > self.window:
            self._first += self.held - self.window
            self.held = self.window
        return views

    def views(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys (B, H, held, D) and values (B, H, held, Dv) held: views, valid until the next change."""
        assert self._keys is not None
        assert self._values is not None
        held = slice(self._first, self._first + self.held)
        return self._keys[:, :, held], self._values[:, :, held]

    def select(self, sequences: torch.Tensor) -> None:
        """Make sequence i of the batch a copy of the former sequences[i] (beam search; the batch may change size)."""
        if self._keys is not None:
            self._move(self.capacity, sequences)

    def crop(self, length: int) -> None:
        """Go back to the first `length` tokens; the memory stays.

        Raises GqaError when the token after them would look back on tokens that the window has dropped.
        """
        dropped = self.length - self.held
        lowest = 0 if self.window is None or dropped == 0 else dropped + self.window - 1
        if not lowest <= length <= self.length:
            raise GqaError("a cache cannot be cropped to this length", got=length, allowed=f"{lowest} to {self.length}")
        self.length, self.held = length, length - dropped

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        self.length = self.held = self._first = 0

    @property
    def nbytes_used(self) -> int:
        """Bytes of the tokens held: what a planner predicts."""
        return 0 if self._keys is None else sum(view.numel() * view.element_size() for view in self.views())

    @property
    def nbytes_allocated(self) -> int:
        return 0 if self._keys is None or self._values is None else self._keys.nbytes + self._values.nbytes

    def _move(self, capacity: int, sequences: torch.Tensor | None = None) -> None:
        """Put the tokens held, of these sequences, at the front of new blocks."""
        blocks = []
        for held in self.views():
            if sequences is not None:
                held = held.index_select(0, sequences.to(held.device))
            block = _empty(held, capacity)
            block[:, :, : self.held] = held
            blocks.append(block)
        self._keys, self._values = blocks
        self._first = 0


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
