"""What attention reads of one layer's keys, or of its values, where a plain tensor does not say enough."""

# B batch · H KV heads · S key tokens · D head dim of k, or Dv of v

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gqa.errors import GqaError


class NotATensorError(GqaError, AttributeError):
    """What code meets that takes a `Stored` for a tensor. An AttributeError too, so that hasattr() says False."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Keys or values as a cache holds them, with what `gqa.attention` needs beside them to read them in place.

    data         (B, H, S, D), or a pool (num_blocks, H, block, D) when there is a block_table
    scale        of int8 data: (B, H, S), or (num_blocks, H, block); data * scale[..., None] are the numbers
    block_table  (B, max_blocks): token s of sequence b is data[block_table[b, s // block], :, s % block]; -1 past its
                 length
    lengths      (B,): tokens held per sequence, where data has room for more
    ragged       these lengths differ: what is told of the longest, such as a mask, is not true of the others

    Only attention that knows it can read it: everything else that is done to a tensor raises GqaError.
    """

    data: torch.Tensor
    scale: torch.Tensor | None = None
    block_table: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    ragged: bool = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python itself looks for, to copy or to print
            raise AttributeError(name)
        raise _not_a_tensor(name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for torch.matmul(query, stored) and its like."""
        raise _not_a_tensor(getattr(function, "__name__", "a torch function"))


def _not_a_tensor(asked: str) -> NotATensorError:
    return NotATensorError(
        "keys and values of a paged or int8 cache are no tensors",
        got=f"an attention that asks for their `{asked}`",
        allowed='attn_implementation="gqa" in transformers, or gqa.attention',
        hint='gqa.hf.register(), then load the model with attn_implementation="gqa"; or GqaCache(kind="contiguous")',
    )


def operands(
    key: torch.Tensor | Stored, value: torch.Tensor | Stored, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor | None]]:
    """What `gqa.attention` takes for what a cache returned: k, v, a mask as wide as they are, and more options.

    mask: over the S tokens held, (..., S) or broadcast over them, in the last of any number of dimensions.
    """
    if not isinstance(key, Stored):
        assert isinstance(value, torch.Tensor)
        return key, value, mask, {}
    assert isinstance(value, Stored)
    room = key.data.shape[2] if key.block_table is None else key.data.shape[2] * key.block_table.shape[1]
    if mask is not None and 1 < mask.shape[-1] < room:
        mask = torch.nn.functional.pad(mask, (0, room - mask.shape[-1]))  # lengths hide the room behind the last key
    options = {"k_scale": key.scale, "v_scale": value.scale, "block_table": key.block_table, "kv_lengths": key.lengths}
    return key.data, value.data, mask, options
