"""MODEL -> its Source: from a path, a preset, a bundled shape or the hub."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from gqa.errors import GqaError
from gqa.progress import Progress, silent
from gqa.source.bundled import bundled_names, bundled_shape, close_names
from gqa.source.files import check_file, read_json
from gqa.source.gguf_config import config_of
from gqa.source.gguf_folder import cached_folder, dequantised_folder
from gqa.source.gguf_header import read_gguf
from gqa.source.hub import CHECKPOINT_FILES, HUB_ID, download
from gqa.source.presets import find_preset, presets


@dataclasses.dataclass(frozen=True)
class Source:
    """name: what to call the model; config: the raw config.json; folder: where its files are (None: no files)."""

    name: str
    config: dict[str, Any]
    folder: Path | None


def open_source(model: str) -> Source:
    """The config of MODEL; of a hub model nothing else is fetched, and of a GGUF file only its header is read.

    Raises GqaError if there is none to read.
    """
    if gguf := _gguf_file(model):
        name, path = gguf
        config = config_of(read_gguf(path))
        folder = cached_folder(path)
        return _open_folder(folder, name) if folder else Source(name, config, None)
    if path := _existing_path(model):
        return _open_path(path)
    if shape := bundled_shape(model):
        return Source(*shape, None)
    if _looks_like_a_path(model) or not HUB_ID.fullmatch(model):
        raise _unknown(model)
    return _open_folder(download(model, ("config.json",)), name=model)


def open_checkpoint(model: str, progress: Progress = silent) -> Source:
    """MODEL with its weights and tokenizer at hand: `folder` is never None. A hub model is downloaded once, into
    huggingface_hub's own cache; a GGUF file is dequantised once, into gqa's.

    Raises GqaError like open_source and dequantised_folder, and for a bundled shape, which has no weights.
    """
    if gguf := _gguf_file(model):
        name, path = gguf
        source = _open_folder(dequantised_folder(path, progress), name)
    elif not _existing_path(model) and not _looks_like_a_path(model) and HUB_ID.fullmatch(model):
        source = _open_folder(download(model, CHECKPOINT_FILES), name=model)
    else:
        source = open_source(model)
    if source.folder is None:
        raise GqaError(
            f"{source.name} is a bundled shape without weights",
            allowed="a model folder, a GGUF file or a hub id",
            hint=f"gqa plan {model}",
        )
    for path in source.folder.iterdir():
        if path.exists() and not path.is_dir():
            check_file(path)  # whoever opens a tokenizer that is a pipe waits for ever
    return source


def _gguf_file(model: str) -> tuple[str, Path] | None:
    """(name, path) if MODEL is a GGUF file or the preset of one."""
    if path := _existing_path(model):
        return (path.stem, path) if path.suffix.lower() == ".gguf" and not path.is_dir() else None
    preset = find_preset(model)
    return preset and (preset.name, preset.path())


def _open_path(path: Path) -> Source:
    if path.is_dir():
        return _open_folder(path, name=path.resolve().name)
    if path.suffix != ".json":
        raise GqaError("not a config.json", got=path, allowed="a model folder, a config.json, a GGUF file or a hub id")
    folder = path.parent.resolve()
    return Source(folder.name if path.name == "config.json" else path.stem, read_json(path), folder)


def _open_folder(folder: Path, name: str) -> Source:
    path = folder / "config.json"
    if not os.path.lexists(path):
        raise GqaError("a folder without config.json", got=folder, allowed="a folder as save_pretrained writes it")
    return Source(name, read_json(path, folder), folder)


def _unknown(model: str) -> GqaError:
    if _looks_like_a_path(model):
        return GqaError("no such model folder or config.json", got=model)
    close = close_names(model, [*bundled_names(), *(preset.name for preset in presets())], count=4, cutoff=0.5)
    return GqaError(
        "an unknown model",
        got=repr(model),
        allowed="a model folder, a config.json, a GGUF file, a hub id such as meta-llama/Llama-3.1-8B, "
        "or a bundled shape",
        hint=f"shapes like it: {', '.join(close)}" if close else "gqa plan --models lists them",
    )


def _existing_path(model: str) -> Path | None:
    try:
        path = Path(model).expanduser()
        return path if model.strip() and path.exists() else None  # Path("") would be the current folder
    except (OSError, ValueError, RuntimeError):  # too long a name, a NUL byte, no such home
        return None


def _looks_like_a_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or model.lower().endswith((".json", ".gguf")) or "\\" in model
