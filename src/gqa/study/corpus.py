"""The three texts of a study, as windows of token ids: none of them shares a token with another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gqa.errors import GqaError
from gqa.study.embedded import Corpus
from gqa.text import load_tokenizer, read_text, token_windows

# Of a user's own text: what conversion and evaluation get; the rest is for uptraining.
_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class StudyText:
    """Windows (N, T) of token ids, int64: for uptraining, for calibration, for evaluation; the latter two in a
    random order of their own, so that the first n are a fair sample."""

    name: str
    train: np.ndarray
    calibration: np.ndarray
    test: np.ndarray


def from_files(paths: Sequence[Path], folder: Path, window: int, seed: int = 0) -> StudyText:
    """A user's text with the tokenizer of `folder`: the last tenth is the test text, the tenth before it is for
    calibration, what comes first is for uptraining.

    Raises GqaError if the text cannot be read or has fewer than 30 windows.
    """
    windows = token_windows(read_text(paths), load_tokenizer(folder), window)
    if len(windows) < 30:
        raise GqaError(
            "the text is too short for a study",
            got=f"{len(windows)} windows of {window} tokens",
            allowed="30 or more",
            hint="give more text, or a smaller --window",
        )
    tenth = int(len(windows) * _SHARE)
    random = np.random.default_rng(seed)
    return StudyText(
        name=", ".join(Path(path).name for path in paths),
        train=random.permutation(windows[: -2 * tenth]),
        calibration=random.permutation(windows[-2 * tenth : -tenth]),
        test=random.permutation(windows[-tenth:]),
    )


def from_corpus(corpus: Corpus, folder: Path, window: int, seed: int = 0) -> StudyText:
    """The standard library's sources, split by file, with the tokenizer of `folder`."""
    tokenizer = load_tokenizer(folder)
    random = np.random.default_rng(seed)
    parts = {
        part: random.permutation(token_windows(read_text(getattr(corpus, part)), tokenizer, window))
        for part in ("train", "calibration", "test")
    }
    return StudyText(name="Python's standard library", **parts)
