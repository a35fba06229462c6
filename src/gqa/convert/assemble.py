"""Write the files of the result: changed tensors from wherever they are computed, all others byte for byte."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from gqa.convert.job import Job
from gqa.convert.journal import Journal
from gqa.convert.meter import Meter
from gqa.convert.pool import PooledLayers
from gqa.progress import Progress
from gqa.weights.copying import append_tensor
from gqa.weights.hashes import hash_shard
from gqa.weights.header import read_header
from gqa.weights.writer import publish, unpublished, write_tensor, write_unpublished

# Appends a changed tensor of a layer to a file; False if that tensor came out as the parent's.
Append = Callable[[int, str, BinaryIO], bool]


def write_shards(job: Job, journal: Journal, progress: Progress) -> dict[str, Any]:
    """Assemble the files that are not complete yet; a layer's file goes when the last of its tensors is in place.

    While a file is hashed and brought to the disk the next one is written already: a kill loses these two at most.
    Returns the hashes of all files, by hash_shard.
    """
    unfinished = [name for name in job.shards if not (journal.result / name).exists()]
    layer_of = {entry.name: layer for layer, entries in job.changes.items() for entry in entries}
    order = [[layer_of[entry.name] for entry in job.shards[name] if entry.name in layer_of] for name in unfinished]
    shard_of = {name: shard for shard in job.checkpoint.shards for name in shard.tensors}
    nbytes = {entry.name: entry.nbytes for entries in job.shards.values() for entry in entries}
    meter = Meter(progress, "write files", sum(nbytes.values()))
    finished = [name for name in job.shards if name not in unfinished]
    meter.skip(sum(entry.nbytes for name in finished for entry in job.shards[name]))

    with contextlib.ExitStack() as stack:
        if job.pooled:
            append = _pooled(stack.enter_context(PooledLayers(job, [layer for layers in order for layer in layers])))
        else:
            append = _finished(journal, order)

        def write(name: str, stream: BinaryIO) -> None:
            layer = layer_of.get(name)
            if layer is None or not append(layer, name, stream):
                append_tensor(shard_of[name], name, stream)
            meter.add(nbytes[name])

        hasher = stack.enter_context(ThreadPoolExecutor(1, "hash"))
        hashes = {name: hasher.submit(_hash, job, name, (journal.result / name).open("rb")) for name in finished}
        publisher = stack.enter_context(ThreadPoolExecutor(1, "publish"))
        published: list[Future[None]] = []
        for index, shard in enumerate(unfinished):
            path = journal.result / shard
            write_unpublished(path, job.shards[shard], write, job.metadata(shard))
            # Opened before it gets its name, and read while it is on its way from memory to the disk.
            hashes[shard] = hasher.submit(_hash, job, shard, unpublished(path).open("rb"))
            over = set(order[index]).difference(*order[index + 1 :])
            files = [] if job.pooled else [journal.layer_path(layer) for layer in sorted(over)]
            published.append(publisher.submit(_publish, path, files))
        for one in published:
            one.result()
        return {name: one.result() for name, one in hashes.items()}


def _pooled(layers: PooledLayers) -> Append:
    def append(layer: int, name: str, stream: BinaryIO) -> bool:
        write_tensor(stream, layers.tensor(layer, name))
        return True

    return append


def _finished(journal: Journal, order: Sequence[Sequence[int]]) -> Append:
    """From the files of finished layers, opened before the first of them is used up."""
    files = {layer: read_header(journal.layer_path(layer)) for layers in order for layer in layers}

    def append(layer: int, name: str, stream: BinaryIO) -> bool:
        if name not in files[layer].tensors:
            return False
        append_tensor(files[layer], name, stream)
        return True

    return append


def _hash(job: Job, shard: str, stream: BinaryIO) -> dict[str, Any]:
    with stream:
        header_bytes = job.shard_bytes(shard) - sum(entry.nbytes for entry in job.shards[shard])
        return hash_shard(stream, header_bytes, job.shards[shard])


def _publish(path: Path, used_up: Sequence[Path]) -> None:
    publish(path)
    for file in used_up:
        file.unlink()
