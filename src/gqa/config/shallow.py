"""The config.json of the same decoder with fewer layers: what a benchmark runs when there are no weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from gqa.config.parse import LAYERS, parse_config, text_part
from gqa.errors import GqaError


def shallow_config(config: Mapping[str, Any], layers: int, name: str) -> dict[str, Any]:
    """A deep copy of the text part of a raw config.json with its first `layers` layers. Lists with an entry per layer
    are cut. Raises GqaError for fewer than 1 or more than the model has, and like `parse_config`."""
    count = len(parse_config(config, name).layers)
    if not 1 <= layers <= count:
        raise GqaError(f"{name} has {count} layers", got=f"layers = {layers}", allowed=f"1 to {count}")
    part = copy.deepcopy(dict(text_part(config)))
    part.setdefault("model_type", config.get("model_type", ""))
    for key, value in part.items():
        if isinstance(value, list) and len(value) == count and count > 1:
            part[key] = value[:layers]
    return part | {key: layers for key in LAYERS if key in part}
