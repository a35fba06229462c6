"""What a result holds beside its tensors, and whether a folder is the result that it should be."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gqa.config import ModelShape
from gqa.convert.card import approximations, model_card
from gqa.convert.job import Job
from gqa.convert.journal import Journal
from gqa.errors import GqaError
from gqa.record import describe_versions, write_text_atomic
from gqa.source import check_file, legacy_tokenizer, read_json
from gqa.weights.header import DTYPE_BYTES, TensorEntry
from gqa.weights.reader import INDEX, Checkpoint
from gqa.weights.writer import write_index

REPORT = "gqa-conversion.json"
_FORMAT = 1

# As people write them; others keep the name they have in the file.
DTYPE_NAMES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}

# Beside the weights only what describes a model travels: no pickle, no code, no other format's weights.
_SMALL_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".md", ".spm", ".vocab", ".bpe")
_SMALL_NAMES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
# Made anew, or about something that the result is not: other weights' indexes, adapters, a state of training.
_LEFT_OUT = (
    "config.json",
    REPORT,
    "*.index.json",
    "adapter_*",
    "trainer_state.json",
    "training_args*",
    "*_results.json",
)
_TEMPLATES = "additional_chat_templates"
_PARENT_CARD = "README.parent.md"
_TOKENIZER = "tokenizer_config.json"
# Room for config, card, tokenizer and journal when space is checked.
_SMALL_BYTES = 1 << 20


def copy_small_files(folder: Path, result: Path) -> None:
    """Copy what describes the parent beside its weights; its card gives way to ours, under another name."""
    for path in _small_files(folder):
        relative = path.relative_to(folder)
        target = result / (_PARENT_CARD if relative.name == "README.md" else relative)
        target.parent.mkdir(exist_ok=True)
        if relative.name == _TOKENIZER and (text := legacy_tokenizer(path)):
            target.write_text(text, encoding="utf-8")
        else:
            shutil.copyfile(path, target)
        with target.open("rb") as stream:
            os.fsync(stream.fileno())


def _small_files(folder: Path) -> list[Path]:
    """What describes the model beside its weights: tokenizer, generation settings, chat templates, licence, card."""
    found = [path for path in folder.iterdir() if _is_small_file(path)]
    return sorted(check_file(path, folder) for path in [*found, *folder.glob(f"{_TEMPLATES}/*.jinja")])


def _is_small_file(path: Path) -> bool:
    wanted = path.suffix in _SMALL_SUFFIXES or path.name.upper().startswith(_SMALL_NAMES)
    hidden = path.name.startswith(".")
    return wanted and not hidden and not path.is_dir() and not any(path.match(pattern) for pattern in _LEFT_OUT)


def describe(
    job: Job,
    layers: Sequence[Mapping[str, Any]],
    identity: Mapping[str, Any],
    texts: Sequence[str],
    journal: Journal,
) -> dict[str, Any]:
    """The report: sizes before and after, what was lost on text that no fit has seen, and per layer what was done
    and lost.

    Nothing in it depends on when, how fast or with how many interruptions the work was done, so that the same
    conversion gives the same bytes.
    """
    key = job.checkpoint.entry(job.layout.tensor_name(0, "k"))
    calibration = identity["calibration"]
    return {
        "model": job.source.name,
        "query_heads": job.parent.query_heads,
        "kv_heads_parent": job.parent.kv_heads,
        "kv_heads": job.child.kv_heads,
        "recipe": job.recipe.to_dict(),
        "calibration": calibration and {**calibration, "texts": [Path(text).name for text in texts]},
        "tensors": len(job.checkpoint.names),
        "tensors_changed": sum(layer["tensors_changed"] for layer in layers),
        "bytes_parent": job.checkpoint.nbytes,
        "bytes": job.output_bytes,
        "kv_dtype": DTYPE_NAMES.get(key.dtype, key.dtype),
        "kv_bytes_per_token_parent": _kv_bytes_per_token(job.parent, key),
        "kv_bytes_per_token": _kv_bytes_per_token(job.child, key),
        "measured": journal.measured_distilled if journal.distilled else journal.measured,
        **(
            {
                "distillation": {**journal.distilled, **identity["distillation"]},
                "measured_before_distillation": journal.measured,
            }
            if journal.distilled
            else {}
        ),
        **({"answers": journal.answers} if journal.answers else {}),
        "layers": list(layers),
        "approximations": [*approximations(job.recipe, job.parent.kv_heads), *(() if job.exact else job.layout.notes)],
        "file": REPORT,
    }


def _kv_bytes_per_token(shape: ModelShape, key: TensorEntry) -> int:
    """Sum over layers of H * (D + Dv), in the dtype of the weights."""
    return sum(layer.kv_heads * (layer.head_dim + layer.v_head_dim) for layer in shape.layers) * DTYPE_BYTES[key.dtype]


def write_config(job: Job, result: Path) -> None:
    """config.json and the index of the shards: with them the result loads."""
    write_text_atomic(result / "config.json", json.dumps(job.config, indent=2, ensure_ascii=False) + "\n")
    if job.checkpoint.sharded:
        write_index(result / INDEX, job.shards)


def write_text_files(
    result: Path,
    report: Mapping[str, Any],
    out: Path,
    identity: Mapping[str, Any],
    shards: Mapping[str, Any],
) -> None:
    """The model card and the report for programs, with the hashes of all that was written. shards: those of the weight
    files, as hash_shard gives them."""
    write_text_atomic(result / "README.md", model_card(report, out.name))
    document = {"format": _FORMAT, "identity": identity, "report": report, "versions": describe_versions()}
    files = sorted(path for path in result.rglob("*") if path.is_file() and path.name not in shards)
    hashes = {str(path.relative_to(result)): _sha256(path.read_bytes()) for path in files}
    document["hashes"] = {"shards": {name: shards[name] for name in sorted(shards)}, "files": hashes}
    document["hashes"]["record"] = record_sha256(document)
    write_text_atomic(result / REPORT, record_text(document))


def record_text(document: Mapping[str, Any]) -> str:
    """The report for programs as its file holds it."""
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def record_sha256(document: Mapping[str, Any]) -> str:
    """The hash of a report for programs, but for the place where this hash stands."""
    others = {name: value for name, value in document.get("hashes", {}).items() if name != "record"}
    return _sha256(json.dumps({**document, "hashes": others}, sort_keys=True).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def verify(job: Job, result: Path) -> None:
    """Read the result back as any consumer would: every header, every name, dtype and shape."""
    written = Checkpoint(result)
    job.layout.check(written, job.child)
    planned = {entry.name: (entry.dtype, entry.shape) for entries in job.shards.values() for entry in entries}
    found = {name: (written.entry(name).dtype, written.entry(name).shape) for name in written.names}
    if planned != found:
        wrong = sorted(name for name in planned | found if planned.get(name) != found.get(name))
        raise GqaError(
            "the written files are not what was planned", got=", ".join(wrong[:5]), hint="is the disk sound?"
        )


def already_done(out: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The report of OUT if it is this same conversion, complete; else GqaError."""
    try:
        document = read_json(out / REPORT, out)
        found, report = document["identity"], document["report"]
    except (GqaError, KeyError):
        found, report = None, {}
    if found != json.loads(json.dumps(identity)):
        raise GqaError(
            "OUT exists and is not this conversion's",
            got=f"{out}{'' if found is None else ', converted from another source or with another recipe'}",
            allowed="a folder that does not exist yet",
            hint="choose another name, or remove it",
        )
    Checkpoint(out)
    return {**report, "out": str(out), "already_done": True, "seconds": None}


def small_bytes(folder: Path) -> int:
    """Room that everything but the weights may take."""
    return sum(path.stat().st_size for path in _small_files(folder)) + _SMALL_BYTES
