"""Checkpoint folders: what is read is what safetensors reads, and what is wrong is told when the folder is opened."""

import io

import pytest
import torch
from helpers.checkpoints import tiny_config, tiny_tensors, write_checkpoint
from safetensors import safe_open
from safetensors.torch import save_file

from gqa.errors import GqaError
from gqa.weights.reader import TORCH_DTYPES, Checkpoint


@pytest.mark.parametrize("shards", [1, 3])
def test_reads_what_safetensors_reads(tmp_path, shards):
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "m", shards=shards, dtype=torch.bfloat16))
    assert len(checkpoint.shards) == shards
    assert len(checkpoint.names) == len(set(checkpoint.names))
    for shard in checkpoint.shards:
        with safe_open(shard.path, "pt") as reference:
            assert set(shard.tensors) == set(reference.keys())
            for name in shard.tensors:
                expected = reference.get_tensor(name)
                assert torch.equal(checkpoint.read(name), expected)
                assert checkpoint.shape(name) == tuple(expected.shape)
                assert checkpoint.dtype(name) == expected.dtype
                stream = io.BytesIO()
                checkpoint.copy_bytes(name, stream)
                assert stream.getvalue() == expected.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", list(TORCH_DTYPES), ids=str)
def test_every_dtype_and_ugly_shapes(tmp_path, dtype):
    kind = TORCH_DTYPES[dtype]
    tensors = {
        name: torch.ones(shape).to(kind) for name, shape in (("scalar", ()), ("none", (0, 3)), ("odd", (3, 1, 5)))
    }
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    for name, tensor in tensors.items():
        read = checkpoint.read(name)
        assert read.dtype == kind
        assert read.shape == tensor.shape
        assert read.reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


def test_what_is_read_is_writable_and_private(tmp_path):
    folder = write_checkpoint(tmp_path / "m")
    checkpoint = Checkpoint(folder)
    before = (folder / "model.safetensors").read_bytes()
    checkpoint.read("model.norm.weight").zero_()
    assert (folder / "model.safetensors").read_bytes() == before
    assert checkpoint.read("model.norm.weight").abs().sum() > 0


def test_the_single_file_wins_where_both_exist(tmp_path):
    folder = write_checkpoint(tmp_path / "m", shards=2)
    save_file(tiny_tensors(tiny_config()), folder / "model.safetensors")
    assert [shard.name for shard in Checkpoint(folder).shards] == ["model.safetensors"]


def test_fingerprint_tells_retrained_weights_but_not_a_copy(tmp_path):
    prints = [Checkpoint(write_checkpoint(tmp_path / str(seed), seed=seed % 2)).fingerprint() for seed in (0, 1, 2)]
    assert prints[0] == prints[2]
    assert prints[0] != prints[1]


def test_a_name_that_does_not_exist(tmp_path):
    with pytest.raises(GqaError, match="has no tensor nothing"):
        Checkpoint(write_checkpoint(tmp_path / "m")).read("nothing")


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    folder = write_checkpoint(tmp_path / "m")
    checkpoint = Checkpoint(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    last = checkpoint.names[-1]
    with pytest.raises(GqaError, match="changed while it was read"):
        checkpoint.read(last)
    with pytest.raises(GqaError, match="changed while it was read"):
        checkpoint.copy_bytes(last, io.BytesIO())
