"""The backward of the CPU kernels as a function of torch tensors."""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim of q, k · Dv head dim of v

from __future__ import annotations

import ctypes

import torch

from gqa.ops import compiled, cpu_backward, simd, threads
from gqa.ops.cpu_backward import BLOCK, MAX_ROWS, SCRATCH_BYTES, Job
from gqa.ops.rows import BOOL_MASK, FLOAT_MASK
from gqa.ops.simd import WIDTH

KINDS = {torch.float32: simd.FP32, torch.bfloat16: simd.BF16, torch.float16: simd.FP16}


def _dense(x):
    return x if x.stride(-1) == 1 else x.contiguous()


def _whole(x, dtype):
    return x.to(dtype).contiguous()


def _place(x):
    e = x.element_size()
    return x.data_ptr(), x.stride(0) * e, x.stride(1) * e, x.stride(2) * e


def backward(
    q: torch.Tensor,  # (B, H*G, T, D)
    k: torch.Tensor,  # (B, H, S, D)
    v: torch.Tensor,  # (B, H, S, Dv)
    out: torch.Tensor,  # (B, H*G, T, Dv)
    lse: torch.Tensor,  # (B, H*G, T), float32
    d_out: torch.Tensor,  # (B, H*G, T, Dv)
    d_lse: torch.Tensor | None,  # (B, H*G, T), float32
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
    rows=None, nt=None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of q, k, v and, where there are any, sinks, in their dtypes; the options are those of the forward.

    dK and dV accumulate in float32 at H heads: no tensor here has H*G heads of S tokens.
    """
    B, HG, T, D = q.shape
    H, S, Dv = k.shape[1], k.shape[2], v.shape[3]
    q, k, v, out, d_out = (_dense(x) for x in (q, k, v, out, d_out))
    lse = lse.contiguous()
    blocks = -(-S // BLOCK)
    dq = torch.empty(B, HG, T, D, dtype=q.dtype)
    dk = torch.zeros(B, H, blocks * BLOCK, -(-D // WIDTH) * WIDTH)
    dv = torch.zeros(B, H, blocks * BLOCK, -(-Dv // WIDTH) * WIDTH)
    turns = torch.zeros(B * H * blocks, dtype=torch.int64)
    delta = torch.empty(B, HG, T) if sinks is not None else None

    job = Job()
    job.counters = ctypes.addressof(job)
    job.kv_heads, job.group, job.tokens, job.keys, job.head_dim, job.v_head_dim = H, HG // H, T, S, D, Dv
    job.q, job.q_batch, job.q_head, job.q_token = _place(q)
    job.k, job.k_batch, job.k_head, job.k_token = _place(k)
    job.v, job.v_batch, job.v_head, job.v_token = _place(v)
    job.out, job.out_batch, job.out_head, job.out_token = _place(out)
    job.d_out, job.d_out_batch, job.d_out_head, job.d_out_token = _place(d_out)
    job.lse = lse.data_ptr()
    if d_lse is not None:
        d_lse = _whole(d_lse, torch.float32)
        job.d_lse = d_lse.data_ptr()
    job.delta = 0 if delta is None else delta.data_ptr()
    job.dq, job.turns = dq.data_ptr(), turns.data_ptr()
    job.dk, job.dk_token = dk.data_ptr(), 4 * dk.shape[3]
    job.dv, job.dv_token = dv.data_ptr(), 4 * dv.shape[3]
    job.causal, job.q_start, job.window = causal, q_start, window or 0
    job.scale, job.capped, job.softcap = scale, softcap is not None, softcap or 0.0
    if q_starts is not None:
        q_starts = _whole(q_starts, torch.int64)
        job.q_starts = q_starts.data_ptr()
    if kv_lengths is not None:
        kv_lengths = _whole(kv_lengths, torch.int64)
        job.lengths = kv_lengths.data_ptr()
    if kv_starts is not None:
        kv_starts = _whole(kv_starts, torch.int64)
        job.starts = kv_starts.data_ptr()
    if mask is not None:
        if mask.dtype not in (torch.bool, torch.float32):
            mask = mask.float()
        mask = mask.expand(B, HG, T, S)
        job.mask, job.mask_batch, job.mask_head, job.mask_token = _place(mask)
        job.mask_key = mask.stride(3) * mask.element_size()
        job.mask_kind = BOOL_MASK if mask.dtype == torch.bool else FLOAT_MASK

    total = T * HG // H
    job.rows = min(total, rows or MAX_ROWS)
    job.tiles = -(-total // job.rows)
    job.blocks = blocks
    job.units = B * H
    job.tasks = job.units * job.tiles
    workers = min(nt or threads.count(), job.tasks)
    job.abreast = min(job.units, workers)
    scratch = torch.empty(workers * SCRATCH_BYTES + 64, dtype=torch.uint8)
    job.scratch = (scratch.data_ptr() + 63) // 64 * 64
    threads.run(compiled.address(cpu_backward.entry, KINDS[q.dtype]), ctypes.addressof(job), workers)

    d_sinks = None
    if sinks is not None:
        assert delta is not None
        weight = torch.exp(sinks.float()[:, None] - lse).masked_fill(lse == -torch.inf, 0)
        d_sinks = -(weight * delta).sum(dim=(0, 2)).to(sinks.dtype)
    return dq, dk[:, :, :S, :D].to(k.dtype).contiguous(), dv[:, :, :S, :Dv].to(v.dtype).contiguous(), d_sinks
