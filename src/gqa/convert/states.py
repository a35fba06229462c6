"""Activations of the calibration text, window by window: in memory, or in files where memory is short.

Letters: N windows · T tokens per window · d hidden size.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


class States(Protocol):
    """N windows of (T, d) numbers; a Tensor of shape (N, T, d) is one. Slices and index tensors give Tensors."""

    @property
    def shape(self) -> torch.Size: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice | Tensor, /) -> Tensor: ...

    def split(self, split_size: int, /) -> Iterable[Tensor]: ...


class StatesFile:
    """States in a file, of which only what is asked for is in memory: the numbers of window after window."""

    def __init__(self, path: Path, shape: torch.Size, dtype: torch.dtype, device: str = "cpu", first: int = 0) -> None:
        self.path, self.shape, self.dtype, self.device, self.first = path, shape, dtype, device, first
        self._window_bytes = math.prod(shape[1:]) * dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice | Tensor, /) -> Tensor:
        if isinstance(index, Tensor):
            return torch.stack([self._read(window, window + 1)[0] for window in index.tolist()])
        start, stop, step = index.indices(len(self))
        assert step == 1, "windows are read in their order"
        return self._read(start, max(start, stop))

    def split(self, split_size: int, /) -> Iterator[Tensor]:
        for start in range(0, len(self), split_size):
            yield self._read(start, min(start + split_size, len(self)))

    @property
    def complete(self) -> bool:
        """The file is there, with all of its windows."""
        return self.path.is_file() and self.path.stat().st_size >= (self.first + len(self)) * self._window_bytes

    def _read(self, start: int, stop: int) -> Tensor:
        # Plain reads rather than a mapping: pages of a mapping would count as this process's memory.
        buffer = torch.empty((stop - start) * self._window_bytes, dtype=torch.uint8)
        view, done = buffer.numpy().data, 0
        with self.path.open("rb", buffering=0) as stream:
            stream.seek((self.first + start) * self._window_bytes)
            while done < len(view):
                count = stream.readinto(view[done:])
                if not count:
                    raise OSError(f"{self.path} is shorter than it was")
                done += count
        return buffer.view(self.dtype).view(stop - start, *self.shape[1:]).to(self.device)


class Store:
    """Where states are kept: in the device's memory (no folder), or in files of this folder.

    States before a layer outlive a kill; those within a layer are made again. `keep` and `keep_before` return what
    they were given, batch after batch, as States.
    """

    def __init__(self, folder: Path | None, device: str = "cpu") -> None:
        self.folder, self.device = folder, device
        if folder is not None:
            folder.mkdir(exist_ok=True)

    def keep(self, name: str, batches: Iterable[Tensor], windows: int) -> States:
        """States that are only needed until the next ones of this name."""
        return self._keep(name, batches, windows, durable=False)

    def keep_before(self, layer: int, batches: Mapping[str, Iterable[Tensor]], windows: int) -> tuple[States, ...]:
        """States before a layer: parent's and child's, each by name."""
        return tuple(self._keep(_name(layer, name), some, windows, durable=True) for name, some in batches.items())

    def before(self, layer: int, names: Iterable[str], like: torch.Size, dtype: torch.dtype) -> tuple[States, ...]:
        """What `keep_before` kept for a layer, also in a former run; nothing if any of it is missing."""
        if self.folder is None:
            return ()
        files = tuple(StatesFile(self.folder / _name(layer, name), like, dtype, self.device) for name in names)
        return files if all(file.complete for file in files) else ()

    def forget_before(self, layer: int) -> None:
        """Give up the states before this layer and before all earlier ones."""
        if self.folder is not None:
            for path in self.folder.glob("before-*"):
                if int(path.name.split("-")[1]) <= layer:
                    path.unlink()

    def _keep(self, name: str, batches: Iterable[Tensor], windows: int, *, durable: bool) -> States:
        if self.folder is None:
            return torch.cat(list(batches))
        path = self.folder / name
        temporary = path.with_name(f"{name}.tmp")
        batches = iter(batches)
        first = next(batches)
        with temporary.open("wb") as stream:
            for batch in itertools.chain([first], batches):
                stream.write(batch.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(temporary, path)
        return StatesFile(path, torch.Size((windows, *first.shape[1:])), first.dtype, self.device)


def head(states: States, windows: int) -> States:
    """The first windows alone, where they lie."""
    return _part(states, 0, min(windows, len(states)))


def tail(states: States, windows: int) -> States:
    """The last windows alone, where they lie."""
    return _part(states, len(states) - windows, len(states))


def _part(states: States, start: int, stop: int) -> States:
    if not isinstance(states, StatesFile):
        return states[start:stop]
    shape = torch.Size((stop - start, *states.shape[1:]))
    return StatesFile(states.path, shape, states.dtype, states.device, states.first + start)


def _name(layer: int, name: str) -> str:
    return f"before-{layer:04d}-{name}"
