"""Raw safetensors files, honest and not."""

from __future__ import annotations

import json
from typing import Any

HONEST: dict[str, Any] = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}


def header_file(header: dict[str, Any] | bytes, data_bytes: int = 0) -> bytes:
    """A file with this header and that many bytes of data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data_bytes)
