"""Memory for many sequences of different lengths: blocks of a few tokens, handed out as the sequences grow.

    sequence   length   blocks         With blocks of 16 tokens and a pool of 8: 0, 3 and 6 are free, and 7 and 2 are
       0         35     7 2 4          shared, as sequence 2 began like sequence 0. When one of the two writes on,
       1         20     1 5            it gets a copy of a shared block that is not full.
       2         27     7 2

No sequence needs its tokens side by side, so no room is lost but what the last block of each has not filled.

Source: Kwon et al. 2023, arXiv 2309.06180.
"""

# B sequences of a step · T new tokens of each · H KV heads · D head dim of k · Dv head dim of v

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from gqa.cache.check import Form, check_crop, check_floating, check_form, form_of
from gqa.cache.int8 import quantise
from gqa.cache.stored import Stored
from gqa.errors import GqaError

_NOWHERE = -1


class PoolFullError(GqaError):
    """The pool has not the blocks that were asked for; nothing has changed."""


@dataclass(frozen=True, slots=True)
class Step:
    """Where T new tokens of each of B sequences go, and what attention reads from then on; the same in every layer."""

    blocks: torch.Tensor  # (B, T) block of each token
    offsets: torch.Tensor  # (B, T) its place in there
    table: torch.Tensor  # (B, max_blocks)
    lengths: torch.Tensor  # (B,) the new tokens included
    ragged: bool  # these differ, which the host knows without asking a device
    _copies: dict[torch.device, Step] = field(default_factory=dict, init=False, repr=False)

    def on(self, device: torch.device) -> Step:
        """The same for the layers on another device: copied there once for all of them."""
        if device == self.table.device:
            return self
        if device not in self._copies:
            self._copies[device] = Step(
                *_copies((self.blocks, self.offsets, self.table, self.lengths), device), ragged=self.ragged
            )
        return self._copies[device]


@dataclass(slots=True)
class _Held:
    """What one sequence has: its blocks in order, and its tokens."""

    blocks: array[int] = field(default_factory=lambda: array("q"))
    length: int = 0


class BlockPool:
    """Blocks of `block` tokens that sequences take, share and give back; per layer two tensors (num_blocks, H, block,
    D or Dv), made when the layer is first written to. In int8, two of scales (num_blocks, H, block) beside them.

    A sequence is a number from `allocate` or `fork`, valid until its `release`. All layers have the same sequences,
    lengths and blocks.

    num_blocks: how many there are. When none is left, what asked for more raises PoolFullError, a GqaError, and changes
    nothing; a pool that `grows` doubles instead.
    dtype: torch.int8 rounds keys and values as `quantise` says; by default they are held as they come.
    """

    def __init__(
        self, num_blocks: int, *, block: int = 16, grows: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        if block < 1:
            raise GqaError("a block is a number of tokens", got=block, allowed="1 or more")
        if num_blocks < 0 or not (num_blocks or grows):
            raise GqaError("a pool is a number of blocks", got=num_blocks, allowed="1 or more")
        if dtype not in (None, torch.int8):
            raise GqaError("a pool holds numbers as they come, or in int8", got=dtype, allowed="None, torch.int8")
        self.block, self.grows, self.dtype = block, grows, dtype
        self._free = list(range(num_blocks))[::-1]  # a stack: what was given back last is taken first
        self._holders = np.zeros(num_blocks, np.int64)  # per block, how many sequences have it
        self._sequences: dict[int, _Held] = {}
        self._allocated = 0  # sequences so far: the number of the next
        self._layers: dict[int, list[torch.Tensor]] = {}  # pools of keys and values, and of their scales in int8
        self._forms: dict[int, Form] = {}

    @property
    def num_blocks(self) -> int:
        return len(self._holders)

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def sequences(self) -> list[int]:
        """The sequences there are, oldest first."""
        return list(self._sequences)

    def length(self, sequence: int) -> int:
        """Tokens of a sequence."""
        return self._held(sequence).length

    def blocks_for(self, tokens: int) -> int:
        """Blocks that so many tokens of one sequence take."""
        return -(-tokens // self.block)

    def allocate(self) -> int:
        """A new sequence, of no tokens."""
        sequence = self._allocated
        self._allocated += 1
        self._sequences[sequence] = _Held()
        return sequence

    def fork(self, sequence: int) -> int:
        """A new sequence that begins with all tokens of this one, in the same blocks: no copy is made.

        The last of them, where it is not full, is copied by whichever of the two is first to write to it.
        """
        held = self._held(sequence)
        self._holders[np.array(held.blocks)] += 1
        new = self.allocate()
        self._sequences[new] = _Held(held.blocks[:], held.length)
        return new

    def release(self, sequence: int) -> None:
        """End a sequence; blocks that no other one shares are free again."""
        self.crop(sequence, 0)
        del self._sequences[sequence]

    def crop(self, sequence: int, length: int) -> None:
        """Go back to the first `length` tokens of a sequence; blocks past them are given back."""
        held = self._held(sequence)
        check_crop(length, 0, held.length)
        keep = self.blocks_for(length)
        dropped = np.array(held.blocks[keep:])
        self._holders[dropped] -= 1
        self._free.extend(dropped[self._holders[dropped] == 0].tolist())
        del held.blocks[keep:]
        held.length = length

    def reserve(self, sequences: Sequence[int], tokens: int) -> Step:
        """Make each of these sequences `tokens` longer, for every layer then to `write` to the places named.

        Raises PoolFullError when there are not enough blocks, and then nothing has changed.
        """
        held = [self._held(sequence) for sequence in sequences]
        if len(set(sequences)) != len(held):
            raise GqaError("a sequence goes forward once per step", got=list(sequences), allowed="each one once")
        shared = self._shared_tails(held) if tokens else []
        fresh = [self.blocks_for(one.length + tokens) - len(one.blocks) for one in held]
        taken = self._take(len(shared) + sum(fresh))
        self._copy_tails(shared, taken[: len(shared)])
        begin = len(shared)
        for one, count in zip(held, fresh, strict=True):
            one.blocks.extend(taken[begin : begin + count])
            one.length += tokens
            begin += count
        return self._step(held, tokens)

    def check(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Raise GqaError when k (B, H, T, D) and v (B, H, T, Dv) do not go together or with what the layer holds, or
        when autograd would need them."""
        if self.dtype == torch.int8:
            check_floating(k)
        form = form_of(k, v)._replace(batch=None)
        check_form(form, self._forms.get(layer, form))

    def write(self, layer: int, step: Step, k: torch.Tensor, v: torch.Tensor) -> tuple[Stored, Stored]:
        """Put k (B, H, T, D) and v (B, H, T, Dv) where the step says; return the layer as attention reads it.

        Raises GqaError as `check` does, or when B and T are not those of the step.
        """
        self.check(layer, k, v)
        B, H, T, _ = k.shape
        if step.blocks.shape != (B, T):
            raise GqaError(
                "keys and values are not of this step", got=f"B={B}, T={T}", allowed=tuple(step.blocks.shape)
            )
        new = [k, v]
        if self.dtype == torch.int8:  # the numbers of both, then the scales of both
            new = [x for pair in zip(quantise(k), quantise(v), strict=True) for x in pair]
        if layer not in self._layers:
            self._layers[layer] = [_empty((self.num_blocks, H, self.block, *one.shape[3:]), one) for one in new]
            self._forms[layer] = form_of(k, v)._replace(batch=None)
        places = step.on(k.device)
        for pool, one in zip(self._layers[layer], new, strict=True):
            pool.transpose(1, 2).index_put_((places.blocks, places.offsets), one.transpose(1, 2))
        return self.read(layer, step)

    def append(self, sequences: Sequence[int], keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        """Add T tokens to each of B sequences: per layer k (B, H, T, D) and v (B, H, T, Dv), all layers at once.

        Raises GqaError when they do not fit or the pool is full, and then nothing has changed.
        """
        sizes = {(x.shape[0], x.shape[2]) for x in (*keys, *values) if x.dim() == 4}
        if len(keys) != len(values) or len(sizes) != 1 or next(iter(sizes))[0] != len(sequences):
            raise GqaError(
                "keys and values are not of one step",
                got=", ".join(str(tuple(x.shape)) for x in (*keys, *values)),
                allowed=f"a k and a v per layer, of {len(sequences)} sequences and the same number of tokens",
            )
        for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
            self.check(layer, k, v)
        step = self.reserve(sequences, sizes.pop()[1])
        for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
            self.write(layer, step, k, v)

    def stored(self, layer: int, sequences: Sequence[int]) -> tuple[Stored, Stored]:
        """Keys and values of these sequences in one layer, as attention reads them."""
        return self.read(layer, self._step([self._held(sequence) for sequence in sequences], 0))

    def read(self, layer: int, step: Step) -> tuple[Stored, Stored]:
        """The same for the sequences of a step, while none of them has changed since."""
        if layer not in self._layers:
            raise GqaError("nothing was written to this layer", got=layer, allowed=sorted(self._layers))
        keys, values, *scales = self._layers[layer]
        k_scale, v_scale = scales or (None, None)
        places = step.on(keys.device)
        return (
            Stored(keys, k_scale, places.table, places.lengths, places.ragged),
            Stored(values, v_scale, places.table, places.lengths, places.ragged),
        )

    def enlarge(self, num_blocks: int) -> None:
        """Have at least so many blocks; what is held moves to larger tensors."""
        before = self.num_blocks
        if num_blocks <= before:
            return
        for pools in self._layers.values():
            for index, old in enumerate(pools):
                pools[index] = _empty((num_blocks, *old.shape[1:]), old)
                pools[index][:before] = old
        self._free[:0] = range(num_blocks - 1, before - 1, -1)
        self._holders = np.pad(self._holders, (0, num_blocks - before))

    def blocks_of(self, sequences: Sequence[int]) -> int:
        """Blocks that these sequences hold; one that several of them share counts once."""
        return len(set().union(*(self._held(sequence).blocks for sequence in sequences)))

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers: block * sum of H * (D + Dv) * bytes, in int8 of H * (D + Dv + 8)."""
        return sum(pool[:1].nbytes for pools in self._layers.values() for pool in pools)

    @property
    def nbytes_used(self) -> int:
        """Bytes of the blocks that are not free."""
        return (self.num_blocks - self.free_blocks) * self.block_bytes

    @property
    def nbytes_allocated(self) -> int:
        """Bytes of all blocks."""
        return self.num_blocks * self.block_bytes

    def _held(self, sequence: int) -> _Held:
        if sequence not in self._sequences:
            raise GqaError("the pool has no such sequence", got=sequence, allowed="from allocate() or fork()")
        return self._sequences[sequence]

    def _step(self, held: list[_Held], tokens: int) -> Step:
        """Where the last `tokens` of each of these are, and all of them."""
        table = np.full((len(held), max((len(one.blocks) for one in held), default=0)), _NOWHERE, np.int64)
        for row, one in zip(table, held, strict=True):
            row[: len(one.blocks)] = one.blocks
        lengths = np.array([one.length for one in held], np.int64)
        positions = lengths[:, None] - tokens + np.arange(tokens)
        blocks = np.take_along_axis(table, positions // self.block, axis=1)
        ragged = len(set(lengths.tolist())) > 1
        return Step(*(torch.from_numpy(x) for x in (blocks, positions % self.block, table, lengths)), ragged=ragged)

    def _shared_tails(self, held: list[_Held]) -> list[_Held]:
        """Those whose last block has room, but others have it too: they need a copy to write to.

        Where all who have it are in this step, the last of them may keep it.
        """
        result = []
        leaving: dict[int, int] = {}
        for one in held:
            if one.length % self.block:
                block = one.blocks[-1]
                left = leaving.get(block, 0)
                if self._holders[block] - left > 1:
                    leaving[block] = left + 1
                    result.append(one)
        return result

    def _take(self, count: int) -> list[int]:
        """So many free blocks, now held once each; all or nothing."""
        missing = count - len(self._free)
        if missing > 0 and self.grows:
            self.enlarge(self.num_blocks + max(missing, self.num_blocks))
        elif missing > 0:
            raise PoolFullError(
                "the pool of blocks is full",
                got=f"{count} more blocks of {self.block} tokens",
                allowed=f"{len(self._free)} free of {self.num_blocks}",
                hint="release or crop sequences, or make the pool with a larger num_blocks",
            )
        taken = [self._free.pop() for _ in range(count)]
        self._holders[taken] = 1
        return taken

    def _copy_tails(self, held: list[_Held], targets: list[int]) -> None:
        """Let each have a copy of its last block instead, in all layers."""
        if not held:
            return
        sources = [one.blocks[-1] for one in held]
        for one, source, target in zip(held, sources, targets, strict=True):
            one.blocks[-1] = target
            self._holders[source] -= 1
        for pools in self._layers.values():
            for pool in pools:
                pool[targets] = pool[sources]


def _copies(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """int64 tensors of the host, copied to a device in one transfer.

    Each begins at a multiple of 16 bytes there, as kernels are compiled anew for addresses that do not.
    """
    ends = list(itertools.accumulate(x.numel() + x.numel() % 2 for x in tensors))
    # The host must not wait for a copy to CUDA, and does not where it is from pinned memory.
    packed = torch.empty(ends[-1], dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    places = list(zip([0, *ends], tensors, strict=False))
    for begin, x in places:
        packed[begin : begin + x.numel()] = x.flatten()
    there = packed.to(device, non_blocking=True)
    return [there[begin : begin + x.numel()].view(x.shape) for begin, x in places]


def _empty(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    # What is made in inference mode could not be written to outside of it.
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=like.dtype, device=like.device)
