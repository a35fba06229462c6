"""Windows of token ids -> the batch of each step, as a function of the step alone."""

# N windows, T tokens of a window, B windows of a batch

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch

from gqa.errors import GqaError


def training_order(count: int, length: int, tokens: int, batch: int, seed: int = 0) -> np.ndarray:
    """Which of `count` windows of `length` tokens to train on, in the order of training: `tokens` worth of them, in
    whole batches, at least one.

    Every window is used once, in a seeded random order, before any is used again.
    """
    if tokens < 1:
        raise GqaError("a number of training tokens is not positive", got=tokens, allowed="1 or more")
    if batch < 1:
        raise GqaError("a batch is not positive", got=batch, allowed="1 or more")
    wanted = batch * max(1, round(tokens / (length * batch)))
    random = np.random.default_rng(seed)
    rounds = -(-wanted // count)
    return np.concatenate([random.permutation(count) for _ in range(rounds)])[:wanted]


def training_windows(windows: np.ndarray, tokens: int, batch: int, seed: int = 0) -> np.ndarray:
    """The windows (N, T) to train on, in the `training_order`."""
    return windows[training_order(len(windows), windows.shape[1], tokens, batch, seed)]


@dataclasses.dataclass(frozen=True)
class TrainingText:
    """windows (N, T) of token ids, in memory or mapped from a file; order: which of them to train on, one after
    another; held_out (M, T): windows to measure the gap to the parent on, none of them in `windows`."""

    windows: np.ndarray
    order: np.ndarray
    held_out: np.ndarray

    @classmethod
    def of(cls, windows: np.ndarray) -> TrainingText:
        """Every window once, in the order given, and none held out."""
        return cls(windows, np.arange(len(windows)), windows[:0])

    @property
    def length(self) -> int:
        return self.windows.shape[1]

    def ids(self, places: np.ndarray) -> torch.Tensor:
        """Token ids (B, T) of windows by their places: in `windows`, and after those in `held_out`."""
        N = len(self.windows)
        ids = np.empty((len(places), self.length), dtype=np.int64)
        training = places < N
        ids[training] = self.windows[places[training]]
        ids[~training] = self.held_out[places[~training] - N]
        return torch.from_numpy(ids)

    def pieces(self) -> Iterator[np.ndarray]:
        """All windows in the order of training, some at a time, so that they need not fit into memory at once."""
        for start in range(0, len(self.order), 4096):
            yield np.ascontiguousarray(self.windows[self.order[start : start + 4096]], dtype=np.int64)


def training_text(windows: np.ndarray, tokens: int, batch: int, seed: int = 0, held_out: int = 0) -> TrainingText:
    """`training_windows`, without a copy, after a seeded choice of windows to hold out."""
    if not held_out:
        return TrainingText(windows, training_order(len(windows), windows.shape[1], tokens, batch, seed), windows[:0])
    if len(windows) <= held_out:
        raise GqaError("the text is too short to hold windows out", got=f"{len(windows)} windows")
    shuffled = np.random.default_rng([seed, held_out]).permutation(len(windows))
    kept = np.sort(shuffled[held_out:])
    order = kept[training_order(len(kept), windows.shape[1], tokens, batch, seed)]
    return TrainingText(windows, order, np.asarray(windows[np.sort(shuffled[:held_out])]))
