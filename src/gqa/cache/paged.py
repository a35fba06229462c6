"""A KV cache whose tokens lie in blocks of a pool, which it may share with other caches."""

# B sequences · H KV heads · T new tokens · D head dim of k · Dv head dim of v

from __future__ import annotations

import torch

from gqa.cache.check import check_capacity, check_crop
from gqa.cache.pool import BlockPool, Step
from gqa.cache.stored import Stored
from gqa.errors import GqaError


class PagedLayer:
    """One layer of a `PagedCache`. The cache keeps what there is to know, and no layer: so memory is given back as soon
    as the last one lets go of the cache, not when Python next looks for cycles."""

    def __init__(self, cache: PagedCache, index: int) -> None:
        self.cache, self.index = cache, index

    @property
    def length(self) -> int:
        """The tokens that the longest sequence has been given here."""
        return self.cache.layer_length(self.index)

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[Stored, Stored]:
        """Add k (B, H, T, D) and v (B, H, T, Dv); return all that is held: the pools, their block table and lengths.

        The first layer to go ahead takes the blocks, for all. Raises GqaError when k and v do not go with what is
        held, when autograd would need them, or when the pool is full; then nothing has changed.
        """
        self.cache.pool.check(self.index, k, v)
        step = self.cache.step(k.shape[0], self.length, k.shape[2])
        stored = self.cache.pool.write(self.index, step, k, v)
        self.cache.advance(self.index, k.shape[2])
        return stored

    def stored(self) -> tuple[Stored, Stored]:
        """The keys and values held, as attention reads them."""
        step = self.cache.last_step
        if step is None:
            return self.cache.pool.stored(self.index, self.cache.sequences)
        return self.cache.pool.read(self.index, step)

    def span(self, tokens: int) -> tuple[int, int]:
        """How many keys there are after so many tokens more, and the position of the first of them.

        Of the longest sequence; the block table has room for up to a block more.
        """
        return self.length + tokens, 0


class PagedCache:
    """B sequences of a `BlockPool` that go forward together, layer by layer, as a model's forward does.

    Takes all tokens of every layer: a sliding window is the attention's to apply.

    The sequences are equally long until `join` adds others, as when requests come and go. Then each takes its next
    token at its own place, one token per step, and `length` is the longest one's.

    capacity: tokens per sequence to allocate at first, in a pool of its own that doubles when it is full.
    pool: live in this one instead, beside other caches, until `reset` gives the blocks back. Where it does not grow,
    an append that it has no room for is refused and changes nothing.

    Where tokens go is decided on the host, so a step cannot be part of a CUDA graph; `gqa.attention` on the tables it
    gives can.
    """

    def __init__(self, capacity: int = 0, *, pool: BlockPool | None = None) -> None:
        check_capacity(capacity)
        self.capacity = capacity
        self.pool = BlockPool(0, grows=True) if pool is None else pool
        self.sequences: list[int] = []
        self._layer_lengths: list[int] = []
        self.last_step: Step | None = None  # until something else changes the sequences
        self._length = 0  # of the sequences in the pool; the layers still to be written in this step are behind

    def layer(self, index: int) -> PagedLayer:
        """Layer number `index`, from 0; made now if it is new."""
        self._layer_lengths += [0] * (index + 1 - len(self._layer_lengths))
        return PagedLayer(self, index)

    @property
    def layers(self) -> list[PagedLayer]:
        """All layers that were asked for so far."""
        return [PagedLayer(self, index) for index in range(len(self._layer_lengths))]

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[Stored, Stored]:
        """Append k (B, H, T, D) and v (B, H, T, Dv) to a layer; return all it holds, as attention reads it."""
        return self.layer(layer).append(k, v)

    def layer_length(self, layer: int) -> int:
        """Tokens that one layer has been given; 0 for a layer not seen yet."""
        return self._layer_lengths[layer] if layer < len(self._layer_lengths) else 0

    def advance(self, layer: int, tokens: int) -> None:
        """A layer has written its tokens of a step."""
        self._layer_lengths[layer] += tokens

    @property
    def length(self) -> int:
        """Tokens of the longest sequence, those of a step in progress not counted until its last layer has them."""
        return min(self._layer_lengths, default=0)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, those of a step in progress counted."""
        return [self.pool.length(sequence) for sequence in self.sequences]

    @property
    def batch(self) -> int:
        """Sequences; 0 before the first update."""
        return len(self.sequences)

    @property
    def nbytes_used(self) -> int:
        """Bytes of the blocks that its sequences hold, one that they share counted once: the tokens of each sequence
        rounded up to whole blocks."""
        return self.pool.blocks_of(self.sequences) * self.pool.block_bytes

    @property
    def nbytes_allocated(self) -> int:
        """Bytes of the pool."""
        return self.pool.nbytes_allocated

    def step(self, batch: int, length: int, tokens: int) -> Step:
        """Where a layer that holds `length` tokens puts its next: a new step, or the one another layer began."""
        if self._length == 0 and batch != len(self.sequences):
            self.reset()
            if self.pool.grows:
                self.pool.enlarge(batch * self.pool.blocks_for(self.capacity))
            self.sequences = [self.pool.allocate() for _ in range(batch)]
        if batch != len(self.sequences):
            raise GqaError("another number of sequences than the cache holds", got=batch, allowed=len(self.sequences))
        if length == self._length:
            if tokens > 1 and len(set(self.lengths)) > 1:
                raise GqaError(
                    "sequences of different lengths go forward one token per step",
                    got=f"{tokens} tokens behind {self.lengths}",
                    hint="let each take its prompt in a PagedCache of its own, then join() them",
                )
            self.last_step = self.pool.reserve(self.sequences, tokens)
            self._length += tokens
        elif self.last_step is None or length + tokens != self._length:
            raise GqaError(
                "the layers of a paged cache go forward together",
                got=f"{tokens} tokens behind {length}",
                allowed=f"{self._length - length}, as in the layer before",
                hint="crop the cache to what all layers hold when a forward was cut short",
            )
        assert self.last_step is not None
        return self.last_step

    def fork(self) -> PagedCache:
        """Another cache that begins with these tokens and shares their blocks: no copy is made."""
        other = PagedCache(pool=self.pool)
        other.sequences = [self.pool.fork(sequence) for sequence in self.sequences]
        other._length = self._length
        other._layer_lengths = self._layer_lengths[:]
        return other

    def join(self, other: PagedCache) -> None:
        """Take over the sequences of another cache over the same pool, of whatever length, behind one's own; the other
        is empty then. No copy is made. Raises GqaError amid a step of either, or for another pool."""
        if other.pool is not self.pool or other is self:
            raise GqaError("caches join that share a pool", hint="PagedCache(pool=pool) for both")
        for cache in (self, other):
            if any(length != cache._length for length in cache._layer_lengths):
                raise GqaError("a cache joins no other amid a step", hint="crop it to what all layers hold")
        self.layer(len(other._layer_lengths) - 1)
        self.sequences += other.sequences
        self._settle(max(self._length, other._length))
        other.sequences = []
        other._settle(0)

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens of every sequence; of different lengths, of the longest, and the others lose
        as many tokens as that one."""
        lengths = self.lengths
        longest = max(lengths, default=0)
        check_crop(length, longest - min(lengths, default=0), self.length)
        for sequence, held in zip(self.sequences, lengths, strict=True):
            self.pool.crop(sequence, held - (longest - length))
        self._settle(length)

    def reset(self) -> None:
        """Forget all tokens and sequences; their blocks are free for others."""
        for sequence in self.sequences:
            self.pool.release(sequence)
        self.sequences = []
        self._settle(0)

    def select(self, sequences: torch.Tensor) -> None:
        """Reorder, repeat or drop sequences, as beam search does: blocks change hands, none is copied."""
        chosen = [self.pool.fork(self.sequences[index]) for index in sequences.tolist()]
        for sequence in self.sequences:
            self.pool.release(sequence)
        self.sequences = chosen
        longest = max(self.lengths, default=0)
        self._layer_lengths = [max(0, length - (self._length - longest)) for length in self._layer_lengths]
        self.last_step, self._length = None, longest

    def _settle(self, length: int) -> None:
        self.last_step, self._length = None, length
        self._layer_lengths = [length] * len(self._layer_lengths)
