"""A GGUF file -> an ordinary checkpoint folder in bf16, made once and kept in gqa's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gqa.errors import GqaError
from gqa.progress import Progress, silent
from gqa.quiet import quiet_transformers
from gqa.record import write_text_atomic
from gqa.source.files import check_file
from gqa.source.gguf_config import config_of
from gqa.source.gguf_header import GgufHeader, read_gguf
from gqa.source.legacy import write_legacy_keys
from gqa.storage import cache_folder, publish

FORMAT = 1  # part of the folder's name: raise it when the same file would give another folder
_LINK = "model.gguf"


def cached_folder(path: Path) -> Path | None:
    """The folder that was made of this file, if it is in the cache. The file is read only if one of its size is."""
    if not any(cache_folder().glob(_name(check_file(path), "*"))):
        return None
    folder = cache_folder() / _name(path, _sha256(path))
    return folder if folder.is_dir() else None


def dequantised_folder(path: Path, progress: Progress = silent) -> Path:
    """The folder for this file: safetensors in bf16, config.json, tokenizer and chat template.

    transformers reads the file, so its RAM must hold the model in bf16. The folder appears whole, by a rename; a
    second process waits for the first. Raises GqaError for a file that is damaged or not understood, without the gguf
    package, and where the cache folder cannot be written.
    """
    header = read_gguf(path)
    config = config_of(header)
    state = _state(path)
    folder = cache_folder() / _name(path, _sha256(path))
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise GqaError("GGUF files need the package gguf", got="it is not installed", hint="pip install 'gqa[gguf]'")
    with _locked():
        if folder.is_dir():
            return folder
        working = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(working, ignore_errors=True)  # of a process that was killed
        try:
            _convert(header, config, working, progress)
            if _state(path) != state:
                raise GqaError("the GGUF file changed while it was read", got=path, hint="give the command again")
            publish(working / "model", folder)
        except OSError as error:
            raise _unwritable(error) from None
        finally:
            shutil.rmtree(working, ignore_errors=True)
    return folder


def _convert(header: GgufHeader, config: dict[str, Any], working: Path, progress: Progress) -> None:
    """Write `working`/model."""
    path = header.path
    # In a folder of its own, so that transformers sees this file and none that lies beside it.
    (working / "file").mkdir(parents=True)
    (working / "file" / _LINK).symlink_to(path.resolve())
    stage = f"dequantising {path.name}"
    progress(stage, 0, 3, "kept for the next time")
    try:
        # tqdm, which transformers uses here directly, writes its bar to stderr.
        with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
            model = _load(working / "file", config)
            progress(stage, 1, 3)
            tokenizer = _load_tokenizer(working / "file", config)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        raise GqaError("transformers cannot read the GGUF file", got=f"{path}: {_first_line(error)}") from error
    progress(stage, 2, 3)
    folder = working / "model"
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    write_legacy_keys(folder)
    _drop_tokens_from(header.lengths["tokenizer.ggml.tokens"], folder / "tokenizer.json")
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    progress(stage, 3, 3)


def _load(folder: Path, config: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=_LINK,
        config=AutoConfig.for_model(**config),
        quantization_config=GgufConfig(gguf_file=_LINK, dequantize=True),
        dtype=torch.bfloat16,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    model, report = loaded
    if wrong := sorted(map(str, (*report["missing_keys"], *report["mismatched_keys"], *report["unexpected_keys"]))):
        raise ValueError(f"{len(wrong)} tensors do not fit the model, the first {wrong[0]}")
    return model


def _load_tokenizer(folder: Path, config: dict[str, Any]) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=_LINK)
    tokenizer.model_max_length = config["max_position_embeddings"]
    return tokenizer


def _drop_tokens_from(count: int, path: Path) -> None:
    """Drop added tokens that the file does not have: the class of tokenizer that transformers builds adds one of its
    own (<|endoftext|>), which may have no row in the embedding."""
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] < count]
    write_text_atomic(path, json.dumps(tokenizer, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """One conversion at a time: it may take most of the machine's memory."""
    import fcntl  # not everywhere, and `gqa plan` does without

    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        handle = os.open(cache_folder() / "gguf.lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise _unwritable(error) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _unwritable(error: OSError) -> GqaError:
    got = f"{cache_folder()}: {error.strerror or _first_line(error)}"
    return GqaError("the cache folder cannot be written", got=got, hint="set GQA_CACHE to a folder with space")


def _name(path: Path, sha256: str) -> str:
    return f"gguf-{FORMAT}-{path.stat().st_size}-{sha256}"


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _state(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_size, status.st_ino, status.st_mtime_ns


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
