"""The shapes of known models that ship with gqa, by name."""

from __future__ import annotations

import csv
import difflib
import functools
import importlib.resources
import re
from collections.abc import Iterable
from typing import Any


@functools.cache
def bundled_names() -> tuple[str, ...]:
    """The names of the shapes that ship with gqa."""
    return tuple(_bundled_rows())


def bundled_shape(model: str) -> tuple[str, dict[str, Any]] | None:
    """(name, config) of the bundled shape of that name, however it is spelled; None if there is none."""
    wanted = plain(model)
    row = next((row for name, row in _bundled_rows().items() if plain(name) == wanted), None)
    return None if row is None else (row["name"], _bundled_config(row))


def close_names(text: str, names: Iterable[str], count: int, cutoff: float) -> list[str]:
    """At most `count` of the names that are spelled like `text`; cutoff: how like, from 0 to 1."""
    by_plain = {plain(name): name for name in names}
    return [by_plain[name] for name in difflib.get_close_matches(plain(text), by_plain, n=count, cutoff=cutoff)]


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


def plain(name: str) -> str:
    """`Llama-3.1 70B` and `llama3.1-70b` are one name."""
    return re.sub(r"[\s_-]", "", name).lower()
