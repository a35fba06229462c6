"""How much memory a conversion takes, and whether the activations of its calibration text lie in files for it.

The factors are fitted to measured peaks. Letters: A numbers of an attention · B of a whole block · n tokens of
calibration text · d hidden size.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gqa.convert.calibrate import BATCH
from gqa.convert.scores import score_tokens
from gqa.errors import GqaError
from gqa.units import format_bytes

if TYPE_CHECKING:
    from gqa.convert.job import Job

# Python with torch; and with transformers, which runs the blocks.
_LIBRARIES_BYTES = 320 << 20
_WITH_BLOCKS_BYTES = 600 << 20

# Logits of one piece of a distillation's predictions, and how many tensors of that size lie in memory: parent's and
# child's, with logarithms, exponentials and gradients.
_PIECE_BYTES, _PIECES = 64 << 20, 8

# States before a block and after it, parent's and child's, and the attention's inputs and targets.
_STATES = 6


def peak_memory_bytes(job: Job, *, streamed: bool) -> int:
    """An estimate of the process's peak; streamed: with the calibration activations in files, and
    those of a distillation made again in its backward pass.

    Pooling: two layers' attention as it is stored. Data-free: 5 A numbers of float64, parent's and child's attention
    and what the closed forms make of it. Calibrated: also B + A of float32 (a block of the parent, and the child's
    attention), 4 d^2 of float64 (the covariance and its roots), and about ten numbers per token and hidden dimension:
    of all n tokens, or, streamed, of a batch. Refitting scores holds, for some of the tokens, one group's
    scores and attention and six times its queries. Refining adds gradients and momenta for one attention. A
    distillation runs after all that (`distill_bytes`).
    """
    if job.identity:
        return _LIBRARIES_BYTES
    entries = {layer: job.attention(layer) for layer in job.changes}
    if job.pooled:
        return _LIBRARIES_BYTES + 2 * max(sum(entry.nbytes for entry in some) for some in entries.values())
    attention = max(sum(math.prod(entry.shape) for entry in some) for some in entries.values())
    peak = 5 * attention * 8
    training = _WITH_BLOCKS_BYTES + distill_bytes(job, recompute=streamed) if job.distills else 0
    if not job.recipe.all_windows:
        return max(_LIBRARIES_BYTES + peak, training)
    recipe, d = job.recipe, job.parent.hidden
    tokens = recipe.all_windows * recipe.window
    batch = min(tokens, BATCH * recipe.window)
    prefix = job.layout.layer_prefix(0)
    block = sum(math.prod(job.checkpoint.entry(n).shape) for n in job.checkpoint.names if n.startswith(prefix))
    peak += (block + attention) * 4 + 4 * d * d * 8 + 10 * (batch if streamed else tokens) * d * 4
    if recipe.refit:
        queries = max(layer.query_heads for layer in job.child.layers) // recipe.kv_heads
        states = 6 * max(layer.head_dim for layer in job.child.layers)
        peak += queries * min(score_tokens(d), tokens) * (2 * recipe.window + states) * 4
    if recipe.refine_tokens:
        peak += 3 * attention * 4
    embedding = job.checkpoint.entry(job.layout.embedding)
    first = embedding.nbytes + math.prod(embedding.shape) * 4 + tokens * d * 4
    if recipe.measure_tokens:  # the head, and the logits of one window with what the loss makes of them
        first += recipe.window * job.checkpoint.shape(job.layout.embedding)[0] * 4 * 3
    return max(_WITH_BLOCKS_BYTES + max(peak, first), training)


def distill_bytes(job: Job, *, recompute: bool = False) -> int:
    """What a distillation holds beside the libraries: every weight of the parent once, in the dtype that products run
    in; the child's attentions in float32, each with gradient and two moments; the activations of one step, about
    (4 d + 3 I) numbers of the products' dtype and 11 d of float32 per token and layer, I the width of the MLP; and
    eight tensors of a piece of logits. recompute: the backward pass makes the activations of one layer after another
    again, from the hidden states before each.
    """
    recipe, width = job.recipe, 2 if job.recipe.distill_precision == "bf16" else 4
    numbers = sum(math.prod(job.checkpoint.entry(name).shape) for name in job.checkpoint.names)
    d, wide = job.parent.hidden, job.parent.intermediate or 4 * job.parent.hidden
    tokens = recipe.distill_batch * recipe.distill_window
    layers, of_layer = len(job.parent.layers), tokens * ((4 * d + 3 * wide) * width + 11 * d * 4)
    activations = of_layer + layers * tokens * d * 4 if recompute else layers * of_layer
    piece = min(_PIECE_BYTES, tokens * job.checkpoint.shape(job.layout.embedding)[0] * 4)
    return numbers * width + 16 * trained_numbers(job) + activations + _PIECES * piece


def recomputes_activations(job: Job, budget_bytes: int | None, device: str = "cpu") -> bool:
    """Whether a distillation makes activations again to stay within a budget of the device's memory (None: what is free
    there, where the system reports it)."""
    limit = available_bytes(device) if budget_bytes is None else budget_bytes
    return job.distills and limit is not None and _WITH_BLOCKS_BYTES + distill_bytes(job) > limit


def trained_numbers(job: Job) -> int:
    """Numbers of the child's attentions, which a distillation trains."""
    total = 0
    for layer in range(len(job.child.layers)):
        shapes = job.layout.attention_shapes(job.child, layer)
        total += sum(math.prod(shape) for name, shape in shapes.items() if name in job.checkpoint)
    return total


def training_disk_bytes(job: Job) -> int:
    """Room for the checkpoints of a distillation: while a third is written, two lie there, each of weights and two
    moments in float32."""
    return 3 * 12 * trained_numbers(job) if job.distills else 0


def states_bytes(job: Job) -> int:
    """Room on the disk for the calibration activations in files, float32."""
    return _STATES * job.recipe.all_windows * job.recipe.window * job.parent.hidden * 4


def keeps_states_in_files(job: Job, budget_bytes: int | None, device: str = "cpu") -> bool:
    """Whether the calibration activations go to files, so that the conversion stays within a budget of the device's
    memory (None: what is free there, where the system reports it).

    Raises GqaError if a budget that was given is too small even so.
    """
    limit = available_bytes(device) if budget_bytes is None else budget_bytes
    if limit is None or peak_memory_bytes(job, streamed=False) <= limit:
        return False
    least = peak_memory_bytes(job, streamed=True)
    if budget_bytes is not None and least > budget_bytes:
        raise GqaError(
            "the conversion does not fit the memory it may take",
            got=format_bytes(budget_bytes),
            allowed=f"about {format_bytes(least)} or more",
            hint=_smaller(job, least),
        )
    return bool(job.recipe.all_windows) and not job.pooled


def _smaller(job: Job, least: int) -> str | None:
    """Which arguments take less memory than `least`, the peak of this job."""
    if job.distills and least <= _WITH_BLOCKS_BYTES + distill_bytes(job, recompute=True):
        return "a smaller --distill-batch or --distill-window, or no --distill"
    return "a shorter --window, or mean, which takes little" if job.recipe.all_windows else None


def available_bytes(device: str = "cpu") -> int | None:
    """Memory that is free or can be freed at once; None where the system does not tell."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
