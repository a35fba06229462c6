"""What cannot be converted: one clear error, nothing written, the source untouched. Malice is in tests/attacks."""

import numpy as np
import pytest
import torch
from helpers.attacks import CALIBRATED, MEAN, refused
from helpers.checkpoints import tiny_config, tiny_tensors, write_checkpoint
from safetensors.torch import save_file

from gqa.convert.recipe import make_recipe
from gqa.convert.run import convert
from gqa.errors import GqaError
from gqa.source import open_checkpoint


@pytest.mark.parametrize(
    ("query_heads", "kv_heads", "wanted", "said", "allowed", "nearest"),
    [
        (32, 32, 12, "12 KV heads do not divide 32 query heads", "1, 2, 4, 8, 16, 32", 8),
        (8, 8, 9, "9 KV heads are more than the 8 query heads", "1, 2, 4, 8", 8),
        (8, 2, 1000, "1000 KV heads are more than the 8 query heads", "1, 2, 4, 8", 8),
        (8, 2, 3, "3 KV heads do not divide 8 query heads", "1, 2, 4, 8", 2),
        (12, 6, 4, "4 KV heads do not divide the 6 there are", "1, 2, 3, 6, 12", 3),
        (12, 4, 6, "6 KV heads are no multiple of the 4 there are", "1, 2, 4, 12", 4),
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


@pytest.mark.parametrize(
    "windows",
    [None, np.zeros((1, 32), int), np.zeros((2, 31), int), np.zeros(64, int)],
    ids=["none", "too few", "too short", "flat"],
)
def test_windows_that_are_not_the_recipes(tmp_path, windows):
    refused(write_checkpoint(tmp_path / "m"), tmp_path / "out", "not what the recipe says", CALIBRATED, windows=windows)


def test_tokens_of_another_tokenizer(tmp_path):
    windows = np.full((2, 32), 160)
    error = refused(write_checkpoint(tmp_path / "m"), tmp_path / "out", "does not know", CALIBRATED, windows=windows)
    assert (error.got, error.allowed) == ("160", "0 to 159")


def test_two_checkpoints_in_one_folder_are_not_mixed(tmp_path):
    folder = write_checkpoint(tmp_path / "m", shards=2)
    save_file({"a": torch.ones(2)}, folder / "consolidated.safetensors")
    convert(open_checkpoint(str(folder)), tmp_path / "out", MEAN)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2
