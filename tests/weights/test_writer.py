"""Files written tensor by tensor: safetensors itself reads them, and they appear whole or not at all."""

import errno
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from gqa.errors import GqaError
from gqa.weights import writer
from gqa.weights.header import TensorEntry, read_header

TENSORS = {
    "odd": torch.randn(3, 1, 5).bfloat16(),
    "scalar": torch.tensor(2.5),
    "wide": torch.randn(7, 3, dtype=torch.float64),
    "strided": torch.randn(6, 4).T,
    "none": torch.ones(0, 3),
    "bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),
}


def test_safetensors_reads_it(tmp_path):
    path = tmp_path / "x.safetensors"
    writer.write_tensors(path, TENSORS, {"format": "pt"})
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in TENSORS.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    entries = [writer.describe(name, tensor) for name, tensor in TENSORS.items()]
    assert path.stat().st_size == writer.file_bytes(entries, {"format": "pt"})
    assert all(entry.start % TENSORS[entry.name].element_size() == 0 for entry in read_header(path).tensors.values())
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_writer_that_fails_leaves_nothing_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("old")

    def full(name, stream):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        writer.write_shard(path, [TensorEntry("a", "F32", (4,))], full, {})
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_too_few_bytes_for_a_tensor_are_a_bug(tmp_path):
    with pytest.raises(AssertionError, match="a: not the bytes"):
        writer.write_shard(tmp_path / "x", [TensorEntry("a", "F32", (4,))], lambda name, stream: None, {})
    assert list(tmp_path.iterdir()) == []


def test_space_is_counted_to_the_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    writer.check_space(tmp_path / "not" / "yet" / "there", 1000)
    with pytest.raises(GqaError, match="not enough space") as caught:
        writer.check_space(tmp_path / "not" / "yet" / "there", 1001)
    assert str(tmp_path) in caught.value.what
