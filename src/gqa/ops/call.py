"""What the jobs of all CPU kernels have in common: a call's tensors, strides and options as fields, and its memory."""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim of q, k · Dv head dim of v

from __future__ import annotations

import threading
from typing import Any

import torch

from gqa.ops import simd
from gqa.ops.rows import BOOL_MASK, FLOAT_MASK

KINDS = {torch.float32: simd.FP32, torch.bfloat16: simd.BF16, torch.float16: simd.FP16, torch.int8: simd.INT8}

_local = threading.local()


def describe(
    job: Any,
    q: torch.Tensor,  # (B, H*G, T, D)
    key_tokens: int,
    *,
    causal: bool,
    q_start: int,
    q_starts: torch.Tensor | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    mask: torch.Tensor | None,
    kv_lengths: torch.Tensor | None,
    kv_starts: torch.Tensor | None,
) -> None:
    """Write the options into a job; what is made here, and has to outlive its run, is kept with it."""
    job.causal, job.q_start, job.window = causal, q_start, window or 0
    job.scale, job.capped, job.softcap = scale, softcap is not None, softcap or 0.0
    job.kept = kept = []
    if q_starts is not None:
        kept.append(whole(q_starts, torch.int64))
        job.q_starts = kept[-1].data_ptr()
    if kv_lengths is not None:
        kept.append(whole(kv_lengths, torch.int64))
        job.lengths = kept[-1].data_ptr()
    if kv_starts is not None:
        kept.append(whole(kv_starts, torch.int64))
        job.starts = kept[-1].data_ptr()
    if mask is not None:
        if mask.dtype not in (torch.bool, torch.float32):
            mask = mask.float()
        kept.append(mask)
        mask = mask.expand(*q.shape[:3], key_tokens)
        job.mask, job.mask_batch, job.mask_head, job.mask_token = place(mask)
        job.mask_key = mask.stride(3) * mask.element_size()
        job.mask_kind = BOOL_MASK if mask.dtype == torch.bool else FLOAT_MASK


def scratch(size: int) -> int:
    """The address of memory for the workers of a call, kept for the next call of the same Python thread."""
    buffer = getattr(_local, "buffer", None)
    if buffer is None or buffer.numel() < size + 64:
        with torch.inference_mode(False):
            buffer = _local.buffer = torch.empty(size + 64, dtype=torch.uint8)
    return -(-buffer.data_ptr() // 64) * 64


def like_queries(q: torch.Tensor, columns: int) -> torch.Tensor:
    """Room for (B, H*G, T, columns), in q's order of heads and tokens, so that what follows finds its own."""
    B, HG, T, _ = q.shape
    tokens_first = q.stride(1) < q.stride(2)
    return q.new_empty(B, T, HG, columns).transpose(1, 2) if tokens_first else q.new_empty(B, HG, T, columns)


def dense(x: torch.Tensor) -> torch.Tensor:
    """With neighbours in the last dimension next to each other."""
    return x if x.stride(3) == 1 else x.contiguous()


def whole(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype).contiguous()


def place(x: torch.Tensor) -> tuple[int, int, int, int]:
    """Address, and strides of the first three dimensions in bytes."""
    size, strides = x.element_size(), x.stride()
    return x.data_ptr(), strides[0] * size, strides[1] * size, strides[2] * size
