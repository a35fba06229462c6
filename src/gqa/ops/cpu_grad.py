"""The CPU's backward kernel as a function of torch tensors."""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim of q, k · Dv head dim of v

from __future__ import annotations

import ctypes

import torch

from gqa.ops import call, compiled, cpu_backward, threads
from gqa.ops.call import KINDS, dense, place, whole
from gqa.ops.cpu_backward import BLOCK, MAX_ROWS, SCRATCH_BYTES, Job
from gqa.ops.grad import sinks_gradient
from gqa.ops.simd import WIDTH
from gqa.ops.tiles import GROUP

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def backward(
    q: torch.Tensor,  # (B, H*G, T, D)
    k: torch.Tensor,  # (B, H, S, D)
    v: torch.Tensor,  # (B, H, S, Dv)
    out: torch.Tensor,  # (B, H*G, T, Dv)
    lse: torch.Tensor,  # (B, H*G, T), float32
    d_out: torch.Tensor,  # (B, H*G, T, Dv)
    d_lse: torch.Tensor | None,  # (B, H*G, T)
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
) -> Gradients:
    """The gradients of q, k, v and sinks, (0) without sinks, each in its tensor's dtype; options as in the forward.

    dK and dV are summed in float32 at H heads: nothing here has H*G heads of S tokens.
    """
    B, HG, T, D = q.shape
    H, S, Dv = k.shape[1], k.shape[2], v.shape[3]
    dq, *_ = gradients(q, k, v, sinks)
    blocks, keys = -(-S // BLOCK), -(-S // GROUP) * GROUP
    dk = torch.zeros(B, H, keys, -(-D // WIDTH) * WIDTH)
    dv = torch.zeros(B, H, keys, -(-Dv // WIDTH) * WIDTH)
    turns = torch.zeros(B * H * blocks, dtype=torch.int64)
    delta = torch.empty(B, HG, T)
    q, k, v, out, d_out = dense(q), dense(k), dense(v), dense(out), dense(d_out)

    job = Job()
    job.counters = ctypes.addressof(job)
    job.kv_heads, job.group, job.tokens, job.keys, job.head_dim, job.v_head_dim = H, HG // H, T, S, D, Dv
    job.q, job.q_batch, job.q_head, job.q_token = place(q)
    job.k, job.k_batch, job.k_head, job.k_token = place(k)
    job.v, job.v_batch, job.v_head, job.v_token = place(v)
    job.out, job.out_batch, job.out_head, job.out_token = place(out)
    job.d_out, job.d_out_batch, job.d_out_head, job.d_out_token = place(d_out)
    job.dq, job.dq_batch, job.dq_head, job.dq_token = place(dq)
    job.dk, _, job.dk_head, job.dk_token = place(dk)
    job.dv, _, job.dv_head, job.dv_token = place(dv)
    lse = whole(lse, torch.float32)
    job.lse, job.delta, job.turns = lse.data_ptr(), delta.data_ptr(), turns.data_ptr()
    if d_lse is not None:
        d_lse = whole(d_lse, torch.float32)
        job.d_lse = d_lse.data_ptr()
    call.describe(
        job, q, S, causal=causal, q_start=q_start, q_starts=q_starts, window=window, scale=scale, softcap=softcap,
        mask=mask, kv_lengths=kv_lengths, kv_starts=kv_starts,
    )  # fmt: skip

    rows = T * HG // H
    job.rows = min(rows, MAX_ROWS)
    job.tiles, job.blocks, job.units = -(-rows // job.rows), blocks, B * H
    job.tasks = job.units * job.tiles
    workers = min(threads.count(), job.tasks)
    job.abreast = min(job.units, workers)
    job.scratch = call.scratch(workers * SCRATCH_BYTES)
    threads.run(compiled.address(cpu_backward.entry, KINDS[q.dtype]), ctypes.addressof(job), workers)

    d_sinks = q.new_empty(0)
    if sinks is not None:
        d_sinks = sinks_gradient(sinks, lse, delta)
    dk, dv = dk[:, :, :S, :D], dv[:, :, :S, :Dv]
    return dq, dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous(), d_sinks


def gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None) -> Gradients:
    """Room for what `backward` returns."""
    d_sinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return call.like_queries(q, q.shape[3]), k.new_empty(k.shape), v.new_empty(v.shape), d_sinks
