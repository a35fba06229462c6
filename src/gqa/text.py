"""Text files -> windows of token ids: what calibration, evaluation and uptraining all read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gqa.errors import GqaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_text(paths: Sequence[Path]) -> str:
    """The texts of UTF-8 files, in the order given, with a line end between two files.

    Raises GqaError for no file at all, one that is missing, a folder, unreadable, binary (a NUL byte or not UTF-8),
    and when all of them together hold nothing but white space.
    """
    if not paths:
        raise GqaError("no text file was given", hint="--text FILE")
    text = "\n".join(_read_file(Path(path)) for path in paths)
    if not text.strip():
        raise GqaError("the text is empty", got=", ".join(map(str, paths)), allowed="UTF-8 text")
    return text


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


def _read_file(path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise GqaError("no text file at this path", got=path) from None
    except IsADirectoryError:
        raise GqaError("a folder where a text file was expected", got=path) from None
    except OSError as error:
        raise GqaError("a text file cannot be read", got=f"{path}: {error.strerror}") from None
    if b"\0" in content:
        raise GqaError("a file is binary, not text", got=f"{path}: it has NUL bytes", allowed="UTF-8 text")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise GqaError(
            "a file is not UTF-8 text",
            got=f"{path}: byte {content[error.start]:#04x} at offset {error.start}",
            allowed="UTF-8 text",
        ) from None
