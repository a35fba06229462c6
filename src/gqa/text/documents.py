"""Where text comes from: .txt, .jsonl and .parquet files, folders of those, and data sets of the hub."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gqa.errors import GqaError

FIELD = "text"
_FOLDER_FILES = (".txt", ".jsonl", ".parquet")
_PIECE_BYTES = 1 << 20
_ROWS = 1024  # of a parquet file in memory at once
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")


def read_text(paths: Sequence[Path | str], field: str = FIELD) -> str:
    """All of the text at once, in the order given, with a line end between two files and between two documents.

    paths and field: as for `pieces`. Raises GqaError for no file at all, for what `pieces` refuses, and when all of
    them together hold nothing but white space.
    """
    if not paths:
        raise GqaError("no text file was given", hint="--text FILE")
    text = "\n".join(_whole(path, field) for path in paths)
    if not text.strip():
        raise GqaError("the text is empty", got=", ".join(map(str, paths)), allowed="UTF-8 text")
    return text


def pieces(paths: Sequence[Path | str], field: str = FIELD) -> Iterator[tuple[str, bool]]:
    """The text piece by piece, in the order given, so that it need not fit into memory; with each piece, whether a
    document ends with it.

    A path is a file, a folder of .txt, .jsonl and .parquet files (with those of the folders in it, sorted by name), a
    folder that `datasets` saved, or a data set of the hub, `owner/name` or `owner/name@revision`, of which the split
    `train` is streamed. A .jsonl file has a document in `field` of every line, a .parquet file and a data set in that
    column of every row; any other file is one document, in UTF-8.

    Raises GqaError for what is missing, unreadable, binary (a NUL byte or not UTF-8), or without that field.
    """
    for path in paths:
        for source in _sources(path):
            if not isinstance(source, Path):
                yield from ((_text(row, field, str(path)), True) for row in source)
            elif source.suffix == ".jsonl":
                yield from ((document, True) for document in _json_lines(source, field))
            elif source.suffix == ".parquet":
                yield from ((document, True) for document in _parquet(source, field))
            else:
                yield from _plain(source)


def plain_bytes(paths: Sequence[Path | str]) -> int | None:
    """The bytes of files that are all plain text; None if something else is among them."""
    files = [Path(path) for path in paths]
    if all(file.is_file() and file.suffix not in (".jsonl", ".parquet") for file in files):
        return sum(file.stat().st_size for file in files)
    return None


def _whole(path: Path | str, field: str) -> str:
    if not Path(path).is_dir() and plain_bytes([path]) is not None:
        return "".join(text for text, _ in _plain(Path(path)))
    documents, text = [], ""
    for piece, ends in pieces([path], field):
        text += piece
        if ends:
            documents.append(text)
            text = ""
    return "\n".join(documents)


def _sources(path: Path | str) -> list[Any]:
    """Files, or one iterable of rows."""
    file = Path(path)
    if file.is_dir():
        if (file / "dataset_info.json").exists() or (file / "dataset_dict.json").exists():
            return [_saved(file)]
        found = sorted(f for f in file.rglob("*") if f.suffix in _FOLDER_FILES and f.is_file())
        if not found:
            raise GqaError(
                "a folder without text files", got=file, allowed=f"files ending in {', '.join(_FOLDER_FILES)}"
            )
        return list(found)
    name = str(path)
    if not file.exists() and _HUB_ID.fullmatch(name) and file.suffix not in _FOLDER_FILES and not file.parent.exists():
        return [_streamed(name)]
    return [file]


def _plain(path: Path) -> Iterator[tuple[str, bool]]:
    """A file cut at line ends, in pieces of about a MiB."""
    decoder, seen = codecs.getincrementaldecoder("utf-8-sig")(), 0
    try:
        with path.open("rb") as stream:
            while True:
                content = stream.read(_PIECE_BYTES)
                content += stream.readline() if content else b""
                if b"\0" in content:
                    raise GqaError("a file is binary, not text", got=f"{path}: it has NUL bytes", allowed="UTF-8 text")
                last = len(content) < _PIECE_BYTES
                yield decoder.decode(content, final=last), last
                if last:
                    return
                seen += len(content)
    except UnicodeDecodeError as error:
        raise GqaError(
            "a file is not UTF-8 text",
            got=f"{path}: byte {error.object[error.start]:#04x} at offset {seen + error.start}",
            allowed="UTF-8 text",
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _json_lines(path: Path, field: str) -> Iterator[str]:
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise GqaError("a line is not JSON", got=f"{path}, line {number}: {error}") from None
                yield _text(row, field, f"{path}, line {number}")
    except OSError as error:
        raise _unreadable(path, error) from None


def _parquet(path: Path, field: str) -> Iterator[str]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise GqaError("reading .parquet needs the package pyarrow", hint="pip install pyarrow") from None
    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise _no_field(field, f"{path}: columns {', '.join(names)}")
            for batch in file.iter_batches(_ROWS, columns=[field]):
                for row in batch.to_pylist():
                    yield _text(row, field, str(path))
    except (ArrowException, OSError) as error:
        raise GqaError("a .parquet file cannot be read", got=f"{path}: {error}") from None


def _saved(folder: Path) -> Any:
    data = _datasets().load_from_disk(str(folder))
    return data["train"] if isinstance(data, dict) else data


def _streamed(name: str) -> Any:
    repository, _, revision = name.partition("@")
    try:
        return _datasets().load_dataset(repository, revision=revision or None, split="train", streaming=True)
    except (OSError, ValueError) as error:
        raise GqaError(
            "no such file here, and the hub does not give this data set",
            got=f"{name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            allowed="a file, a folder, or a data set with a split `train`",
        ) from None


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise GqaError("reading data sets needs the package datasets", hint="pip install datasets") from None
    datasets.disable_progress_bars()
    return datasets


def _text(row: Any, field: str, place: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        raise _no_field(field, place)
    return row[field]


def _no_field(field: str, got: str) -> GqaError:
    return GqaError(f"no text in the field {field!r}", got=got, hint="--text-field NAME")


def _unreadable(path: Path, error: OSError) -> GqaError:
    if isinstance(error, FileNotFoundError):
        return GqaError("no text file at this path", got=path)
    return GqaError("a text file cannot be read", got=f"{path}: {error.strerror}")
