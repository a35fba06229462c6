"""The converted model's config: what changes, and what must not."""

import copy

import pytest

from gqa.config import child_config, parse_config
from gqa.errors import GqaError

PARENT = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 99,
    "intermediate_size": 100,
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    "dtype": "bfloat16",
    "made_up": {"kept": [1, 2]},
}


def test_only_what_must_change_changes():
    before = copy.deepcopy(PARENT)
    child = child_config(PARENT, 2)
    assert before == PARENT
    assert {key: child[key] for key in child if child[key] != PARENT.get(key)} == {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
    }
    assert set(PARENT) <= set(child)
    child["made_up"]["kept"].append(3)
    assert before == PARENT


def test_the_child_is_the_parent_with_the_dial_turned():
    parent = parse_config(PARENT, "x")
    assert parse_config(child_config(PARENT, 4), "x") == parent.with_kv_heads(4)


def test_scaled_rotary_is_told_in_both_spellings():
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "partial_rotary_factor": 0.5}
    child = child_config(PARENT | {"rope_parameters": rope}, 2)
    assert child["rope_parameters"] == rope
    assert child["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    assert (child["rope_theta"], child["partial_rotary_factor"]) == (1e4, 0.5)


def test_rotary_per_kind_of_layer():
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    child = child_config(PARENT | {"rope_parameters": rope}, 2)
    assert (child["rope_theta"], child["rope_local_base_freq"]) == (1e6, 1e4)
    assert child["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}


def test_legacy_keys_that_are_there_stay():
    legacy = {key: value for key, value in PARENT.items() if key not in ("rope_parameters", "dtype")}
    legacy |= {"rope_theta": 1e4, "rope_scaling": None, "torch_dtype": "float16"}
    child = child_config(legacy, 2)
    assert {key: child[key] for key in child if child[key] != legacy.get(key)} == {
        "num_key_value_heads": 2,
        "head_dim": 8,
    }


def test_a_nested_text_config_is_edited_inside():
    nested = {"model_type": "some_vlm", "text_config": PARENT, "vision_config": {"num_attention_heads": 3}}
    child = child_config(nested, 2)
    assert child["text_config"]["num_key_value_heads"] == 2
    assert "num_key_value_heads" not in child
    assert child["vision_config"] == nested["vision_config"]
    assert "num_key_value_heads" not in PARENT["made_up"]


@pytest.mark.parametrize("rope", [None, [], {"full_attention": None}, {"full_attention": 3}, {"rope_type": None}])
def test_strange_rotary_is_left_alone(rope):
    assert child_config(PARENT | {"rope_parameters": rope}, 2)["rope_parameters"] == rope


def test_off_the_dial():
    with pytest.raises(GqaError, match="3 KV heads do not divide 8 query heads"):
        child_config(PARENT, 3)


def test_transformers_reads_the_child_without_a_warning(tmp_path, caplog):
    from transformers import AutoConfig

    scaled = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    import json

    parent = PARENT | {"max_position_embeddings": 256, "rope_parameters": scaled}
    (tmp_path / "config.json").write_text(json.dumps(child_config(parent, 2)))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.num_key_value_heads == 2
    assert config.rope_parameters == scaled
    assert not caplog.records
