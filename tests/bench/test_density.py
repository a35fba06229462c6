"""Serving density: what fits is what the plan says, to the block, and the pool is really full."""

import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

import gqa
from gqa.bench import density
from gqa.bench.density import Memory, filled, measure_density
from gqa.bench.machine import Probe
from gqa.cache.pool import BlockPool
from gqa.config import parse_config
from gqa.errors import GqaError
from gqa.hardware import Device
from gqa.model.serve import forward
from gqa.plan.decode import decode_bound
from gqa.plan.kv_dtype import kv_dtype

SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 16,
    "tie_word_embeddings": False,
}
TOKEN = 3 * 2 * (8 + 8)  # layers, KV heads, D + Dv: numbers of one token
DEVICE = Device("a device", 1 << 30, "", 1e9, 1e12, "fp32", {})


def build(config, dtype=torch.float32):
    gqa.hf.register()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="gqa", dtype=dtype).eval()
    return model, parse_config(config.to_dict(), "small")


@pytest.mark.parametrize("block", [1, 5, 16])
@pytest.mark.parametrize("context", [1, 16, 33])
@pytest.mark.parametrize(
    ("dtype", "int8", "token_bytes"),
    [
        (torch.float32, False, TOKEN * 4),
        (torch.bfloat16, False, TOKEN * 2),
        (torch.float32, True, TOKEN + 3 * 2 * 2 * 4),  # and a float32 scale per layer and head, of K and of V
    ],
    ids=["fp32", "bf16", "int8"],
)
def test_what_fits_is_what_the_plan_says(dtype, int8, token_bytes, context, block):
    model, shape = build(LlamaConfig(**SMALL), dtype)
    blocks = 5 * math.ceil(context / block) - 1  # four sequences, and one that lacks a block
    row = measure_density(
        model, shape, Memory((blocks + 1) * block * token_bytes - 1, block, int8=int8), context, DEVICE, repeats=1
    )
    assert row["pool_blocks"] == row["pool_blocks_predicted"] == blocks
    assert row["pool_bytes"] == blocks * block * token_bytes
    assert row["sequences_fit"] == row["sequences_predicted"] == 4
    assert row["tokens_per_second"] == 4 / row["seconds_per_step_p50"]
    assert (row["kv_heads"], row["queries_per_kv_head"]) == (2, 2)
    bound = decode_bound(shape, context, 4, kv_dtype("int8" if int8 else row["dtype"]), dtype.itemsize, DEVICE)
    assert bound is not None
    assert row["decode_seconds_bound"] == bound.seconds


def test_sliding_layers_keep_every_token_and_the_plan_knows():
    model, shape = build(MistralConfig(**SMALL, sliding_window=7))
    row = measure_density(model, shape, Memory(100 * TOKEN * 4, 4), 12, DEVICE, repeats=1)
    assert row["sequences_fit"] == row["sequences_predicted"] == 100 // 12


def test_a_budget_for_less_than_one_sequence_gives_no_time():
    model, shape = build(LlamaConfig(**SMALL))
    row = measure_density(model, shape, Memory(16 * TOKEN * 4), 17, DEVICE, repeats=1)
    assert (row["pool_blocks"], row["sequences_fit"], row["sequences_predicted"]) == (1, 0, 0)
    assert row["tokens_per_second"] is row["decode_seconds_bound"] is None


def test_the_bandwidth_of_the_same_turns_gives_the_bound():
    model, shape = build(LlamaConfig(**SMALL))
    runs = []
    probe = Probe("nothing", 10**6, lambda: runs.append(len(runs)))
    row = measure_density(model, shape, Memory(1 << 16), 10, DEVICE, read=probe, repeats=2)
    assert len(runs) == 2 + density.WARM_UP_STEPS
    assert row["read_bytes_per_second"] > 0
    bound = decode_bound(
        shape,
        10,
        row["sequences_fit"],
        kv_dtype("fp32"),
        4,
        Device("this", 1, "", row["read_bytes_per_second"], 1e12, "fp32", {}),
    )
    assert bound is not None
    assert row["decode_seconds_bound"] == bound.seconds
    assert row["tokens_per_second_bound"] == row["sequences_fit"] / bound.seconds


def test_a_step_gives_every_sequence_its_last_token(monkeypatch):
    seen = []

    def watching(model, cache, ids, positions=None):
        before = cache.get_seq_length()
        logits = forward(model, cache, ids, positions)
        seen.append((len(ids), before, cache.get_seq_length()))
        return logits

    monkeypatch.setattr(density, "forward", watching)
    model, shape = build(LlamaConfig(**SMALL))
    row = measure_density(model, shape, Memory(1 << 16), 10, DEVICE, repeats=2)
    assert seen[-5:] == [(row["sequences_fit"], 9, 10)] * 5


def test_the_pool_is_filled_with_sequences_of_their_own():
    model, _ = build(LlamaConfig(**SMALL))
    pool = BlockPool(10, block=4)
    with torch.inference_mode():
        cache = filled(model, pool, 11, 3)
    assert cache.lengths == [11] * 3
    assert pool.free_blocks == 1
    assert pool.blocks_of(cache.store.sequences) == 9


def test_refusals():
    model, shape = build(LlamaConfig(**SMALL))
    with pytest.raises(GqaError, match="not even one block"):
        measure_density(model, shape, Memory(16 * TOKEN * 4 - 1), 1, DEVICE)
    with pytest.raises(GqaError, match="context_tokens"):
        measure_density(model, shape, Memory(1 << 20), 0, DEVICE)
    with pytest.raises(GqaError, match="memory asked for is not there"):
        measure_density(model, shape, Memory(1 << 60), 16, DEVICE)
    with pytest.raises(GqaError, match="repeats"):
        measure_density(model, shape, Memory(1 << 14), 16, DEVICE, repeats=0)
    with pytest.raises(GqaError, match="dtype"):
        measure_density(model.double(), shape, Memory(1 << 20), 16, DEVICE)
