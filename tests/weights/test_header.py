"""Headers that are read back: honest ones, and those that are written here. Malicious ones are in tests/attacks."""

import pytest
import torch
from helpers.headers import HONEST, header_file
from safetensors.torch import save_file

from gqa.errors import GqaError
from gqa.weights.header import TensorEntry, make_header, read_header


def test_the_honest_file_is_read(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(header_file(HONEST, 16))
    shard = read_header(tmp_path / "x.safetensors")
    assert [(e.name, e.dtype, e.shape, e.nbytes) for e in shard.tensors.values()] == [("a", "F32", (4,), 16)]


def test_a_missing_file(tmp_path):
    with pytest.raises(GqaError, match="cannot be read"):
        read_header(tmp_path / "none.safetensors")


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
