"""Fewer layers of the same decoder."""

import pytest

from gqa.config import parse_config
from gqa.config.shallow import shallow_config
from gqa.errors import GqaError
from gqa.source import bundled_names, open_source


def test_lists_per_layer_are_cut():
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    config = {
        "model_type": "qwen2",
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "layer_types": kinds,
        "sliding_window": 32,
        "eos_token_id": [1, 2],
    }
    shallow = shallow_config(config, 2, "tiny")
    assert shallow == config | {"num_hidden_layers": 2, "layer_types": kinds[:2]}
    assert config["num_hidden_layers"] == 4


def test_the_text_part_of_a_multimodal_config():
    text = {"hidden_size": 64, "n_layer": 4, "n_head": 8}
    shallow = shallow_config({"model_type": "falcon", "text_config": text}, 1, "tiny")
    assert shallow == {"model_type": "falcon", "hidden_size": 64, "n_layer": 1, "n_head": 8}


@pytest.mark.parametrize("name", bundled_names())
def test_every_bundled_shape(name):
    source = open_source(name)
    assert len(parse_config(shallow_config(source.config, 1, name), name).layers) == 1


@pytest.mark.parametrize("layers", [0, 17])
def test_refuses(layers):
    source = open_source("llama-3.2-1b")
    with pytest.raises(GqaError, match="has 16 layers"):
        shallow_config(source.config, layers, source.name)
