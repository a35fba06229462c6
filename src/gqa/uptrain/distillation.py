"""Distillation of a conversion: all attentions together, towards the parent's predictions.

Hinton et al. 2015, arXiv 1503.02531, at temperature 1; sharing everything but the attentions is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gqa.evaluate.load import quiet_transformers
from gqa.progress import Progress, silent
from gqa.uptrain.data import TrainingText
from gqa.uptrain.loop import Loop
from gqa.uptrain.processes import Processes
from gqa.uptrain.settings import Settings
from gqa.uptrain.shared_trunk import SharedTrunk

if TYPE_CHECKING:
    from gqa.convert.job import Job


def distill_attentions(
    job: Job,
    attention: Mapping[str, torch.Tensor],
    windows: np.ndarray,
    folder: Path,
    *,
    recompute: bool = False,
    device: str = "cpu",
    progress: Progress = silent,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Train the attentions of `job`'s child from `attention` on, over windows (N, T) in their order; everything else
    is the parent's, frozen, and in memory once.

    attention: the child's attention tensors by their names in the checkpoint; what is missing is the parent's. Loss:
    KL(parent || child), the mean over predicted tokens. AdamW (betas 0.9 and 0.95, no weight decay, gradients clipped
    to a norm of 1), a tenth of the steps as linear warm-up, then a cosine to zero; `job.recipe` has batch, rate and
    precision. folder: checkpoints; called again after a kill, it goes on from the last one to the same bits.
    recompute: activations are made again in the backward pass, which takes less memory and a forward pass more.

    Returns the trained tensors (float32) by the same names, and `steps`, `tokens` and `final_kl_to_parent_nats`: the
    mean of the last ten steps, each measured before it was taken.
    Raises TrainingError where a loss is not finite.
    """
    recipe = job.recipe
    settings = Settings(
        batch=recipe.distill_batch,
        learning_rate=recipe.distill_learning_rate,
        seed=recipe.seed,
    )
    trunk = SharedTrunk(
        job.checkpoint,
        job.source.config,
        recipe.kv_heads,
        job.layout,
        attention,
        half=recipe.distill_precision == "bf16",
        device=device,
        gradient_checkpointing=recompute,
    )
    loop = Loop(
        trunk, TrainingText.of(windows), settings, folder, Processes(), progress, weight_decay=0.0, stage="distill"
    )
    with quiet_transformers():
        trace = loop.run()
    kls = [kl for _, kl in trace["recent"]]
    report = {
        "steps": trace["step"],
        "tokens": trace["step"] * recipe.distill_batch * recipe.distill_window,
        "final_kl_to_parent_nats": sum(kls) / len(kls),
    }
    return {name: tensor.detach() for name, tensor in trunk.attention().items()}, report
