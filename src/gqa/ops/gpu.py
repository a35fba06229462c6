"""The Triton forward as a function of torch tensors: a call's strides, options and shares of the GPU into launches."""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim of q, k · Dv head dim of v

from __future__ import annotations

import functools
import importlib.util
import math
import os
from typing import Any

import torch

from gqa.ops.call import dense, like_queries
from gqa.ops.launch import Launch
from gqa.ops.triton_tiles import tile

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEW_ROWS = 64  # packed rows up to which a call is bound by memory
SPLIT_KEYS = 128  # a split's keys at least
MOST_SPLITS = 128
START_KEYS = 300  # what a program's beginning and its place in the join take, as keys read; seen on an H100
TAIL = 0.4  # programs more per multiprocessor, where not all of them run at once: the last ones leave some idle
INSTALLED = importlib.util.find_spec("triton") is not None
# Kernels run in Triton's interpreter, on the CPU, if this is set before Triton is imported, by which it goes as well.
INTERPRETED = INSTALLED and os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


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
    if not INSTALLED:
        return "a machine without Triton"
    if q.device.type != "cuda" and not (q.device.type == "cpu" and INTERPRETED):
        return f"tensors on {q.device.type}"
    if q.dtype not in DTYPES:
        return str(q.dtype)
    # A compiler of graphs would trace the question, and warn of the cache.
    if q.device.type == "cuda" and not torch.compiler.is_compiling() and capability(q.device) < 80:
        return "a GPU of compute capability below 8.0"
    if torch.is_grad_enabled():
        for name, x in (("mask", mask), ("k_scale", k_scale), ("v_scale", v_scale)):
            if x is not None and x.requires_grad:
                return f"a {name} that requires grad"
        if k_scale is not None and q.requires_grad:
            return "gradients through int8 keys and values"
    return None


@functools.cache
def capability(device: torch.device) -> int:
    """10 * major + minor of the GPU; of an H100 where the interpreter stands for one."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # some, so that tiny shapes are split
    return torch.cuda.get_device_properties(device).multi_processor_count


def forward(q: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse: `plan_forward` with the same arguments, on the GPU where q is, and its launches run."""
    launches, out, lse = plan_forward(
        q, *arguments, capability=capability(q.device), multiprocessors=multiprocessors(q.device)
    )
    with on_device(q):
        for launch in launches:
            launch.run()
    return out, lse


def on_device(q: torch.Tensor) -> Any:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device_of(q) if q.device.type == "cuda" else torch.no_grad()


def plan_forward(
    q: torch.Tensor,  # (B, H*G, T, D)
    k: torch.Tensor,  # (B, H, S, D), or a pool (blocks, H, block, D)
    v: torch.Tensor,  # (B, H, S, Dv), or a pool (blocks, H, block, Dv)
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
    block_table: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    q_offsets: torch.Tensor | None,
    k_offsets: torch.Tensor | None,
    want_lse: bool,
    *,
    capability: int,
    multiprocessors: int,
) -> tuple[list[Launch], torch.Tensor, torch.Tensor]:
    """The kernels of a forward in order, and where they write: out (B, H*G, T, Dv) in q's dtype, and lse (B, H*G, T)
    float32, or (0) without `want_lse`. Nothing is run: meta tensors will do.

    The options are those of `gqa.attention`. With q_offsets and k_offsets, (N + 1) each, B is 1 and N sequences lie end
    to end; without q_start each of them is aligned bottom-right.
    """
    from gqa.ops import triton_forward

    B, HG, T, D = q.shape
    H, Dv = k.shape[1], v.shape[3]
    S = k.shape[2] if block_table is None else k.shape[2] * block_table.shape[1]
    group = HG // H
    if scale < 0:
        q, scale = -q, -scale
    q, k, v = dense(q), dense(k), in_pairs(dense(v))
    out = like_queries(q, Dv)
    lse = q.new_empty((B, HG, T) if want_lse else (0,), dtype=torch.float32)

    rows = T * group
    few = rows <= FEW_ROWS and q_offsets is None
    shape = tile("decode" if few else "forward", capability, D, Dv, q.dtype, k.dtype, rows, masked=mask is not None)
    tiles = -(-rows // shape.block_rows)
    splits = 1
    if q_offsets is not None:
        tiles += q_offsets.shape[0] - 1  # the last tile of each sequence may be partly filled
    else:
        seen = S if window is None else min(S, window + T)
        at_once = 1 if not few else 3 if shape.block_rows == 16 else 2
        splits = choose_splits(B * H * tiles, seen // SPLIT_KEYS, multiprocessors, at_once)
    parts = part_lse = None
    if splits > 1:
        parts = q.new_empty((splits, B, H, rows, Dv), dtype=torch.float32)
        part_lse = q.new_empty((splits, B, H, rows), dtype=torch.float32)

    places = {
        **_strides("q", q), **_strides("k", k), **_strides("v", v), **_strides("out", out),
        "lse_batch": HG * T, "lse_head": T,
    }  # fmt: skip
    attend = Launch(
        triton_forward.attend,
        (tiles * splits, H, B),
        {
            "q": q, "k": k, "v": v, "out": out, "lse": lse if want_lse else None, **places,
            "group": group, "query_tokens": T, "key_tokens": S, "scale": scale or 1e-30, "softcap": softcap,
            **positions(causal, q_start, q_starts, window, kv_lengths, kv_starts),
            "sinks": None if sinks is None else sinks.contiguous(),
            **describe_mask(mask, q, S),
            "table": None if block_table is None else dense_rows(block_table),
            "table_batch": None if block_table is None else dense_rows(block_table).stride(0),
            **_scale("k_scale", k_scale), **_scale("v_scale", v_scale),
            **ragged(q_offsets, k_offsets, T, S),
            "splits": splits, "parts": parts, "part_lse": part_lse,
            "HEAD_DIM": D, "V_HEAD_DIM": Dv, "DIMS": padded(D), "V_DIMS": padded(Dv),
            "PAGE": 0 if block_table is None else k.shape[2],
            "PRECISION": precision(q.dtype, D, Dv),
            "BLOCK_ROWS": shape.block_rows, "BLOCK_KEYS": shape.block_keys, "FEW_ROWS": few,
        },
        shape.warps,
        # Pages are looked up before K and V can be loaded: Triton shares the stages between the two steps.
        shape.stages if block_table is None else 2 * shape.stages - 1,
    )  # fmt: skip
    if splits == 1:
        return [attend], out, lse
    join = Launch(
        triton_forward.join,
        (rows, H, B),
        {
            "parts": parts, "part_lse": part_lse, "out": out, "lse": lse if want_lse else None,
            **{name: places[name] for name in ("out_batch", "out_head", "out_token", "lse_batch", "lse_head")},
            "group": group, "splits": splits,
            "V_HEAD_DIM": Dv, "V_DIMS": padded(Dv), "SPLITS": padded(splits), "AT_ONCE": 16,
        },
        4,
        1,
    )  # fmt: skip
    return [attend, join], out, lse


@functools.cache
def choose_splits(tiles: int, most: int, multiprocessors: int, at_once: int) -> int:
    """Over how many programs to share the keys of each tile.

    tiles: programs without splitting; most: splits of SPLIT_KEYS that the keys suffice for; at_once: programs that a
    multiprocessor holds.

    Programs share the memory's rate, so the time is that of the multiprocessor with most of them, each with its share
    of the keys and START_KEYS. One or two programs on every multiprocessor are best; a few more than fit at once are
    worst, as the last ones run alone.
    """

    def time(splits: int) -> float:
        programs = tiles * splits
        rounds = programs / multiprocessors
        rounds = math.ceil(rounds) if programs <= at_once * multiprocessors else rounds + TAIL
        return rounds * (most * SPLIT_KEYS / splits + START_KEYS)

    return min(range(1, max(1, min(MOST_SPLITS, most)) + 1), key=time)


def padded(size: int) -> int:
    """The least power of two that holds `size` and that a matrix instruction takes."""
    return max(16, 1 << (size - 1).bit_length())


def precision(dtype: torch.dtype, head_dim: int, v_head_dim: int) -> str:
    """How fp32 is multiplied: on tensor cores in three products of parts, to about fp32's precision; where the parts do
    not fit into registers, as it is."""
    if dtype != torch.float32:
        return "tf32"  # not asked for
    return "tf32x3" if max(head_dim, v_head_dim) <= 128 else "ieee"


def positions(
    causal: bool,
    q_start: int | None,
    q_starts: torch.Tensor | None,
    window: int | None,
    kv_lengths: torch.Tensor | None,
    kv_starts: torch.Tensor | None,
) -> dict[str, Any]:
    """The kernels' arguments that say which query sees which key."""
    tensors = {"q_starts": q_starts, "kv_lengths": kv_lengths, "kv_starts": kv_starts}
    given = {name: None if x is None else x.contiguous() for name, x in tensors.items()}
    return given | {"q_start": q_start, "window": window, "CAUSAL": causal}


def describe_mask(mask: torch.Tensor | None, q: torch.Tensor, key_tokens: int) -> dict[str, Any]:
    """The mask as bytes or float32, with the strides of (B, H*G, T, S)."""
    names = ("mask_batch", "mask_head", "mask_token", "mask_key")
    if mask is None:
        return {"mask": None} | dict.fromkeys(names)
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask.float()
    mask = mask.expand(*q.shape[:3], key_tokens)
    return {"mask": mask} | dict(zip(names, mask.stride(), strict=True))


def ragged(
    q_offsets: torch.Tensor | None, k_offsets: torch.Tensor | None, query_tokens: int, key_tokens: int
) -> dict[str, Any]:
    """The kernels' arguments that cut tokens into sequences."""
    if q_offsets is None or k_offsets is None:
        none = dict.fromkeys(("q_offsets", "k_offsets", "sequences", "total_queries", "total_keys"))
        return none | {"SEQUENCES": 1}
    sequences = q_offsets.shape[0] - 1
    return {
        "q_offsets": q_offsets.contiguous(),
        "k_offsets": k_offsets.contiguous(),
        "sequences": sequences,
        "total_queries": query_tokens,
        "total_keys": key_tokens,
        "SEQUENCES": padded(sequences),
    }


def in_pairs(v: torch.Tensor) -> torch.Tensor:
    """int8 values two to an int16, where they lie so that this is a view."""
    if (
        v.dtype != torch.int8
        or v.shape[3] % 2
        or v.storage_offset() % 2
        or any(stride % 2 for stride in v.stride()[:3])
    ):
        return v
    return v.view(torch.int16)


def dense_rows(table: torch.Tensor) -> torch.Tensor:
    return table if table.stride(1) == 1 else table.contiguous()


def _strides(name: str, x: torch.Tensor) -> dict[str, int]:
    batch, head, token, _ = x.stride()
    return {f"{name}_batch": batch, f"{name}_head": head, f"{name}_token": token}


def _scale(name: str, scale: torch.Tensor | None) -> dict[str, Any]:
    names = (f"{name}_batch", f"{name}_head", f"{name}_token")
    if scale is None:
        return {name: None} | dict.fromkeys(names)
    return {name: scale} | dict(zip(names, scale.stride(), strict=True))
