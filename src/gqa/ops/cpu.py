"""The CPU kernels as functions of torch tensors."""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim of q, k · Dv head dim of v

from __future__ import annotations

import ctypes
import hashlib
import sys
import threading
from functools import cache
from pathlib import Path

import torch
from numba import cfunc, types

from gqa.ops import simd, threads
from gqa.ops.cpu_forward import BLOCK, BOOL_MASK, FLOAT_MASK, MAX_ROWS, NO_MASK, SCRATCH_BYTES, Job, work
from gqa.ops.simd import VECTOR_BYTES, WIDTH, Kind

KINDS = {torch.float32: simd.FP32, torch.bfloat16: simd.BF16, torch.float16: simd.FP16, torch.int8: simd.INT8}
_SIGNATURE = types.void(types.voidptr)


@cache
def _build() -> str:
    """What compiled kernels depend on beside their types, so that the cache on disk never serves an older kernel."""
    here = Path(__file__).parent
    sources = (here / name for name in ("simd.py", "job.py", "tiles.py", "cpu_forward.py"))
    text = b"".join(source.read_bytes() for source in sources)
    return f"{hashlib.sha256(text).hexdigest()[:16]} {simd.WIDTH} {simd.REGISTERS}"


@cache
def _forward(q_kind: Kind, kv_kind: Kind) -> int:
    """The address of the forward worker for these kinds of numbers; compiled at first use, then read from disk."""
    build = _build()

    @cfunc(_SIGNATURE, cache=True)
    def forward(address):
        build  # noqa: B018  a constant of the function, hence part of its key in the cache
        work(q_kind, kv_kind, address)

    _KEEP.append(forward)
    return forward.address


_KEEP: list = []
_local = threading.local()


def _scratch(size):
    buffer = getattr(_local, "buffer", None)
    if buffer is None or buffer.numel() < size + 64:
        buffer = _local.buffer = torch.empty(size + 64, dtype=torch.uint8)
    return (buffer.data_ptr() + 63) // 64 * 64


def attention(q, k, v, *, causal=False, q_start=0, q_starts=None, window=None, scale, softcap=None, mask=None, sinks=None,
              kv_lengths=None, kv_starts=None, block_table=None, k_scale=None, v_scale=None, want_lse=False, splits=None, rows=None, ahead=0):
    B, HG, T, D = q.shape
    H, Dv = k.shape[1], v.shape[3]
    S = k.shape[2] if block_table is None else k.shape[2]*block_table.shape[1]
    G = HG // H
    out = torch.empty(B, HG, T, Dv, dtype=q.dtype)
    lse = torch.empty(B, HG, T) if want_lse else None
    total = T * G
    if rows is None:
        rows = total if total <= MAX_ROWS else 64
    tiles = -(-total // rows)
    n = threads.count()
    units = B * H * tiles
    if splits is None:
        splits = max(1, min(-(-8 * n // units), S // 512)) if units < 8 * n else 1
    split_keys = -(-S // splits // BLOCK) * BLOCK
    splits = -(-S // split_keys)
    rs = 8 + -(-Dv // WIDTH) * VECTOR_BYTES
    partial_bytes = min(rows, total) * rs
    e, ke = q.element_size(), k.element_size()
    job = Job()
    job.counters = ctypes.addressof(job)
    job.tasks = units * splits
    if splits > 1:
        work_space = torch.empty(units * splits * partial_bytes, dtype=torch.uint8)
        arrivals = torch.zeros(units, dtype=torch.int64)
        job.partials, job.arrivals = work_space.data_ptr(), arrivals.data_ptr()
    job.q, job.q_batch, job.q_head, job.q_token = q.data_ptr(), q.stride(0)*e, q.stride(1)*e, q.stride(2)*e
    job.k, job.k_batch, job.k_head, job.k_token = k.data_ptr(), k.stride(0)*ke, k.stride(1)*ke, k.stride(2)*ke
    job.v, job.v_batch, job.v_head, job.v_token = v.data_ptr(), v.stride(0)*ke, v.stride(1)*ke, v.stride(2)*ke
    job.out, job.out_batch, job.out_head, job.out_token = out.data_ptr(), out.stride(0)*e, out.stride(1)*e, out.stride(2)*e
    job.lse = lse.data_ptr() if lse is not None else 0
    job.kv_heads, job.group, job.tokens, job.keys, job.head_dim, job.v_head_dim = H, G, T, S, D, Dv
    job.rows, job.tiles, job.splits, job.split_keys, job.partial_bytes = rows, tiles, splits, split_keys, partial_bytes
    job.causal, job.q_start, job.window = causal, q_start, window or 0
    job.scale = scale
    job.softcap = softcap or 1.0; job.capped = softcap is not None
    job.ahead = ahead
    nt = min(n, units*splits)
    job.scratch = _scratch(nt * SCRATCH_BYTES)
    threads.run(_forward(KINDS[q.dtype], KINDS[k.dtype]), ctypes.addressof(job), nt)
    return (out, lse) if want_lse else out
