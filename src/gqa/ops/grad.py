"""Autograd's way from a forward kernel to its backward kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


class Differentiable(torch.autograd.Function):
    """`torch.ops.gqa.<impl>_forward`, with `<impl>_backward` as its backward.

    Takes impl ("cpu" or "triton"), q, k, v and what the forward takes after them, less its `want_lse`.
    """

    @staticmethod
    def forward(impl: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any) -> Any:
        return getattr(torch.ops.gqa, f"{impl}_forward").default(q, k, v, *options, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        impl, q, k, v, causal, q_start, q_starts, window, scale, softcap, mask, sinks, lengths, starts, *rest = inputs
        assert rest[:3] == [None, None, None], "pages and int8 are no leaves"
        offsets = rest[3:]  # of ragged batches, by "triton" only
        ctx.save_for_backward(q, k, v, *output, q_starts, mask, sinks, lengths, starts, *offsets)
        ctx.impl, ctx.numbers = impl, (causal, q_start, window, scale, softcap)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor | None, d_lse: torch.Tensor | None) -> Any:
        q, k, v, out, lse, q_starts, mask, sinks, lengths, starts, *offsets = ctx.saved_tensors
        causal, q_start, window, scale, softcap = ctx.numbers
        dq, dk, dv, d_sinks = getattr(torch.ops.gqa, f"{ctx.impl}_backward").default(
            q, k, v, out, lse, torch.zeros_like(out) if d_out is None else d_out, d_lse, causal, q_start, q_starts,
            window, scale, softcap, mask, sinks, lengths, starts, *offsets,
        )  # fmt: skip
        return None, dq, dk, dv, *(None,) * 7, None if sinks is None else d_sinks, *(None,) * (5 + len(offsets))


def sinks_gradient(sinks: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """The gradient of sinks (H*G,): -sum over sequences and tokens of exp(sink - lse) * delta, both (B, H*G, T), where
    delta = sum(dO * out) - d_lse, as the kernels have it. A row that sees nothing, not even a sink, adds none."""
    weight = torch.exp(sinks.float()[:, None] - lse).masked_fill(lse == -torch.inf, 0)
    return -(weight * delta).sum(dim=(0, 2)).to(sinks.dtype)
