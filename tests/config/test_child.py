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


def test_longrope_as_transformers_4_wants_it():
    """Exactly these three keys (its Phi3Config checks), the original context beside them."""
    longrope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0, 1.1],
        "long_factor": [2.0, 2.2],
        "original_max_position_embeddings": 32,
    }
    child = child_config(PARENT | {"rope_parameters": longrope}, 2)
    assert child["rope_parameters"] == longrope
    assert child["rope_scaling"] == {"type": "longrope", "short_factor": [1.0, 1.1], "long_factor": [2.0, 2.2]}
    assert child["original_max_position_embeddings"] == 32


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


FALCON = {
    "model_type": "falcon",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "vocab_size": 99,
    "multi_query": False,
}
BIGCODE = {"model_type": "gpt_bigcode", "n_embd": 64, "n_layer": 2, "n_head": 8, "vocab_size": 99, "multi_query": False}


@pytest.mark.parametrize("parent", [FALCON, BIGCODE], ids=["falcon", "gpt_bigcode"])
def test_classes_that_know_one_kv_head_or_all(parent):
    child = child_config(parent, 1)
    assert child["multi_query"] is True
    assert parse_config(child, "x") == parse_config(parent, "x").with_kv_heads(1)
    assert child_config(child, 8)["multi_query"] is False
    with pytest.raises(GqaError, match="knows one KV head or all") as caught:
        child_config(parent, 2)
    assert caught.value.allowed == "1, 8"


def test_falcons_new_decoder_has_a_number_of_its_own():
    new = FALCON | {"new_decoder_architecture": True, "num_kv_heads": 4}
    child = child_config(new, 2)
    assert {key: child[key] for key in child if child[key] != new.get(key)} == {"num_kv_heads": 2}
    assert "head_dim" not in child  # its class would refuse it
    older = {key: value for key, value in new.items() if key != "num_kv_heads"} | {"n_head_kv": 4}
    assert child_config(older, 2) == older | {"num_kv_heads": 2, "n_head_kv": 2}


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
