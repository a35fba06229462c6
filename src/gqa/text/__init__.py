"""Text on the disk or on the hub -> windows of token ids: what calibration, evaluation and uptraining all read."""

from gqa.text.documents import pieces, read_text
from gqa.text.prompts import Prompt, read_prompts
from gqa.text.windows import load_tokenizer, token_windows

__all__ = ["Prompt", "load_tokenizer", "pieces", "read_prompts", "read_text", "token_windows"]
