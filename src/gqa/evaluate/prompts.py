"""Prompts for a model and its parent: those of a file, those that the parent writes, or beginnings of a text."""

# N windows · T tokens of a window

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gqa.errors import GqaError
from gqa.model.generate import encode_prompt
from gqa.model.sample import sample_prompts, wants_chat
from gqa.progress import Progress, silent
from gqa.text.prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BEGINNING = 32  # tokens of a text that are continued, where there is no chat template


def own_prompts(
    parent: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    *,
    chat: bool | None = None,
    windows: np.ndarray | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> list[list[int]]:
    """Token ids of `count` prompts. With chat (by default where the tokenizer has a template), questions that the
    parent writes, in the template. Without, the first 32 tokens of windows (N, T) of a text, or of texts that the
    parent writes where no windows are given.

    Raises GqaError for a count below 1, chat without a template, and fewer windows than prompts.
    """
    if count < 1:
        raise GqaError("a number of prompts is not positive", got=count, allowed="1 or more")
    talks = wants_chat(tokenizer, chat)
    if talks or windows is None:
        length = {} if talks else {"max_tokens": BEGINNING}
        return sample_prompts(parent, tokenizer, prompts=count, chat=talks, seed=seed, progress=progress, **length)
    if len(windows) < count:
        raise GqaError(
            "the text has fewer windows than there are to be prompts",
            got=f"{len(windows)} windows of {windows.shape[1]} tokens",
            allowed=f"{count} or more",
            hint=f"--answers {len(windows)}, more text, or a smaller --window",
        )
    places = np.arange(count) * len(windows) // count  # from all over the text
    return windows[places, :BEGINNING].tolist()


def file_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], *, chat: bool | None = None
) -> list[list[int]]:
    """Token ids of the prompts of a file; with chat (by default where the tokenizer has a template), as a user's turn
    in the template. Raises GqaError for chat without a template and for a prompt without tokens."""
    talks = wants_chat(tokenizer, chat)
    return [encode_prompt(tokenizer, one.text, chat=talks)[0].tolist() for one in prompts]


def check_same_tokenizer(tokenizer: PreTrainedTokenizerBase, parent_tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise GqaError where the same token ids are other text for the parent than for the model."""
    ours, theirs = tokenizer.get_vocab(), parent_tokenizer.get_vocab()
    if ours != theirs:
        different = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        raise GqaError(
            "the parent has another tokenizer than the model",
            got=f"{len(different)} tokens with different ids, the first {different[0]!r}",
            allowed="the same tokens with the same ids",
        )
