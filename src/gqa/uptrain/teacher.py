"""The parent's predictions: from the parent itself, or from a folder that it wrote them to once."""

# N windows, T tokens of a window, B windows of a micro-batch, V entries of the vocabulary, K that are stored of them

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gqa.errors import GqaError
from gqa.progress import Progress
from gqa.record import write_text_atomic
from gqa.uptrain.data import TrainingText
from gqa.uptrain.distill import TopPredictions, top_predictions
from gqa.uptrain.processes import Processes
from gqa.weights.reader import Checkpoint
from gqa.weights.writer import check_space, sync_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# (places of windows in the text (B,), their ids (B, T)) -> what distillation_loss takes as teacher
Teacher = Callable[[np.ndarray, torch.Tensor], torch.Tensor | TopPredictions]

_ABOUT = "gqa-teacher-logits.json"
_IDS, _VALUES = "ids.npy", "log_probabilities.npy"
_MARK_EVERY = 50  # batches between two marks of how far the writing is


def arithmetic(device: torch.device, *, half: bool) -> contextlib.AbstractContextManager[Any]:
    """Where models run: bf16 products, fp32 weights and sums, if `half`."""
    return torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext()


def live_teacher(parent: PreTrainedModel, *, half: bool) -> Teacher:
    """The parent itself, in the arithmetic of the model that is trained."""
    parent.requires_grad_(False).eval()

    def predict(places: np.ndarray, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), arithmetic(ids.device, half=half):
            return parent(input_ids=ids, use_cache=False).logits

    return predict


def stored_teacher(folder: Path, text: TrainingText) -> Teacher:
    """The predictions that `store` wrote for this text."""
    rows = _rows(text)
    stored_ids, stored_values = (np.load(folder / name, mmap_mode="r") for name in (_IDS, _VALUES))

    def predict(places: np.ndarray, ids: torch.Tensor) -> TopPredictions:
        found = np.searchsorted(rows, places)
        top = torch.from_numpy(stored_ids[found].astype(np.int64)).to(ids.device)
        return TopPredictions(top, torch.from_numpy(stored_values[found]).to(ids.device))

    return predict


def is_stored(folder: Path, parent: Checkpoint, text: TrainingText, k: int) -> bool:
    """Whether the folder has the parent's predictions for this text. GqaError if it is something else."""
    if not os.path.lexists(folder):
        return False
    if _about(folder) != _identity(parent, text, k):
        raise GqaError(
            "the folder has not the parent's predictions for this text",
            got=folder,
            allowed="a new folder, or one that the same parent, text, tokens, window, seed and top-k wrote",
        )
    return True


def store(
    folder: Path,
    parent: PreTrainedModel,
    source: Checkpoint,
    text: TrainingText,
    k: int,
    world: Processes,
    batch: int,
    progress: Progress,
    *,
    half: bool,
) -> None:
    """Write the parent's k most likely tokens for every window that is trained on or held out, `batch` windows at a
    time in each process. An interrupted writing goes on where it was. Every process calls this.
    """
    rows, identity = _rows(text), _identity(source, text, k)
    partial = folder.with_name(folder.name + ".partial")
    V = parent.config.get_text_config().vocab_size
    if k > V:
        raise GqaError("more predictions than the vocabulary has entries", got=k, allowed=f"at most {V}")
    shape = (len(rows), text.length - 1, k)

    def begin() -> int:
        if _about(partial) != identity:
            if partial.exists():
                raise GqaError("other predictions were being written here", got=partial, hint=f"delete {partial}")
            folder.parent.mkdir(parents=True, exist_ok=True)
            check_space(folder.parent, 4 * (2 * k + 1) * shape[0] * shape[1])
            begun = partial.with_name(f".{partial.name}.begun")
            shutil.rmtree(begun, ignore_errors=True)
            begun.mkdir()
            for name, dtype, last in ((_IDS, np.int32, k), (_VALUES, np.float32, k + 1)):
                np.lib.format.open_memmap(begun / name, "w+", dtype, (*shape[:2], last)).flush()
            _tell(begun, identity, 0)
            os.rename(begun, partial)
        return int(json.loads((partial / _ABOUT).read_text(encoding="utf-8"))["windows_done"])

    done = world.agree(begin)
    ids_file, values_file = (np.load(partial / name, mmap_mode="r+") for name in (_IDS, _VALUES))

    def flush() -> None:
        ids_file.flush()
        values_file.flush()
        world.wait()

    predict, block = live_teacher(parent, half=half), batch * world.count
    for number, start in enumerate(range(done, len(rows), block), start=1):
        # As many in every process, as they run together; what is too much is done twice and written once.
        mine = np.minimum(start + world.rank * batch + np.arange(batch), len(rows) - 1)
        ids = text.ids(rows[mine]).to(parent.device)
        logits = predict(rows[mine], ids)
        assert isinstance(logits, torch.Tensor)
        top = top_predictions(logits, k)
        ids_file[mine], values_file[mine] = top.ids.cpu().numpy(), top.log_probabilities.cpu().numpy()
        end = min(start + block, len(rows))
        progress("the parent's predictions", end, len(rows))
        if number % _MARK_EVERY == 0:
            flush()
            world.agree(lambda end=end: _tell(partial, identity, end))
    flush()

    def publish() -> None:
        _tell(partial, identity, len(rows))
        sync_folder(partial)
        os.rename(partial, folder)
        sync_folder(folder.parent)

    world.agree(publish)


def _rows(text: TrainingText) -> np.ndarray:
    """The places, sorted, of the windows that predictions are stored for."""
    held_out = len(text.windows) + np.arange(len(text.held_out))
    return np.concatenate([np.unique(text.order), held_out])


def _identity(parent: Checkpoint, text: TrainingText, k: int) -> str:
    rows = _rows(text)
    digest = hashlib.sha256(json.dumps([parent.fingerprint(), k, rows.shape, text.length], default=str).encode())
    for start in range(0, len(rows), 4096):
        digest.update(text.ids(rows[start : start + 4096]).numpy().tobytes())
    return digest.hexdigest()


def _tell(folder: Path, identity: str, done: int) -> None:
    write_text_atomic(folder / _ABOUT, json.dumps({"identity": identity, "windows_done": done}))


def _about(folder: Path) -> str | None:
    try:
        return json.loads((folder / _ABOUT).read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
