"""How many bytes numbers of a KV cache take, scales included."""

from __future__ import annotations

import dataclasses

from gqa.errors import GqaError


@dataclasses.dataclass(frozen=True)
class KvDtype:
    """`block_bytes` for every `block` numbers of a token's row, and `scale_bytes` more for each head's K and V."""

    name: str
    block_bytes: int
    block: int = 1
    scale_bytes: int = 0

    def bytes_of(self, numbers: int, heads: int) -> int:
        """Bytes of one token's row of K, or of V: `numbers` of `heads` heads together."""
        return -(-numbers // self.block) * self.block_bytes + heads * self.scale_bytes

    @property
    def state_element_bytes(self) -> int:
        """Of the inputs that a convolution keeps, which no engine quantises."""
        return max(2, self.block_bytes // self.block)


KV_DTYPES = {
    dtype.name: dtype
    for dtype in (
        KvDtype("fp32", 4),
        KvDtype("fp16", 2),
        KvDtype("bf16", 2),
        KvDtype("fp8", 1),  # one scale per layer, which counts nothing
        KvDtype("int8", 1, scale_bytes=4),  # a float32 per token and head: gqa's own, and vLLM's int8_per_token_head
        # Blocks of 32 with a scale, as ggml-common.h of llama.cpp lays them out.
        KvDtype("q8_0", 34, 32),
        KvDtype("q5_1", 24, 32),
        KvDtype("q5_0", 22, 32),
        KvDtype("q4_1", 20, 32),
        KvDtype("q4_0", 18, 32),
        KvDtype("iq4_nl", 18, 32),
    )
}


def kv_dtype(name: str) -> KvDtype:
    """The dtype of that name, or of one of its other names. Raises GqaError."""
    known = KV_DTYPES.get(_SAME.get(name, name))
    if known is None:
        raise GqaError("an unknown dtype of a KV cache", got=repr(name), allowed=", ".join(KV_DTYPES))
    return known


_SAME = {
    "float32": "fp32",
    "f32": "fp32",
    "float16": "fp16",
    "f16": "fp16",
    "bfloat16": "bf16",
    "fp8_e4m3": "fp8",
    "fp8_e5m2": "fp8",
}
