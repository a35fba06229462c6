"""The Triton backward as a function of torch tensors: a call's strides and options into launches."""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim of q, k · Dv head dim of v

from __future__ import annotations

import torch

from gqa.ops import gpu
from gqa.ops.call import dense, like_queries, whole
from gqa.ops.grad import sinks_gradient
from gqa.ops.launch import Launch
from gqa.ops.triton_tiles import tile

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
    q_start: int | None,
    q_starts: torch.Tensor | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    kv_lengths: torch.Tensor | None,
    kv_starts: torch.Tensor | None,
    q_offsets: torch.Tensor | None = None,
    k_offsets: torch.Tensor | None = None,
) -> Gradients:
    """The gradients of q, k, v and sinks, (0) without sinks, each in its tensor's dtype; options as in the forward.

    With q_offsets and k_offsets, (N + 1) each, B is 1 and N sequences lie end to end; without q_start each of them is
    aligned bottom-right. Two calls with the same arguments give the same bits.
    """
    launches, (dq, dk, dv, d_sinks) = plan_backward(
        q, k, v, out, lse, d_out, d_lse, causal, q_start, q_starts, window, scale, softcap, mask, sinks, kv_lengths,
        kv_starts, q_offsets, k_offsets, capability=gpu.capability(q.device),
    )  # fmt: skip
    with gpu.on_device(q):
        for launch in launches:
            launch.run()
    if sinks is not None:
        d_sinks = sinks_gradient(sinks, lse, launches[0].arguments["delta"])
    return dq, dk, dv, d_sinks


def plan_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    causal: bool,
    q_start: int | None,
    q_starts: torch.Tensor | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    kv_lengths: torch.Tensor | None,
    kv_starts: torch.Tensor | None,
    q_offsets: torch.Tensor | None = None,
    k_offsets: torch.Tensor | None = None,
    *,
    capability: int,
) -> tuple[list[Launch], Gradients]:
    """The kernels of `backward` in order, and what they write; d_sinks is left to `backward`, from the first's delta.

    Nothing is run: meta tensors will do.
    """
    from gqa.ops import triton_backward

    B, HG, T, D = q.shape
    H, S, Dv = k.shape[1], k.shape[2], v.shape[3]
    group = HG // H
    assert q_offsets is None or mask is None, "ragged batches have no mask"
    results = dq, dk, dv, _ = gradients(q, k, v, sinks)
    if q_offsets is not None:  # behind the last offset there may be tokens of no sequence
        for x in (dq, dk, dv):
            x.zero_()
    q, k, v, out, d_out = dense(q), dense(k), dense(v), dense(out), dense(d_out)
    shift, delta = (lse.new_empty((B, HG, T), dtype=torch.float32) for _ in range(2))

    ragged = gpu.ragged(q_offsets, k_offsets, T, S)
    options = {
        **_tensors(q=q, k=k, v=v, d_out=d_out),
        "shift": shift, "delta": delta, "lse_batch": HG * T, "lse_head": T,
        "kv_heads": H, "group": group, "query_tokens": T, "key_tokens": S, "scale": scale, "softcap": softcap,
        **gpu.positions(causal, q_start, q_starts, window, kv_lengths, kv_starts),
        **gpu.describe_mask(mask, q, S),
        **(ragged if q_offsets is not None else ragged | {"sequences": B}),
        "HEAD_DIM": D, "V_HEAD_DIM": Dv, "DIMS": gpu.padded(D), "V_DIMS": gpu.padded(Dv),
        "PRECISION": gpu.precision(q.dtype, D, Dv),
    }  # fmt: skip
    rows = tile("backward_rows", capability, D, Dv, q.dtype, k.dtype, T * group, masked=mask is not None)
    keys = tile("backward_keys", capability, D, Dv, q.dtype, k.dtype, T * group, masked=mask is not None)
    row_tiles, key_tiles = -(-T * group // rows.block_rows), -(-S // keys.block_keys)
    if q_offsets is not None:  # the last tile of each sequence may be partly filled
        row_tiles, key_tiles = row_tiles + q_offsets.shape[0] - 1, key_tiles + q_offsets.shape[0] - 1
    return [
        Launch(
            triton_backward.differentiate_rows,
            (row_tiles * B * H, 1, 1),
            {
                **options, **_tensors(out=out, dq=dq), "lse": whole(lse, torch.float32),
                "d_lse": None if d_lse is None else whole(d_lse, torch.float32),
                "BLOCK_ROWS": rows.block_rows, "BLOCK_KEYS": rows.block_keys,
            },
            rows.warps,
            rows.stages,
        ),
        Launch(
            triton_backward.differentiate_keys,
            (key_tiles * B * H, 1, 1),
            {**options, **_tensors(dk=dk, dv=dv), "BLOCK_ROWS": keys.block_rows, "BLOCK_KEYS": keys.block_keys},
            keys.warps,
            keys.stages,
        ),
    ], results  # fmt: skip


def gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None) -> Gradients:
    """Room for what `backward` returns, each with heads and tokens in its tensor's order."""
    d_sinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return like_queries(q, q.shape[3]), like_queries(k, k.shape[3]), like_queries(v, v.shape[3]), d_sinks


def _tensors(**tensors: torch.Tensor) -> dict[str, torch.Tensor | int]:
    """The kernels' arguments that say where tensors (batch, head, token, dim) lie."""
    arguments: dict[str, torch.Tensor | int] = {}
    for name, x in tensors.items():
        batch, head, token, _ = x.stride()
        arguments |= {name: x, f"{name}_batch": batch, f"{name}_head": head, f"{name}_token": token}
    return arguments
