"""A little more training after a conversion: Ainslie et al. 2023 (arXiv 2305.13245), with the parent as teacher."""

from gqa.uptrain.data import training_windows
from gqa.uptrain.loop import uptrain

__all__ = ["training_windows", "uptrain"]
