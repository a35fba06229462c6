"""Decode measurements: the right bytes, sane times, a model left as it was."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

import gqa
from gqa.bench.decode import measure_decode
from gqa.errors import GqaError

SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 16,
}


def build(config):
    gqa.hf.register()
    return AutoModelForCausalLM.from_config(config, attn_implementation="gqa")


@pytest.fixture
def model():
    return build(LlamaConfig(**SMALL))


@pytest.mark.parametrize("context", [1, 63, 200])  # 200 is far beyond max_position_embeddings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_measures_bytes_and_ordered_percentiles(model, context, dtype):
    seen = []
    result = measure_decode(
        model.to(dtype), context, repeats=5, progress=lambda stage, done, total, note="": seen.append((done, total))
    )
    assert result["cache_bytes_measured"] == context * 3 * 2 * (8 + 8) * dtype.itemsize  # layers, KV heads, D + Dv
    assert 0 < result["seconds_per_token_p20"] <= result["seconds_per_token_p50"] <= result["seconds_per_token_p80"]
    assert result["context_tokens"] == context
    assert seen == [(i, 5) for i in range(1, 6)]


@pytest.mark.parametrize(("context", "held"), [(5, 5), (7, 7), (63, 7)])
def test_sliding_layers_hold_their_window(context, held):
    result = measure_decode(build(MistralConfig(**SMALL, sliding_window=7)), context, repeats=9)
    assert result["cache_bytes_measured"] == held * 3 * 2 * (8 + 8) * 4


def test_leaves_the_model_as_it_was(model):
    model.train()
    measure_decode(model, 4, repeats=1)
    assert model.training


@pytest.mark.parametrize(("context", "repeats"), [(0, 3), (5, 0)])
def test_refuses(model, context, repeats):
    with pytest.raises(GqaError, match="positive"):
        measure_decode(model, context, repeats=repeats)
