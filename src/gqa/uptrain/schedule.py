"""The learning rate of each step, as a function of the step alone: nothing to store, nothing to resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from gqa.uptrain.settings import Schedule


def factor(kind: Schedule, step: int, steps: int) -> float:
    """What the peak is multiplied by at `step` of `steps`, from 0: a tenth of the steps of linear warm-up from zero,
    then the peak (`constant`), a straight line to zero (`linear`) or half a cosine to zero (`cosine`)."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return step / warm_up
    if kind == "constant":
        return 1.0
    done = (step - warm_up) / max(1, steps - warm_up)
    return 1 - done if kind == "linear" else max(0.0, 0.5 * (1 + math.cos(math.pi * done)))


def final_rate(parent: Path | None) -> float | None:
    """The learning rate at the end of a parent's training, where its folder tells one that still moved weights.

    Ainslie et al. 2023 (section 3.1) go on with the schedule of the pre-training: where that ended at a rate to go on
    with, this is it, held. A schedule that ended at nothing (under a hundredth of its peak) cannot be gone on with.
    Read from gqa_training.json (`final_learning_rate`) or trainer_state.json, as transformers' Trainer writes it.
    """
    if parent is None:
        return None
    told = _read(parent / "gqa_training.json").get("final_learning_rate")
    rates = [told] if isinstance(told, int | float) else _logged(_read(parent / "trainer_state.json"))
    if not rates or not 0 < rates[-1] < 1 or rates[-1] < max(rates) / 100:
        return None
    return float(rates[-1])


def _logged(state: dict[str, Any]) -> list[float]:
    history = state.get("log_history")
    entries = history if isinstance(history, list) else []
    rates = [entry.get("learning_rate") for entry in entries if isinstance(entry, dict)]
    return [rate for rate in rates if isinstance(rate, int | float)]


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
