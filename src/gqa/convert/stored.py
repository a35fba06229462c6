"""Converted tensors as files hold them: rounded once to the parent's dtypes, and only those that changed."""

from __future__ import annotations

from pathlib import Path

import torch

from gqa.convert.job import Job
from gqa.errors import GqaError
from gqa.weights.finite import all_finite
from gqa.weights.header import read_header
from gqa.weights.layout import AttentionWeights
from gqa.weights.reader import TORCH_DTYPES, read_tensor


def as_stored(job: Job, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the dtype of the parent's, in the CPU's memory. Raises GqaError if a value does not fit it."""
    dtype = TORCH_DTYPES[job.checkpoint.entry(name).dtype]
    stored = tensor.detach().to("cpu", dtype)
    if not all_finite(stored):
        raise GqaError(
            f"tensor {name} does not fit {str(dtype).removeprefix('torch.')} after the conversion",
            got=f"values up to {float(tensor.abs().max()):.3g}",
            allowed=f"at most {torch.finfo(dtype).max:.3g}",
            hint="store the parent as bf16 or fp32 first",
        )
    return stored


def changed_tensors(job: Job, layer: int, weights: AttentionWeights) -> dict[str, torch.Tensor]:
    """A layer's tensors in the dtypes of the source, without those that came out as they were."""
    planned = {entry.name: entry for entry in job.changes[layer]}
    changed: dict[str, torch.Tensor] = {}
    for name, tensor in job.layout.attention_tensors(layer, weights).items():
        stored = as_stored(job, name, tensor)
        old = job.checkpoint.entry(name)
        if tuple(stored.shape) == old.shape and torch.equal(stored, job.checkpoint.read(name)):
            continue
        assert name in planned, f"{name} was not to change"
        assert tuple(stored.shape) == planned[name].shape, f"{name} has shape {tuple(stored.shape)}"
        changed[name] = stored
    return changed


class StoredLayer:
    """A finished layer as it will be stored: its own file, and the parent's tensors where nothing changed."""

    def __init__(self, job: Job, path: Path) -> None:
        self.parent, self.file = job.checkpoint, read_header(path)

    def __contains__(self, name: object) -> bool:
        return name in self.parent

    def read(self, name: str) -> torch.Tensor:
        return read_tensor(self.file, name) if name in self.file.tensors else self.parent.read(name)
