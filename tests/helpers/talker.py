"""A tiny model with a tokenizer of whole words and a chat template."""

from __future__ import annotations

from typing import Any

from helpers.models import tiny_llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

BOS, EOS, USER, BOT = range(4)
ENDS = (EOS, *range(80, 96))  # many, so that random weights end a text after half a dozen tokens
TEMPLATE = (
    "{% for turn in messages %}<bos> <user> {{ turn['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)


def word_tokenizer(template: str | None = TEMPLATE, bos: str | None = "<bos>", eos: str | None = "<eos>") -> Any:
    """97 tokens: four special ones, the words w4 to w95, and one for any other word."""
    words = ["<bos>", "<eos>", "<user>", "<bot>", *(f"w{i}" for i in range(4, 96)), "<unk>"]
    tokens = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token=bos, eos_token=eos, unk_token="<unk>")
    made.chat_template = template  # type: ignore[assignment]
    return made


def talker(kv_heads: int = 2, **options: Any) -> Any:
    """A tiny Llama for these tokens."""
    model = tiny_llama(kv_heads, query_heads=4, **options)
    settings: Any = model.generation_config
    settings.eos_token_id = list(ENDS)
    return model
