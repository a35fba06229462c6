"""Checkpoint folders: what is read is what safetensors reads, and what is wrong is told when the folder is opened."""

import io
import json

import pytest
import torch
from helpers.checkpoints import tiny_config, tiny_tensors, write_checkpoint
from safetensors import safe_open
from safetensors.torch import save_file

from gqa.errors import GqaError
from gqa.weights.reader import INDEX, TORCH_DTYPES, Checkpoint


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


def edit_index(folder, **changes):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))


def shrink(path):
    path.write_bytes(path.read_bytes()[:-100])


def duplicate(folder):
    save_file({"model.norm.weight": torch.ones(64)}, folder / "extra.safetensors")
    edit_index(folder, other="extra.safetensors")


SHARD = "model-00002-of-00003.safetensors"
BROKEN = {
    "missing shard": (lambda folder: (folder / SHARD).unlink(), f"missing\ngot: {SHARD}"),
    "truncated shard": (lambda folder: shrink(folder / SHARD), f"{SHARD} is truncated"),
    "a name that no shard has": (lambda folder: edit_index(folder, ghost=SHARD), "ghost is not where"),
    "a name in another shard": (
        lambda folder: edit_index(folder, **{"lm_head.weight": SHARD}),
        "lm_head.weight is not",
    ),
    "a tensor in two shards": (duplicate, "model.norm.weight is in two shards"),
    "a file outside": (lambda folder: edit_index(folder, x="../secret.safetensors"), "may not name"),
    "an absolute path": (lambda folder: edit_index(folder, x="/etc/passwd.safetensors"), "may not name"),
    "a pickle in the index": (lambda folder: edit_index(folder, x="model.bin"), "may not name"),
    "a number as file": (lambda folder: edit_index(folder, x=3), "may not name"),
    "index is not JSON": (lambda folder: (folder / INDEX).write_text("{"), "not an index"),
    "index is a list": (lambda folder: (folder / INDEX).write_text("[]"), "not an index"),
    "index is empty": (lambda folder: (folder / INDEX).write_text('{"weight_map": {}}'), "names no tensor"),
    "index without map": (lambda folder: (folder / INDEX).write_text("{}"), "not an index"),
    "no index": (lambda folder: (folder / INDEX).unlink(), "without weights"),
    "no folder": (lambda folder: folder.rename(folder.with_name("gone")), "no checkpoint folder"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folder(tmp_path, name):
    folder = write_checkpoint(tmp_path / "m", shards=3)
    damage, said = BROKEN[name]
    damage(folder)
    with pytest.raises(GqaError, match=said):
        Checkpoint(folder)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "last.ckpt"])
def test_pickles_are_refused_without_being_opened(tmp_path, file):
    (tmp_path / file).write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    with pytest.raises(GqaError, match="can run any code hidden in it") as caught:
        Checkpoint(tmp_path)
    assert caught.value.got == file


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "bitsandbytes"])
def test_quantised_checkpoints_are_refused(tmp_path, method):
    config = tiny_config(quantization_config={"quant_method": method})
    with pytest.raises(GqaError, match=f"quantisation {method}"):
        Checkpoint(write_checkpoint(tmp_path / "m", config))


def test_a_name_that_does_not_exist(tmp_path):
    with pytest.raises(GqaError, match="has no tensor nothing"):
        Checkpoint(write_checkpoint(tmp_path / "m")).read("nothing")


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    folder = write_checkpoint(tmp_path / "m")
    checkpoint = Checkpoint(folder)
    shrink(folder / "model.safetensors")
    last = checkpoint.names[-1]
    with pytest.raises(GqaError, match="changed while it was read"):
        checkpoint.read(last)
    with pytest.raises(GqaError, match="changed while it was read"):
        checkpoint.copy_bytes(last, io.BytesIO())
