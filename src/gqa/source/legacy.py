"""A folder that transformers 5 has written -> one that readers of the older spelling take unchanged."""

from __future__ import annotations

import json
from pathlib import Path

from gqa.config import add_legacy_keys
from gqa.record import write_text_atomic

# How a tokenizer was loaded, which transformers 5 saves with it.
_LOADING = ("is_local", "local_files_only")


def write_legacy_keys(folder: Path) -> None:
    """Add the older keys to config.json, and give the tokenizer the older name of its class.

    transformers 5 writes rope_parameters and dtype only; older readers look for rope_theta, rope_scaling and
    torch_dtype, and else guess or stop.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    add_legacy_keys(config)
    config.setdefault("rope_scaling", None)
    write_text_atomic(path, json.dumps(config, indent=2) + "\n")
    path = folder / "tokenizer_config.json"
    if text := legacy_tokenizer(path):
        write_text_atomic(path, text)


def legacy_tokenizer(path: Path) -> str | None:
    """The text of a tokenizer_config.json with the older name of a class that transformers 5 renamed; None for other
    classes, and for what is not a JSON object."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    if not isinstance(config, dict) or config.get("tokenizer_class") != "TokenizersBackend":
        return None
    kept = {key: value for key, value in config.items() if key not in _LOADING}
    return json.dumps({**kept, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2, ensure_ascii=False) + "\n"
