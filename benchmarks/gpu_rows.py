"""Which shapes are timed on a GPU, the most telling first: where time runs out, the last ones are left."""

# S key tokens · D head dim

from __future__ import annotations

import dataclasses

from gqa.bench.problem import Problem

HEADS = ((64, 8), (32, 8), (28, 4), (24, 8), (32, 1), (32, 32))
DIAL = (32, 16, 8, 4, 2, 1)
BATCHES = (1, 8, 64)
CONTEXTS = (1024, 8192, 32768, 131072)
HEAD_DIMS = (128, 64, 256)
PROMPTS = ((4, 4096), (1, 16384))  # (batch, tokens): as many tokens in each

SHARE = 1 / 4  # of the memory that K and V of a row may take: some peers hold a copy in a layout of their own
SCORES = 8  # score matrices in float64 that the check of a prompt holds


def headline_decode() -> list[Problem]:
    """A full GPU and a lone sequence, at the two shapes of most models."""
    sizes = ((32, 8192), (1, 32768), (32, 32768), (1, 8192))
    return [Problem(*heads, 128, S, batch=batch) for batch, S in sizes for heads in HEADS[:2]]


def prompts(dtype: str) -> list[Problem]:
    """Causal prefill, forward and then forward and backward."""
    return [
        Problem(*heads, 128, S, S, batch=batch, dtype=dtype, backward=backward)
        for batch, S in PROMPTS
        for heads in ((32, 8), (64, 8))
        for backward in (False, True)
    ]


def dial() -> list[Problem]:
    return [Problem(32, kv_heads, 128, 32768, batch=16) for kv_heads in DIAL]


def dtypes() -> list[Problem]:
    return [
        dataclasses.replace(problem, dtype=dtype)
        for dtype in ("fp16", "int8", "fp32")
        for problem in headline_decode()[:4]
    ]


def table() -> list[Problem]:
    """Every combination; no backend is to be ahead of us in any."""
    return [
        Problem(*heads, head_dim, S, batch=batch)
        for head_dim in HEAD_DIMS
        for heads in HEADS
        for batch in BATCHES
        for S in CONTEXTS
    ]


def rows(memory_bytes: int) -> tuple[list[Problem], list[Problem]]:
    """(what is to be timed, in this order; what does not fit into the memory)."""
    everything = headline_decode() + prompts("bf16") + dial() + dtypes() + prompts("fp16") + table()
    everything = list(dict.fromkeys(everything))
    fitting = [problem for problem in everything if fits(problem, memory_bytes)]
    return fitting, [problem for problem in everything if not fits(problem, memory_bytes)]


def fits(problem: Problem, memory_bytes: int) -> bool:
    checked = SCORES * problem.query_tokens * problem.context_tokens * 8 if problem.causal else 0
    return problem.kv_bytes <= SHARE * memory_bytes and checked <= memory_bytes / 2


def compiled(problem: Problem) -> bool:
    """Whether FlexAttention takes part, which compiles for each shape, some ten seconds."""
    return problem == headline_decode()[1] or (problem.query_heads == 32 and problem in prompts("bf16")[:4])


def paged(problem: Problem) -> bool:
    """Whether our own call over pages takes part."""
    return problem in headline_decode() or (not problem.causal and problem in dtypes())
