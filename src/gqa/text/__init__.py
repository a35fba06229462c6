"""Text on the disk or on the hub -> windows of token ids: what calibration, evaluation and uptraining all read."""

from gqa.text.documents import pieces, read_text
from gqa.text.windows import load_tokenizer, token_windows

__all__ = ["load_tokenizer", "pieces", "read_text", "token_windows"]
