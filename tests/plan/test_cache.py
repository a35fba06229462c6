"""Bytes of the KV cache: hand-worked cases, and every bundled shape against the table it came with."""

import csv
from pathlib import Path

import pytest

import gqa
from gqa.config import parse_config
from gqa.plan.cache import as_multi_head, kv_bytes, kv_bytes_per_token
from gqa.plan.kv_dtype import kv_dtype
from gqa.source import bundled_names, open_source

BF16, FP32 = kv_dtype("bf16"), kv_dtype("fp32")
ROWS = {
    row["name"]: row
    for row in csv.DictReader((Path(gqa.__file__).parent / "data" / "models.csv").read_text().splitlines())
}


def bundled(name):
    source = open_source(name)
    return parse_config(source.config, source.name)


def test_llama_3_70b_by_hand():
    # 80 layers * 8 KV heads * (128 + 128) numbers * 2 bytes = 327,680 bytes a token; times 131,072 tokens.
    shape = bundled("llama-3-70b")
    assert kv_bytes_per_token(shape, BF16) == 327_680
    assert kv_bytes(shape, 131072, 1, BF16) == 42_949_672_960
    # 64 KV heads instead of 8: eight times as much.
    assert kv_bytes(as_multi_head(shape), 131072, 1, BF16) == 343_597_383_680
    # 1 KV head: an eighth of the eight.
    assert kv_bytes(shape.with_kv_heads(1), 131072, 1, BF16) == 5_368_709_120


@pytest.mark.parametrize("name", bundled_names())
def test_every_bundled_shape_gives_its_bytes_per_token(name):
    shape = bundled(name).without_windows()
    expected = int(ROWS[name]["bf16_kv_bytes_per_token_all_full"])
    assert kv_bytes_per_token(shape, BF16) == expected
    assert kv_bytes(shape, 100_000, 3, BF16) == 3 * 100_000 * expected


@pytest.mark.parametrize("name", [name for name in bundled_names() if ROWS[name]["sliding_layers"]])
def test_every_bundled_shape_slides_where_its_row_says(name):
    shape, told = bundled(name), ROWS[name]["sliding_layers"]
    sliding = sum(layer.kind == "sliding" for layer in shape.layers)
    expected = len(shape.layers) if told == "all" else int(told.split(" of ")[0])
    assert sliding == expected
    assert {layer.window for layer in shape.layers if layer.window} == {int(ROWS[name]["sliding_window"])}


def test_sliding_layers_cap_at_the_window():
    # Gemma 2 2B: 26 layers of 4 KV heads * (256 + 256) * 2 bytes = 4096 bytes a token and layer; half of them keep
    # at most 4096 tokens. At 8192 tokens: 13 * 8192 * 4096 + 13 * 4096 * 4096 = 436,207,616 + 218,103,808.
    shape = bundled("gemma-2-2b")
    assert kv_bytes(shape, 8192, 1, BF16) == 654_311_424
    # Up to the window nothing is saved: 26 * 4096 * 4096.
    assert kv_bytes(shape, 4096, 1, BF16) == 436_207_616
    assert kv_bytes(shape, 4097, 1, BF16) - kv_bytes(shape, 4096, 1, BF16) == 13 * 4096
    # Mistral 7B v0.1 slides everywhere, at 4096 tokens of 131,072 bytes: half a GiB however long the context.
    assert kv_bytes(bundled("mistral-7b-v0.1"), 10**9, 1, BF16) == 536_870_912


def test_latent_attention_stores_one_row():
    # DeepSeek-V3: 61 layers * (512 + 64) * 2 bytes.
    shape = bundled("deepseek-v3")
    assert kv_bytes_per_token(shape, BF16) == 70_272
    # As MHA: 61 * 128 heads * ((128 + 64) + 128) * 2 bytes.
    assert kv_bytes_per_token(as_multi_head(shape), BF16) == 4_997_120


def test_k_and_v_of_different_width():
    # 2 layers * 2 KV heads * (8 + 4) * 4 bytes = 192 bytes a token; 3 requests of 5 tokens.
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2}
    shape = parse_config(config | {"v_head_dim": 4}, "narrow values")
    assert kv_bytes_per_token(shape, FP32) == 192
    assert kv_bytes(shape, 5, 3, FP32) == 2880


def test_explicit_head_dim_is_read():
    # Qwen3-4B has heads of 128, although hidden / heads would be 80: 36 * 8 * 256 * 2.
    assert kv_bytes_per_token(bundled("qwen3-4b"), BF16) == 147_456
