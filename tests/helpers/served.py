"""Tiny transformers models of the families whose attention differs, with random weights that make a difference."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

import gqa
from gqa.cache.int8 import quantise

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
    "tie_word_embeddings": False,  # tied ones repeat their input for ever at random weights
}
WINDOW = 7
MODELS = {
    "llama-mha": LlamaConfig(**{**SMALL, "num_key_value_heads": 6}),
    "llama-gqa": LlamaConfig(**SMALL),
    "llama-mqa": LlamaConfig(**{**SMALL, "num_key_value_heads": 1}),
    "mistral-window": MistralConfig(**SMALL, sliding_window=WINDOW),
    "qwen2-bias": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "phi3-fused": Phi3Config(**{**SMALL, "head_dim": 8}),  # its head dim is hidden / heads
    "gemma2-softcap-window": Gemma2Config(**SMALL, sliding_window=WINDOW, attn_logit_softcapping=2.0),
    "gpt-oss-sinks-window": GptOssConfig(
        **SMALL,
        sliding_window=WINDOW,
        num_local_experts=2,
        num_experts_per_tok=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}
PROMPT_TOKENS, NEW_TOKENS = 11, 12


@functools.cache
@torch.inference_mode(False)  # whoever asks first: it is kept for tests of gradients, too
def served_model(name: str, implementation: str) -> Any:
    """The model of this name, the same weights for every attention implementation."""
    gqa.hf.register()
    torch.manual_seed(0)
    config = copy.deepcopy(MODELS[name])  # a model keeps its config, and its attention's name in it
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("bias", "sinks")):
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def prompts(padded: bool = True) -> dict[str, torch.Tensor]:
    """Two prompts, the first left-padded by five tokens."""
    ids = torch.randint(1, 97, (2, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        ids[0, :5] = mask[0, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


def greedy(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **options)


@functools.cache
def eager_tokens(name: str, padded: bool) -> torch.Tensor:
    """What the model's own eager attention generates."""
    tokens = greedy(served_model(name, "eager"), prompts(padded))
    assert len(set(tokens[:, PROMPT_TOKENS:].flatten().tolist())) > 4  # a degenerate model would prove nothing
    return tokens


class RoundedCache(DynamicCache):
    """transformers' own cache, whose keys and values have gone through int8 and back."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        k, v = (q * scale[..., None] for q, scale in (quantise(key_states), quantise(value_states)))
        return super().update(k, v, layer_idx, *args, **kwargs)
