"""The folders of an uptraining: whose a folder is, and how the result gets into its place whole."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gqa.errors import GqaError
from gqa.quiet import quiet_transformers
from gqa.record import write_text_atomic
from gqa.uptrain.data import TrainingText
from gqa.uptrain.stream import StreamedText
from gqa.weights.reader import Checkpoint
from gqa.weights.writer import check_space, sync_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REPORT = "gqa-uptraining.json"
_JOB = "gqa-uptraining-job.json"

# The model's weights are made anew, other formats' would be those of the untrained model, and code does not travel.
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npy", ".py")
# About weights that the result no longer has.
_NOT_TRUE_ANY_MORE = ("gqa-conversion.json", "gqa_training.json", REPORT)


@dataclasses.dataclass(frozen=True)
class Job:
    """One uptraining: its identity (a hash of all that decides the result), its place, and where it works."""

    identity: str
    out: Path
    working: Path
    done: bool


def find_job(
    source: Checkpoint, parent: Checkpoint | None, text: TrainingText | StreamedText, asked: dict[str, Any], out: Path
) -> Job:
    """Find out whether this uptraining is new, was interrupted or is done.

    Raises GqaError if `out` or its working folder belongs to something else.
    """
    streamed = isinstance(text, StreamedText)
    size = text.identity() if streamed else [len(text.order), text.length]
    what = [source.fingerprint(), parent and parent.fingerprint(), size, asked]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode())
    if not streamed:
        for piece in text.pieces():
            digest.update(piece.tobytes())
        digest.update(np.ascontiguousarray(text.held_out, dtype=np.int64).tobytes())
    job = Job(digest.hexdigest(), out, out.with_name(out.name + ".partial"), done=False)
    if os.path.lexists(out):
        if _identity(out / REPORT) != job.identity:
            raise GqaError(
                "the output exists and is not the result of this uptraining",
                got=out,
                hint="give another folder, or delete this one",
            )
        if _identity(job.working / _JOB) == job.identity:  # killed between the rename and this
            _discard(job.working)
        shutil.rmtree(_gone(job.working), ignore_errors=True)  # killed in the midst of that
        return dataclasses.replace(job, done=True)
    if job.working.exists() and _identity(job.working / _JOB) != job.identity:
        raise GqaError(
            "another uptraining was interrupted here",
            got=job.working,
            hint=f"repeat its command to go on with it, or delete {job.working}",
        )
    return job


def begin(job: Job, source: Checkpoint) -> int:
    """Make the working folder, unless an interrupted run left it, and own it until the handle that this returns is
    closed. GqaError if it cannot be written, or another process owns it."""
    if not job.working.exists():
        _make(job, source)
    handle = os.open(job.working / _JOB, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise GqaError("another process is at work on this uptraining", got=job.working, hint="wait for it") from None
    return handle


def _make(job: Job, source: Checkpoint) -> None:
    try:
        job.out.parent.mkdir(parents=True, exist_ok=True)
        # Two checkpoints in fp32 with two moments of Adam each, and the result as it was stored.
        checkpoint = 3 * source.nbytes * 4 // _stored_dtype(source).itemsize
        check_space(job.out.parent, 2 * checkpoint + source.nbytes)
        # The mark comes with the folder, so that no kill leaves a working folder that nobody owns.
        begun = job.working.with_name(f".{job.working.name}.begun")
        shutil.rmtree(begun, ignore_errors=True)
        begun.mkdir()
        write_text_atomic(begun / _JOB, json.dumps({"identity": job.identity}))
        os.rename(begun, job.working)
    except OSError as error:
        raise GqaError("the output cannot be written", got=f"{job.out}: {error.strerror}") from None


def finish(model: PreTrainedModel, source: Checkpoint, job: Job, report: dict[str, Any]) -> None:
    """Write the trained model in the dtype that the source had, with the source's own config and tokenizer, and
    rename it into its place."""
    result = job.working / "result"
    shutil.rmtree(result, ignore_errors=True)
    with quiet_transformers():
        model.to(_stored_dtype(source)).save_pretrained(result)  # pyright: ignore[reportCallIssue, reportArgumentType]
    for path in sorted(source.folder.iterdir()):
        if path.is_file() and path.suffix not in _NOT_COPIED and not path.name.endswith(".index.json"):
            if path.name in _NOT_TRUE_ANY_MORE:
                continue
            # config.json too: its shape has not changed, and save_pretrained drops the keys that older readers need.
            shutil.copyfile(path, result / path.name)
    _tell(result / "README.md", report)
    write_text_atomic(result / REPORT, json.dumps({**report, "identity": job.identity}, indent=2) + "\n")
    for path in result.iterdir():
        path.chmod(path.stat().st_mode | 0o044)  # safetensors writes private files; a model is an ordinary file
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    sync_folder(result)
    os.rename(result, job.out)
    sync_folder(job.out.parent)
    _discard(job.working)


def read_report(out: Path) -> dict[str, Any]:
    """What `uptrain` returned when it wrote this folder."""
    report = json.loads((out / REPORT).read_text(encoding="utf-8"))
    del report["identity"]
    return report


def _discard(working: Path) -> None:
    """Delete a working folder so that it never stands there without the mark that tells whose it is."""
    shutil.rmtree(_gone(working), ignore_errors=True)
    os.rename(working, _gone(working))
    shutil.rmtree(_gone(working), ignore_errors=True)


def _gone(working: Path) -> Path:
    return working.with_name(f".{working.name}.gone")


def _tell(path: Path, report: dict[str, Any]) -> None:
    before = path.read_text(encoding="utf-8") + "\n" if path.exists() else f"# {report['model']}\n\n"
    teacher = "without a teacher"
    if report["parent"] is not None:
        teacher = f"with the parent as teacher (weight {report['distill_weight']:g} on KL, the rest on the text)"
    moved = {"attention": ", of the attentions alone", "lora": f", as updates of rank {report.get('lora_rank')}"}
    text = (
        f"## Uptraining\n\nTrained with `gqa uptrain` for {report['tokens']} tokens, in steps of "
        f"{report['batch']} windows of {report['window']} tokens, AdamW at {report['learning_rate']:g}"
        f"{moved.get(report.get('train', 'all'), '')}, {teacher}.\n"
    )
    write_text_atomic(path, before + text)


def _identity(path: Path) -> str | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _stored_dtype(source: Checkpoint) -> torch.dtype:
    """The dtype of most of the tensors."""
    return Counter(source.dtype(name) for name in source.names).most_common(1)[0][0]
