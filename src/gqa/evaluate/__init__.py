"""What a model predicts, in figures: cross-entropy on a text, and how far from its parent's predictions it is."""

from gqa.evaluate.load import load_model
from gqa.evaluate.run import ParentLogits, evaluate, remember

__all__ = ["ParentLogits", "evaluate", "load_model", "remember"]
