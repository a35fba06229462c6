"""The dial: which numbers of KV heads there are, and what turning it changes."""

import pytest

from gqa.config import check_kv_heads, kv_head_choices, parse_config
from gqa.errors import GqaError

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 8,
}


@pytest.mark.parametrize(
    ("query_heads", "choices"),
    [(1, (1,)), (2, (1, 2)), (12, (1, 2, 3, 4, 6, 12)), (16, (1, 2, 4, 8, 16)), (71, (1, 71))],
)
def test_choices_are_the_divisors(query_heads, choices):
    assert kv_head_choices(query_heads) == choices


def test_turning_the_dial_changes_only_kv_heads():
    shape = parse_config(LLAMA, "small")
    turned = shape.with_kv_heads(3)
    assert (turned.kv_heads, turned.query_heads, turned.head_dim) == (3, 12, 8)
    assert turned.with_kv_heads(4) == shape
    assert shape.with_kv_heads(12).kv_heads == 12


@pytest.mark.parametrize(
    ("kv_heads", "relation", "nearest"),
    [(5, "do not divide", 4), (7, "do not divide", 6), (24, "are more than the", 12)],
)
def test_errors_off_the_dial(kv_heads, relation, nearest):
    shape = parse_config(LLAMA, "small")
    with pytest.raises(GqaError) as caught:
        check_kv_heads(shape, kv_heads)
    assert str(caught.value).splitlines() == [
        f"{kv_heads} KV heads {relation} 12 query heads",
        "allowed: 1, 2, 3, 4, 6, 12",
        f"hint: the same command with --kv-heads {nearest}",
    ]


@pytest.mark.parametrize("kv_heads", [0, -4, True, 4.0, "4", None])
def test_kv_heads_of_the_wrong_kind(kv_heads):
    with pytest.raises(GqaError, match="positive whole number"):
        check_kv_heads(parse_config(LLAMA, "small"), kv_heads)


def test_latent_attention_has_no_dial():
    latent = parse_config(
        LLAMA | {"kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}, "latent"
    )
    with pytest.raises(GqaError, match="no KV heads to turn"):
        latent.with_kv_heads(2)
