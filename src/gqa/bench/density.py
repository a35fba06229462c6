"""Serving density: how many sequences a fixed memory of keys and values holds, and their tokens per second."""

# B sequences · S tokens of each · H KV heads · D head dim of k · Dv head dim of v

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from gqa.bench.decode import evaluating
from gqa.bench.machine import Probe
from gqa.bench.timing import Seconds, take_turns
from gqa.cache.pool import BlockPool, PoolFullError
from gqa.config import ModelShape
from gqa.errors import GqaError
from gqa.hardware import Device
from gqa.model.hf import GqaCache
from gqa.model.serve import forward
from gqa.plan.capacity import max_concurrent_requests
from gqa.plan.decode import decode_bound
from gqa.plan.engines import Paged
from gqa.plan.kv_dtype import kv_dtype
from gqa.progress import Progress, silent
from gqa.record import describe_machine
from gqa.units import DTYPE_BYTES, format_bytes

WARM_UP_STEPS = 3
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclasses.dataclass(frozen=True)
class Memory:
    """What keys and values may take: `budget_bytes` over all layers, in blocks of `block_tokens`, as the model gives
    them or in int8."""

    budget_bytes: int
    block_tokens: int = 16
    int8: bool = False

    def kv_name(self, model: Any) -> str:
        """The dtype of keys and values. Raises GqaError for a model that is in none of fp32, bf16 and fp16."""
        if model.dtype not in DTYPE_NAMES:
            raise GqaError("a model of this dtype is not timed", got=model.dtype, allowed="fp32, bf16, fp16")
        return "int8" if self.int8 else DTYPE_NAMES[model.dtype]

    def pool(self, model: Any) -> BlockPool:
        """As many blocks as the budget has room for, by the weight of one that the model has really written to.

        Raises GqaError where not even one fits, where the budget exceeds the memory of a CPU's machine, and for a model
        whose layers are not all attention with keys and values of their own.
        """
        self.kv_name(model)
        present = describe_machine()["memory_bytes"]
        if model.device.type == "cpu" and present is not None and self.budget_bytes > present:
            raise GqaError(
                "the memory asked for is not there", got=format_bytes(self.budget_bytes), allowed=format_bytes(present)
            )
        probe = self._pool(1)
        cache = _cache(model, probe)
        forward(model, cache, [[0]])
        blocks = self.budget_bytes // probe.block_bytes
        if not blocks:
            raise GqaError(
                "not even one block fits",
                got=format_bytes(self.budget_bytes),
                allowed=f"{format_bytes(probe.block_bytes)} or more, {self.block_tokens} tokens of every layer",
            )
        return self._pool(blocks)

    def _pool(self, blocks: int) -> BlockPool:
        return BlockPool(blocks, block=self.block_tokens, dtype=torch.int8 if self.int8 else None)


def measure_density(
    model: Any,
    shape: ModelShape,
    memory: Memory,
    context: int,
    device: Device,
    *,
    read: Probe | None = None,
    repeats: int = 20,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Fill a real pool with sequences of `context` tokens until it refuses one; then decode them all, step by step.

    model: a transformers causal language model with attn_implementation="gqa" on the device. shape: its config as
    the planner reads it, from which what fits is predicted first. device: gives the bound of the time; read: run in
    turns with the steps, gives its bandwidth instead. Keys and values are random: time does not depend on them. A step
    gives every sequence its last token, over `context` keys, and is taken back.

    Returns a flat row: kv_heads, queries_per_kv_head, context_tokens, dtype, kv_dtype, block_tokens.
    predicted: pool_blocks_predicted, sequences_predicted, decode_seconds_bound and tokens_per_second_bound (None where
    the planner does not know the parameters).
    measured: pool_blocks, pool_bytes, sequences_fit; read_bytes_per_second of `read`, None without it;
    seconds_per_step_p20, _p50, _p80, tokens_per_second, tokens_per_second_each.
    Times and their bounds are None where nothing fits.
    Raises GqaError like `Memory.pool`, and for a context or repeats below 1.
    """
    if context < 1:
        raise GqaError("context_tokens must be positive", got=context, allowed="1 or more")
    kv = kv_dtype(memory.kv_name(model))
    engine = Paged(block=memory.block_tokens)
    predicted = max_concurrent_requests(engine, shape, context, kv, memory.budget_bytes)
    row: dict[str, Any] = {
        "kv_heads": shape.kv_heads,
        "queries_per_kv_head": shape.query_heads // shape.kv_heads,
        "context_tokens": context,
        "dtype": DTYPE_NAMES[model.dtype],
        "kv_dtype": kv.name,
        "block_tokens": memory.block_tokens,
        "pool_blocks_predicted": engine.pool(shape, context, memory.budget_bytes, kv).blocks,
        "sequences_predicted": predicted,
    }
    with evaluating(model):
        pool = memory.pool(model)
        cache = filled(model, pool, context, predicted, progress)
        row |= {
            "pool_blocks": pool.num_blocks,
            "pool_bytes": pool.nbytes_allocated,
            "sequences_fit": len(cache.lengths),
        }
        if not cache.lengths:
            return row | dict.fromkeys(_SPEEDS)
        note = f"{shape.kv_heads} KV heads, {len(cache.lengths)} sequences"
        timed, rate = _time(model, cache, read, repeats, lambda done: progress("decode", done, repeats, note))
    if rate is not None:
        device = dataclasses.replace(device, bandwidth_bytes_per_second=rate)
    batch = row["sequences_fit"]
    bound = decode_bound(shape, context, batch, kv, DTYPE_BYTES[row["dtype"]], device)
    return row | {
        "read_bytes_per_second": rate,
        "seconds_per_step_p20": timed.p20,
        "seconds_per_step_p50": timed.p50,
        "seconds_per_step_p80": timed.p80,
        "tokens_per_second": batch / timed.p50,
        "tokens_per_second_each": 1 / timed.p50,
        "decode_seconds_bound": bound and bound.seconds,
        "tokens_per_second_bound": bound and batch / bound.seconds,
    }


_SPEEDS = (
    "read_bytes_per_second",
    "seconds_per_step_p20",
    "seconds_per_step_p50",
    "seconds_per_step_p80",
    "tokens_per_second",
    "tokens_per_second_each",
    "decode_seconds_bound",
    "tokens_per_second_bound",
)


def filled(model: Any, pool: BlockPool, context: int, expected: int, progress: Progress = silent) -> GqaCache:
    """A cache of sequences of `context` random tokens, admitted one by one until the pool refuses."""
    whole = _cache(model, pool)
    new = _random_tokens(model, pool.dtype, context)
    note = f"{pool.num_blocks} blocks"
    while True:
        one = _cache(model, pool)
        try:
            for layer, (k, v) in enumerate(new):
                one.store.update(layer, k, v)
        except PoolFullError:
            one.reset()
            return whole
        whole.join(one)
        progress("filling the pool", len(whole.lengths), max(expected, len(whole.lengths)), note)


def _random_tokens(model: Any, dtype: torch.dtype | None, context: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per layer k (1, H, S, D) and v (1, H, S, Dv), as the model itself would write them."""
    probe = _cache(model, BlockPool(1, block=1, dtype=dtype))
    forward(model, probe, [[0]])
    random = torch.Generator().manual_seed(0)
    return [
        tuple(
            torch.randn(1, data.shape[1], context, data.shape[3], generator=random).to(model.device, model.dtype)
            for data in (held.data for held in layer.stored())
        )
        for layer in probe.blocks
    ]  # type: ignore[return-value]


def _cache(model: Any, pool: BlockPool) -> GqaCache:
    return GqaCache(config=model.config, kind="paged", pool=pool)


def _time(
    model: Any, cache: GqaCache, read: Probe | None, repeats: int, on_round: Callable[[int], None]
) -> tuple[Seconds, float | None]:
    """Of a step of all sequences, each of which ends as it began; and the rate of `read` in the same turns."""
    cache.crop(-1)
    ids = [[0]] * len(cache.lengths)

    def step(_: int) -> None:
        forward(model, cache, ids)[0, 0].item()  # waits for the device

    turns: dict[str, Callable[[int], object]] = {"decode": step}
    if read is not None:
        turns["read"] = lambda _: read.run()
    timed = take_turns(
        turns,
        repeats=repeats,
        warm_up=WARM_UP_STEPS,
        after={"decode": lambda: cache.crop(-1)},
        on_round=on_round,
    )
    return timed["decode"], None if read is None else read.amount / timed["read"].p50
