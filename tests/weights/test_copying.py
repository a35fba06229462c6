"""Bytes copied from file to file: by the kernel, by hand where it cannot, and told where the source has shrunk."""

import errno
import os

import pytest
import torch
from safetensors.torch import save_file

from gqa.errors import GqaError
from gqa.weights import copying
from gqa.weights.header import read_header

needs_kernel = pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="Linux alone copies in the kernel")


@pytest.fixture
def shard(tmp_path):
    tensors = {"a": torch.randn(300, 7), "b": torch.randn(5).bfloat16(), "none": torch.zeros(0, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    return read_header(tmp_path / "x.safetensors")


def bytes_of(shard, name):
    entry = shard.tensors[name]
    return shard.path.read_bytes()[entry.start : entry.start + entry.nbytes]


def appended(shard, target):
    """Each tensor between other bytes, written as files are: through a buffer."""
    with target.open("wb") as stream:
        for name in shard.tensors:
            stream.write(b"before " + name.encode())
            copying.append_tensor(shard, name, stream)
        stream.write(b"after")
        assert stream.tell() == sum(len(f"before {name}") + e.nbytes for name, e in shard.tensors.items()) + 5
    return target.read_bytes()


@pytest.mark.parametrize("chunk", [1 << 20, 1000])
def test_bytes_arrive_in_order(tmp_path, shard, monkeypatch, chunk):
    monkeypatch.setattr(copying, "_CHUNK_BYTES", chunk)
    expected = b"".join(b"before " + name.encode() + bytes_of(shard, name) for name in shard.tensors) + b"after"
    assert appended(shard, tmp_path / "y") == expected


@needs_kernel
@pytest.mark.parametrize("error", [errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_by_hand_where_the_kernel_cannot(tmp_path, shard, monkeypatch, error):
    expected = appended(shard, tmp_path / "y")

    def cannot(*args):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "copy_file_range", cannot)
    assert appended(shard, tmp_path / "z") == expected


@needs_kernel
def test_a_full_disk_is_no_reason_to_copy_by_hand(tmp_path, shard, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError, match="No space"):
        appended(shard, tmp_path / "z")


def test_a_source_that_has_shrunk(tmp_path, shard):
    for size in (shard.tensors["a"].start + 4000, 8):  # within the tensor, and before it
        os.truncate(shard.path, size)
        with pytest.raises(GqaError, match="changed while it was"):
            appended(shard, tmp_path / "y")
