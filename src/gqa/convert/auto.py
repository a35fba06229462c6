"""The fewest KV heads whose measured loss stays within a budget."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gqa.config import kv_head_choices, parse_config
from gqa.convert.job import plan_conversion
from gqa.convert.recipe import Recipe
from gqa.convert.run import CompareAnswers, Distill, convert
from gqa.errors import GqaError
from gqa.progress import Progress, silent
from gqa.record import write_text_atomic
from gqa.source import Source


def candidates(source: Source, recipe: Recipe) -> list[int]:
    """The KV heads that this checkpoint could be given, from one upwards, fewer than it has. Raises GqaError if its
    class allows none, and for everything that keeps the checkpoint from being converted at all."""
    have = parse_config(source.config, source.name).kv_heads
    found, refused = [], None
    for kv_heads in (choice for choice in kv_head_choices(have) if choice < have):
        try:
            plan_conversion(source, dataclasses.replace(recipe, kv_heads=kv_heads))
        except GqaError as error:
            refused = error
        else:
            found.append(kv_heads)
    if not found:
        raise refused or GqaError("the model has a single KV head already", allowed="a model with more of them")
    return found


def convert_within(
    source: Source,
    out: str | Path,
    recipe: Recipe,
    windows: np.ndarray,
    budget: float,
    choices: Sequence[int],
    progress: Progress = silent,
    *,
    texts: Sequence[str] = (),
    memory_bytes: int | None = None,
    device: str = "cpu",
    distill: Distill | None = None,
    distill_windows: np.ndarray | None = None,
    compare_answers: CompareAnswers | None = None,
) -> dict[str, Any]:
    """`convert` to the first number of KV heads among `choices` that keeps the measured perplexity within 1 + budget
    times the parent's; recipe.kv_heads counts for nothing. Each is converted and measured; OUT is written for the
    first that stays within.

    The report has `tried`, the candidates that did not, with what was measured; `within_budget` is False if none did,
    and then there is no OUT. What was tried is kept in OUT.tried.json until the end, so that a run that was killed
    goes on with the candidate it was at.
    """
    out = Path(out)
    notes = out.with_name(out.name + ".tried.json")
    job = plan_conversion(source, dataclasses.replace(recipe, kv_heads=choices[0]))
    identity = job.identify(windows, distill_windows) | {"recipe": dataclasses.replace(recipe, kv_heads=1).to_dict()}
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    tried = _read(notes, name)
    for kv_heads in choices:
        before = next((one for one in tried if one["kv_heads"] == kv_heads), None)
        if before is not None and before["perplexity"] > (1 + budget) * before["perplexity_parent"]:
            continue
        tried = [one for one in tried if one is not before]
        report = convert(
            source,
            out,
            dataclasses.replace(recipe, kv_heads=kv_heads),
            windows,
            progress,
            texts=texts,
            memory_bytes=memory_bytes,
            budget=budget,
            device=device,
            distill=distill,
            distill_windows=distill_windows,
            compare_answers=compare_answers,
        )
        if report["within_budget"]:
            notes.unlink(missing_ok=True)
            return {**report, "tried": tried}
        tried.append({"kv_heads": kv_heads, **report["measured"]})
        write_text_atomic(notes, json.dumps({"identity": name, "tried": tried}, indent=2) + "\n")
    notes.unlink(missing_ok=True)
    return {"kv_heads": None, "within_budget": False, "tried": tried}


def _read(notes: Path, name: str) -> list[dict[str, Any]]:
    """What a former run of the same search has tried."""
    try:
        found = json.loads(notes.read_text(encoding="utf-8"))
        return list(found["tried"]) if found["identity"] == name else []
    except (OSError, ValueError, KeyError, TypeError):
        return []
