"""What engines make of a cache, worked by hand from their rules."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqa.config import parse_config
from gqa.errors import GqaError
from gqa.plan.capacity import max_context
from gqa.plan.engines import ENGINES, find_engine
from gqa.plan.kv_dtype import kv_dtype
from gqa.plan.shard import shard
from gqa.source import open_source

BF16, FP8, INT8 = kv_dtype("bf16"), kv_dtype("fp8"), kv_dtype("int8")
BASE = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
FULL = parse_config(BASE, "full")  # 4 layers * 2 KV heads * 16 numbers * 2 bytes = 256 bytes a token
MIXED = parse_config(
    BASE | {"sliding_window": 40, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}, "mixed"
)  # 64 bytes a token and layer
STATES = parse_config(
    BASE
    | {"model_type": "qwen3_next", "linear_num_key_heads": 1, "linear_num_value_heads": 2, "head_dim": 8}
    | {"linear_key_head_dim": 4, "linear_value_head_dim": 8},
    "states",
)  # 3 layers of 2 * 4 * 1 + 8 * 2 = 24 channels of 4 taps and 2 * 4 * 8 = 64 numbers in fp32; 1 of 64 bytes a token


def bundled(name):
    source = open_source(name)
    return parse_config(source.config, source.name)


def test_vllm_takes_whole_blocks():
    # 33 tokens are 3 blocks of 16 tokens at 256 bytes.
    vllm = find_engine("vllm")
    assert vllm.bytes_for(FULL, 33, 5, BF16) == 5 * 3 * 16 * 256
    assert vllm.bytes_for(FULL, 32, 1, BF16) == 2 * 16 * 256
    pool = vllm.pool(FULL, 33, 100 * 16 * 256 + 17, BF16)
    assert (pool.blocks, pool.block_tokens) == (100, 16)
    assert pool.concurrency == pytest.approx(100 / 3)
    assert pool.tokens == int(100 / 3 * 33)  # as it is logged since 0.21
    assert find_engine("vllm@0.19").pool(FULL, 33, 100 * 16 * 256, BF16).tokens == 1600
    assert find_engine("vllm@0.8").pool(FULL, 33, 100 * 16 * 256, BF16).concurrency == pytest.approx(1600 / 33)
    wide = find_engine("vllm", block=64)
    assert wide.bytes_for(FULL, 33, 1, BF16) == 64 * 256


def test_vllm_groups_layers():
    # 1 full and 3 sliding layers: groups of 1, four of them; a block has 16 * 64 bytes in one layer.
    vllm = find_engine("vllm@0.20", batched_tokens=32)
    # Full 1000 tokens: 63 blocks. Sliding: 40 - 1 + 32 = 71 tokens in 5 blocks, and one more.
    assert vllm.bytes_for(MIXED, 1000, 1, BF16) == (63 + 3 * (5 + 1)) * 16 * 64
    # From 0.26 on two steps may be under way: 40 - 1 + 64 = 103 tokens in 7 blocks.
    assert find_engine("vllm", batched_tokens=32).bytes_for(MIXED, 1000, 1, BF16) == (63 + 3 * (7 + 1)) * 16 * 64
    pool = vllm.pool(MIXED, 1000, 810 * 16 * 64, BF16)
    assert pool.blocks == 810
    assert pool.tokens == 810 // 4 * 16
    assert pool.concurrency == pytest.approx(10)


def test_vllm_pads_groups_that_do_not_divide():
    # 13 full and 13 sliding layers of Gemma 2 are two groups of 13. Of 10 full and 12 sliding, 12 < 1.5 * 10: groups of
    # 12, the full one padded.
    shape = parse_config(
        BASE
        | {"num_hidden_layers": 22, "sliding_window": 40}
        | {"layer_types": ["full_attention"] * 10 + ["sliding_attention"] * 12},
        "x",
    )
    assert find_engine("vllm").pool(shape, 64, 12 * 16 * 64 * 7, BF16).blocks == 7
    # Before 0.12 the smaller count decided: groups of 10.
    assert find_engine("vllm@0.11").pool(shape, 64, 10 * 16 * 64 * 7, BF16).blocks == 7


def test_vllm_widens_blocks_to_hold_a_state():
    # A state: 24 channels * 3 inputs * 2 bytes + 64 numbers * 4 bytes = 400 bytes. A block of 16 tokens has 1024.
    vllm = find_engine("vllm")
    assert vllm.bytes_for(STATES, 160, 1, BF16) == (10 + 3 * 2) * 16 * 64
    # With rows of 8 bytes (int4 would be such) the state would need 50 tokens: 64.
    small = parse_config(
        BASE
        | {"model_type": "qwen3_next", "head_dim": 1, "linear_num_key_heads": 1}
        | {"linear_num_value_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 8},
        "small",
    )
    assert vllm.pool(small, 160, 10**6, BF16).block_tokens == 64  # 2 * (1 + 1) * 2 = 8 bytes a token


def test_sglang_has_a_slot_per_token():
    sglang = find_engine("sglang", block=4)
    # 33 tokens are 9 pages of 4, and one page to spare.
    assert sglang.bytes_for(FULL, 33, 2, BF16) == (2 * 36 + 4) * 256
    assert sglang.pool(FULL, 33, 1000 * 256, BF16).tokens == 1000
    assert find_engine("sglang").pool(MIXED, 33, 1000 * 256, BF16).tokens == 1000  # nothing slides there
    # gpt-oss has a pool of its own for sliding layers, of 0.8 times the tokens: 12 layers of 2048 bytes each.
    tokens = find_engine("sglang").pool(bundled("gpt-oss-20b"), 1000, 10**9, BF16).tokens
    assert tokens == int(10**9 // (12 * 2048 * 1.8))


def test_llama_cpp_pads_contexts():
    llama = find_engine("llama.cpp")
    assert llama.bytes_for(FULL, 257, 3, BF16) == 3 * 512 * 256
    # A window of 40 and a micro-batch of 512: 552 -> 768 cells in three layers, 1024 in one.
    assert llama.bytes_for(MIXED, 1024, 1, BF16) == (3 * 768 + 1024) * 64
    assert llama.bytes_for(MIXED, 256, 1, BF16) == 4 * 256 * 64
    # q8_0: 34 bytes for 32 numbers; K and V of 2 heads of 8 are 16 numbers each, which do not fill a block.
    with pytest.raises(GqaError, match="heads of 8 numbers in q8_0"):
        llama.bytes_for(FULL, 256, 1, kv_dtype("q8_0"))
    # States in fp32: 3 layers * (24 * 3 + 64) * 4 bytes.
    assert llama.bytes_for(STATES, 256, 1, BF16) == 256 * 64 + 3 * (72 + 64) * 4


def test_scales_of_a_quantised_cache():
    # 4 layers * 2 heads * (8 + 4 + 8 + 4) bytes.
    assert find_engine("contiguous").bytes_for(FULL, 10, 1, INT8) == 10 * 4 * 2 * 24
    assert find_engine("contiguous").bytes_for(FULL, 10, 1, FP8) == 10 * 128


def test_gqa_int8_cache_takes_what_the_planner_says():
    import torch

    from gqa.cache.int8 import quantise

    q, scale = quantise(torch.randn(1, 2, 10, 8))
    one = q.numel() * q.element_size() + scale.numel() * scale.element_size()
    assert find_engine("contiguous").bytes_for(FULL, 10, 1, INT8) == 4 * 2 * one


def test_paged_takes_whole_blocks_of_every_layer():
    paged, row = find_engine("paged"), 256
    assert paged.bytes_for(FULL, 33, 2, BF16) == 2 * 3 * 16 * row
    assert find_engine("paged", block=5).bytes_for(FULL, 33, 2, BF16) == 2 * 7 * 5 * row
    pool = paged.pool(FULL, 33, 100 * 16 * row - 1, BF16)
    assert (pool.blocks, pool.tokens, pool.block_tokens, pool.concurrency) == (99, 99 * 16, 16, 33)
    assert paged.bytes_for(MIXED, 1000, 1, BF16) == paged.bytes_for(MIXED.without_windows(), 1000, 1, BF16)
    assert any("sliding" in sentence for sentence in paged.rules(MIXED, BF16))


@pytest.mark.parametrize(("ranks", "kv_heads"), [(1, 8), (2, 4), (4, 2), (8, 1), (16, 1), (64, 1)])
def test_tensor_parallel_shares_or_repeats_kv_heads(ranks, kv_heads):
    # Llama 3 70B: 64 query heads on 8 KV heads.
    layer = shard(bundled("llama-3-70b"), ranks).layers[0]
    assert (layer.kv_heads, layer.query_heads) == (kv_heads, 64 // ranks)
    latent = shard(bundled("deepseek-v3"), ranks).layers[0]
    assert (latent.kv_heads, latent.head_dim) == (1, 576)  # a latent row is whole on every device


def test_what_cannot_be_split_evenly():
    with pytest.raises(GqaError, match="cannot be split evenly over 3"):
        shard(bundled("llama-3-70b"), 3)
    with pytest.raises(GqaError, match="10 KV heads of Phi-4 cannot be shared out to 4"):
        shard(bundled("phi-4"), 4)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("tensorrt", {}, "an unknown engine"),
        ("vllm@new", {}, "an unknown engine"),
        ("contiguous", {"block": 16}, "--block means nothing to contiguous"),
        ("llama.cpp", {"block": 16}, "--block means nothing to llama.cpp"),
        ("sglang", {"batched_tokens": 16}, "--batched-tokens means nothing to sglang"),
        ("vllm", {"block": 0}, "--block is out of range"),
    ],
)
def test_wrong_engines(name, options, says):
    with pytest.raises(GqaError, match=says):
        find_engine(name, **options)


@given(
    st.sampled_from(ENGINES),
    st.sampled_from([FULL, MIXED, STATES, bundled("gpt-oss-20b"), bundled("deepseek-v3")]),
    st.integers(1, 5),
    st.integers(-10, 10**9),
)
def test_the_longest_context_fits_and_one_more_does_not(name, shape, batch, budget):
    engine = find_engine(name)
    longest = max_context(engine, shape, batch, BF16, budget)
    assert longest is not None  # one layer of each grows
    assert longest == 0 or engine.bytes_for(shape, longest, batch, BF16) <= budget
    assert engine.bytes_for(shape, longest + 1, batch, BF16) > budget


@given(st.sampled_from(ENGINES), st.sampled_from([FULL, MIXED, STATES]), st.integers(1, 10**5), st.integers(0, 10**9))
def test_requests_that_fit_take_no_more_than_the_budget(name, shape, context, budget):
    engine = find_engine(name)
    requests = math.floor(engine.pool(shape, context, budget, BF16).concurrency)
    spare = engine.bytes_for(shape, context, 0, BF16) if name == "sglang" else 0
    if name != "sglang" or shape is not STATES:  # whose pools for states and tokens are divided beforehand
        assert engine.bytes_for(shape, context, requests, BF16) - spare <= budget
