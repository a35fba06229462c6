"""The CPU kernels as functions of torch tensors: a call's addresses, strides and options into a job, and run it."""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim of q, k · Dv head dim of v

from __future__ import annotations

import ctypes

import torch

from gqa.ops import call, compiled, cpu_forward, threads
from gqa.ops.call import KINDS, dense, place, whole
from gqa.ops.cpu_forward import MAX_ROWS, SCRATCH_BYTES, Job
from gqa.ops.simd import CONVERTS_FP16, VECTOR_BYTES, WIDTH
from gqa.ops.tiles import GROUP

AHEAD_BYTES = 24 << 10  # of K, and of V, are on their way from memory at decode
AHEAD_ROWS = 32  # query rows of a tile up to which memory, not arithmetic, takes the time
TILE_ROWS = 64  # query rows of a tile where there are many
SERIAL_WORK = 1 << 20  # multiplications below which waking threads costs more than they save
SPLIT_KEYS = 512  # a split's keys at least
TASKS_PER_THREAD = 16  # so that threads end together although one is held up


def unserved(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> str | None:
    """The first thing asked for that the kernels cannot do, or None."""
    if q.device.type != "cpu":
        return f"tensors on {q.device.type}"
    if q.dtype not in KINDS:
        return str(q.dtype)
    if q.dtype == torch.float16 and not CONVERTS_FP16:
        return "torch.float16 on a processor without instructions for it"
    if torch.is_grad_enabled():
        for name, x in (("mask", mask), ("k_scale", k_scale), ("v_scale", v_scale)):
            if x is not None and x.requires_grad:
                return f"a {name} that requires grad"
        if k_scale is not None and q.requires_grad:
            return "gradients through int8 keys and values"
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
    q, k, v = dense(q), dense(k), dense(v)
    out, lse = outputs(q, v, want_lse)

    job = Job()
    job.counters = ctypes.addressof(job)
    job.kv_heads, job.group, job.tokens, job.keys, job.head_dim, job.v_head_dim = H, HG // H, T, S, D, Dv
    job.q, job.q_batch, job.q_head, job.q_token = place(q)
    job.k, job.k_batch, job.k_head, job.k_token = place(k)
    job.v, job.v_batch, job.v_head, job.v_token = place(v)
    job.out, job.out_batch, job.out_head, job.out_token = place(out)
    job.lse = lse.data_ptr() if want_lse else 0
    rows = T * HG // H
    job.rows = rows if rows <= MAX_ROWS else TILE_ROWS
    job.tiles = -(-rows // job.rows)
    tiles = B * H * job.tiles
    if rows <= AHEAD_ROWS:
        job.ahead = max(GROUP, AHEAD_BYTES // (D * k.element_size()))
    call.describe(
        job, q, S, causal=causal, q_start=q_start, q_starts=q_starts, window=window, scale=scale, softcap=softcap,
        mask=mask, kv_lengths=kv_lengths, kv_starts=kv_starts,
    )  # fmt: skip
    # What is made here has to outlive the run, so each has a name.
    if sinks is not None:
        sinks = whole(sinks, torch.float32)
        job.sinks = sinks.data_ptr()
    if block_table is not None:
        block_table = whole(block_table, torch.int64)
        job.table, job.table_batch, job.page_tokens = block_table.data_ptr(), 8 * block_table.stride(0), k.shape[2]
    if k_scale is not None and v_scale is not None:
        k_scale, v_scale = k_scale.float(), v_scale.float()
        job.k_scale, job.k_scale_batch, job.k_scale_head, job.k_scale_token = place(k_scale)
        job.v_scale, job.v_scale_batch, job.v_scale_head, job.v_scale_token = place(v_scale)

    workers = threads.count()
    if B * HG * T * S * (D + Dv) < SERIAL_WORK:
        workers = 1
    # Few tiles cannot fill the threads, so their keys are split.
    splits = 1
    if workers > 1 and tiles < TASKS_PER_THREAD * workers:
        splits = max(1, min(-(-TASKS_PER_THREAD * workers // tiles), S // SPLIT_KEYS))
    job.split_keys = -(-S // (splits * GROUP)) * GROUP
    job.splits = -(-S // job.split_keys)
    job.tasks = tiles * job.splits
    if job.splits > 1:
        job.partial_bytes = job.rows * (8 + -(-Dv // WIDTH) * VECTOR_BYTES)
        partials = torch.empty(job.tasks * job.partial_bytes, dtype=torch.uint8)
        arrivals = torch.zeros(tiles, dtype=torch.int64)
        job.partials, job.arrivals = partials.data_ptr(), arrivals.data_ptr()
    workers = min(workers, job.tasks)
    job.scratch = call.scratch(workers * SCRATCH_BYTES)
    kernel = compiled.address(cpu_forward.entry, KINDS[q.dtype], KINDS[k.dtype])
    threads.run(kernel, ctypes.addressof(job), workers)
    return out, lse


def outputs(q: torch.Tensor, v: torch.Tensor, want_lse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for out and lse."""
    B, HG, T, _ = q.shape
    return call.like_queries(q, v.shape[3]), q.new_empty((B, HG, T) if want_lse else (0,), dtype=torch.float32)
