r"""`gqa.attention`: check, choose an implementation, call it.

Query head n reads KV head n // G. With H = 2 KV heads and G = 3 queries per KV head:

    query head   0   1   2   3   4   5
                  \  |  /     \  |  /
    KV head          0           1

K and V stay at H heads throughout; no implementation repeats them in memory.
"""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim of q, k · Dv head dim of v

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from gqa.errors import GqaError
from gqa.ops import check, cpu, gpu, registry, sdpa

IMPLEMENTATIONS = ("reference", "cpu", "triton", "sdpa")


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    q_start: int | torch.Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    kv_lengths: torch.Tensor | None = None,
    kv_starts: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Any:
    """Grouped-query attention: out[n, t] = sum_s p[n, t, s] v[n // G, s].

    p is the softmax over the visible keys s of  cap(scale * q[n, t] . k[n // G, s]) + mask[n, t, s],
    with cap(x) = softcap * tanh(x / softcap), or x without softcap.

    q            (B, H*G, T, D), fp32, bf16, fp16 or fp64; G any integer, D and Dv at most 256
    k, v         (B, H, S, D), (B, H, S, Dv), of q's dtype, or int8 with scales; strided views are fine
    causal       query t sees keys up to its own position, S - T + t (bottom-right aligned) unless q_start says
                 otherwise; kv_lengths does not move positions
    q_start      position of the first query: an int (0 aligns top-left), or a (B,) tensor, one per sequence
    window       a query sees only the last `window` keys up to its position, itself counted: s > position - window.
                 Without `causal`, the keys after it stay visible
    scale        default D ** -0.5
    softcap      caps scores before masks are applied
    mask         broadcastable to (B, H*G, T, S): boolean, True = visible, or floating, added to the scores
    sinks        (H*G,): a logit per query head that joins the softmax's denominator and has no value
    kv_lengths   (B,) ints: only keys s < kv_lengths[b] exist
    kv_starts    (B,) ints: only keys s >= kv_starts[b] exist (left padding). What lies outside the two never
                 counts; impl="sdpa" multiplies it by zero, so there it must be finite
    block_table  (B, max_blocks) ints: k and v are pools (num_blocks, H, block, D or Dv), S = max_blocks * block, and
                 key s of sequence b is pool[block_table[b, s // block], :, s % block]. Entries past kv_lengths are
                 never used and may be -1
    k_scale, v_scale  (B, H, S), or (num_blocks, H, block) with block_table: int8 numbers times the scale of their
                 token and head are the keys and values
    return_lse   also return the natural log of the softmax's denominator, (B, H*G, T), float32 (float64 for fp64)
    impl         "auto", "reference", "cpu", "triton" (NVIDIA GPUs) or "sdpa"; an explicit one that cannot serve is
                 refused, never replaced

    Visibility is the conjunction of causal, window, mask, kv_lengths and kv_starts. A row that sees no key gives
    zeros; its lse is -inf, or the sink's logit. Scores accumulate in float32, float64 for fp64 inputs (by torch's
    own kernels with impl="sdpa").

    Returns out (B, H*G, T, Dv) in q's dtype, or (out, lse). Raises GqaError on shapes, dtypes, devices, values and
    implementations that do not fit. Differentiable in q, k, v, by "cpu" and "triton" also in sinks, by the reference
    in all.

    Nothing is read back from a GPU, so calls there can be captured in CUDA graphs; what kv_lengths, kv_starts and
    block_table hold is not checked there.

    Source: Ainslie et al. 2023, arXiv 2305.13245.
    """
    chosen, q_int, q_starts, scale = _resolve(
        q, k, v, causal=causal, q_start=q_start, window=window, scale=scale, softcap=softcap, mask=mask, sinks=sinks,
        kv_lengths=kv_lengths, kv_starts=kv_starts, block_table=block_table, k_scale=k_scale, v_scale=v_scale,
        return_lse=return_lse, impl=impl,
    )  # fmt: skip
    options = [
        causal, q_int, q_starts, window, scale, softcap, mask, sinks,
        kv_lengths, kv_starts, block_table, k_scale, v_scale,
    ]  # fmt: skip
    if chosen in registry.KERNELS and not torch.compiler.is_compiling():
        # Straight to what the composite ops would call: a token's time is short.
        out, lse = registry.KERNELS[chosen](q, k, v, options, return_lse)
        return (out, lse) if return_lse else out
    op = registry.attention_with_lse if return_lse else registry.attention
    return op(q, k, v, *options, chosen)


def attention_impl(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> str:
    """The implementation that `attention` with the same arguments would run. Raises what it would raise."""
    return _resolve(q, k, v, **options)[0]


def attention_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | Sequence[int],
    cu_seqlens_k: torch.Tensor | Sequence[int],
    *,
    causal: bool = False,
    q_start: int | torch.Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Any:
    """`attention` for N sequences laid end to end, without padding; each sees its own keys only.

    q            (query tokens, H*G, D); k, v: (key tokens, H, D), (key tokens, H, Dv)
    cu_seqlens_q, cu_seqlens_k
                 N + 1 rising offsets from 0 to the number of tokens: sequence i is q[cu[i]:cu[i + 1]]. Tensors on a GPU
                 are not read by the host, so not checked; offsets outside the tokens are moved inside
    q_start      an int for all or an (N,) tensor; by default each sequence is aligned bottom-right on its own
    the rest     as in `attention`

    Returns out (query tokens, H*G, Dv), or (out, lse) with lse (query tokens, H*G). Raises GqaError. One launch serves
    all sequences with impl="triton"; the others take a call per sequence.
    """
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3 or 0 in (len(q), len(k)):
        raise GqaError(
            "packed q, k and v do not have the shapes they need",
            got=f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}",
            allowed="q (tokens, H*G, D), k (tokens, H, D), v (tokens, H, Dv), each at least one token",
        )
    options: dict[str, Any] = {"causal": causal, "window": window, "softcap": softcap, "sinks": sinks, "impl": impl}
    whole_q, whole_k, whole_v = (x[None].transpose(1, 2) for x in (q, k, v))
    first, firsts = (None, q_start) if isinstance(q_start, torch.Tensor) else (q_start, None)
    chosen, *_, factor = _resolve(
        whole_q, whole_k, whole_v, q_start=first, scale=scale, return_lse=return_lse, **options
    )
    sequences = len(cu_seqlens_q) - 1
    if len(cu_seqlens_k) != len(cu_seqlens_q):
        raise GqaError(
            "cu_seqlens_q and cu_seqlens_k differ in length", got=f"{len(cu_seqlens_q)} and {len(cu_seqlens_k)}"
        )
    if firsts is not None and (firsts.shape != (sequences,) or firsts.dtype not in check.INTEGERS):
        raise GqaError(
            "q_start needs one position per sequence",
            got=f"{tuple(firsts.shape)} {firsts.dtype}",
            allowed=f"({sequences},) ints, or an int for all",
        )
    if chosen == "triton":
        q_offsets = _offsets_on("cu_seqlens_q", cu_seqlens_q, q)
        k_offsets = _offsets_on("cu_seqlens_k", cu_seqlens_k, k)
        numbers = [causal, first, firsts, window, factor, softcap, None, sinks, *(None,) * 5]
        out, lse = registry.triton_attention(whole_q, whole_k, whole_v, numbers, return_lse, q_offsets, k_offsets)
        out = out[0].transpose(0, 1)
        return (out, lse[0].transpose(0, 1)) if return_lse else out

    q_ends, k_ends = _offsets("cu_seqlens_q", cu_seqlens_q, len(q)), _offsets("cu_seqlens_k", cu_seqlens_k, len(k))
    starts = [first] * sequences if firsts is None else firsts.tolist()
    outs, lses = [], []
    for i in range(sequences):
        rows, keys = slice(q_ends[i], q_ends[i + 1]), slice(k_ends[i], k_ends[i + 1])
        one_q, one_k, one_v = whole_q[:, :, rows], whole_k[:, :, keys], whole_v[:, :, keys]
        if one_q.shape[2] == 0:
            continue
        mask = None
        if one_k.shape[2] == 0:  # a key that is masked out stands for none, sinks and gradients included
            one_k, one_v = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (one_k, one_v))
            mask = torch.zeros(1, 1, dtype=torch.bool, device=q.device)
        out = attention(
            one_q, one_k, one_v, q_start=starts[i], scale=scale, mask=mask, return_lse=return_lse, **options
        )
        if return_lse:
            out, lse = out
            lses.append(lse[0].transpose(0, 1))
        outs.append(out[0].transpose(0, 1))
    return (torch.cat(outs), torch.cat(lses)) if return_lse else torch.cat(outs)


def _resolve(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    q_start: int | torch.Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    kv_lengths: torch.Tensor | None = None,
    kv_starts: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> tuple[str, int, torch.Tensor | None, float]:
    """Check everything; return the implementation, the first query's position (an int, or a tensor that overrides
    it) and the scale."""
    scaled = k_scale is not None or v_scale is not None
    check.check_qkv(q, k, v, paged=block_table is not None, scaled=scaled)
    check.check_positions(q, q_start=q_start, window=window)
    check.check_numbers(scale=scale, softcap=softcap)
    key_tokens = k.shape[2]
    if block_table is not None:
        check.check_block_table(block_table, q, k)
        key_tokens *= block_table.shape[1]
    if mask is not None:
        check.check_mask(mask, q, key_tokens)
    if sinks is not None:
        check.check_sinks(sinks, q)
    if kv_lengths is not None:
        check.check_per_sequence("kv_lengths", kv_lengths, q)
    if kv_starts is not None:
        check.check_per_sequence("kv_starts", kv_starts, q)
    if scaled:
        check.check_scales(k_scale, v_scale, q, k)

    refusals = {
        "reference": None,
        "cpu": cpu.unserved(q, k, v, mask=mask, k_scale=k_scale, v_scale=v_scale),
        "triton": gpu.unserved(q, k, v, mask=mask, k_scale=k_scale, v_scale=v_scale),
        "sdpa": sdpa.unserved(
            q, k, v, softcap=softcap, mask=mask, sinks=sinks, block_table=block_table, k_scale=k_scale,
            return_lse=return_lse,
        ),
    }  # fmt: skip
    chosen = _choose(impl, refusals)
    factor = q.shape[3] ** -0.5 if scale is None else float(scale)
    if isinstance(q_start, torch.Tensor):
        return chosen, 0, q_start, factor
    return chosen, key_tokens - q.shape[2] if q_start is None else q_start, None, factor


def _choose(impl: str, refusals: dict[str, str | None]) -> str:
    """The implementation that runs. On CPUs ours was faster than torch's wherever we measured (benchmarks/cpu.py)."""
    if impl == "auto":
        return next(name for name in ("cpu", "triton", "sdpa", "reference") if refusals[name] is None)
    if impl not in IMPLEMENTATIONS:
        raise GqaError("an unknown implementation", got=f"impl={impl!r}", allowed=", ".join(("auto", *IMPLEMENTATIONS)))
    if refusals[impl] is not None:
        serving = ", ".join(name for name, refusal in refusals.items() if refusal is None)
        raise GqaError(f'impl="{impl}" does not serve {refusals[impl]}', allowed=serving, hint='impl="auto" chooses')
    return impl


def _offsets_on(name: str, value: torch.Tensor | Sequence[int], x: torch.Tensor) -> torch.Tensor:
    """Offsets into the tokens of x on its device, checked where that needs no wait for a GPU."""
    if isinstance(value, torch.Tensor) and value.device.type == "cuda":
        if value.dim() != 1 or value.dtype not in check.INTEGERS:
            raise GqaError(
                f"{name} is not a list of offsets", got=f"{tuple(value.shape)} {value.dtype}", allowed="(N + 1,) ints"
            )
        return value.to(x.device)
    return torch.tensor(_offsets(name, value, len(x)), dtype=torch.int32, device=x.device)


def _offsets(name: str, value: torch.Tensor | Sequence[int], tokens: int) -> list[int]:
    offsets = [int(x) for x in (value.tolist() if isinstance(value, torch.Tensor) else value)]
    rising = all(a <= b for a, b in itertools.pairwise(offsets))
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != tokens or not rising:
        raise GqaError(f"{name} is not a list of rising offsets", got=offsets, allowed=f"0, ..., {tokens}")
    return offsets
