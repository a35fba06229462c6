"""What a caller may pass to the attention op. Every refusal names what, got and allowed."""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim of q, k · Dv head dim of v

from __future__ import annotations

import torch

from gqa.errors import GqaError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)
MAX_HEAD_DIM = 256


def check_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, paged: bool, scaled: bool) -> None:
    """q (B, H*G, T, D); k (B, H, S, D) and v (B, H, S, Dv), or pools (blocks, H, block, D or Dv) when paged."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise GqaError(
            "q, k and v need four dimensions",
            got=_shapes(q=q, k=k, v=v),
            allowed="q (B, H*G, T, D), k (B, H, S, D), v (B, H, S, Dv)",
            hint="ragged batches without a batch dimension go to gqa.attention_packed",
        )
    kv_layout = "k (blocks, H, block, D), v (blocks, H, block, Dv)" if paged else "k (B, H, S, D), v (B, H, S, Dv)"
    if k.shape[:3] != v.shape[:3]:
        raise GqaError("k and v differ in batch, heads or tokens", got=_shapes(k=k, v=v), allowed=kv_layout)
    if not paged and q.shape[0] != k.shape[0]:
        raise GqaError("q and k differ in batch", got=_shapes(q=q, k=k), allowed="q (B, H*G, T, D), k (B, H, S, D)")
    if q.shape[3] != k.shape[3]:
        raise GqaError("q and k differ in head dim", got=_shapes(q=q, k=k), allowed="the same D")
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        raise GqaError("a tensor is empty", got=_shapes(q=q, k=k, v=v), allowed="every size at least 1")
    if q.shape[1] % k.shape[1]:
        H, HG = k.shape[1], q.shape[1]
        raise GqaError(
            f"{H} KV heads do not divide {HG} query heads",
            got=_shapes(q=q, k=k),
            allowed=", ".join(str(n) for n in range(1, HG + 1) if HG % n == 0),
            hint="heads are dimension 1: q (B, H*G, T, D), not (B, T, H*G, D)",
        )
    if q.shape[3] > MAX_HEAD_DIM or v.shape[3] > MAX_HEAD_DIM:
        raise GqaError("a head dim is too large", got=_shapes(q=q, v=v), allowed=f"at most {MAX_HEAD_DIM}")
    if q.dtype not in FLOATS:
        raise GqaError("q has a dtype the op does not take", got=q.dtype, allowed=_names(FLOATS))
    kv_dtype = torch.int8 if scaled else q.dtype
    if k.dtype != kv_dtype or v.dtype != kv_dtype:
        raise GqaError(
            "k and v have a dtype that does not go with q's",
            got=f"q {q.dtype}, k {k.dtype}, v {v.dtype}",
            allowed="torch.int8, with k_scale and v_scale" if scaled else f"{q.dtype} like q",
            hint=None if scaled else "torch.int8 goes with k_scale and v_scale",
        )
    _check_device(q, k=k, v=v)


def check_positions(q: torch.Tensor, *, q_start: object, window: object) -> None:
    """q_start: None, an int or a (B,) tensor; window: None or a positive int."""
    if isinstance(q_start, torch.Tensor):
        check_per_sequence("q_start", q_start, q)
    elif q_start is not None and (isinstance(q_start, bool) or not isinstance(q_start, (int, torch.SymInt))):
        raise GqaError("q_start is not a position", got=repr(q_start), allowed="an int or a (B,) tensor of ints")
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise GqaError("window is not a number of tokens", got=repr(window), allowed="an int of at least 1, or None")


def check_numbers(*, scale: object, softcap: object) -> None:
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise GqaError(f"{name} is not a number", got=repr(value), allowed="a float or None")
    if isinstance(softcap, (int, float)) and not softcap > 0:
        raise GqaError("softcap must be positive", got=softcap, allowed="a number above 0, or None")


def check_per_sequence(name: str, value: torch.Tensor, q: torch.Tensor) -> None:
    """One integer per sequence: (B,)."""
    if value.shape != q.shape[:1] or value.dtype not in INTEGERS:
        raise GqaError(
            f"{name} needs one integer per sequence",
            got=f"{tuple(value.shape)} {value.dtype}",
            allowed=f"({q.shape[0]},) of {_names(INTEGERS)}",
        )
    _check_device(q, **{name: value})


def check_mask(mask: torch.Tensor, q: torch.Tensor, key_tokens: int) -> None:
    """Boolean or floating, broadcastable to (B, H*G, T, S)."""
    full = (*q.shape[:3], key_tokens)
    shape = mask.shape
    fits = len(shape) <= 4 and all(
        size in (1, want) for size, want in zip(reversed(shape), reversed(full), strict=False)
    )
    if not fits or (mask.dtype != torch.bool and mask.dtype not in FLOATS):
        raise GqaError(
            "mask does not fit",
            got=f"{tuple(shape)} {mask.dtype}",
            allowed=f"broadcastable to (B, H*G, T, S) = {tuple(full)}; torch.bool (True sees) or floating (added)",
        )
    _check_device(q, mask=mask)


def check_sinks(sinks: torch.Tensor, q: torch.Tensor) -> None:
    if sinks.shape != q.shape[1:2] or sinks.dtype not in FLOATS:
        raise GqaError(
            "sinks needs one logit per query head",
            got=f"{tuple(sinks.shape)} {sinks.dtype}",
            allowed=f"({q.shape[1]},) of {_names(FLOATS)}",
        )
    _check_device(q, sinks=sinks)


def check_scales(k_scale: torch.Tensor | None, v_scale: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> None:
    """Both or none; one scale per token and head: (B, H, S), or (blocks, H, block) when paged."""
    for name, value in (("k_scale", k_scale), ("v_scale", v_scale)):
        if value is None or value.shape != k.shape[:3] or value.dtype not in FLOATS:
            raise GqaError(
                f"{name} needs one scale per token and head",
                got=None if value is None else f"{tuple(value.shape)} {value.dtype}",
                allowed=f"{tuple(k.shape[:3])} of {_names(FLOATS)}; k_scale and v_scale together",
            )
        _check_device(q, **{name: value})


def check_block_table(block_table: torch.Tensor, q: torch.Tensor, pool: torch.Tensor) -> None:
    if block_table.dim() != 2 or block_table.shape[0] != q.shape[0] or block_table.dtype not in INTEGERS:
        raise GqaError(
            "block_table needs a row of block numbers per sequence",
            got=f"{tuple(block_table.shape)} {block_table.dtype}",
            allowed=f"({q.shape[0]}, max_blocks) of {_names(INTEGERS)}",
        )
    _check_device(q, block_table=block_table)
    # Reading values costs a synchronisation on a GPU and breaks a compiled graph: only where it is free.
    readable = type(block_table) is torch.Tensor and block_table.device.type == "cpu"
    if readable and not torch.compiler.is_compiling() and int(block_table.max()) >= pool.shape[0]:
        raise GqaError(
            "block_table names a block that the pool does not have",
            got=int(block_table.max()),
            allowed=f"0 to {pool.shape[0] - 1}; anything negative past kv_lengths",
        )


def _check_device(q: torch.Tensor, **tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.device != q.device:
            raise GqaError(f"{name} is not where q is", got=f"{name} on {tensor.device}", allowed=f"{q.device}")


def _shapes(**tensors: torch.Tensor) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)
