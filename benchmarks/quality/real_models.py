"""The models of the proof: every conversion, distillation and control, each made in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from real_bench import CALIBRATION_SEED, Bench
from real_progress import show
from real_texts import CALIBRATION

from gqa.convert.effort import seconds_estimate
from gqa.convert.job import plan_conversion
from gqa.convert.memory import keeps_states_in_files, peak_memory_bytes
from gqa.convert.recipe import Recipe, make_recipe
from gqa.convert.texts import conversion_text
from gqa.convert.verify import verify
from gqa.device import default_device, multiplies_bf16
from gqa.errors import GqaError
from gqa.evaluate.own_text import own_text
from gqa.report.forms import tokens as count_of
from gqa.text import token_windows

MAKER = Path(__file__).with_name("real_make.py")


@dataclasses.dataclass(frozen=True)
class Model:
    """recipe: of the conversion, and of the control's training: its windows, batch and rate. own_text: whether half of
    the text is what the parent writes. control: the parent trained on the windows that the distillation reads."""

    name: str
    recipe: Recipe | None = None
    own_text: bool = False
    control: bool = False

    @property
    def distill_tokens(self) -> int:
        return self.recipe.distill_tokens if self.recipe else 0


def models(bench: Bench) -> list[Model]:
    """All models, the parent first, those that take longest last."""
    asked = bench.asked
    n, calibration, window = asked.kv_heads, asked.calibration, asked.window
    fit: Any = {"calibration_tokens": calibration, "window": window}
    longer: Any = {"calibration_tokens": asked.refine, "refine_tokens": asked.refine, "window": window}
    found = [
        Model("parent"),
        Model("mean", make_recipe(n, "mean", window=window)),
        Model("procrustes", make_recipe(n, "procrustes", **fit)),
        Model("svd", make_recipe(n, "svd", **fit)),
        Model(
            f"svd-refined-{count_of(asked.refine)}", make_recipe(n, "svd", refine_steps=asked.refine_steps, **longer)
        ),
    ]
    precision = "bf16" if multiplies_bf16(default_device()) else "fp32"
    for tokens in asked.distill:
        training: Any = {"distill_tokens": tokens, "distill_window": window, "distill_batch": asked.batch}
        recipe = make_recipe(n, "svd", **fit, **training, distill_precision=precision)
        size = count_of(tokens)
        found += [
            Model(f"control-{size}", recipe, control=True),
            Model(f"distilled-{size}", recipe),
            Model(f"distilled-half-own-{size}", recipe, own_text=True),
        ]
    return found


def make(bench: Bench, model: Model) -> dict[str, Any]:
    """Make the model in a process of its own; returns its seconds, its peak memory and what the library reports.

    A process that was stopped goes on, and `resumed` then says that its seconds are not all."""
    if model.recipe is None:
        return {"name": model.name}
    out = bench.model_folder(model.name)
    out.parent.mkdir(parents=True, exist_ok=True)
    recipe, windows, distill_windows, rounds = _text(bench, model)
    job = out.with_name(f"{model.name}.npz")
    given = {"model": str(bench.folder), "out": str(out), "control": model.control, "recipe": recipe.to_dict()}
    arrays: Any = {
        name: array for name, array in (("windows", windows), ("distill", distill_windows)) if array is not None
    }
    np.savez(job, about=json.dumps(given), **arrays)
    resumed = out.exists() or out.with_name(f"{out.name}.partial").exists()
    seconds, peak = run([sys.executable, str(MAKER), str(job)])
    job.unlink()
    report = json.loads(out.with_name(f"{model.name}.report.json").read_text(encoding="utf-8"))
    row = {
        "name": model.name,
        "method": "training" if model.control else recipe.method,
        "distill_tokens": recipe.distill_tokens,
        "distill_rounds": rounds,
        "own_text": model.own_text,
        "control": model.control,
        "seconds": seconds,
        "peak_rss_bytes": peak,
        "resumed": resumed,
        "report": report,
    }
    if model.control:
        return row
    checked = verify(out, bench.source)
    if not checked["sound"]:
        raise GqaError("the conversion is not what its recipe says", got=checked["differences"][:3])
    plan = plan_conversion(bench.source, recipe)
    streamed = keeps_states_in_files(plan, None)
    return row | {
        "tensors_verified": checked["tensors"],
        "kv_bytes_per_token": report["kv_bytes_per_token"],
        "seconds_estimate": seconds_estimate(plan),
        "peak_memory_bytes_estimate": peak_memory_bytes(plan, streamed=streamed),
    }


def calibration_windows(bench: Bench, tokens: int) -> np.ndarray:
    """Windows of the calibration pages."""
    window = bench.asked.window
    return token_windows(bench.text(CALIBRATION), bench.tokenizer, window, tokens // window, CALIBRATION_SEED)


def run(command: Sequence[str]) -> tuple[float, int]:
    """Seconds and peak memory in bytes of a process. Raises GqaError if it fails: its own error stands above."""
    began = time.perf_counter()
    process = subprocess.Popen(command)
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.terminate()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise GqaError("the process that makes a model failed", got=f"exit {process.returncode}")
    return time.perf_counter() - began, usage.ru_maxrss * 1024


def _text(bench: Bench, model: Model) -> tuple[Recipe, np.ndarray | None, np.ndarray | None, float]:
    """The recipe with the tokens that there are, windows of the fits, windows of the distillation in their order, and
    how often that reads its text. The parent's own text is written here, so that a conversion's seconds have none of
    it."""
    recipe = model.recipe
    assert recipe is not None
    if not recipe.calibration_tokens:
        return recipe, None, None, 0.0
    pages = bench.text(CALIBRATION)
    sources = [lambda count, tokens: token_windows(pages, bench.tokenizer, tokens, count, CALIBRATION_SEED)]
    if model.own_text:
        sources.append(lambda count, tokens: own_text(bench.folder, count, tokens, CALIBRATION_SEED, show))
    cut = conversion_text(sources, recipe)
    return cut.recipe, cut.windows, cut.distill_windows, cut.distill_rounds
