"""Tokens per second: both ways give the same words, and a wrong one gives no figure."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

import gqa
from gqa.bench import generation
from gqa.bench.decode import decode_step, filled_cache
from gqa.bench.generation import DEFAULT, default_way, measure_generation, random_model, sharing_copy
from gqa.bench.kernels import OURS
from gqa.config.shallow import shallow_config
from gqa.errors import GqaError
from gqa.source import open_source

SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 16,
    "initializer_range": 0.2,
}


def build(config, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_ways_are_timed_at_every_context(dtype):
    model = build(LlamaConfig(**SMALL), dtype)
    seen = []
    rows = measure_generation(
        model, [5, 63], repeats=2, progress=lambda stage, done, total, note="": seen.append((done, note))
    )
    assert [(row["context_tokens"], row["contender"]) for row in rows] == [
        (5, OURS), (5, DEFAULT), (63, OURS), (63, DEFAULT)
    ]  # fmt: skip
    for row in rows:
        assert row["status"] == "timed"
        assert row["layers"] == 3
        assert row["cache_bytes_measured"] == row["context_tokens"] * 3 * 2 * (8 + 8) * dtype.itemsize
        assert row["tokens_per_second"] == 1 / row["seconds_per_token_p50"]
        assert 0 < row["logits_error_rms"] <= row["logits_error_rms_allowed"]
    assert seen == [(1, "5 tokens"), (2, "5 tokens"), (1, "63 tokens"), (2, "63 tokens")]


def test_sliding_windows():
    config = MistralConfig(**{**SMALL, "sliding_window": 7})
    assert [row["status"] for row in measure_generation(build(config), [63], repeats=1)] == ["timed", "timed"]


def test_the_model_is_left_as_it_was():
    model = build(LlamaConfig(**SMALL)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measure_generation(model, [5], repeats=1)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_copy_shares_the_weights_and_not_the_config():
    gqa.hf.register()
    model = build(LlamaConfig(**SMALL))
    twin = sharing_copy(model, "gqa")
    assert [p.data_ptr() for p in twin.parameters()] == [p.data_ptr() for p in model.parameters()]
    assert (twin.config._attn_implementation, model.config._attn_implementation) == ("gqa", "sdpa")


def test_rewinding_the_default_gives_the_same_logits_again():
    model = build(LlamaConfig(**SMALL))
    gqa.hf.register()
    with torch.inference_mode():
        cache = filled_cache(sharing_copy(model, "gqa"), 20)
        way = default_way(model, [tuple(view.clone() for view in layer.views()) for layer in cache.blocks], 20)
        first = way.step(3)
        assert way.cache.get_seq_length() == 21
        way.rewind()
        assert way.cache.get_seq_length() == 20
        assert torch.equal(way.step(3), first)


def test_a_way_that_is_wrong_gives_no_time(monkeypatch):
    def forgetful(model, cache, token=0):  # ours with the token after the one asked for
        ours = model.config._attn_implementation == "gqa"
        return decode_step(model, cache, token + ours)

    monkeypatch.setattr(generation, "decode_step", forgetful)
    ours, default = measure_generation(build(LlamaConfig(**SMALL)), [5], repeats=1)
    assert (ours["status"], default["status"]) == ("wrong", "timed")
    assert ours["logits_error_rms"] > ours["logits_error_rms_allowed"]
    assert "tokens_per_second" not in ours
    assert default["times_of_gqa"] is None


def test_random_model_of_a_bundled_shape():
    source = open_source("qwen2.5-0.5b")
    config = shallow_config(source.config, 2, source.name) | {"vocab_size": 64, "intermediate_size": 32}
    model = random_model(config, torch.bfloat16)
    assert model.config.num_hidden_layers == 2
    assert model.dtype == torch.bfloat16
    assert not model.training
    with pytest.raises(GqaError, match="transformers cannot build"):
        random_model({"model_type": "abacus"}, torch.float32)


@pytest.mark.parametrize(
    ("dtype", "context", "repeats", "says"),
    [(torch.float64, 5, 1, "dtype"), (torch.float32, 0, 1, "context_tokens"), (torch.float32, 5, 0, "repeats")],
)
def test_refuses(dtype, context, repeats, says):
    with pytest.raises(GqaError, match=says):
        measure_generation(build(LlamaConfig(**SMALL), dtype), [context], repeats=repeats)
