"""Safetensors headers that lie: each one error, and nothing allocated for what a header only claims."""

import json
import tracemalloc

import pytest
from helpers.attacks import complete, refused
from helpers.checkpoints import write_checkpoint
from helpers.headers import HONEST, header_file

from gqa.errors import GqaError
from gqa.weights.header import read_header
from gqa.weights.reader import Checkpoint

GOOD = HONEST["a"]
GOOD_TEXT = json.dumps(GOOD).encode()
OTHER = {**GOOD, "dtype": "BF16", "data_offsets": [16, 24]}


def length(count: int) -> bytes:
    return count.to_bytes(8, "little")


def one(**changes) -> bytes:
    """A file with one tensor, sound but for these entries."""
    return header_file({"a": {**GOOD, **changes}}, 16)


def two(begin: int, data_bytes: int) -> bytes:
    """A second tensor of 16 bytes that begins there."""
    return header_file({"a": GOOD, "b": {**GOOD, "data_offsets": [begin, begin + 16]}}, data_bytes)


def many_names_and_one_twice() -> bytes:
    names = [*(f'"{number}":0' for number in range(100_000)), '"x":0', '"x":0']
    return header_file(("{" + ",".join(names) + "}").encode())


ATTACKS = {
    "empty": (b"", "header"),
    "seven bytes": (b"1234567", "header"),
    "header beyond the file": (length(1 << 20) + b"{}", "claims 1048576"),
    "header one byte beyond the file": (length(3) + b"{}", "claims 3"),
    "header of 2^63 bytes": (length(1 << 63) + b"{}", "claims 9223372036854775808"),
    "header of 2^64 - 8 bytes": (length((1 << 64) - 8) + b"{}", "claims 18446744073709551608"),
    "header of length 0": (length(0), "not a table"),
    "not JSON": (header_file(b"{" * 16), "not sound JSON"),
    "cut off": (header_file(b'{"a": {"dtype": "F3'), "not sound JSON"),
    "more after the table": (header_file(b"{} {}"), "not sound JSON"),
    "a space before the table": (header_file(b' {"a": %b}' % GOOD_TEXT, 16), "not a table"),
    "a byte order mark": (header_file(b'\xef\xbb\xbf{"a": %b}' % GOOD_TEXT, 16), "not a table"),
    "UTF-16": (header_file(json.dumps(HONEST).encode("utf-16-le"), 16), "not sound JSON"),
    "not UTF-8": (header_file(b'{"\xff\xfe": 1}'), "not sound JSON"),
    "deeply nested": (header_file(b'{"a":' * 60_000), "not sound JSON"),
    "a number of 5000 digits": (header_file(b'{"a": %b}' % (b"9" * 5000)), "not sound JSON"),
    "a list": (header_file(b"[]"), "not a table"),
    "null": (header_file(b"null"), "not a table"),
    "a tensor twice": (header_file(b'{"a": %b, "a": %b}' % (GOOD_TEXT, GOOD_TEXT), 16), "'a' twice"),
    "a tensor twice, spelled otherwise": (header_file(b'{"a":%b, "\\u0061":%b}' % (GOOD_TEXT, GOOD_TEXT), 16), "twice"),
    "the last of many names twice": (many_names_and_one_twice(), "'x' twice"),
    "a key twice": (header_file(b'{"a": {"dtype": "F32", "dtype": "F64"}}'), "'dtype' twice"),
    "metadata twice": (header_file(b'{"__metadata__": {}, "__metadata__": {}}'), "'__metadata__' twice"),
    "metadata of numbers": (header_file({"__metadata__": {"a": 1}}), "metadata"),
    "metadata in a table": (header_file({"__metadata__": {"a": {"b": "c"}}}), "metadata"),
    "metadata is null": (header_file({"__metadata__": None}), "metadata"),
    "half a character in metadata": (header_file({"__metadata__": {"a": "\ud800"}}), "metadata"),
    "a tensor is null": (header_file({"a": None}), "described by"),
    "a tensor is a text": (header_file({"a": "F32"}), "described by"),
    "no offsets": (header_file({"a": {"dtype": "F32", "shape": [4]}}, 16), "described by"),
    "more keys": (one(code="x"), "described by"),
    "a name that is half a character": (header_file({"\udc80": GOOD}, 16), "a tensor named"),
    "a name that colours the terminal": (header_file({"\x1b[31mred": GOOD}, 16), "a tensor named"),
    "a name of two lines": (header_file({"a\nerror: all is well": GOOD}, 16), "a tensor named"),
    "a name of 2000 letters": (header_file({"a" * 2000: GOOD}, 16), "a tensor named"),
    "unknown dtype": (one(dtype="F31"), "dtype 'F31'"),
    "a dtype of four bits": (one(dtype="F4"), "dtype 'F4'"),
    "a dtype in small letters": (one(dtype="f32"), "dtype 'f32'"),
    "dtype is a list": (one(dtype=["F32"]), "of dtype"),
    "dtype is a very long text": (one(dtype="F" * 10_000), "of dtype"),
    "a wider dtype": (one(dtype="F64"), "on 16 bytes"),
    "a narrower dtype": (one(dtype="F16"), "on 16 bytes"),
    "no shape": (one(shape=None), "of shape"),
    "negative shape": (one(shape=[-4]), "of shape"),
    "two negative sizes": (one(shape=[-2, -2]), "of shape"),
    "fractional shape": (one(shape=[4.0]), "of shape"),
    "boolean shape": (one(shape=[True, 4]), "of shape"),
    "a shape in a shape": (one(shape=[[4]]), "of shape"),
    "a size that is not a number": (
        header_file(json.dumps({"a": {**GOOD, "shape": [float("nan")]}}).encode()),
        "shape",
    ),
    "shape says more": (one(shape=[5]), "on 16 bytes"),
    "shape says less": (one(shape=[3]), "on 16 bytes"),
    "sizes that overflow to what is there": (one(shape=[1 << 32, 1 << 32, 4]), "of shape"),
    "bytes that overflow": (one(shape=[1 << 62]), "of shape"),
    "a size of 65 bits": (one(shape=[(1 << 64) + 4]), "of shape"),
    "a size of 4000 digits": (one(shape=[10**4000, 10**4000]), "of shape"),
    "huge and empty": (one(shape=[0, 1 << 62, 1 << 62], data_offsets=[0, 0]), "of shape"),
    "a hundred thousand dimensions": (one(shape=[1] * 100_000), "of shape"),
    "no data_offsets": (one(data_offsets=None), "of shape"),
    "negative offset": (one(data_offsets=[-8, 8]), "of shape"),
    "offsets swapped": (one(data_offsets=[16, 0]), "on -16 bytes"),
    "three offsets": (one(data_offsets=[0, 8, 16]), "of shape"),
    "an offset of 64 bits": (one(data_offsets=[(1 << 64) - 16, 1 << 64]), "of shape"),
    "beyond the end": (one(data_offsets=[1 << 40, (1 << 40) + 16]), "begins at"),
    "overlap": (two(8, 24), "begins at"),
    "the same bytes twice": (two(0, 16), "begins at"),
    "the same bytes as another dtype": (
        header_file({"a": GOOD, "b": {**OTHER, "data_offsets": [0, 8]}}, 16),
        "begins at",
    ),
    "a hole": (two(20, 36), "begins at"),
    "a hole at the beginning": (header_file({"a": {**GOOD, "data_offsets": [8, 24]}}, 24), "begins at"),
    "bytes at the end": (header_file(HONEST, 17), "1 bytes after"),
    "truncated": (header_file(HONEST, 15), "is truncated"),
    "no data at all": (header_file(HONEST, 0), "is truncated"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_header(tmp_path, name):
    content, said = ATTACKS[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(GqaError, match=said) as caught:
            read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "x.safetensors" in caught.value.what
    assert complete(caught.value)
    assert len(str(caught.value)) < 1500
    assert peak < (1 << 20) + 30 * len(content)


def test_a_header_that_is_in_the_file_but_too_long_is_not_read(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as stream:  # of holes: it takes no space on the disk
        stream.write(length(1 << 30))
        stream.truncate(2 << 30)
    tracemalloc.start()
    with pytest.raises(GqaError, match="claims 1073741824"):
        read_header(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_values_nested_as_deep_as_a_reader_stands(tmp_path):
    """Deep enough to be too deep for what is done with a value, and not yet for reading it."""
    path = tmp_path / "x.safetensors"
    for depth in range(1, 1200, 3):
        nested = b"[" * depth + b"]" * depth
        path.write_bytes(header_file(b'{"a": {"dtype": %b, "shape": [4], "data_offsets": [0, 16]}}' % nested, 16))
        with pytest.raises(GqaError):
            read_header(path)


@pytest.mark.parametrize("name", ["header of 2^63 bytes", "overlap", "a hole", "truncated", "a tensor twice"])
@pytest.mark.parametrize("shards", [1, 3])
def test_in_a_conversion(tmp_path, name, shards):
    folder = write_checkpoint(tmp_path / "m", shards=shards)
    last = Checkpoint(folder).shards[-1].path
    last.write_bytes(ATTACKS[name][0])
    refused(folder, tmp_path / "out", ATTACKS[name][1])
