"""The CPU kernels as functions of torch tensors: a call's addresses, strides and options into a job, and run it."""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim of q, k · Dv head dim of v

from __future__ import annotations

import ctypes
import threading

import torch

from gqa.ops import compiled, cpu_forward, simd, threads
from gqa.ops.cpu_forward import BLOCK, BOOL_MASK, FLOAT_MASK, MAX_ROWS, SCRATCH_BYTES, Job
from gqa.ops.simd import VECTOR_BYTES, WIDTH

KINDS = {torch.float32: simd.FP32, torch.bfloat16: simd.BF16, torch.float16: simd.FP16, torch.int8: simd.INT8}
TILE_ROWS = 64  # query rows of a tile where there are many
SERIAL_WORK = 1 << 20  # multiplications below which waking threads costs more than they save
SPLIT_KEYS = 512  # a split's keys at least
TASKS_PER_THREAD = 8  # so that threads end together although one is held up

_local = threading.local()


def unserved(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> str | None:
    """The first thing asked for that the kernels cannot do, or None."""
    if q.device.type != "cpu":
        return f"tensors on {q.device.type}"
    if q.dtype not in KINDS:
        return str(q.dtype)
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, mask, sinks, k_scale, v_scale)
    ):
        return "gradients"
    return None


def forward(
    q: torch.Tensor,  # (B, H*G, T, D)
    k: torch.Tensor,  # (B, H, S, D), or a pool (blocks, H, block, D)
    v: torch.Tensor,  # (B, H, S, Dv), or a pool (blocks, H, block, Dv)
    causal: bool,
    q_start: int,
    q_starts: torch.Tensor | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    kv_lengths: torch.Tensor | None,
    kv_starts: torch.Tensor | None,
    block_table: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    want_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, H*G, T, Dv) in q's dtype, and lse (B, H*G, T) float32, or (0) without `want_lse`.

    The options are those of `gqa.attention`. q, k and v may be strided; where their last dimension is, they are copied.
    """
    B, HG, T, D = q.shape
    H, Dv = k.shape[1], v.shape[3]
    S = k.shape[2] if block_table is None else k.shape[2] * block_table.shape[1]
    q, k, v = _dense(q), _dense(k), _dense(v)
    out, lse = outputs(q, v, want_lse)

    job = Job()
    job.counters = ctypes.addressof(job)
    job.kv_heads, job.group, job.tokens, job.keys, job.head_dim, job.v_head_dim = H, HG // H, T, S, D, Dv
    job.q, job.q_batch, job.q_head, job.q_token = _place(q)
    job.k, job.k_batch, job.k_head, job.k_token = _place(k)
    job.v, job.v_batch, job.v_head, job.v_token = _place(v)
    job.out, job.out_batch, job.out_head, job.out_token = _place(out)
    job.lse = lse.data_ptr() if want_lse else 0
    job.causal, job.q_start, job.window = causal, q_start, window or 0
    job.scale, job.capped, job.softcap = scale, softcap is not None, softcap or 0.0
    job.ahead = 16
    # What is made here has to outlive the run, so each has a name.
    if q_starts is not None:
        q_starts = _whole(q_starts, torch.int64)
        job.q_starts = q_starts.data_ptr()
    if kv_lengths is not None:
        kv_lengths = _whole(kv_lengths, torch.int64)
        job.lengths = kv_lengths.data_ptr()
    if kv_starts is not None:
        kv_starts = _whole(kv_starts, torch.int64)
        job.starts = kv_starts.data_ptr()
    if sinks is not None:
        sinks = _whole(sinks, torch.float32)
        job.sinks = sinks.data_ptr()
    if mask is not None:
        if mask.dtype not in (torch.bool, torch.float32):
            mask = mask.float()
        mask = mask.expand(B, HG, T, S)
        job.mask, job.mask_batch, job.mask_head, job.mask_token = _place(mask)
        job.mask_key = mask.stride(3) * mask.element_size()
        job.mask_kind = BOOL_MASK if mask.dtype == torch.bool else FLOAT_MASK
    if block_table is not None:
        block_table = _whole(block_table, torch.int64)
        job.table, job.table_batch, job.page_tokens = block_table.data_ptr(), 8 * block_table.stride(0), k.shape[2]
    if k_scale is not None and v_scale is not None:
        k_scale, v_scale = k_scale.float(), v_scale.float()
        job.k_scale, job.k_scale_batch, job.k_scale_head, job.k_scale_token = _place(k_scale)
        job.v_scale, job.v_scale_batch, job.v_scale_head, job.v_scale_token = _place(v_scale)

    rows = T * HG // H
    job.rows = rows if rows <= MAX_ROWS else TILE_ROWS
    job.tiles = -(-rows // job.rows)
    tiles = B * H * job.tiles
    workers = threads.count()
    if B * HG * T * S * (D + Dv) < SERIAL_WORK:
        workers = 1
    # Few tiles cannot fill the threads, so their keys are split.
    splits = 1
    if workers > 1 and tiles < TASKS_PER_THREAD * workers:
        splits = max(1, min(-(-TASKS_PER_THREAD * workers // tiles), S // SPLIT_KEYS))
    job.split_keys = -(-S // (splits * BLOCK)) * BLOCK
    job.splits = -(-S // job.split_keys)
    job.tasks = tiles * job.splits
    if job.splits > 1:
        job.partial_bytes = job.rows * (8 + -(-Dv // WIDTH) * VECTOR_BYTES)
        partials = torch.empty(job.tasks * job.partial_bytes, dtype=torch.uint8)
        arrivals = torch.zeros(tiles, dtype=torch.int64)
        job.partials, job.arrivals = partials.data_ptr(), arrivals.data_ptr()
    workers = min(workers, job.tasks)
    job.scratch = scratch(workers * SCRATCH_BYTES)
    kernel = compiled.address(cpu_forward.entry, KINDS[q.dtype], KINDS[k.dtype])
    threads.run(kernel, ctypes.addressof(job), workers)
    return out, lse


def outputs(q: torch.Tensor, v: torch.Tensor, want_lse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for out and lse. out lies in memory in q's order of heads and tokens, so that what follows finds its own."""
    B, HG, T, _ = q.shape
    Dv = v.shape[3]
    tokens_first = q.stride(1) < q.stride(2)
    out = q.new_empty(B, T, HG, Dv).transpose(1, 2) if tokens_first else q.new_empty(B, HG, T, Dv)
    return out, q.new_empty((B, HG, T) if want_lse else (0,), dtype=torch.float32)


def scratch(size: int) -> int:
    """The address of memory for the workers of a call, kept for the next call of the same Python thread."""
    buffer = getattr(_local, "buffer", None)
    if buffer is None or buffer.numel() < size + 64:
        with torch.inference_mode(False):
            buffer = _local.buffer = torch.empty(size + 64, dtype=torch.uint8)
    return -(-buffer.data_ptr() // 64) * 64


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _whole(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype).contiguous()


def _place(x: torch.Tensor) -> tuple[int, int, int, int]:
    """Address, and strides of the first three dimensions in bytes."""
    size, strides = x.element_size(), x.stride()
    return x.data_ptr(), strides[0] * size, strides[1] * size, strides[2] * size
