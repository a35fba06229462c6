"""Tiny parents that seconds of training teach to copy tokens from afar, which takes attention.

Letters: N windows · T tokens of a window.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from helpers.architectures import Row, tiny_model

VOCAB, WINDOW = 64, 32
# A token is the one so far back: the first distance after an even token, the second after an odd one.
DISTANCES = (3, 6)
_NOISE = 0.1


def copying_windows(count: int, seed: int) -> np.ndarray:
    """Token ids (count, WINDOW) of which nine in ten can be known from those before."""
    random = np.random.default_rng(seed)
    windows = random.integers(3, VOCAB, (count, WINDOW))
    surprises = random.random((count, WINDOW)) < _NOISE
    for t in range(max(DISTANCES), WINDOW):
        back = np.where(windows[:, t - 1] % 2 == 0, *DISTANCES)
        known = windows[np.arange(count), t - back]
        windows[:, t] = np.where(surprises[:, t], windows[:, t], known)
    return windows


def copying_model(row: Row, *, steps: int, batch: int = 32, **changes: Any) -> Any:
    """A model of this row, of 4 heads, that has learned to copy; in float32."""
    model = tiny_model(row, **row.multi_head, vocab_size=VOCAB, initializer_range=0.05, **changes).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps))
    windows = torch.from_numpy(copying_windows(steps * batch, seed=1))
    for ids in windows.split(batch):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model
