"""Caches of every kind against those that transformers fills: a tiny model of each type is built, run and counted."""

import pytest

from gqa.config import parse_config
from gqa.plan.cache import kv_bytes, row_elements, state_bytes
from gqa.plan.kv_dtype import kv_dtype

TOKENS = 40
BASE = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA2 = {"mamba_n_heads": 12, "mamba_d_state": 5, "mamba_n_groups": 2}
MOE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
GATED_DELTA = {
    "head_dim": 8,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 7,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97}
NO_HEADS = {key: BASE[key] for key in ("hidden_size", "vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")} | {
    "num_hidden_layers": 3,
    "state_size": 5,
}
LINEAR_FIRST = ["linear_attention"] * 3 + ["full_attention"]

CASES = {
    "llama4_text": BASE
    | {"head_dim": 8, "attention_chunk_size": 16, "num_local_experts": 2, "intermediate_size_mlp": 64},
    "gemma3n_text": BASE | PER_LAYER | {"num_hidden_layers": 10, "num_kv_shared_layers": 4, "sliding_window": 16},
    "gemma4_text": BASE
    | PER_LAYER
    | {
        "num_hidden_layers": 6,
        "head_dim": 8,
        "global_head_dim": 16,
        "sliding_window": 16,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
    },
    "cohere2": BASE | {"sliding_window": 16},
    "exaone4": BASE | {"sliding_window": 16},
    "olmo3": BASE | {"sliding_window": 16},
    "smollm3": BASE,
    "ministral": BASE | {"sliding_window": 16, "head_dim": 8},
    "qwen3_next": BASE | GATED_DELTA | MOE,
    "qwen3_5_text": BASE | GATED_DELTA,
    "qwen3_5_moe_text": BASE | GATED_DELTA | MOE,
    "jamba": BASE | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 5},
    "bamba": BASE | MAMBA2 | {"attn_layer_indices": [1]},
    "granitemoehybrid": BASE
    | MAMBA2
    | {"layer_types": LINEAR_FIRST, "num_local_experts": 2, "shared_intermediate_size": 8},
    "nemotron_h": BASE
    | {
        "head_dim": 8,
        "hybrid_override_pattern": "M*-M",
        "mamba_num_heads": 4,
        "mamba_head_dim": 6,
        "ssm_state_size": 5,
        "n_groups": 2,
    },
    "falcon_h1": BASE | {"mamba_d_ssm": 24, "mamba_n_heads": 4, "mamba_d_state": 5, "mamba_n_groups": 2},
    "zamba2": {key: value for key, value in BASE.items() if key != "num_key_value_heads"}
    | {"layers_block_type": ["mamba", "hybrid", "mamba", "mamba"], "n_mamba_heads": 4, "mamba_d_state": 5}
    | {"mamba_ngroups": 2},
    "lfm2": BASE | {"full_attn_idxs": [1]},
    "mamba": NO_HEADS,
    "falcon_mamba": NO_HEADS,
    "mamba2": NO_HEADS | {"num_heads": 12, "head_dim": 8, "n_groups": 2},
    "kimi_linear": BASE
    | {"kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 8, "linear_head_dim": 5}
    | {"linear_num_heads": 3, "layer_types": LINEAR_FIRST, "num_experts": 2, "num_experts_per_token": 1}
    | {"moe_intermediate_size": 8, "num_key_value_heads": 6},
}


def filled(config):
    """Per layer the K and V rows' elements of one token, the tokens kept, and the bytes of its states."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()
    with torch.no_grad():
        output = model(torch.arange(3, 3 + TOKENS)[None], use_cache=True)
    cache = output.past_key_values if hasattr(output, "past_key_values") else output.cache_params
    for layer in cache.layers:
        pairs = [tensor for name in ("keys", "values") if (tensor := getattr(layer, name, None)) is not None]
        states = [
            tensor
            for name in ("conv_states", "recurrent_states")
            for tensor in (getattr(layer, name, None) or {}).values()
            if tensor is not None
        ]
        kept = pairs[0].shape[2] if pairs else 0
        yield sum(t.numel() // kept for t in pairs), kept, sum(t.numel() * t.element_size() for t in states)


@pytest.mark.parametrize("model_type", CASES)
def test_caches_are_those_that_transformers_fills(model_type):
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type, **CASES[model_type])
    found = list(filled(config))
    for raw in ({"model_type": model_type, **CASES[model_type]}, config.to_dict()):  # as written by hand, and saved
        shape = parse_config(raw, model_type)
        assert len(shape.layers) == len(found)
        for layer, (row, kept, _) in zip(shape.layers, found, strict=True):
            if layer.kind == "mla":  # transformers keeps the expanded heads of latent attention
                assert kept == TOKENS
            else:
                assert row_elements(layer) == row, layer
            if layer.window and row:  # transformers drops the oldest token of a window before the next one comes
                assert kept == layer.window - 1
        assert state_bytes(shape, kv_dtype("bf16")) == sum(states for _, _, states in found)


def test_layers_that_share_a_cache_by_hand():
    # Gemma 3n E4B: 35 layers of 2 KV heads of 256, every fifth full, the last 15 share: 16 sliding and 4 full ones own
    # a cache. At 4096 tokens: (16 * 512 + 4 * 4096) * 2 * (256 + 256) * 2 bytes.
    shape = parse_config({"model_type": "gemma3n_text", "num_hidden_layers": 35, "hidden_size": 2048}, "E4B")
    assert kv_bytes(shape, 4096, 1, kv_dtype("bf16")) == (16 * 512 + 4 * 4096) * 2048
