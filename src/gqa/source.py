"""What the user calls MODEL -> a config, and the folder it lives in.

MODEL is a folder with a config.json, such a file itself, the name of a bundled shape (`llama-3-70b`) or a hub id
(`meta-llama/Llama-3.1-8B`, `id@revision`).
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import functools
import importlib.resources
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from gqa.errors import GqaError

# Weights as safetensors, configs, tokenizers and chat templates; never pickles or code.
CHECKPOINT_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt", "vocab.txt")

# A real config.json has a few KiB, a tokenizer.json or an index of shards at most some tens of MiB.
MAX_JSON_BYTES = 100_000_000

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Source:
    """name: what to call the model; config: the raw config.json; folder: where its files are (None: no files)."""

    name: str
    config: dict[str, Any]
    folder: Path | None


def open_source(model: str) -> Source:
    """The config of MODEL; of a hub model nothing else is fetched. Raises GqaError if there is none to read."""
    if path := _existing_path(model):
        return _open_path(path)
    bundled = {_plain(name): row for name, row in _bundled_rows().items()}
    if row := bundled.get(_plain(model)):
        return Source(row["name"], _bundled_config(row), None)
    if _looks_like_a_path(model) or not _HUB_ID.fullmatch(model):
        raise _unknown(model)
    return _open_folder(_download(model, ("config.json",)), name=model)


def open_checkpoint(model: str) -> Source:
    """MODEL with its weights and tokenizer at hand: `folder` is never None. A hub model is downloaded once, into
    huggingface_hub's own cache. Raises GqaError like open_source, and for a bundled shape, which has no weights."""
    if not _existing_path(model) and not _looks_like_a_path(model) and _HUB_ID.fullmatch(model):
        source = _open_folder(_download(model, CHECKPOINT_FILES), name=model)
    else:
        source = open_source(model)
    if source.folder is None:
        raise GqaError(
            f"{source.name} is a bundled shape without weights",
            allowed="a model folder or a hub id",
            hint=f"gqa plan {model}",
        )
    for path in source.folder.iterdir():
        if path.exists() and not path.is_dir():
            check_file(path)  # whoever opens a tokenizer that is a pipe waits for ever
    return source


@functools.cache
def bundled_names() -> tuple[str, ...]:
    """The names of the shapes that ship with gqa."""
    return tuple(_bundled_rows())


def check_file(path: Path, folder: Path | None = None) -> Path:
    """The path, if it is an ordinary file, and, where a folder is given, one that belongs to it; else GqaError.

    A pipe would be waited for, and a device never ends. A symbolic link that leads out of a model folder could have
    any file of this machine copied into a result that is then published; only the hub's own cache, whose folders
    are links from `snapshots/<revision>/` to `blobs/`, may have such links.
    """
    try:
        mode = path.stat().st_mode
        real = path.resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as error:  # no such file, a NUL in its name, links in a circle
        reason = getattr(error, "strerror", None) or error
        raise GqaError("a file cannot be read", got=f"{_shown(path)}: {reason}") from None
    if not stat.S_ISREG(mode):
        raise GqaError("not an ordinary file", got=f"{path}: {_KINDS.get(stat.S_IFMT(mode), 'a device')}")
    if folder is not None:
        home = folder.resolve()
        allowed = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
        if not any(real.is_relative_to(place) for place in allowed):
            raise GqaError(
                f"{path.name} is a link out of the model folder",
                got=f"{path} -> {real}",
                allowed="a file in the folder, or a link within it",
                hint="put the file itself there, if you trust where the link leads",
            )
    return path


def read_json(path: Path, folder: Path | None = None) -> dict[str, Any]:
    """The JSON object in a file from elsewhere. GqaError for what check_file refuses, for more than MAX_JSON_BYTES,
    and for what is not an object of valid Unicode."""
    check_file(path, folder)
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_JSON_BYTES + 1)
        if len(content) > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES} bytes")
        document = json.loads(content.decode("utf-8"))
        # JSON can spell half a character, which no file that is written from this could hold.
        json.dumps(document, ensure_ascii=False).encode("utf-8")
    except (OSError, ValueError, RecursionError) as error:
        raise GqaError(f"{path.name} cannot be read", got=f"{path}: {error}", allowed="a JSON object") from None
    if not isinstance(document, dict):
        raise GqaError(f"{path.name} is not a JSON object", got=f"{path}: a {type(document).__name__}")
    return document


def _shown(path: Path) -> str:
    return str(path) if str(path).isprintable() else ascii(str(path))


_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def _open_path(path: Path) -> Source:
    if path.is_dir():
        return _open_folder(path, name=path.resolve().name)
    if path.suffix != ".json":
        raise GqaError("not a config.json", got=path, allowed="a model folder, a config.json or a hub id")
    folder = path.parent.resolve()
    return Source(folder.name if path.name == "config.json" else path.stem, read_json(path), folder)


def _open_folder(folder: Path, name: str) -> Source:
    path = folder / "config.json"
    if not os.path.lexists(path):
        raise GqaError("a folder without config.json", got=folder, allowed="a folder as save_pretrained writes it")
    return Source(name, read_json(path, folder), folder)


@functools.cache
def _bundled_rows() -> dict[str, dict[str, str]]:
    text = importlib.resources.files("gqa").joinpath("data", "models.csv").read_text("utf-8")
    return {row["name"]: row for row in csv.DictReader(text.splitlines())}


def _bundled_config(row: dict[str, str]) -> dict[str, Any]:
    """The row as the config.json that Hugging Face would write for it."""
    config: dict[str, Any] = {
        "model_type": row["model_type"],
        "num_hidden_layers": int(row["layers"]),
        "hidden_size": int(row["hidden"]),
        "num_attention_heads": int(row["query_heads"]),
        "max_position_embeddings": int(row["context"]),
        "sliding_window": int(row["sliding_window"]) if row["sliding_window"] else None,
        "tie_word_embeddings": row["tied_embeddings"] == "yes",
    }
    if row["kv_heads"] == "MLA":
        rank, rope_dim = row["head_dim"].split("+")
        config |= {"kv_lora_rank": int(rank), "qk_rope_head_dim": int(rope_dim)}
    else:
        config |= {"num_key_value_heads": int(row["kv_heads"]), "head_dim": int(row["head_dim"])}
    for key, column in (("vocab_size", "vocab"), ("intermediate_size", "intermediate")):
        if row[column]:
            config[key] = int(row[column])
    if row["quantised"]:
        config["quantization_config"] = {"quant_method": row["quantised"]}
    for pair in row["more"].split():
        key, _, value = pair.partition("=")
        config[key] = value == "true" if value in ("true", "false") else int(value)
    return config


def _plain(name: str) -> str:
    """`Llama-3.1 70B` and `llama3.1-70b` are one name."""
    return re.sub(r"[\s_-]", "", name).lower()


def _unknown(model: str) -> GqaError:
    if _looks_like_a_path(model):
        return GqaError("no such model folder or config.json", got=model)
    by_plain = {_plain(name): name for name in bundled_names()}
    close = difflib.get_close_matches(_plain(model), by_plain, n=4, cutoff=0.5)
    return GqaError(
        "an unknown model",
        got=repr(model),
        allowed="a model folder, a config.json, a hub id such as meta-llama/Llama-3.1-8B, or a bundled shape",
        hint=f"shapes like it: {', '.join(by_plain[name] for name in close)}"
        if close
        else "gqa plan --models lists them",
    )


def _existing_path(model: str) -> Path | None:
    try:
        path = Path(model).expanduser()
        return path if model.strip() and path.exists() else None  # Path("") would be the current folder
    except (OSError, ValueError, RuntimeError):  # too long a name, a NUL byte, no such home
        return None


def _looks_like_a_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or model.endswith(".json") or "\\" in model


def _download(model: str, patterns: tuple[str, ...]) -> Path:
    """The local snapshot of a hub repository with the files that match."""
    from huggingface_hub import errors, snapshot_download

    repository, _, revision = model.partition("@")
    try:
        # Unlike hf_hub_download, which retries for 20 s, this says at once that there is no network.
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(patterns)))
    except (errors.GatedRepoError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise GqaError(
            "the hub does not give this model",
            got=f"{model}: {_first_line(error)}",
            hint="check the id, or log in with `hf auth login` and accept the model's licence",
        ) from None
    # HTTPError: the base class of whichever HTTP library this huggingface_hub uses.
    except (OSError, ValueError, errors.HTTPError) as error:  # pyright: ignore[reportPrivateImportUsage]
        raise GqaError(
            "no such folder here, and the model hub cannot be reached",
            got=f"{model}: {_first_line(error)}",
            allowed="a hub id with network, a model folder, a config.json or a bundled shape",
            hint=_hint_of_bundled(repository),
        ) from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _hint_of_bundled(repository: str) -> str | None:
    by_plain = {_plain(name): name for name in bundled_names()}
    close = difflib.get_close_matches(_plain(repository.split("/")[1]), by_plain, n=1, cutoff=0.8)
    return f"gqa plan {by_plain[close[0]]} plans with the shape that ships with gqa" if close else None
