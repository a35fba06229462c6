"""What a conversion cost in behaviour: the answers of a child beside its parent's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gqa.device import multiplies_bf16
from gqa.evaluate import answers
from gqa.evaluate.load import load_model
from gqa.evaluate.prompts import own_prompts
from gqa.progress import Progress, silent
from gqa.text import load_tokenizer


def compare_answers(
    parent: Path, child: Path, prompts: int, *, seed: int = 0, device: str = "cpu", progress: Progress = silent
) -> dict[str, Any]:
    """Greedy answers of two model folders to prompts that the parent writes, as `gqa.evaluate.answers.AnswerReport`
    has them. Both models run in bf16 where the device multiplies that faster, else in fp32.

    Raises GqaError like `load_model` and `gqa.evaluate.answers.compare_answers`.
    """
    dtype = torch.bfloat16 if multiplies_bf16(device) else torch.float32
    tokenizer = load_tokenizer(parent)
    before = load_model(parent, dtype=dtype, device=device)
    asked = own_prompts(before, tokenizer, prompts, seed=seed, progress=progress)
    after = load_model(child, dtype=dtype, device=device)
    return answers.compare_answers(after, before, tokenizer, asked, progress=progress).to_dict()
