"""What a step of uptraining takes over the dial, in seconds and, predicted, in FLOPs: a part of uptraining.py."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import PreTrainedModel

from gqa.config import ModelShape
from gqa.evaluate import load_model
from gqa.plan.training import training_flops_per_token


@dataclasses.dataclass
class Contender:
    """A model in training, with or without its parent as teacher, and the seconds of its steps so far."""

    kv_heads: int
    model: PreTrainedModel
    teacher: PreTrainedModel | None
    optimizer: torch.optim.Optimizer
    seconds: list[float] = dataclasses.field(default_factory=list)
    core_seconds: list[float] = dataclasses.field(default_factory=list)  # of all threads: little moved by other work

    def step(self, ids: torch.Tensor) -> None:
        began, began_core = time.perf_counter(), time.process_time()
        logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss = cross_entropy(logits, ids[:, 1:].flatten())
        if self.teacher is not None:
            with torch.no_grad():
                known = self.teacher(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            own = log_softmax(logits, dim=-1)
            loss = 0.3 * loss + 0.7 * kl_div(own, log_softmax(known, dim=-1), reduction="batchmean", log_target=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - began)
        self.core_seconds.append(time.process_time() - began_core)


def step_rows(
    folders: Mapping[int, Path], shape: ModelShape, batches: Sequence[np.ndarray] | np.ndarray, repeats: int
) -> list[dict[str, Any]]:
    """A row per model (KV heads -> folder, the parent's first), without and with the parent as teacher. They take
    turns, so that a slow moment of the machine does not fall on one of them alone; the first turn is not counted."""
    parent = next(iter(folders.values()))
    teacher = load_model(parent).eval().requires_grad_(False)
    contenders = []
    for kv_heads, folder in folders.items():
        for known in (None, teacher):
            model = load_model(folder).train()
            optimizer = torch.optim.AdamW(model.parameters(), 2e-4, betas=(0.9, 0.95), weight_decay=0.1)
            contenders.append(Contender(kv_heads, model, known, optimizer))
    for turn in range(repeats + 1):
        ids = torch.from_numpy(batches[turn % len(batches)])
        for contender in contenders:
            contender.step(ids)
    return rows_of(contenders, shape, batches[0].shape)


def rows_of(contenders: Sequence[Contender], shape: ModelShape, batch: tuple[int, ...]) -> list[dict[str, Any]]:
    """Percentiles of the seconds, and FLOPs as planned; a teacher's are those of a forward pass, a third of a step.

    core_seconds: of all threads together, which other work on the machine moves little; predicted: at the rate that the
    first contender reached."""
    tokens = int(np.prod(batch))

    def flops(kv_heads: int) -> float:
        per_token = training_flops_per_token(shape.with_kv_heads(kv_heads), batch[1])
        assert per_token is not None
        return per_token * tokens

    first = contenders[0]
    rate = flops(first.kv_heads) / float(np.median(first.core_seconds[1:]))
    rows = []
    for one in contenders:
        work = flops(one.kv_heads) + (flops(first.kv_heads) / 3 if one.teacher is not None else 0.0)
        p20, p50, p80 = (float(value) for value in np.percentile(one.seconds[1:], [20, 50, 80]))
        rows.append(
            {
                "kv_heads": one.kv_heads,
                "teacher": one.teacher is not None,
                "tokens_per_step": tokens,
                "repeats": len(one.seconds) - 1,
                "seconds_per_step_p20": p20,
                "seconds_per_step_p50": p50,
                "seconds_per_step_p80": p80,
                "core_seconds_per_step_p50": float(np.median(one.core_seconds[1:])),
                "flops_per_step": work,
                "core_seconds_per_step_predicted": work / rate,
            }
        )
    return rows
