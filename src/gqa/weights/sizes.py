"""How many bytes a checkpoint's tensors take, from its headers alone."""

from __future__ import annotations

import os
import re
from pathlib import Path

from gqa.errors import GqaError
from gqa.source import read_json
from gqa.weights.header import TensorEntry, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# What architectures call their K and V projections, alone and fused with others; scales and zeros of quantised ones
# are named after them.
_K_OR_V = re.compile(r"(^|[._])(k|v|kv)(_proj|_lin)?\.")
_FUSED = re.compile(r"(^|[._])(qkv_proj|wqkv|query_key_value|c_attn|qkv)\.", re.IGNORECASE)


def stored_bytes(folder: Path, kv_share: float) -> tuple[int, float] | None:
    """(bytes of all tensors, bytes of those of the K and V projections), or None where there are no safetensors.

    kv_share: the part of a fused projection's rows that are K and V. Raises GqaError for a broken header or index.
    """
    if os.path.lexists(folder / SINGLE):
        names = [SINGLE]
    elif os.path.lexists(folder / INDEX):
        files = read_json(folder / INDEX, folder).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
            raise GqaError(f"{INDEX} has no weight_map", got=folder / INDEX)
        names = sorted(set(files.values()))
    else:
        return None
    total, kv = 0, 0.0
    for name in names:
        if Path(name).name != name:
            raise GqaError(f"{INDEX} names a file outside the folder", got=name)
        for tensor in read_header(folder / name).tensors.values():
            total += tensor.nbytes
            kv += tensor.nbytes * _share(tensor, kv_share)
    return total, kv


def _share(tensor: TensorEntry, kv_share: float) -> float:
    if _FUSED.search(tensor.name):
        return kv_share
    return 1.0 if _K_OR_V.search(tensor.name) and "norm" not in tensor.name else 0.0
