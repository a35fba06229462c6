"""A text and a tokenizer -> windows of token ids."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gqa.errors import GqaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_windows(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Cut a text into windows that do not overlap: token ids `(N, length)`, int64, without special tokens.

    `count` fewer windows than there are: a seeded choice without replacement, in random order, so that the first n
    of them are a fair sample too. The rest of the text, shorter than a window, is dropped.
    Raises GqaError if the text is shorter than one window.
    """
    if length < 2:
        raise GqaError("a window is too short", got=f"{length} tokens", allowed="2 tokens or more")
    if count is not None and count < 1:
        raise GqaError("a number of windows is not positive", got=count, allowed="1 or more")
    # verbose=False: a text longer than the model's context is no reason for a warning here.
    ids = np.asarray(tokenizer.encode(text, add_special_tokens=False, verbose=False), dtype=np.int64)
    available = len(ids) // length
    if available == 0:
        raise GqaError(
            f"the text is shorter than one window of {length} tokens",
            got=f"{len(ids)} tokens",
            allowed=f"{length} tokens or more",
            hint="give more text, or a smaller --window",
        )
    windows = ids[: available * length].reshape(available, length)
    if count is not None and count < available:
        windows = windows[np.random.default_rng(seed).permutation(available)[:count]]
    return windows


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, from its own files only: no download, no code of the folder's is run.

    Raises GqaError if the folder holds no tokenizer that transformers can read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise GqaError("no model folder at this path", got=folder)
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise GqaError(
            "the model folder has no tokenizer",
            got=folder,
            allowed="tokenizer.json, tokenizer.model, vocab.json or vocab.txt",
            hint="copy the tokenizer files of the model into the folder",
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise GqaError("the tokenizer cannot be read", got=f"{folder}: {error}") from error
