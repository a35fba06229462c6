"""A tiny checkpoint with a tokenizer, for tests of the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.checkpoints import tiny_config, write_checkpoint
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

WORDS = "a mean of heads is not a head that means to be\n"


def write_tokenized(folder: Path, vocabulary: int = 150, **how: Any) -> Path:
    """A checkpoint folder (`write_checkpoint`) with a tokenizer of at most so many tokens, trained on WORDS."""
    write_checkpoint(folder, tiny_config(), **how)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.train_from_iterator([WORDS], trainers.BpeTrainer(vocab_size=vocabulary, show_progress=False))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder
