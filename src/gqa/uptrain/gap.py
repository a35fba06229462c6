"""How far a model is from its parent on text that it is not trained on, and when that stops falling."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from gqa.uptrain.data import TrainingText
from gqa.uptrain.distill import distillation_loss
from gqa.uptrain.processes import Processes
from gqa.uptrain.teacher import Teacher, arithmetic

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PATIENCE = 3  # measurements without progress
PROGRESS = 0.01  # the share of the gap that counts as progress


def stalled(gaps: list[float]) -> bool:
    """Whether the last PATIENCE gaps are all within 1 % of the best before them, or above it: time to stop."""
    return len(gaps) > PATIENCE and min(gaps[-PATIENCE:]) > (1 - PROGRESS) * min(gaps[:-PATIENCE])


@torch.no_grad()
def measure_gap(
    model: PreTrainedModel, teacher: Teacher, text: TrainingText, batch: int, world: Processes, *, half: bool
) -> float:
    """KL(parent || model) over the windows held out, in nats per token; `batch` windows at a time in each process."""
    model.eval()
    total, count = torch.zeros((), dtype=torch.float64), len(text.held_out)
    for start in range(0, count, batch * world.count):
        mine = start + world.rank * batch + np.arange(batch)
        counted = mine[mine < count]
        # All processes run together, so that one with nothing left to do runs what it does not count.
        places = len(text.windows) + (counted if len(counted) else mine[:1] % count)
        ids = text.ids(places).to(model.device)
        with arithmetic(ids.device, half=half):
            logits = model(input_ids=ids, use_cache=False).logits
        _, _, kl = distillation_loss(logits, ids, teacher(places, ids), 1.0)
        assert kl is not None
        total += kl.double().cpu() * len(counted)
    model.train()
    return world.mean(total).item() * world.count / count
