"""What cannot be converted: one clear error, nothing written, the source untouched."""

import errno
import io
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.checkpoints import folder_hashes, tiny_config, tiny_source, tiny_tensors, write_checkpoint
from safetensors.torch import save_file

from gqa.convert.journal import work_folder
from gqa.convert.recipe import make_recipe
from gqa.convert.run import convert
from gqa.errors import GqaError
from gqa.source import open_checkpoint
from gqa.weights import writer

MEAN = make_recipe(2, "mean")
CALIBRATED = make_recipe(2, calibration_tokens=64, window=32)


def refused(folder, out, said, recipe=MEAN, windows=None):
    """Convert, expect an error that says so, and see that nothing has changed."""
    before = folder_hashes(folder.parent)
    with pytest.raises(GqaError, match=said) as caught:
        convert(open_checkpoint(str(folder)), out, recipe, windows)
    assert folder_hashes(folder.parent) == before
    assert not out.exists()
    assert not work_folder(out).exists()
    return caught.value


@pytest.mark.parametrize(
    ("query_heads", "kv_heads", "wanted", "said", "allowed", "nearest"),
    [
        (32, 32, 12, "12 KV heads do not divide 32 query heads", "1, 2, 4, 8, 16, 32", 8),
        (8, 8, 9, "9 KV heads are more than the 8 there are", "1, 2, 4, 8", 8),
        (8, 8, 1000, "1000 KV heads are more than the 8 there are", "1, 2, 4, 8", 8),
        (8, 2, 4, "4 KV heads are more than the 2 there are", "1, 2", 2),
        (12, 6, 4, "4 KV heads do not divide the 6 there are", "1, 2, 3, 6", 3),
    ],
)
def test_kv_heads(tmp_path, query_heads, kv_heads, wanted, said, allowed, nearest):
    config = tiny_config(num_attention_heads=query_heads, num_key_value_heads=kv_heads, head_dim=8)
    folder = write_checkpoint(tmp_path / "m", config)
    error = refused(folder, tmp_path / "out", said, make_recipe(wanted, "mean"))
    assert error.allowed == allowed
    assert error.hint == f"gqa convert <the same arguments> --kv-heads {nearest}"


@pytest.mark.parametrize("value", [0, -1, 2.0, "2", True, None])
def test_kv_heads_that_are_no_count(value):
    with pytest.raises(GqaError, match="kv heads out of range"):
        make_recipe(value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_attention_heads": None}, "has no num_attention_heads"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_attention_heads": -8}, "num_attention_heads"),
        ({"num_attention_heads": 8.5}, "num_attention_heads"),
        ({"num_attention_heads": "eight"}, "num_attention_heads"),
        ({"num_attention_heads": 10**12}, "num_attention_heads"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"num_key_value_heads": 3}, "3 KV heads, which do not divide 8"),
        ({"num_key_value_heads": 16}, "16 KV heads, which do not divide 8"),
        ({"hidden_size": -64}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"head_dim": 0}, "head_dim"),
        ({"head_dim": 16}, "has the wrong shape"),
    ],
    ids=str,
)
def test_nonsense_in_the_config(tmp_path, change, said):
    config = tiny_config()
    folder = write_checkpoint(tmp_path / "m", {**config, **change}, tensors=tiny_tensors(config))
    refused(folder, tmp_path / "out", said)


def test_a_config_that_does_not_match_the_weights(tmp_path):
    config = tiny_config()
    folder = write_checkpoint(tmp_path / "m", {**config, "num_attention_heads": 4}, tensors=tiny_tensors(config))
    refused(folder, tmp_path / "out", "8 KV heads, which do not divide 4")
    folder = write_checkpoint(tmp_path / "n", {**config, "num_hidden_layers": 2}, tensors=tiny_tensors(config))
    refused(folder, tmp_path / "out", r"tensors of model\.layers\.2")


@pytest.mark.parametrize(
    ("model_type", "said"),
    [("retnet", "unknown architecture"), ("gpt2", "cannot have fewer KV heads"), (None, "unknown architecture")],
)
def test_architectures(tmp_path, model_type, said):
    config = tiny_config()
    folder = write_checkpoint(tmp_path / "m", {**config, "model_type": model_type or ""}, tensors=tiny_tensors(config))
    refused(folder, tmp_path / "out", said)


def test_broken_weights(tmp_path):
    folder = write_checkpoint(tmp_path / "missing", shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, tmp_path / "out", "is missing")

    folder = write_checkpoint(tmp_path / "truncated", shards=2)
    os.truncate(folder / "model-00001-of-00002.safetensors", 5000)
    refused(folder, tmp_path / "out", "is truncated")

    tensors = tiny_tensors(tiny_config())
    tensors["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(60, 64)
    folder = write_checkpoint(tmp_path / "shape", tensors=tensors)
    error = refused(folder, tmp_path / "out", "q_proj.weight has the wrong shape")
    assert (error.got, error.allowed) == ("[60, 64]", "[64, 64], as config.json says")

    folder = write_checkpoint(tmp_path / "pickle")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, tmp_path / "out", "pickle")


def test_nan_in_the_last_layer_takes_the_begun_work_along(tmp_path):
    tensors = tiny_tensors(tiny_config())
    tensors["model.layers.2.self_attn.k_proj.weight"][0, 0] = float("nan")
    refused(write_checkpoint(tmp_path / "m", tensors=tensors), tmp_path / "out", "NaN or infinite")


@pytest.mark.parametrize("place", ["m", "m/out", "m/deep/out"])
def test_out_within_the_source(tmp_path, place):
    folder = write_checkpoint(tmp_path / "m")
    before = folder_hashes(tmp_path)
    with pytest.raises(GqaError, match="never touched"):
        convert(open_checkpoint(str(folder)), tmp_path / place, MEAN)
    assert folder_hashes(tmp_path) == before


@pytest.mark.parametrize(
    "windows",
    [None, np.zeros((1, 32), int), np.zeros((2, 31), int), np.zeros(64, int)],
    ids=["none", "too few", "too short", "flat"],
)
def test_windows_that_are_not_the_recipes(tmp_path, windows):
    refused(write_checkpoint(tmp_path / "m"), tmp_path / "out", "not what the recipe says", CALIBRATED, windows)


def test_tokens_of_another_tokenizer(tmp_path):
    windows = np.full((2, 32), 160)
    error = refused(write_checkpoint(tmp_path / "m"), tmp_path / "out", "does not know", CALIBRATED, windows)
    assert (error.got, error.allowed) == ("160", "0 to 159")


# ---- disks


def test_no_space_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    refused(write_checkpoint(tmp_path / "m"), tmp_path / "deep" / "out", "not enough space")
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize("room", [0, 20_000, 60_000, 150_000, 500_000])
def test_a_disk_that_fills_up_under_way(tmp_path, monkeypatch, room):
    source = tiny_source(tmp_path / "m", shards=2)
    recipe = make_recipe(2)
    before = folder_hashes(tmp_path / "m")
    convert(source, tmp_path / "undisturbed" / "out", recipe)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("gqa.weights.writer.Path.open", _open_on_a_disk_with(room))
        patch.delattr("os.copy_file_range", raising=False)  # copies within the kernel would never see this disk
        with pytest.raises(GqaError, match="the disk is full") as caught:
            convert(source, out, recipe)
    assert "give the same command again" in str(caught.value.hint)
    assert not out.exists()
    assert work_folder(out).exists() == (room > 40_000)  # a layer's file takes 40 KiB
    assert not list(tmp_path.rglob("*.tmp"))
    convert(source, out, recipe)
    assert folder_hashes(out) == folder_hashes(tmp_path / "undisturbed" / "out")
    assert folder_hashes(tmp_path / "m") == before


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere")

    folder = write_checkpoint(tmp_path / "m")
    monkeypatch.setattr("gqa.convert.journal.Path.mkdir", refuse)
    error = refused(folder, tmp_path / "out", "cannot be read or written")
    assert error.got == "Permission denied: /somewhere"


def test_a_file_in_the_way(tmp_path):
    folder = write_checkpoint(tmp_path / "m")
    (tmp_path / "file").write_text("mine")
    refused(folder, tmp_path / "file" / "out", "cannot be read or written")


def test_two_checkpoints_in_one_folder_are_not_mixed(tmp_path):
    folder = write_checkpoint(tmp_path / "m", shards=2)
    save_file({"a": torch.ones(2)}, folder / "consolidated.safetensors")
    convert(open_checkpoint(str(folder)), tmp_path / "out", MEAN)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2


# ---- helpers


def _open_on_a_disk_with(room):
    """Path.open whose files share `room` bytes: what does not fit ends in ENOSPC, half written, as on a real disk."""
    left = [room]
    real = io.open

    class Full(io.FileIO):
        def write(self, data, /):
            data = memoryview(data).cast("B")
            if len(data) > left[0]:
                super().write(data[: left[0]])
                left[0] = 0
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.name))
            left[0] -= len(data)
            return super().write(data)

    def fake(path, mode="r", *args, **kwargs):
        return io.BufferedWriter(Full(path, "w")) if mode == "wb" else real(path, mode, *args, **kwargs)

    return fake
