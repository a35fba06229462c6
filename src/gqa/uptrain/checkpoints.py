"""The state of a run on the disk: safetensors that any number of processes can read, whole or not there."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from gqa.errors import GqaError, TrainingError
from gqa.record import write_text_atomic
from gqa.uptrain.processes import Processes
from gqa.weights.header import read_header
from gqa.weights.writer import sync_folder

_TRACE = "gqa_trace.json"  # what a run remembers beside tensors; written last, so that what has it is complete
_MOMENTS = ("exp_avg", "exp_avg_sq")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; what a kill left of others is deleted."""
    complete = []
    for path in folder.glob("checkpoint-*"):
        if not path.suffix and (path / _TRACE).exists():
            complete.append(path)
        else:
            shutil.rmtree(path)
    return max(complete, key=_step, default=None)


def save(
    folder: Path,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    trace: dict[str, Any],
    world: Processes,
) -> None:
    """Write the weights that are trained and their moments, every process its own shards, as `checkpoint-STEP`.

    The name appears by a rename once all is on the disk; then all older ones but the last are deleted.
    """
    final = folder / f"checkpoint-{step}"
    begun = final.with_suffix(".saving")

    def begin() -> None:
        shutil.rmtree(begun, ignore_errors=True)
        begun.mkdir(parents=True)

    def publish() -> None:
        write_text_atomic(begun / _TRACE, json.dumps({**trace, "step": step}))
        sync_folder(begun)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(begun, final)
        sync_folder(folder)
        older = sorted((path for path in folder.glob("checkpoint-*") if path != final and not path.suffix), key=_step)
        for path in older[:-1]:
            gone = path.with_suffix(".gone")  # so that no kill leaves half of one that looks whole
            os.rename(path, gone)
            shutil.rmtree(gone, ignore_errors=True)

    world.agree(begin)
    # HuggingFaceStorageWriter: safetensors, where torch's own format has pickles. It brings the files to the disk.
    writer = HuggingFaceStorageWriter(str(begun), save_distributed=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it says that one process is one
        save_shards(_tensors(model, optimizer), storage_writer=writer, no_dist=world.count == 1)
    world.agree(publish)


def load(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, world: Processes) -> dict[str, Any]:
    """Read a checkpoint into a model and its new optimizer, whatever number of processes wrote it; returns the trace,
    with the number of `step`s done.

    Raises TrainingError, which names the file, for a checkpoint that was damaged after it was written.
    """
    trace = _read_trace(path)
    reader = HuggingFaceStorageReader(str(path))
    stored = reader.read_metadata().state_dict_metadata
    for name, parameter in model.named_parameters():
        if f"{_MOMENTS[0]}.{name}" in stored:  # not in one that never had a gradient
            optimizer.state[parameter] = {
                "step": torch.tensor(float(trace["step"]), dtype=torch.float32, device=parameter.device),
                **{moment: torch.zeros_like(parameter) for moment in _MOMENTS},
            }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load_shards(_tensors(model, optimizer), storage_reader=reader, no_dist=world.count == 1)
    return trace


def _read_trace(path: Path) -> dict[str, Any]:
    """The trace of a checkpoint, all of whose files are whole as far as their sizes show."""
    file = path / _TRACE
    try:
        trace = json.loads(file.read_text(encoding="utf-8"))
        weights = sorted(path.glob("*.safetensors"))
        for file in weights:
            read_header(file)
        if not weights:
            raise GqaError("no weights beside it")
        return trace
    except (OSError, ValueError) as error:
        wrong = error.what if isinstance(error, GqaError) else str(error)
        raise TrainingError(
            "a checkpoint of the training is damaged",
            got=f"{file}: {wrong}",
            hint=f"rm -r {path}  and repeat the command: it resumes from the checkpoint before, or starts the training"
            " again",
        ) from None


def _tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What training changes, by names that do not depend on how it is shared out: the tensors themselves."""
    tensors: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[f"weight.{name}"] = parameter.detach()
            state = optimizer.state.get(parameter, {})
            tensors |= {f"{moment}.{name}": state[moment] for moment in _MOMENTS if moment in state}
    return tensors


def _step(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])
