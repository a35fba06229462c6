"""How long a conversion takes, estimated before it begins: the arithmetic of a layer, and this machine's rate of it.

Letters: A numbers of an attention · B of a whole block · n tokens of text · T tokens per window · d hidden size ·
H KV heads of the parent · r of them share one · G queries per KV head · D head dim.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import torch

from gqa.convert.calibrate import BATCH
from gqa.convert.memory import trained_numbers
from gqa.convert.scores import SOLVES, can_refit, score_tokens

if TYPE_CHECKING:
    from gqa.convert.job import Job

# What decompositions take in products of matrices of their size: a guess, with which `svd` of a 7B shape was estimated
# at 6 min 13 s where it took 3 min 42 s.
_EIGH = 60
_MEASURE_SIZE = 1024
# What norms, activations, softmax and the optimizer add to the products of a distillation: measured on SmolLM2-135M.
_DISTILL_OVERHEAD = 1.6


def seconds_estimate(job: Job, device: str = "cpu") -> float | None:
    """Seconds for the calculations; None where they are hidden behind the writing of files.

    Counted per layer: parent's and child's passes over n tokens, covariances and least squares in float64, the search
    for groups and the closed form, the refit of scores on some of them, and 6 A + 12 G H T D per token of
    refinement. Good to a factor of two.
    """
    if job.pooled or job.identity:
        return None
    single, double = (_flops_per_second(dtype, device) for dtype in (torch.float32, torch.float64))
    total = 0.0
    for layer in job.changes:
        narrow, wide = _layer_flops(job, layer)
        total += narrow / single + wide / double
    if job.distills:
        half = _flops_per_second(torch.bfloat16, device) if job.recipe.distill_precision == "bf16" else single
        total += distill_flops(job) / half * _DISTILL_OVERHEAD
    return total


def distill_flops(job: Job) -> float:
    """Operations of a distillation: forward passes of parent and child, the child's backward to its hidden states and
    to its attentions' weights. The input embedding is not multiplied; the head is, and no gradient of its own is made.
    """
    recipe, shape = job.recipe, job.parent
    numbers = sum(math.prod(job.checkpoint.entry(name).shape) for name in job.checkpoint.names)
    rows = job.checkpoint.shape(job.layout.embedding)
    multiplied = numbers - (0 if shape.tied_embeddings else math.prod(rows))
    trained = trained_numbers(job)
    child = multiplied - sum(math.prod(one.shape) for layer in job.changes for one in job.attention(layer)) + trained
    core = sum(4 * layer.query_heads * recipe.distill_window * layer.head_dim for layer in shape.layers) / 2
    tokens = recipe.distill_windows * recipe.distill_window
    return tokens * (2 * multiplied + 4 * child + 2 * trained + core * 4.5)


def _layer_flops(job: Job, layer: int) -> tuple[float, float]:
    """Operations in float32 and in float64."""
    recipe, shape, d = job.recipe, job.parent.layers[layer], job.parent.hidden
    prefix = job.layout.layer_prefix(layer)
    A = sum(math.prod(entry.shape) for entry in job.attention(layer))
    B = sum(math.prod(job.checkpoint.entry(n).shape) for n in job.checkpoint.names if n.startswith(prefix))
    H, heads, D, Dv = shape.kv_heads, shape.query_heads, shape.head_dim, shape.v_head_dim
    r = H // recipe.kv_heads
    # Energies, pairs of heads and each group's subspace; of keys and of values.
    wide = 4 * heads * d * D * d + 4 * heads * d * Dv * Dv + 2 * (H * Dv) ** 2 * d
    if recipe.grouping == "search" and 1 < recipe.kv_heads < H:
        wide += H * H / 2 * _EIGH * (2 * Dv) ** 3
    wide += recipe.kv_heads * _EIGH * (r * Dv) ** 3 * (recipe.method == "svd")
    if not recipe.all_windows:
        return 0.0, wide
    n, T = recipe.all_windows * recipe.window, recipe.window
    core = 4 * heads * T * D  # of an attention, per token
    narrow = n * (4 * B + 2 * core)
    if recipe.windows:
        n = recipe.windows * T
        narrow += n * 3 * (2 * A + core)
        wide += 2 * n * d * d
        if recipe.refit:
            m = heads * Dv
            wide += 2 * n * (m * m + 2 * m * d) + m**3
            if can_refit(job.layout.norm, shape):
                narrow += SOLVES * min(n, score_tokens(d)) * heads * (4 * d * D + 6 * T * D + 8 * T)
    if recipe.refine_tokens:
        tokens = recipe.refine_steps * BATCH * T
        narrow += tokens * (6 * A + 3 * core) + recipe.refine_steps * 25 * A * D  # and Muon's products, head by head
    return narrow, wide


def _flops_per_second(dtype: torch.dtype, device: str) -> float:
    """Of a product of two square matrices, measured now."""
    a = torch.ones(_MEASURE_SIZE, _MEASURE_SIZE, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - began)
    return 2 * _MEASURE_SIZE**3 / best
