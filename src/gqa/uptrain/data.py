"""Windows of token ids -> what a Trainer reads."""

# N windows, T tokens of a window

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

from gqa.errors import GqaError


def training_windows(windows: np.ndarray, tokens: int, batch: int, seed: int = 0) -> np.ndarray:
    """The windows to train on, in the order of training: `tokens` worth of them, in whole batches, at least one.

    windows (N, T) in any order. Every window is used once, in a seeded random order, before any is used again.
    """
    if tokens < 1:
        raise GqaError("a number of training tokens is not positive", got=tokens, allowed="1 or more")
    if batch < 1:
        raise GqaError("a batch is not positive", got=batch, allowed="1 or more")
    wanted = batch * max(1, round(tokens / (windows.shape[1] * batch)))
    random = np.random.default_rng(seed)
    rounds = -(-wanted // len(windows))
    order = np.concatenate([random.permutation(len(windows)) for _ in range(rounds)])
    return windows[order[:wanted]]


class WindowDataset(Dataset):
    """Windows (N, T) as a torch dataset of `{"input_ids": (T,)}`, in their order."""

    def __init__(self, windows: np.ndarray) -> None:
        self._ids = torch.from_numpy(np.ascontiguousarray(windows, dtype=np.int64))

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._ids[index]}
