"""Malicious and broken safetensors headers: each one error, and nothing allocated for what a header only claims."""

import contextlib
import json

import pytest
import torch
from helpers.headers import HONEST, header_file
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from gqa.errors import GqaError
from gqa.weights.header import TensorEntry, make_header, read_header

GOOD = HONEST["a"]

ATTACKS = {
    "empty": (b"", "header"),
    "seven bytes": (b"1234567", "header"),
    "header beyond the file": ((1 << 20).to_bytes(8, "little") + b"{}", "claims 1048576"),
    "header of 2^63 bytes": ((1 << 63).to_bytes(8, "little") + b"{}", "claims 9223372036854775808"),
    "header of length 0": ((0).to_bytes(8, "little"), "not JSON"),
    "not JSON": (header_file(b"{" * 16), "not JSON"),
    "deeply nested": (header_file(b'{"a":' * 60000), "not JSON"),
    "not UTF-8": (header_file(b'{"\xff\xfe": 1}'), "not JSON"),
    "a list": (header_file(b"[]"), "not a table"),
    "a tensor twice": (header_file(b'{"a": %b, "a": %b}' % ((json.dumps(GOOD).encode(),) * 2), 16), "a twice"),
    "a key twice": (header_file(b'{"a": {"dtype": "F32", "dtype": "F64"}}'), "dtype twice"),
    "metadata of numbers": (header_file({"__metadata__": {"a": 1}}), "metadata"),
    "no offsets": (header_file({"a": {"dtype": "F32", "shape": [4]}}, 16), "described by"),
    "more keys": (header_file({"a": {**GOOD, "code": "x"}}, 16), "described by"),
    "unknown dtype": (header_file({"a": {**GOOD, "dtype": "F31"}}, 16), "dtype 'F31'"),
    "dtype is a list": (header_file({"a": {**GOOD, "dtype": ["F32"]}}, 16), "of dtype"),
    "negative shape": (header_file({"a": {**GOOD, "shape": [-4]}}, 16), "of shape"),
    "fractional shape": (header_file({"a": {**GOOD, "shape": [4.0]}}, 16), "of shape"),
    "boolean shape": (header_file({"a": {**GOOD, "shape": [True, 4]}}, 16), "of shape"),
    "huge shape": (header_file({"a": {**GOOD, "shape": [1 << 62, 1 << 62]}}, 16), "on 16 bytes"),
    "shape says more": (header_file({"a": {**GOOD, "shape": [5]}}, 16), "on 16 bytes"),
    "negative offset": (header_file({"a": {**GOOD, "data_offsets": [-8, 8]}}, 16), "of shape"),
    "offsets swapped": (header_file({"a": {**GOOD, "data_offsets": [16, 0]}}, 16), "on -16 bytes"),
    "three offsets": (header_file({"a": {**GOOD, "data_offsets": [0, 8, 16]}}, 16), "of shape"),
    "beyond the end": (header_file({"a": {**GOOD, "data_offsets": [1 << 40, (1 << 40) + 16]}}, 16), "begins at"),
    "overlap": (header_file({"a": GOOD, "b": {**GOOD, "data_offsets": [8, 24]}}, 24), "begins at"),
    "the same bytes twice": (header_file({"a": GOOD, "b": GOOD}, 16), "begins at"),
    "a gap": (header_file({"a": GOOD, "b": {**GOOD, "data_offsets": [20, 36]}}, 36), "begins at"),
    "bytes at the end": (header_file(HONEST, 17), "1 bytes after"),
    "truncated": (header_file(HONEST, 15), "is truncated"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(tmp_path, name):
    content, said = ATTACKS[name]
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(GqaError, match=said) as caught:
        read_header(tmp_path / "x.safetensors")
    assert "x.safetensors" in caught.value.what


def test_the_honest_file_is_read(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(header_file(HONEST, 16))
    shard = read_header(tmp_path / "x.safetensors")
    assert [(e.name, e.dtype, e.shape, e.nbytes) for e in shard.tensors.values()] == [("a", "F32", (4,), 16)]


def test_a_missing_file(tmp_path):
    with pytest.raises(GqaError, match="cannot be read"):
        read_header(tmp_path / "none.safetensors")


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_header_or_an_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "x.safetensors"
    path.write_bytes(len(content).to_bytes(8, "little") + content)
    with contextlib.suppress(GqaError):  # `{}` is a header, of no tensors
        assert read_header(path).tensors == {}


def test_any_truncation_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3, 5), "b": torch.ones(7, dtype=torch.bfloat16), "c": torch.tensor(1)}, path)
    content = path.read_bytes()
    for cut in range(len(content)):
        path.write_bytes(content[:cut])
        with pytest.raises(GqaError):
            read_header(path)


def test_header_is_padded_to_eight_bytes_and_comes_back(tmp_path):
    entries = [TensorEntry(f"t{'x' * n}", "U8", (n,)) for n in range(9)]
    header = make_header(entries, {"format": "pt"})
    assert len(header) % 8 == 0
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + bytes(sum(range(9))))
    shard = read_header(path)
    assert [(e.name, e.dtype, e.shape) for e in shard.tensors.values()] == [(e.name, e.dtype, e.shape) for e in entries]
    assert shard.metadata == {"format": "pt"}
