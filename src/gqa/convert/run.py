"""Carry out a conversion: layer by layer into a work folder, then shard by shard, then one rename to OUT.

Pooling alone skips the first of these: its layers are computed while their shard is written.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from gqa.convert.assemble import write_shards
from gqa.convert.calibrate import hidden_errors
from gqa.convert.engine import Engine
from gqa.convert.job import Job, plan_conversion
from gqa.convert.journal import Journal, locked, work_folder
from gqa.convert.memory import (
    keeps_states_in_files,
    recomputes_activations,
    states_bytes,
    training_disk_bytes,
)
from gqa.convert.pool import pooled_reports
from gqa.convert.recipe import Recipe
from gqa.convert.result import (
    already_done,
    copy_small_files,
    describe,
    small_bytes,
    verify,
    write_config,
    write_text_files,
)
from gqa.convert.stored import StoredLayer, as_stored, changed_tensors
from gqa.device import check_device
from gqa.errors import GqaError, TrainingError
from gqa.progress import Progress, silent
from gqa.record import describe_versions
from gqa.source import Source
from gqa.units import format_seconds
from gqa.weights.header import read_header
from gqa.weights.reader import read_tensor
from gqa.weights.writer import check_space, sync_folder, write_tensors


def convert(
    source: Source,
    out: str | Path,
    recipe: Recipe,
    windows: np.ndarray | None = None,
    progress: Progress = silent,
    *,
    distill: Distill | None = None,
    distill_windows: np.ndarray | None = None,
    compare_answers: CompareAnswers | None = None,
    texts: Sequence[str] = (),
    memory_bytes: int | None = None,
    budget: float | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Write the checkpoint of `source` with fewer KV heads to the folder OUT, which must not exist.

    windows: (N, recipe.window) token ids of calibration text, where the recipe wants any; texts: the names of the
    files they came from, for the model card. distill, distill_windows: for a recipe with distill_tokens, what trains
    (`gqa.uptrain.distill_attentions`) and (recipe.distill_windows, recipe.distill_window) token ids to train on.
    compare_answers: for a recipe with answers, what compares them (`gqa.evaluate.conversion.compare_answers`).
    budget: OUT is only made if the perplexity that the recipe measures is at most 1 + budget times the parent's; the
    report's `within_budget` says whether it was. memory_bytes: what the process may take, by an estimate (by default
    what is free): memory holds one layer's tensors at a time, and the calibration activations unless they have to go
    to files; a distillation holds the whole model. device: where the calculations run that are not mere pooling.
    Returns the report: sizes before and after, and per layer what was done and lost.

    OUT appears complete, by one rename. Until then all lies in OUT.partial, where a run that was killed, or ran out
    of space, goes on when it is called again with the same arguments. OUT from this same conversion: its report is
    returned at once. Raises GqaError for anything that cannot be converted, before anything is written.
    """
    started = time.perf_counter()
    out = Path(out)
    check_device(device)
    job = plan_conversion(source, recipe)
    windows = _checked_windows(job, windows)
    distillation = _distillation(
        job, distill, distill_windows, recompute=recomputes_activations(job, memory_bytes, device)
    )
    if budget is not None and not recipe.measure_tokens:
        raise GqaError("a budget of loss is measured on text, and there is none", hint="--calibrate FILE, --measure 8k")
    _refuse_out_in_source(out, job.folder)
    try:
        # Another device gives other bits: what one has begun is not for another to go on with.
        identity = job.identify(windows, None if distillation is None else distillation.windows) | (
            {} if device == "cpu" or job.pooled else {"device": device}
        )
        if os.path.lexists(out):
            report = already_done(out, identity)
            _tidy(out, identity)
            return _judged(report, budget)
        in_files = keeps_states_in_files(job, memory_bytes, device)
        needed = job.peak_disk_bytes + small_bytes(job.folder) + (states_bytes(job) if in_files else 0)
        needed += training_disk_bytes(job)
        check_space(out, needed - _bytes_in(work_folder(out)))
        with locked(out) as journal:
            if os.path.lexists(out):  # by a process that was at it when we looked first
                report = already_done(out, identity)
                journal.discard()
                return _judged(report, budget)
            calibration = _Calibration(windows, journal.states if in_files else None, device)
            report = _work(
                job, journal, out, identity, calibration, distillation, compare_answers, progress, texts, budget
            )
    except OSError as error:
        raise _disk_error(out, error) from None
    report = {**report, "out": str(out), "already_done": False, "seconds": time.perf_counter() - started}
    return _judged(report, budget)


class Distill(Protocol):
    """Trains all attentions of a child together, from those of `attention` on.

    attention: the child's changed tensors by their names in the checkpoint; folder: for checkpoints, from which it
    goes on when it is called again; recompute: makes activations again in the backward pass, which takes less memory
    and more time. Returns the trained tensors under the same names, and a report of the training.
    """

    def __call__(
        self,
        job: Job,
        attention: Mapping[str, torch.Tensor],
        windows: np.ndarray,
        folder: Path,
        *,
        recompute: bool,
        device: str,
        progress: Progress,
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]: ...


class CompareAnswers(Protocol):
    """Compares the answers of two model folders, parent and child, to so many prompts; returns figures by name."""

    def __call__(
        self, parent: Path, child: Path, prompts: int, *, seed: int, device: str, progress: Progress
    ) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class _Distillation:
    distill: Distill
    windows: np.ndarray
    recompute: bool


@dataclasses.dataclass(frozen=True)
class _Calibration:
    """windows (N, T): token ids of the text, or None; states: the folder of its activations, None for memory; device:
    where it is calculated."""

    windows: np.ndarray | None
    states: Path | None
    device: str


def _work(
    job: Job,
    journal: Journal,
    out: Path,
    identity: Mapping[str, Any],
    calibration: _Calibration,
    distillation: _Distillation | None,
    compare_answers: CompareAnswers | None,
    progress: Progress,
    texts: Sequence[str],
    budget: float | None,
) -> dict[str, Any]:
    modified = job.checkpoint.modified()
    journal.begin({**identity, "modified": modified, "gqa": describe_versions().get("gqa")})
    try:
        reports = pooled_reports(job) if job.pooled else _convert_layers(job, journal, calibration, progress)
        measured = journal.measured
        if distillation is not None:
            _distill(job, journal, calibration, distillation, progress)
            measured = journal.measured_distilled
        if not _judged({"measured": measured}, budget).get("within_budget", True):
            journal.discard()
            return {"kv_heads": job.recipe.kv_heads, "measured": measured}
        hashes = write_shards(job, journal, progress)
        copy_small_files(job.folder, journal.result)
        write_config(job, journal.result)
        if job.recipe.answers and not job.exact and journal.answers is None:
            journal.finish_answers(_compare_answers(job, journal, compare_answers, calibration.device, progress))
        report = describe(job, reports, identity, texts, journal)
        write_text_files(journal.result, report, out, identity, hashes)
        verify(job, journal.result)
        job.checkpoint.check_unchanged()
    except TrainingError:
        raise  # its last checkpoint is worth keeping
    except GqaError:
        journal.discard()  # it would only fail in the same way again
        raise
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        journal.discard()
        raise GqaError(
            "the equations of a layer cannot be solved",
            got=str(error).splitlines()[0],
            allowed="weights, and hidden states on the text, whose squares are finite",
            hint="--method mean looks at neither",
        ) from None
    except OSError:
        if journal.empty:
            journal.discard()
        raise
    sync_folder(journal.result)
    os.rename(journal.result, out)
    sync_folder(out.absolute().parent)
    journal.discard()
    return report


def _judged(report: Mapping[str, Any], budget: float | None) -> dict[str, Any]:
    """The report with `within_budget`, where there is a budget. What is exact, and so is not measured, is within."""
    if budget is None:
        return dict(report)
    measured = report["measured"]
    within = measured is None or measured["perplexity"] <= (1 + budget) * measured["perplexity_parent"]
    return {**report, "within_budget": within}


def _convert_layers(job: Job, journal: Journal, calibration: _Calibration, progress: Progress) -> list[dict[str, Any]]:
    """Convert the layers that no former run finished, each into a file of its own. Returns the layers' reports."""
    total = len(job.changes)
    to_measure = bool(job.recipe.measure_tokens) and journal.measured is None
    if len(journal.reports) == total and not to_measure:
        return journal.reports
    engine = Engine(
        job.checkpoint,
        job.layout,
        job.source.config,
        job.recipe,
        calibration.windows,
        progress,
        calibration.states,
        len(journal.reports),
        calibration.device,
    )
    started, first = time.perf_counter(), engine.at
    for layer in range(first, total):
        if layer < len(journal.reports):
            engine.replay(layer, job.layout.read_attention(StoredLayer(job, journal.layer_path(layer)), layer))
        else:
            weights, report = engine.convert(layer)
            tensors = changed_tensors(job, layer, weights)
            write_tensors(journal.layer_path(layer), tensors, {})
            journal.finish_layer({**report, "layer": layer, "tensors_changed": len(tensors)})
        error = journal.reports[layer].get("hidden_error")
        left = (time.perf_counter() - started) / (layer + 1 - first) * (total - layer - 1)
        notes = [] if error is None else [f"hidden states off by {error:.2%}"]
        notes += [f"about {format_seconds(left)} left"] if left > 1 else []
        progress("convert layers", layer + 1, total, ", ".join(notes))
    if to_measure and total:
        progress("compare with the parent", 0, 1)
        journal.finish_measuring(engine.measure())
        progress("compare with the parent", 1, 1)
    journal.forget_states()
    return journal.reports


def _compare_answers(
    job: Job, journal: Journal, compare: CompareAnswers | None, device: str, progress: Progress
) -> dict[str, Any]:
    """The figures, or why there are none: what is converted is not lost because its answers cannot be compared."""
    assert compare is not None, "a recipe with answers needs what compares them"
    recipe = job.recipe
    try:
        return compare(job.folder, journal.result, recipe.answers, seed=recipe.seed, device=device, progress=progress)
    except GqaError as error:
        return {"not_compared": str(error)}


def _distill(
    job: Job, journal: Journal, calibration: _Calibration, distillation: _Distillation, progress: Progress
) -> None:
    """Train the converted attentions together and measure the result, unless a former run has done so."""
    if journal.distilled is None:
        layers = {layer: read_header(journal.layer_path(layer)) for layer in job.changes}
        attention = {name: read_tensor(file, name) for file in layers.values() for name in file.tensors}
        trained, report = distillation.distill(
            job,
            attention,
            distillation.windows,
            journal.training,
            recompute=distillation.recompute,
            device=calibration.device,
            progress=progress,
        )
        for layer, entries in job.changes.items():
            some = {entry.name: as_stored(job, entry.name, trained[entry.name]) for entry in entries}
            write_tensors(journal.distilled_path(layer), some, {})
        journal.finish_distilling(report)
    if job.recipe.measure_tokens and journal.measured_distilled is None:
        journal.finish_measuring_distilled(*_measure_again(job, journal, calibration, progress))


def _measure_again(
    job: Job, journal: Journal, calibration: _Calibration, progress: Progress
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Parent and distilled child compared on the windows that no fit has seen, one layer in memory at a time; and how
    far the hidden states behind each layer are off there."""
    assert calibration.windows is not None
    only_measure = dataclasses.replace(
        job.recipe.without_distillation, refit=False, refine_tokens=0, calibration_tokens=0
    )
    windows = calibration.windows[job.recipe.windows :]
    engine = Engine(job.checkpoint, job.layout, job.source.config, only_measure, windows, device=calibration.device)
    errors: list[dict[str, float]] = []
    for layer in job.changes:
        engine.replay(layer, job.layout.read_attention(StoredLayer(job, journal.layer_path(layer)), layer))
        errors.append(hidden_errors(*engine.hidden))
        progress("compare with the parent", layer + 1, len(job.changes))
    return engine.measure(), errors


def _distillation(
    job: Job, distill: Distill | None, windows: np.ndarray | None, *, recompute: bool
) -> _Distillation | None:
    """What trains and its text, as the recipe says, or GqaError."""
    if not job.distills:
        return None
    assert distill is not None, "a recipe with distill_tokens needs what trains"
    recipe = job.recipe
    shape = (recipe.distill_windows, recipe.distill_window)
    if windows is None or windows.ndim != 2 or len(windows) < shape[0] or windows.shape[1] != shape[1]:
        got = "none" if windows is None else f"an array of shape {windows.shape}"
        raise GqaError("the windows of the distillation do not match the recipe", got=got, allowed=f"{shape}")
    return _Distillation(distill, _checked_ids(job, windows[: shape[0]]), recompute)


def _checked_windows(job: Job, windows: np.ndarray | None) -> np.ndarray | None:
    """The windows of text that the recipe uses: as many as it says, or GqaError."""
    recipe = job.recipe
    if job.exact or not recipe.all_windows:
        return None
    wanted = f"({recipe.all_windows} or more, {recipe.window}) token ids"
    if windows is None or windows.ndim != 2 or windows.shape[1] != recipe.window or len(windows) < recipe.all_windows:
        got = "none" if windows is None else f"an array of shape {windows.shape}"
        raise GqaError("the calibration windows are not what the recipe says", got=got, allowed=wanted)
    return _checked_ids(job, windows[: recipe.all_windows])


def _checked_ids(job: Job, windows: np.ndarray) -> np.ndarray:
    windows = np.ascontiguousarray(windows, dtype=np.int64)
    vocab = job.checkpoint.shape(job.layout.embedding)[0]
    if windows.min() < 0 or windows.max() >= vocab:
        raise GqaError(
            "the calibration text has token ids that the model does not know",
            got=int(windows.max()),
            allowed=f"0 to {vocab - 1}",
            hint="does the tokenizer belong to this model?",
        )
    return windows


def _refuse_out_in_source(out: Path, folder: Path) -> None:
    source = os.path.realpath(folder)
    for path in (out, work_folder(out)) if out.name else (out,):
        try:
            real = os.path.realpath(path)
        except ValueError:  # a NUL in the name
            raise GqaError("OUT is no name of a folder", got=ascii(str(out)), allowed="a path") from None
        if Path(real).is_relative_to(source):
            raise GqaError(
                "OUT lies within the source, which is never touched",
                got=out,
                allowed="a place beside it",
                hint="choose another OUT",
            )


def _tidy(out: Path, identity: Mapping[str, Any]) -> None:
    """Remove the work folder that a kill just after the last rename leaves beside OUT."""
    if work_folder(out).is_dir():
        with locked(out) as journal:
            if journal.finished(identity):
                journal.discard()


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _disk_error(out: Path, error: OSError) -> GqaError:
    got = f"{error.strerror or error}: {error.filename or out}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "free some space and give the same command again: it goes on where it stopped"
        return GqaError("the disk is full", got=got, hint=hint)
    return GqaError("the conversion cannot be read or written", got=got, hint="then give the same command again")
