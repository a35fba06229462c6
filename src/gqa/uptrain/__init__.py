"""A little more training after a conversion: Ainslie et al. 2023 (arXiv 2305.13245), with the parent as teacher."""

from gqa.uptrain.data import TrainingText, training_windows
from gqa.uptrain.run import uptrain
from gqa.uptrain.settings import Settings

__all__ = ["Settings", "TrainingText", "training_windows", "uptrain"]
