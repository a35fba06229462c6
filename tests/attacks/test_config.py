"""A config.json that is no configuration: broken text, wrong types, bombs."""

import pytest
from helpers.attacks import CALIBRATED, MEAN, refused
from helpers.checkpoints import tiny_config, tiny_tensors, write_checkpoint

from gqa.convert.run import convert
from gqa.errors import GqaError
from gqa.source import open_checkpoint

BROKEN = {
    "empty": b"",
    "half": b'{"model_type": "llama"',
    "a list": b"[]",
    "a text": b'"llama"',
    "null": b"null",
    "deeply nested lists": b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "deeply nested tables": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a number of 5000 digits": b'{"hidden_size": %b}' % (b"9" * 5000),
    "not UTF-8": b'{"model_type": "\xff\xfe"}',
    "UTF-16": '{"model_type": "llama"}'.encode("utf-16"),
    "half a character": b'{"model_type": "llama", "name": "\\ud800"}',
    "a NUL": b'{"model_type": "llama"}\0',
    "a pickle": b"\x80\x04N.",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken(tmp_path, name):
    folder = write_checkpoint(tmp_path / "m")
    (folder / "config.json").write_bytes(BROKEN[name])
    refused(folder, tmp_path / "out", r"config\.json (cannot be read|is not a JSON object)")


def test_absent(tmp_path):
    folder = write_checkpoint(tmp_path / "m")
    (folder / "config.json").unlink()
    refused(folder, tmp_path / "out", r"without config\.json")


WRONG = [[], {"a": 1}, "8", 8.5, -8, True, 10**30, float("nan"), "\x1b[31m"]
COUNTS = ["hidden_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "intermediate_size"]


@pytest.mark.parametrize("key", COUNTS)
@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_a_count_of_the_wrong_type(tmp_path, key, value):
    config = tiny_config()
    folder = write_checkpoint(tmp_path / "m", {**config, key: value}, tensors=tiny_tensors(config))
    refused(folder, tmp_path / "out", key)


@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_a_model_type_of_the_wrong_type(tmp_path, value):
    folder = write_checkpoint(
        tmp_path / "m", {**tiny_config(), "model_type": value}, tensors=tiny_tensors(tiny_config())
    )
    refused(folder, tmp_path / "out", "model_type|unknown architecture")


# What only the calibration's forward pass reads, which transformers makes of the configuration.
RUN_BY_TRANSFORMERS = [
    ("rms_norm_eps", "small"),
    ("hidden_act", "sing"),
    ("rope_parameters", "default"),
    ("rope_parameters", {"rope_type": "bent", "rope_theta": 1e4}),
    ("rope_parameters", {"rope_type": "default", "rope_theta": "far"}),
    ("rope_parameters", {"rope_type": "default", "rope_theta": None}),
    ("max_position_embeddings", "many"),
    ("attention_bias", "perhaps"),
    ("pad_token_id", 10**9),
    ("pretraining_tp", {}),
]


@pytest.mark.parametrize(("key", "value"), RUN_BY_TRANSFORMERS, ids=repr)
def test_nonsense_for_transformers(tmp_path, key, value):
    config = tiny_config()
    folder = write_checkpoint(tmp_path / "m", {**config, key: value}, tensors=tiny_tensors(config))
    refused(folder, tmp_path / "out", "transformers makes no model|makes no sense", CALIBRATED)


@pytest.mark.parametrize("value", [[], "x", 3], ids=repr)
@pytest.mark.parametrize("key", ["architectures", "auto_map", "text_config", "dtype", "rope_scaling", "layer_types"])
def test_keys_that_pooling_does_not_need(tmp_path, key, value):
    """They are an error, or copied as they are; nothing else."""
    config = tiny_config()
    folder = write_checkpoint(tmp_path / "m", {**config, key: value}, tensors=tiny_tensors(config))
    try:
        convert(open_checkpoint(str(folder)), tmp_path / "out", MEAN)
    except GqaError:
        assert not (tmp_path / "out").exists()
