"""Models of the Hugging Face hub, downloaded once into its own cache."""

from __future__ import annotations

import re
from pathlib import Path

from gqa.errors import GqaError
from gqa.source.bundled import bundled_names, close_names

# Weights as safetensors, configs, tokenizers and chat templates; never pickles or code.
CHECKPOINT_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt", "vocab.txt")

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?", re.ASCII)


def download(model: str, patterns: tuple[str, ...]) -> Path:
    """The local snapshot of a hub repository with the files that match."""
    from huggingface_hub import errors, snapshot_download

    repository, _, revision = model.partition("@")
    try:
        # Unlike hf_hubdownload, which retries for 20 s, this says at once that there is no network.
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(patterns)))
    except (errors.GatedRepoError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise GqaError(
            "the hub does not give this model",
            got=f"{model}: {first_line(error)}",
            hint="check the id, or log in with `hf auth login` and accept the model's licence",
        ) from None
    # HTTPError: the base class of whichever HTTP library this huggingface_hub uses.
    except (OSError, ValueError, errors.HTTPError) as error:  # pyright: ignore[reportPrivateImportUsage]
        raise GqaError(
            "no such folder here, and the model hub cannot be reached",
            got=f"{model}: {first_line(error)}",
            allowed="a hub id with network, a model folder, a config.json, a GGUF file or a bundled shape",
            hint=_hint_of_bundled(repository),
        ) from None


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _hint_of_bundled(repository: str) -> str | None:
    close = close_names(repository.split("/")[1], bundled_names(), count=1, cutoff=0.8)
    return f"gqa plan {close[0]} plans with the shape that ships with gqa" if close else None
