"""Preallocated blocks that double when they are full: what the contiguous and the int8 cache are made of."""

# B batch · H KV heads · T new tokens · S tokens held · D head dim of k · Dv head dim of v

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch

from gqa.cache.check import Form, check_capacity, check_crop, check_form, form_of


class GrowingLayer(ABC):
    """One layer's tokens, in a few tensors (B, H, capacity, ...) that grow together along their tokens.

    The first append says batch, heads, head dims, dtype and device, and allocates `capacity` tokens or what it
    brings, if that is more. When full, the capacity at least doubles, so n tokens cost O(n) copies in all.

    window: keep only this many of the latest tokens. They slide through a block of about twice the window and move
    to a new one when they reach its end, which is once per window.

    length: tokens seen, which is the position of the next one. held: tokens kept, the latest.
    """

    def __init__(self, capacity: int = 0, window: int | None = None) -> None:
        self.window = window
        self.length = self.held = 0
        self._wanted = capacity if window is None else min(capacity, 2 * window)
        self._first = 0  # where in the blocks the held tokens begin
        self._blocks: tuple[torch.Tensor, ...] = ()
        self._form: Form | None = None

    @property
    def capacity(self) -> int:
        """Tokens allocated."""
        return self._blocks[0].shape[2] if self._blocks else 0

    @property
    def batch(self) -> int:
        """Sequences; 0 before the first append."""
        return self._blocks[0].shape[0] if self._blocks else 0

    @abstractmethod
    def append(self, k: torch.Tensor, v: torch.Tensor) -> Any:
        """Add k (B, H, T, D) and v (B, H, T, Dv); return them behind all that was held, as attention reads them."""

    @abstractmethod
    def stored(self) -> Any:
        """The keys and values held, as attention reads them."""

    def span(self, tokens: int) -> tuple[int, int]:
        """How many keys the next append of so many tokens returns, and the position of the first of them."""
        return self.held + tokens, self.length - self.held

    def views(self) -> tuple[torch.Tensor, ...]:
        """The tokens held in each tensor, (B, H, held, ...): views, valid until the next change."""
        held = slice(self._first, self._first + self.held)
        return tuple(block[:, :, held] for block in self._blocks)

    def select(self, sequences: torch.Tensor) -> None:
        """Make sequence i of the batch a copy of the former sequences[i] (beam search; the batch may change size)."""
        if self._form is not None:
            self._move(self.capacity, sequences)
            self._form = self._form._replace(batch=self.batch)

    def crop(self, length: int) -> None:
        """Go back to the first `length` tokens; the memory stays.

        Raises GqaError when the token after them would look back on tokens that the window has dropped.
        """
        dropped = self.length - self.held
        lowest = 0 if self.window is None or dropped == 0 else dropped + self.window - 1
        check_crop(length, lowest, self.length)
        self.length, self.held = length, length - dropped

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        self.length = self.held = self._first = 0

    @property
    def nbytes_used(self) -> int:
        """Bytes of the tokens held: what a planner predicts."""
        return sum(view.numel() * view.element_size() for view in self.views())

    @property
    def nbytes_allocated(self) -> int:
        return sum(block.nbytes for block in self._blocks)

    def _check(self, k: torch.Tensor, v: torch.Tensor) -> None:
        form = form_of(k, v)
        if self._form is None:
            self._form = form
        check_form(form, self._form)

    def _extend(self, *new: torch.Tensor) -> list[torch.Tensor]:
        """Add T tokens to each tensor, (B, H, T, ...); return views of what was held and them.

        With a window, the oldest are dropped only after this, since the new queries may see them.
        """
        tokens = new[0].shape[2]
        if not self._blocks:
            self._blocks = tuple(_empty(one, max(self._wanted, tokens)) for one in new)
        if self._first + self.held + tokens > self.capacity:
            roomy = 2 * (self.capacity if self.window is None else self.window)
            self._move(max(self.held + tokens, roomy))
        begin, end = self._first + self.held, self._first + self.held + tokens
        for block, one in zip(self._blocks, new, strict=True):
            block[:, :, begin:end] = one
        views = [block[:, :, self._first : end] for block in self._blocks]
        self.length += tokens
        self.held += tokens
        if self.window is not None and self.held > self.window:
            self._first += self.held - self.window
            self.held = self.window
        return views

    def _move(self, capacity: int, sequences: torch.Tensor | None = None) -> None:
        """Put the tokens held, of these sequences, at the front of new blocks."""
        blocks = []
        for held in self.views():
            if sequences is not None:
                held = held.index_select(0, sequences.to(held.device))
            block = _empty(held, capacity)
            block[:, :, : self.held] = held
            blocks.append(block)
        self._blocks = tuple(blocks)
        self._first = 0


Layer = TypeVar("Layer", bound=GrowingLayer)


class GrowingCache(Generic[Layer]):
    """A growing layer per layer of a model, each made when it first shows up.

    capacity: tokens to allocate at first, for a cache whose final length is known.
    windows: per layer, how many of the latest tokens it keeps; None, or no entry, for all.
    """

    layer_type: type[Layer]

    def __init__(self, capacity: int = 0, windows: Sequence[int | None] = ()) -> None:
        check_capacity(capacity)
        self.capacity, self.windows = capacity, tuple(windows)
        self.layers: list[Layer] = []

    def layer(self, index: int) -> Layer:
        """Layer number `index`, from 0; made now if it is new."""
        while len(self.layers) <= index:
            window = self.windows[len(self.layers)] if len(self.layers) < len(self.windows) else None
            self.layers.append(self.layer_type(self.capacity, window))
        return self.layers[index]

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> Any:
        """Append k (B, H, T, D) and v (B, H, T, Dv) to a layer; return all it holds, as attention reads it.

        The results are views into the cache: later steps of the same layer may move or overwrite them.
        """
        return self.layer(layer).append(k, v)

    def layer_length(self, layer: int) -> int:
        """Tokens that one layer has seen; 0 for a layer not seen yet."""
        return self.layers[layer].length if layer < len(self.layers) else 0

    @property
    def length(self) -> int:
        """Tokens seen, those of a step in progress not counted until its last layer has them."""
        return min((layer.length for layer in self.layers), default=0)

    @property
    def batch(self) -> int:
        """Sequences; 0 before the first update."""
        return max((layer.batch for layer in self.layers), default=0)

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
    B, H, _, *row = like.shape
    # Blocks made in inference mode could not be written to outside of it.
    with torch.inference_mode(False):
        return torch.empty(B, H, capacity, *row, dtype=like.dtype, device=like.device)
