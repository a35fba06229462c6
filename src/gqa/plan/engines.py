"""What an engine makes of a cache: blocks, padding, pools.

Rules read off released packages (vLLM 0.7.3 to 0.33.0, SGLang 0.5.23, llama.cpp 0c1e57098) and held to what they log
(data/logged.toml). All sizes are of one device: give the rules the shape that `shard` returns.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from typing import Protocol

from gqa.config import LayerShape, ModelShape
from gqa.errors import GqaError
from gqa.plan.cache import (
    FP32_BYTES,
    bytes_of_heads,
    kv_bytes,
    kv_bytes_per_token,
    row_bytes,
    served_row_bytes,
    state_bytes,
)
from gqa.plan.kv_dtype import KvDtype
from gqa.plan.pool import Pool
from gqa.plan.vllm import LATEST, Vllm


class Engine(Protocol):
    """The rules of one engine. `utilisation` is its own share of a device's memory."""

    @property
    def name(self) -> str: ...

    @property
    def utilisation(self) -> float: ...

    def rules(self, shape: ModelShape, kv: KvDtype) -> tuple[str, ...]:
        """What the figures follow, as sentences for the reader."""
        ...

    def bytes_for(self, shape: ModelShape, context: int, requests: int, kv: KvDtype) -> int:
        """Bytes that `requests` requests of S tokens take."""
        ...

    def pool(self, shape: ModelShape, context: int, budget: int, kv: KvDtype) -> Pool:
        """What the engine makes of `budget` bytes for requests of S tokens."""
        ...


@dataclasses.dataclass(frozen=True)
class Contiguous:
    """A cache of exactly the tokens that are kept, as gqa's own caches are when they are full."""

    name: str = "contiguous"
    utilisation: float = 0.9

    def rules(self, shape: ModelShape, kv: KvDtype) -> tuple[str, ...]:
        return ("The cache holds exactly the tokens asked for: no block rounding, no padding.",)

    def bytes_for(self, shape: ModelShape, context: int, requests: int, kv: KvDtype) -> int:
        return kv_bytes(shape, context, requests, kv)

    def pool(self, shape: ModelShape, context: int, budget: int, kv: KvDtype) -> Pool:
        one = kv_bytes(shape, context, 1, kv)
        concurrency = max(0, budget) / one if one else math.inf
        return Pool(max(0, budget) * context // one if one else 0, concurrency)


@dataclasses.dataclass(frozen=True)
class Paged:
    """Blocks of tokens in one pool, each over all layers, as `gqa.cache.pool.BlockPool` hands them out."""

    name: str = "paged"
    utilisation: float = 0.9
    block: int = 16

    def rules(self, shape: ModelShape, kv: KvDtype) -> tuple[str, ...]:
        said = [f"gqa's paged cache: a request takes whole blocks of {self.block} tokens of every layer."]
        if any(layer.window for layer in shape.layers):
            said.append("gqa's paged cache: sliding layers keep every token.")
        return tuple(said)

    def bytes_for(self, shape: ModelShape, context: int, requests: int, kv: KvDtype) -> int:
        return requests * (-(-context // self.block) * self.block_bytes(shape, kv) + state_bytes(shape, kv))

    def pool(self, shape: ModelShape, context: int, budget: int, kv: KvDtype) -> Pool:
        one, block = self.bytes_for(shape, context, 1, kv), self.block_bytes(shape, kv)
        if not one:
            return Pool(0, math.inf)
        if one == -(-context // self.block) * block:  # a part of a block is of no use
            blocks = max(0, budget) // block
            return Pool(blocks * self.block, blocks / -(-context // self.block), blocks, self.block)
        requests = max(0, budget) // one
        return Pool(requests * context, float(requests), block_tokens=self.block)

    def block_bytes(self, shape: ModelShape, kv: KvDtype) -> int:
        """Bytes of one block over all layers."""
        return self.block * kv_bytes_per_token(shape, kv)


@dataclasses.dataclass(frozen=True)
class SGLang:
    """Slots for tokens, in one pool over all layers or one for full and one for sliding layers; slots for states."""

    name: str = "sglang"
    utilisation: float = 0.88
    page: int = 1
    sliding_ratio: float = 0.8
    state_ratio: float = 0.9

    def rules(self, shape: ModelShape, kv: KvDtype) -> tuple[str, ...]:
        said = [
            "SGLang: a slot per token of every layer, one page to spare; the utilisation is mem_fraction_static, whose"
            " default depends on the device (0.88 where SGLang knows none)."
        ]
        if self._two_pools(shape):
            said.append("SGLang: sliding layers have a pool of 0.8 times the tokens of the full ones.")
        elif any(layer.window for layer in shape.layers):
            said.append(f"SGLang has no sliding pool for {shape.model_type}: such layers are charged in full.")
        if any(layer.state for layer in shape.layers):
            said.append("SGLang: 0.9 bytes for constant states per byte of K and V, one slot to spare.")
        return tuple(said)

    def bytes_for(self, shape: ModelShape, context: int, requests: int, kv: KvDtype) -> int:
        return sum(self.parts(shape, requests * _pad(context, self.page), requests, kv).values())

    def parts(self, shape: ModelShape, tokens: int, requests: int, kv: KvDtype) -> dict[str, int]:
        """Bytes of a pool of so many tokens by what they hold, as SGLang logs them (its "GB" are GiB)."""
        found: Counter[str] = Counter()
        for layer in shape.layers:
            slides = self._two_pools(shape) and layer.window is not None
            slots = (int(tokens * self.sliding_ratio) if slides else tokens) + self.page
            for part, row in _k_and_v(layer, kv).items():
                found[part + ("_sliding" if slides else "")] += slots * row
            if s := layer.state:
                found["conv"] += (requests + 1) * 2 * s.channels * max(0, s.taps - 1)
                found["ssm"] += (requests + 1) * FP32_BYTES * s.recurrent
        return dict(found)

    def pool(self, shape: ModelShape, context: int, budget: int, kv: KvDtype) -> Pool:
        slot, rest, slots = self._slot(shape), max(0, budget), math.inf
        if slot:
            slots = max(0, (rest * self.state_ratio / (1 + self.state_ratio) - slot) // slot)
            rest -= (slots + 1) * slot
        cell = 0.0
        for layer in shape.layers:
            slides = self._two_pools(shape) and layer.window is not None
            cell += served_row_bytes(layer, kv) * (self.sliding_ratio if slides else 1)
        tokens = int(max(0, rest) // cell) // self.page * self.page if cell else 0
        return Pool(tokens, min(tokens / context if cell else math.inf, slots), tokens // self.page, self.page)

    def _two_pools(self, shape: ModelShape) -> bool:
        return shape.model_type in _SGLANG_TWO_POOLS and len({layer.window for layer in shape.attention}) > 1

    def _slot(self, shape: ModelShape) -> int:
        """Bytes of one request's constant states."""
        states = [layer.state for layer in shape.layers if layer.state]
        return sum(2 * s.channels * max(0, s.taps - 1) + FP32_BYTES * s.recurrent for s in states)


# Architectures with two pools in SGLang 0.5.23 (its model_config.py).
_SGLANG_TWO_POOLS = {"llama4_text", "gpt_oss", "mimo_v2_flash", "gemma4_text", "step3p5"}


@dataclasses.dataclass(frozen=True)
class LlamaCpp:
    """Cells in steps of 256, a stream of them per request; recurrent states in fp32."""

    name: str = "llama.cpp"
    utilisation: float = 1.0
    step: int = 256
    micro_batch: int = 512

    def rules(self, shape: ModelShape, kv: KvDtype) -> tuple[str, ...]:
        said = [
            "llama.cpp: contexts are padded to 256 cells, a stream per request (--parallel N without --kv-unified); it"
            " keeps no memory back unless --fit is on, which leaves 1 GiB (--reserve 1GiB)."
        ]
        if any(layer.window for layer in shape.layers):
            said.append(f"llama.cpp: a sliding layer has cells for its window and a micro-batch ({self.micro_batch}).")
        return tuple(said)

    def bytes_for(self, shape: ModelShape, context: int, requests: int, kv: KvDtype) -> int:
        return sum(self.parts(shape, context, requests, kv).values())

    def parts(self, shape: ModelShape, context: int, requests: int, kv: KvDtype) -> dict[str, int]:
        """Bytes by what they hold, as llama.cpp logs them: K and V of full and of sliding layers, R and S of states."""
        found: Counter[str] = Counter()
        base = _pad(context, self.step)
        for layer in shape.layers:
            slides = layer.window is not None
            cells = min(base, _pad(layer.window + self.micro_batch, self.step)) if layer.window is not None else base
            self._check(layer, kv)
            for part, row in _k_and_v(layer, kv, served=False).items():
                found[part + ("_sliding" if slides else "")] += requests * cells * row
            if s := layer.state:
                found["r"] += requests * FP32_BYTES * s.channels * max(0, s.taps - 1)
                found["s"] += requests * FP32_BYTES * s.recurrent
        return dict(found)

    def pool(self, shape: ModelShape, context: int, budget: int, kv: KvDtype) -> Pool:
        one = self.bytes_for(shape, context, 1, kv)
        requests = max(0, budget) // one if one else 0
        return Pool(requests * _pad(context, self.step), float(requests), block_tokens=self.step)

    def _check(self, layer: LayerShape, kv: KvDtype) -> None:
        dims = {layer.head_dim} if layer.kind == "mla" else {layer.head_dim, layer.v_head_dim}
        for dim in dims:
            if dim % kv.block:
                raise GqaError(
                    f"llama.cpp does not keep heads of {dim} numbers in {kv.name}",
                    allowed=f"head dims that are multiples of {kv.block}",
                    hint="--kv-dtype fp16",
                )


def find_engine(name: str, *, block: int | None = None, batched_tokens: int | None = None) -> Engine:
    """The engine of that name: `contiguous`, `paged`, `vllm` or `vllm@0.19` for a version's rules, `sglang`,
    `llama.cpp`.

    block: tokens per block or page; batched_tokens: the most tokens of a step (vLLM's --max-num-batched-tokens,
    llama.cpp's --ubatch-size). Raises GqaError for other names and for options that the engine does not have.
    """
    plain = name.lower()
    own = {"contiguous": (), "paged": ("--block",), "sglang": ("--block",), "llama.cpp": ("--batched-tokens",)}.get(
        plain, ()
    )
    match = re.fullmatch(r"vllm(?:@(\d{1,3})\.(\d{1,3})(?:\.\d{1,3})?)?", plain)
    for option, value in (("--block", block), ("--batched-tokens", batched_tokens)):
        if value is not None and not 1 <= value <= 1 << 30:
            raise GqaError(f"{option} is out of range", got=value, allowed=f"1 to {1 << 30}")
        if value is not None and not match and option not in own and plain in ENGINES:
            raise GqaError(f"{option} means nothing to {plain}", got=value, hint=f"leave out {option}")
    if match:
        version = (int(match[1]), int(match[2])) if match[1] else LATEST
        return Vllm(version, block, batched_tokens or 8192)
    if plain == "sglang":
        return SGLang(page=block or 1)
    if plain == "llama.cpp":
        return LlamaCpp(micro_batch=batched_tokens or 512)
    if plain == "contiguous":
        return Contiguous()
    if plain == "paged":
        return Paged(block=block or 16)
    raise GqaError("an unknown engine", got=repr(name), allowed=f"{', '.join(ENGINES)}, or vllm@0.19 for a version")


ENGINES = ("contiguous", "paged", "vllm", "sglang", "llama.cpp")


def _k_and_v(layer: LayerShape, kv: KvDtype, served: bool = True) -> dict[str, int]:
    """Bytes of a token's rows of one layer. A latent row, which serves as V, too, counts as K."""
    if layer.kind == "mla":
        whole = served_row_bytes(layer, kv) if served else row_bytes(layer, kv)
        return {"k": whole}
    if layer.shares_cache or not layer.query_heads:
        return {}
    heads = layer.kv_heads
    return {"k": bytes_of_heads(heads, layer.head_dim, kv), "v": bytes_of_heads(heads, layer.v_head_dim, kv)}


def _pad(number: int, step: int) -> int:
    return -(-number // step) * step
