"""One attention to be timed: its shape, what it must read and compute, and random inputs of that shape."""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim

from __future__ import annotations

import dataclasses
import math

import torch

from gqa.errors import GqaError
from gqa.ops.check import MAX_HEAD_DIM
from gqa.units import DTYPE_BYTES, MIB, dtype_bytes

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INT8_QUERY_DTYPE = "bf16"
SCALE_BYTES = 4  # an fp32 scale per token and head

MAX_COPY_BYTES = 1024 * MIB


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """q (B, H*G, T, D) against k and v (B, H, S, D).

    One query per sequence sees every key (decode); otherwise T is S and the attention is causal (prefill).
    dtype:    of q, k and v; int8 means int8 k and v with a scale per token and head, and bf16 queries.
    backward: the gradients of q, k and v are computed too.
    Raises GqaError for a shape that is none of these.
    """

    query_heads: int
    kv_heads: int
    head_dim: int
    context_tokens: int
    query_tokens: int = 1
    batch: int = 1
    dtype: str = "bf16"
    backward: bool = False

    def __post_init__(self) -> None:
        dtype_bytes(self.dtype)
        for field in ("query_heads", "kv_heads", "head_dim", "context_tokens", "query_tokens", "batch"):
            if getattr(self, field) < 1:
                raise GqaError(f"{field} must be positive", got=getattr(self, field), allowed="1 or more")
        if self.query_heads % self.kv_heads:
            raise GqaError(f"{self.kv_heads} KV heads do not divide {self.query_heads} query heads")
        if self.head_dim > MAX_HEAD_DIM:
            raise GqaError("a head dim is too large", got=self.head_dim, allowed=f"at most {MAX_HEAD_DIM}")
        if self.query_tokens not in (1, self.context_tokens):
            raise GqaError(
                "a timed attention is decode or a whole prefill",
                got=f"{self.query_tokens} query tokens, {self.context_tokens} key tokens",
                allowed=f"1 or {self.context_tokens} query tokens",
            )
        if self.backward and self.dtype == "int8":
            raise GqaError("int8 keys and values have no gradient", allowed=", ".join(TORCH_DTYPES))

    @property
    def causal(self) -> bool:
        return self.query_tokens > 1

    @property
    def query_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[INT8_QUERY_DTYPE if self.dtype == "int8" else self.dtype]

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V, each read once: B * S * H * 2D * bytes, and the scales of int8."""
        row = 2 * self.head_dim * DTYPE_BYTES[self.dtype] + (2 * SCALE_BYTES if self.dtype == "int8" else 0)
        return self.batch * self.context_tokens * self.kv_heads * row

    @property
    def flops(self) -> int:
        """2 * 2D per query head and visible (query, key) pair; a backward pass does 5 such products more than the
        forward's 2, one of which is to compute the scores again (Dao 2023, arXiv 2307.08691, section 4.1)."""
        T = self.query_tokens
        pairs = T * (T + 1) // 2 if self.causal else self.context_tokens
        products = 7 if self.backward else 2
        return self.batch * self.query_heads * pairs * products * 2 * self.head_dim

    def roofline_seconds(self, read_bytes_per_second: float, flops_per_second: float) -> float:
        """max(KV bytes / read bandwidth, FLOPs / matrix rate): as long as K and V come from memory, nothing that
        computes at this rate is faster."""
        return max(self.kv_bytes / read_bytes_per_second, self.flops / flops_per_second)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """q, k, v of a problem; the scales (B, H, S) of int8; the gradient of the output where there is a backward."""

    problem: Problem
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None
    grad: torch.Tensor | None = None

    def clone(self) -> Inputs:
        """The same numbers elsewhere in memory."""
        changes = {
            field.name: tensor.clone()
            for field in dataclasses.fields(self)
            if isinstance(tensor := getattr(self, field.name), torch.Tensor)
        }
        return dataclasses.replace(self, **changes)


def random_inputs(problem: Problem, seed: int = 0, device: str = "cpu") -> Inputs:
    """Normal numbers; int8 keys and values are rounded to 255 steps, of a scale per token and head."""
    generator = torch.Generator(device).manual_seed(seed)
    B, S, D = problem.batch, problem.context_tokens, problem.head_dim
    queries = (B, problem.query_heads, problem.query_tokens, D)

    def normal(*shape: int) -> torch.Tensor:
        out = torch.empty(shape, dtype=problem.query_dtype, device=device)
        for part in out:  # the fp32 numbers of all sequences at once may not fit
            part.copy_(torch.randn(shape[1:], generator=generator, device=device))
        return out

    q, k, v = normal(*queries), normal(B, problem.kv_heads, S, D), normal(B, problem.kv_heads, S, D)
    if problem.dtype == "int8":
        (k, k_scale), (v, v_scale) = _rounded(k), _rounded(v)
        return Inputs(problem, q, k, v, k_scale, v_scale)
    return Inputs(problem, q, k, v, grad=normal(*queries) if problem.backward else None)


def copies_for_cold_caches(problem: Problem, cache_bytes: int) -> tuple[int, bool]:
    """(how many copies of K and V to go round, whether together they exceed twice the last-level cache).

    One copy is enough for a prefill, which is bound by arithmetic, and for K and V that no cache holds anyway. Copies
    together take at most 1 GiB.
    """
    wanted = 1 if problem.causal else max(1, math.ceil((2 * cache_bytes + 1) / problem.kv_bytes))
    count = max(1, min(wanted, MAX_COPY_BYTES // problem.kv_bytes))
    return count, count * problem.kv_bytes > 2 * cache_bytes


def _rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = x.abs().amax(dim=-1).float() / 127
    return (x / scale[..., None]).round_().to(torch.int8), scale
