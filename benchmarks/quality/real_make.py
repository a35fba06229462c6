"""Makes one model of the proof on a real model, as a process of its own whose seconds and memory are measured.

python benchmarks/quality/real_make.py JOB.npz      started by real.py, which writes the file
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from real_progress import show

from gqa.convert.recipe import Recipe
from gqa.convert.run import convert
from gqa.device import default_device
from gqa.errors import GqaError
from gqa.record import write_text_atomic
from gqa.source import open_checkpoint


def make(job: Path) -> None:
    """Make what the file describes; its report goes beside the model's folder, without paths."""
    with np.load(job, allow_pickle=False) as arrays:
        about: dict[str, Any] = json.loads(str(arrays["about"]))
        windows, distill = (arrays.get(name) for name in ("windows", "distill"))
    recipe, out = Recipe(**about["recipe"]), Path(about["out"])
    if about["control"]:
        report = _train(about["model"], out, recipe, distill)
    else:
        source, how = open_checkpoint(about["model"]), _distillation(distill)
        report = convert(source, out, recipe, windows, show, device=default_device(), **how)
    report = {name: value for name, value in report.items() if name not in ("out", "model", "file", "already_done")}
    write_text_atomic(out.with_name(f"{out.name}.report.json"), json.dumps(report, indent=1) + "\n")


def _distillation(windows: np.ndarray | None) -> dict[str, Any]:
    if windows is None:
        return {}
    from gqa.uptrain import distill_attentions  # here: transformers is not in the memory of a plain conversion

    return {"distill": distill_attentions, "distill_windows": windows}


def _train(model: str, out: Path, recipe: Recipe, windows: np.ndarray | None) -> dict[str, Any]:
    """The control: the parent's attentions trained without a teacher, on the distillation's windows at its rate."""
    from gqa.uptrain import Settings, uptrain

    assert windows is not None
    settings = Settings(
        batch=recipe.distill_batch,
        learning_rate=recipe.distill_learning_rate,
        seed=recipe.seed,
        train="attention",
        precision=recipe.distill_precision,
    )
    return uptrain(model, out, windows=windows, settings=settings, progress=show)


if __name__ == "__main__":
    try:
        make(Path(sys.argv[1]))
    except GqaError as error:
        sys.exit(f"error: {error}")
