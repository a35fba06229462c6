"""Which shapes are timed: the few behind the claims (`headline`), and the whole field (`full`)."""

# S key tokens · D head dim

from __future__ import annotations

from gqa.bench.problem import Problem

DTYPES = ("fp32", "bf16", "fp16", "int8")
FLOATS = DTYPES[:3]
HEADS = ((64, 8), (32, 8), (32, 32), (32, 1), (28, 4), (24, 8), (71, 1))
DIAL = (32, 16, 8, 4, 2, 1)
LONG, MIDDLE, SHORT = 32768, 8192, 1024
PROMPT = 2048
MODEL, MODEL_LAYERS = "llama-3.2-1b", 4
CONTEXTS = (512, MIDDLE, LONG)
MODEL_DTYPES = ("fp32", "bf16")


def headline() -> list[Problem]:
    """The rows that claims are made of, and one of every other kind."""
    decode = [Problem(*heads, 128, S, dtype=dtype) for S in (MIDDLE, LONG) for heads in HEADS[:2] for dtype in DTYPES]
    decode += [Problem(32, kv_heads, 128, LONG, dtype="bf16") for kv_heads in DIAL]
    decode += [Problem(*heads, 128, MIDDLE, dtype="bf16") for heads in HEADS[2:]]
    decode += [Problem(32, 8, head_dim, MIDDLE, dtype="bf16") for head_dim in (64, 256)]
    decode += [Problem(32, 8, 128, SHORT, dtype=dtype) for dtype in ("fp32", "bf16")]
    decode += [Problem(32, 8, 128, MIDDLE, batch=8, dtype="bf16")]
    return _once(decode + prompts())


def full(memory_bytes: int) -> list[Problem]:
    """Every combination whose inputs, with their copies for the peers, take at most a third of the memory."""
    decode = [
        Problem(*heads, head_dim, S, batch=batch, dtype=dtype)
        for heads in HEADS
        for head_dim in (64, 128, 256)
        for S in (SHORT, MIDDLE, LONG)
        for batch in (1, 8)
        for dtype in DTYPES
    ]
    decode += [Problem(32, kv_heads, 128, LONG, dtype=dtype) for kv_heads in DIAL for dtype in FLOATS]
    copies = 4  # ours and torch's, onnxruntime's, JAX's, and a part of it in float64
    fitting = [problem for problem in decode if copies * problem.kv_bytes < memory_bytes / 3]
    return _once(headline() + fitting)


def prompts() -> list[Problem]:
    """Causal prefill, forward and then forward and backward."""
    return [
        Problem(32, 8, 128, PROMPT, PROMPT, dtype=dtype, backward=backward)
        for backward in (False, True)
        for dtype in FLOATS
    ]


def _once(problems: list[Problem]) -> list[Problem]:
    return list(dict.fromkeys(problems))
