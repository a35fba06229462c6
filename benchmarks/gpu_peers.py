"""Attention on a GPU as contenders: torch's backends by name, FlashAttention, FlashInfer, and ours over pages.

Each gets the inputs in the layout it likes, and says why it cannot serve. Libraries are imported by name where they
are used, as most machines lack them.
"""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from peers import flex_attention, floats_only, installed, ours_in_bf16
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from gqa.bench.kernels import OURS, Contender, Ready, of_torch, ours, torch_folded
from gqa.bench.problem import Inputs, Problem
from gqa.errors import GqaError
from gqa.ops.api import attention

FLEX = "torch FlexAttention"
PAGED = "gqa, paged"
BLOCK = 16  # tokens of a page, the default of our caches and of vLLM
WORKSPACE_BYTES = 128 << 20

# Contender -> the distribution that has it.
LIBRARIES = {"flash-attn 2": "flash-attn", "flash-attn 3": "flash-attn-3", "FlashInfer": "flashinfer-python"}


def peers() -> tuple[dict[str, Contender], dict[str, str]]:
    """(name -> contender of every peer that is installed, name -> what is missing of the others)."""
    found: dict[str, Contender] = {
        "torch flash": torch_backend(SDPBackend.FLASH_ATTENTION, cuda.can_use_flash_attention),
        "torch cuDNN": torch_backend(SDPBackend.CUDNN_ATTENTION, cuda.can_use_cudnn_attention),
        "torch folded": torch_folded,
    }
    more = {
        "flash-attn 2": flash_attention("flash_attn"),
        "flash-attn 3": flash_attention("flash_attn_interface"),
        "FlashInfer": flashinfer,
    }
    absent = {name: f"{library} not installed" for name, library in LIBRARIES.items() if not installed(library)}
    return found | {name: contender for name, contender in more.items() if name not in absent}, absent


def contenders(
    problem: Problem, found: dict[str, Contender], impl: str, *, compiled: bool, paged: bool
) -> dict[str, Contender]:
    """Who is timed at a problem: ours, the peers, FlexAttention where its compilation is worth the time, our own paged
    call, and beside int8 the same in bf16."""
    chosen = {OURS: ours(impl), **found}
    if compiled:
        chosen[FLEX] = flex_attention
    if paged:
        chosen[PAGED] = functools.partial(ours_paged, impl=impl)
    if problem.dtype == "int8":
        chosen["gqa in bf16"] = functools.partial(ours_in_bf16, impl=impl)
    return chosen


def torch_backend(backend: SDPBackend, serves: Callable[..., bool]) -> Contender:
    """torch's scaled_dot_product_attention with enable_gqa by one backend alone."""

    def contender(inputs: Inputs) -> Ready:
        floats_only(inputs)
        causal = inputs.problem.causal
        with sdpa_kernel(backend):
            # mask, dropout, is_causal, enable_gqa
            if not serves(cuda.SDPAParams(inputs.q, inputs.k, inputs.v, None, 0.0, causal, True)):
                raise GqaError("the backend does not take this shape or dtype")

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

        return of_torch(inputs, attend)

    return contender


def tokens_first(inputs: Inputs) -> Inputs:
    """The same tensors, in memory as (B, tokens, heads, D)."""

    def laid_out(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    grad = None if inputs.grad is None else laid_out(inputs.grad)
    return dataclasses.replace(inputs, q=laid_out(inputs.q), k=laid_out(inputs.k), v=laid_out(inputs.v), grad=grad)


def flash_attention(module: str) -> Contender:
    """FlashAttention's own functions: the one with split keys for a decode step, the differentiable one for prompts."""

    def contender(inputs: Inputs) -> Ready:
        floats_only(inputs)
        library: Any = importlib.import_module(module)
        causal = inputs.problem.causal

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out = library.flash_attn_func(q, k, v, causal=True) if causal else library.flash_attn_with_kvcache(q, k, v)
            out = out[0] if isinstance(out, tuple) else out  # some versions return the lse, too
            return out.transpose(1, 2)

        return of_torch(tokens_first(inputs), attend)

    return contender


def flashinfer(inputs: Inputs) -> Ready:
    """FlashInfer's wrappers for batches, planned beforehand: decode over pages in order, prompts end to end."""
    floats_only(inputs)
    if inputs.grad is not None:
        raise GqaError("no backward pass")
    library: Any = importlib.import_module("flashinfer")
    problem, dtype, device = inputs.problem, inputs.q.dtype, inputs.q.device
    B, S = problem.batch, problem.context_tokens
    heads = (problem.query_heads, problem.kv_heads, problem.head_dim)
    laid_out = tokens_first(inputs)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (laid_out.q, laid_out.k, laid_out.v))  # (B * tokens, heads, D)
    if problem.causal:
        wrapper = library.BatchPrefillWithRaggedKVCacheWrapper(_workspace(device), "NHD")
        offsets = _counts(B + 1, device) * S
        wrapper.plan(offsets, offsets, *heads, causal=True, q_data_type=dtype)
        run = functools.partial(wrapper.run, q, k, v)
    else:
        if S % BLOCK:
            raise GqaError("whole pages only", got=S, allowed=f"multiples of {BLOCK}")
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(_workspace(device), "NHD", use_tensor_cores=True)
        pages = S // BLOCK
        last = torch.full((B,), BLOCK, dtype=torch.int32, device=device)
        wrapper.plan(
            _counts(B + 1, device) * pages,
            _counts(B * pages, device),
            last,
            *heads,
            BLOCK,
            q_data_type=dtype,
            kv_data_type=dtype,
        )
        run = functools.partial(wrapper.run, q, (k.unflatten(0, (-1, BLOCK)), v.unflatten(0, (-1, BLOCK))))
    return Ready(run, lambda out: (out.unflatten(0, (B, -1)).transpose(1, 2),))


def _counts(count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32, device=device)


@functools.cache
def _workspace(device: torch.device) -> torch.Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def ours_paged(inputs: Inputs, impl: str) -> Ready:
    """`gqa.attention` over the same keys and values in pages that lie in random order."""
    B, S = inputs.problem.batch, inputs.problem.context_tokens
    if S % BLOCK or inputs.grad is not None:
        raise GqaError("whole pages only, and no backward pass", got=S, allowed=f"multiples of {BLOCK}")
    blocks = S // BLOCK
    order = torch.randperm(B * blocks, generator=torch.Generator().manual_seed(0)).to(inputs.q.device)

    def pool(x: torch.Tensor) -> torch.Tensor:
        """(B, H, S, ...) -> (B * blocks, H, block, ...)"""
        pages = x.unflatten(2, (blocks, BLOCK)).transpose(1, 2).flatten(0, 1)
        shuffled = torch.empty_like(pages, memory_format=torch.contiguous_format)
        shuffled[order] = pages
        return shuffled

    options: dict[str, Any] = {
        "block_table": order.view(B, blocks).to(torch.int32),
        "causal": inputs.problem.causal,
        "impl": impl,
    }
    if inputs.k_scale is not None and inputs.v_scale is not None:
        options |= {"k_scale": pool(inputs.k_scale), "v_scale": pool(inputs.v_scale)}
    return of_torch(
        dataclasses.replace(inputs, k=pool(inputs.k), v=pool(inputs.v)), functools.partial(attention, **options)
    )
