"""Training after a conversion: distillation of its attentions, and uptraining of whole models.

Uptraining: Ainslie et al. 2023 (arXiv 2305.13245), with the parent as teacher.
"""

from gqa.uptrain.data import TrainingText, training_text, training_windows
from gqa.uptrain.distillation import distill_attentions
from gqa.uptrain.run import uptrain
from gqa.uptrain.settings import Settings
from gqa.uptrain.stream import StreamedText

__all__ = [
    "Settings",
    "StreamedText",
    "TrainingText",
    "distill_attentions",
    "training_text",
    "training_windows",
    "uptrain",
]
