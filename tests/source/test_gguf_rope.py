"""Rotary factors -> the rule they follow, for the factors that transformers calculates."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from gqa.source.gguf_rope import rope_parameters


@pytest.mark.parametrize(("base", "head_dim", "factor"), [(500000.0, 128, 8.0), (500000.0, 64, 32.0)])
def test_llama_3(base, head_dim, factor):
    rule = {
        "rope_type": "llama3",
        "rope_theta": base,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaled = LlamaRotaryEmbedding(LlamaConfig(head_dim=head_dim, rope_parameters=rule)).inv_freq
    factors = (base ** (-torch.arange(0, head_dim, 2) / head_dim) / scaled).tolist()
    assert rope_parameters(base, head_dim, factors) == rule
    factors[head_dim // 4] *= 1.01
    assert rope_parameters(base, head_dim, factors) is None


def test_none():
    plain = {"rope_type": "default", "rope_theta": 1e4}
    assert rope_parameters(1e4, 64, None) == rope_parameters(1e4, 64, [1.0] * 32) == plain
