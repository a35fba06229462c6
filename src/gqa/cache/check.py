"""What every append to a layer of a cache has in common with the first."""

# B batch · H KV heads · D head dim of k · Dv head dim of v

from __future__ import annotations

from typing import NamedTuple

import torch

from gqa.errors import GqaError


class Form(NamedTuple):
    """All of k (B, H, T, D) and v (B, H, T, Dv) but their tokens. batch is None where it may vary."""

    batch: int | None
    heads: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        B = "B" if self.batch is None else self.batch
        k, v = (f"({B}, {self.heads}, tokens, {size})" for size in (self.head_dim, self.v_head_dim))
        return f"keys {k} and values {v}, {self.dtype} on {self.device}"


def form_of(k: torch.Tensor, v: torch.Tensor) -> Form:
    """The form of k and v. Raises GqaError when they do not go together, or when autograd would need them."""
    if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
        raise GqaError(
            "a preallocated cache cannot be differentiated through",
            hint="run under torch.no_grad(), or train without a cache (use_cache=False)",
        )
    fit = k.dim() == v.dim() == 4 and k.shape[:3] == v.shape[:3] and k.dtype == v.dtype and k.device == v.device
    if not fit:
        raise GqaError(
            "keys and values do not go together",
            got=" and ".join(f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in (k, v)),
            allowed="k (B, H, T, D) and v (B, H, T, Dv) of one dtype and device",
        )
    return Form(k.shape[0], k.shape[1], k.shape[3], v.shape[3], k.dtype, k.device)


def check_form(new: Form, held: Form) -> None:
    """Raise GqaError when what is to be appended has another form than what is held."""
    if new != held:
        raise GqaError("keys and values do not go with those in the cache", got=new, allowed=held)


def check_floating(k: torch.Tensor) -> None:
    if not k.is_floating_point():
        raise GqaError("an int8 cache does its own rounding", got=k.dtype, allowed="a floating dtype")


def check_capacity(capacity: int) -> None:
    if capacity < 0:
        raise GqaError("a cache's capacity is a number of tokens", got=capacity, allowed="0 or more")


def check_crop(length: int, lowest: int, highest: int) -> None:
    if not lowest <= length <= highest:
        raise GqaError("a cache cannot be cropped to this length", got=length, allowed=f"{lowest} to {highest}")
