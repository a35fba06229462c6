"""Text that a model folder's model writes, kept in the cache folder for the next conversion of the same model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from gqa.device import default_device, multiplies_bf16
from gqa.evaluate.load import load_model
from gqa.model.sample import sample_windows
from gqa.progress import Progress, silent
from gqa.storage import cache_folder
from gqa.text import load_tokenizer
from gqa.weights.reader import Checkpoint

# At 1 a small model's text drifts into noise (docs/LOG.md).
_TEMPERATURE = 0.8


def own_text(folder: Path, windows: int, tokens: int, seed: int = 0, progress: Progress = silent) -> np.ndarray:
    """Windows (N, T) of token ids that the model in `folder` writes at temperature 0.8. Every second one begins with
    the beginning of a text, the others with that of a user's turn, where there is a chat template.

    They are sampled once and kept in the cache folder, by model, window and seed; a later call adds what is missing.
    The model runs in bf16 where its device multiplies that faster, else in fp32.
    Raises GqaError like `load_model` and `gqa.model.sample.sample_windows`.
    """
    device = default_device()
    dtype = torch.bfloat16 if multiplies_bf16(device) else torch.float32
    identity = json.dumps([Checkpoint(folder).fingerprint(), tokens, seed, _TEMPERATURE, str(dtype)], default=str)
    kept = cache_folder() / f"own-text-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    model = load_model(folder, dtype=dtype, device=device)
    tokenizer = load_tokenizer(folder)
    return sample_windows(
        model,
        tokenizer,
        windows=windows,
        window_tokens=tokens,
        temperature=_TEMPERATURE,
        seed=seed,
        folder=kept,
        progress=progress,
    )
