"""vLLM's paged cache: groups of layers that draw blocks of one size from one pool.

Read off the released packages: v1/core/kv_cache_utils.py (kv_cache_planning.py since 0.33), v1/kv_cache_interface.py,
config/cache.py, platforms/interface.py. What a rule's number is since which version stands beside it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

from gqa.config import ModelShape
from gqa.errors import GqaError
from gqa.plan.cache import FP32_BYTES, served_row_bytes
from gqa.plan.kv_dtype import KvDtype
from gqa.plan.pool import Pool

LATEST = (0, 33)

_BLOCK, _LATENT_BLOCK, _LATENT_HYBRID_ALIGN = 16, 64, 128


@dataclasses.dataclass(frozen=True)
class _Kind:
    """Layers that keep the same: bytes per token and block, or a constant state (`state` bytes per request)."""

    row: int
    window: int | None
    chunked: bool
    state: int


@dataclasses.dataclass(frozen=True)
class _Group:
    """Layers of one kind that get blocks together: a request takes `blocks` of them."""

    blocks: int
    block: int


@dataclasses.dataclass(frozen=True)
class Vllm:
    """The rules of one version. batched_tokens: max_num_batched_tokens, of which sliding layers keep a step's worth."""

    version: tuple[int, int] = LATEST
    block: int | None = None
    batched_tokens: int = 8192

    @property
    def name(self) -> str:
        return "vllm" if self.version == LATEST else f"vllm@{self.version[0]}.{self.version[1]}"

    @property
    def utilisation(self) -> float:
        return 0.92 if self.version >= (0, 20) else 0.9

    def rules(self, shape: ModelShape, kv: KvDtype) -> tuple[str, ...]:
        kinds = _kinds(shape, kv)
        version, block = ".".join(map(str, self.version)), self._first_block(shape, kinds)
        said = [f"vLLM {version}: blocks of {block} tokens; a request takes whole blocks in every group of layers."]
        if any(kind.window for kind in kinds):
            said.append(
                f"vLLM: a sliding layer keeps its window and a step's tokens (--batched-tokens {self.batched_tokens}"
                f"{', twice, as steps overlap' if self._steps() > 1 else ''}) and one block more."
            )
        if any(kind.state for kind in kinds):
            said.append("vLLM: a constant state takes two blocks of its group (prefix caching is on).")
        return tuple(said)

    def bytes_for(self, shape: ModelShape, context: int, requests: int, kv: KvDtype) -> int:
        groups, block_bytes = self._layout(shape, context, kv)
        return requests * sum(group.blocks for group in groups) * block_bytes

    def pool(self, shape: ModelShape, context: int, budget: int, kv: KvDtype) -> Pool:
        groups, block_bytes = self._layout(shape, context, kv)
        blocks = max(0, budget) // block_bytes
        smallest = min(group.block for group in groups)
        concurrency = blocks / sum(group.blocks for group in groups)
        tokens = blocks // len(groups) * smallest
        if self.version < (0, 9):
            concurrency = tokens / context
        elif self.version >= (0, 21):
            tokens = int(concurrency * context)
        return Pool(tokens, concurrency, blocks, smallest)

    def _layout(self, shape: ModelShape, context: int, kv: KvDtype) -> tuple[list[_Group], int]:
        """Groups of layers, and the bytes of a block in every layer of one group together."""
        kinds = _kinds(shape, kv)
        if not kinds:
            raise GqaError(f"{shape.name} keeps nothing for a request", hint="--engine contiguous")
        block = self._first_block(shape, kinds)
        alike = {(kind.window, kind.chunked, bool(kind.state)) for kind in kinds}
        if len(alike) == 1:
            return [self._group(next(iter(kinds)), block, context)], sum(
                count * self._page(kind, block) for kind, count in kinds.items()
            )
        page = max(self._page(kind, block) for kind in kinds)
        # A smaller page that divides the largest gets longer blocks; others are padded up to it.
        blocks = {}
        for kind in kinds:
            times, rest = divmod(page, self._page(kind, block))
            blocks[kind] = block if kind.state or rest else block * times
        size = self._group_size([kinds[kind] for kind in kinds])
        groups = [
            self._group(kind, blocks[kind], context) for kind, count in kinds.items() for _ in range(-(-count // size))
        ]
        return groups, size * page

    def _group(self, kind: _Kind, block: int, context: int) -> _Group:
        if kind.state:
            return _Group(2, block)
        if kind.window is None:
            return _Group(-(-context // block), block)
        kept = kind.window - (not kind.chunked) + self._steps() * self.batched_tokens
        return _Group(-(-min(kept, context) // block) + (not kind.chunked), block)

    def _page(self, kind: _Kind, block: int) -> int:
        """Bytes of one block in one layer."""
        return kind.state or block * kind.row

    def _first_block(self, shape: ModelShape, kinds: Counter[_Kind]) -> int:
        """Tokens of a block: the option's, or what fits the model. Where layers keep states, the attention's blocks
        are widened until one holds a state."""
        block = self.block or self._latent_block(shape) or _BLOCK
        state, row = max((kind.state for kind in kinds), default=0), max((kind.row for kind in kinds), default=0)
        if not state or not row:
            return block
        align = max(block, _LATENT_HYBRID_ALIGN) if shape.is_latent else block
        return align * -(-state // (align * row))

    def _latent_block(self, shape: ModelShape) -> int:
        """FlashMLA's blocks; with states beside latent attention the alignment takes their place."""
        return _LATENT_BLOCK if shape.is_latent else 0

    def _group_size(self, counts: list[int]) -> int:
        """Layers per group: the smallest kind's, or the largest's where it is little more."""
        low, high = min(counts), max(counts)
        little = 1.5 if self.version >= (0, 18) else 1.25 if self.version >= (0, 12) else 1.0
        return high if high < low * little else low

    def _steps(self) -> int:
        """Steps that may be under way at once: two where scheduling overlaps them."""
        return 2 if self.version >= (0, 26) else 1


def _kinds(shape: ModelShape, kv: KvDtype) -> Counter[_Kind]:
    """The kinds of layers that keep anything, and how many there are of each; a layer with attention and a state
    counts as two."""
    found: Counter[_Kind] = Counter()
    for layer, count in shape.counted_layers:
        if row := served_row_bytes(layer, kv):
            found[_Kind(row, layer.window, layer.kind == "chunked", 0)] += count
        if s := layer.state:
            recurrent = s.recurrent * (FP32_BYTES if s.fp32 else 2)
            found[_Kind(0, None, False, 2 * s.channels * max(0, s.taps - 1) + recurrent)] += count
    return found
