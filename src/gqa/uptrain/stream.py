"""A text of any size -> windows in a file: read once, in pieces, then mapped into memory as training needs them."""

# N windows, T tokens of a window

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gqa.errors import GqaError
from gqa.progress import Progress
from gqa.record import write_text_atomic
from gqa.text import load_tokenizer, pieces
from gqa.uptrain.data import TrainingText, training_text
from gqa.weights.writer import sync_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENS, _COUNT = "tokens.int32", "tokens.json"
_AT_ONCE = 256  # pieces that the tokenizer gets together, to use all cores
_SAMPLE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class StreamedText:
    """What `gqa.text.pieces` reads at `paths`, up to as many windows of `length` tokens as `tokens` and `held_out`
    ask for. The tokenizer is that of the folder; its end-of-text token stands between documents, if it has one."""

    paths: tuple[str, ...]
    field: str
    tokenizer: Path
    length: int
    tokens: int
    batch: int
    seed: int
    held_out: int = 0

    def identity(self) -> str:
        """A hash of what decides the windows: of files, size, beginning and end."""
        told = {**dataclasses.asdict(self), "tokenizer": None, "files": [_sample(path) for path in self.paths]}
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json"):
            told[name] = _sample(str(self.tokenizer / name))
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    @property
    def wanted(self) -> int:
        """Windows to read, if the text has as many."""
        return self.batch * max(1, round(self.tokens / (self.length * self.batch))) + self.held_out

    def pack(self, folder: Path, progress: Progress) -> None:
        """Write the windows into the folder; nothing to do if they are there. An interrupted writing begins anew.

        Raises GqaError for text that cannot be read, or is shorter than one window and those held out.
        """
        if (folder / _COUNT).exists():
            return
        wanted, done = self.wanted * self.length, 0
        with (folder / _TOKENS).open("wb") as stream:
            for ids in _token_ids(self.paths, self.field, load_tokenizer(self.tokenizer)):
                stream.write(ids[: wanted - done].astype("<i4").tobytes())
                done = min(wanted, done + len(ids))
                progress("cutting the text into windows", done, wanted)
                if done == wanted:
                    break
            stream.flush()
            os.fsync(stream.fileno())
        windows = done // self.length
        if windows <= self.held_out:
            raise GqaError(
                "the text is too short",
                got=f"{done} tokens",
                allowed=f"more than {self.held_out + 1} windows of {self.length} tokens",
            )
        write_text_atomic(folder / _COUNT, json.dumps({"windows": windows}))
        sync_folder(folder)

    def open(self, folder: Path) -> TrainingText:
        """What `pack` wrote."""
        count = json.loads((folder / _COUNT).read_text(encoding="utf-8"))["windows"]
        windows = np.memmap(folder / _TOKENS, dtype="<i4", mode="r", shape=(count, self.length))
        return training_text(windows, self.tokens, self.batch, self.seed, self.held_out)


def _token_ids(paths: tuple[str, ...], field: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    end: list[int] = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]  # pyright: ignore
    texts = pieces(paths, field)
    while some := list(itertools.islice(texts, _AT_ONCE)):
        encoded = tokenizer([text for text, _ in some], add_special_tokens=False, verbose=False)["input_ids"]
        ids = [part for row, (_, ends) in zip(encoded, some, strict=True) for part in (row, end if ends else [])]  # pyright: ignore
        yield np.fromiter(itertools.chain.from_iterable(ids), dtype=np.int64)


def _sample(path: str) -> Any:
    """What tells one file from another without reading all of it; of a folder, that of the files in it."""
    file = Path(path)
    if file.is_dir():
        return {str(f.relative_to(file)): _sample(str(f)) for f in sorted(file.rglob("*")) if f.is_file()}
    if not file.is_file():
        return None
    size = file.stat().st_size
    with file.open("rb") as stream:
        begin = stream.read(_SAMPLE_BYTES)
        stream.seek(max(0, size - _SAMPLE_BYTES))
        return [size, hashlib.sha256(begin + stream.read()).hexdigest()]
