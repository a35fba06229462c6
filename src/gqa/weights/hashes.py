"""SHA-256 of a weight file, tensor by tensor, so that what has changed in it can be named."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, BinaryIO

from gqa.weights.header import TensorEntry

_CHUNK_BYTES = 8 << 20


def hash_shard(stream: BinaryIO, header_bytes: int, entries: Iterable[TensorEntry]) -> dict[str, Any]:
    """`{"header": hash, "tensors": {name: hash}}` of an open file that holds the entries in this order.

    hashlib lets go of the interpreter, so that this costs no time beside a copy that waits for the disk.
    """
    hashes: dict[str, Any] = {"header": _hash(stream, header_bytes), "tensors": {}}
    for entry in entries:
        hashes["tensors"][entry.name] = _hash(stream, entry.nbytes)
    return hashes


def _hash(stream: BinaryIO, nbytes: int) -> str:
    digest = hashlib.sha256()
    while nbytes:
        part = stream.read(min(nbytes, _CHUNK_BYTES))
        if not part:
            raise OSError("a file that was just written is shorter than it was")
        digest.update(part)
        nbytes -= len(part)
    return digest.hexdigest()
