"""Parameter counts against the models that transformers builds, and against published sizes."""

import dataclasses

import pytest

from gqa.config import parse_config
from gqa.plan.parameters import (
    active_parameters,
    attention_parameters,
    kv_projection_parameters,
    read_parameters,
    total_parameters,
)
from gqa.source import open_source

# Odd sizes, so that no two matrices have the same number of elements by accident.
SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "vocab_size": 97,
    "max_position_embeddings": 40,
}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 10, "intermediate_size": 76}
WIDE = SMALL | {"num_key_value_heads": 2, "intermediate_size": 76}  # classes without a head_dim of their own
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LATENT = SMALL | {
    "intermediate_size": 76,
    "q_lora_rank": 14,
    "kv_lora_rank": 18,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 6,
    "v_head_dim": 10,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}

CASES = {
    "llama": ("llama", GROUPED),
    "llama, biases, tied": (
        "llama",
        GROUPED | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "mistral": ("mistral", GROUPED),
    "mixtral": ("mixtral", GROUPED | {"num_local_experts": 4}),
    "qwen2": ("qwen2", WIDE),
    "qwen3": ("qwen3", GROUPED),
    "qwen3_moe": (
        "qwen3_moe",
        GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "mlp_only_layers": [1]},
    ),
    "gemma": ("gemma", GROUPED),
    "gemma2": ("gemma2", GROUPED),
    "gemma3_text": ("gemma3_text", GROUPED),
    "phi3": ("phi3", WIDE | {"pad_token_id": 0}),
    "starcoder2": ("starcoder2", WIDE),
    "starcoder2, no biases": ("starcoder2", WIDE | {"use_bias": False}),
    "cohere": ("cohere", WIDE | {"pad_token_id": 0}),
    "olmo2": ("olmo2", WIDE | {"pad_token_id": 0}),
    "granite": ("granite", WIDE),
    "cohere2": ("cohere2", GROUPED | TOKENS),
    "exaone4": ("exaone4", WIDE | TOKENS),
    "olmo3": ("olmo3", WIDE | TOKENS),
    "smollm3": ("smollm3", WIDE | TOKENS),
    "ministral": ("ministral", GROUPED),
    "glm4": ("glm4", GROUPED | TOKENS),
    "seed_oss": ("seed_oss", GROUPED),
    "olmoe": ("olmoe", WIDE | TOKENS | {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("gpt_oss", GROUPED | {"num_local_experts": 4}),
    "deepseek_v2": ("deepseek_v2", LATENT),
    "deepseek_v3": ("deepseek_v3", LATENT),
    "deepseek_v2, direct queries": ("deepseek_v2", LATENT | {"q_lora_rank": None}),
    "falcon, one KV head": ("falcon", SMALL | {"new_decoder_architecture": False}),
    "falcon, new decoder": ("falcon", SMALL | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt2": ("gpt2", SMALL),
    "gpt_bigcode": ("gpt_bigcode", SMALL),
    "gpt_neox": ("gpt_neox", SMALL | {"intermediate_size": 76}),
}


@pytest.mark.parametrize(("model_type", "settings"), CASES.values(), ids=CASES)
def test_counts_what_transformers_builds(model_type, settings):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = parse_config(config.to_dict(), model_type)
    assert total_parameters(shape) == sum(parameter.numel() for parameter in model.parameters())


def test_attention_parameters_by_hand():
    # hidden 48, 6 query heads and 2 KV heads of 10, 3 layers:
    # q 48*60 = 2880, k and v 48*20 = 960 each, o 60*48 = 2880; together 7680 a layer.
    shape = parse_config({"model_type": "llama", **GROUPED}, "hand")
    assert attention_parameters(shape) == 3 * 7680
    assert kv_projection_parameters(shape) == 3 * 2 * 960
    # Biases: q 60, k and v 20 each, o 48.
    biased = parse_config({"model_type": "llama", **GROUPED, "attention_bias": True}, "hand")
    assert attention_parameters(biased) == 3 * (7680 + 60 + 40 + 48)
    # Qwen2 has biases on q, k and v only.
    qwen = parse_config({"model_type": "qwen2", **GROUPED}, "hand")
    assert attention_parameters(qwen) == 3 * (7680 + 60 + 40)
    assert kv_projection_parameters(qwen) == 3 * 2 * (960 + 20)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Llama-2-7B", 6_738_415_616),  # the number that the model card on the hub shows in full
        ("Llama-3-8B", 8_030_261_248),  # the same
        ("Llama-3-70B", 70_553_706_496),  # the same
        ("Mistral-7B-v0.1", 7_241_732_096),  # the same
        ("Mixtral-8x7B", 46_702_792_704),  # the same
        ("GPT-2", 124_439_808),  # transformers' gpt2 counted
    ],
)
def test_published_totals(name, parameters):
    source = open_source(name)
    assert total_parameters(parse_config(source.config, name)) == parameters


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("DeepSeek-V2", 236e9, 21e9),  # arXiv 2405.04434, abstract
        ("DeepSeek-V3", 671e9, 37e9),  # arXiv 2412.19437, abstract
        ("gpt-oss-120B", 116.83e9, 5.13e9),  # arXiv 2508.10925, table 1
        ("gpt-oss-20B", 20.91e9, 3.61e9),  # the same
    ],
)
def test_published_sizes_of_mixtures(name, total, active):
    source = open_source(name)
    shape = parse_config(source.config, name)
    assert total_parameters(shape) == pytest.approx(total, rel=0.01)
    # DeepSeek's figures count the input embedding, which no step reads (V3: 0.93 of 37 billion).
    assert active_parameters(shape) == pytest.approx(active, rel=0.04)


def test_experts_met_grow_with_the_batch():
    # 4 experts, 2 per token: one token meets 2; two tokens 4 * (1 - 1/4) = 3; very many all 4.
    shape = parse_config({"model_type": "mixtral", **GROUPED, "num_local_experts": 4}, "hand")
    expert = 3 * 48 * 76
    one, two, many = (read_parameters(shape, tokens) for tokens in (1, 2, 200))
    assert one is not None
    assert two == pytest.approx(one + 3 * expert)  # one expert more in each of 3 layers
    assert many == pytest.approx(one + 3 * 2 * expert)
    assert active_parameters(shape) == round(one)


def test_unknown_stays_unknown():
    unknown_type = parse_config({"model_type": "brand_new", **GROUPED}, "new")
    assert attention_parameters(unknown_type) is None
    assert kv_projection_parameters(unknown_type) is None
    known = parse_config({"model_type": "llama", **GROUPED}, "known")
    assert total_parameters(dataclasses.replace(known, vocab=None)) is None
    assert total_parameters(dataclasses.replace(known, intermediate=None)) is None
    assert active_parameters(dataclasses.replace(known, vocab=None)) is None
    assert total_parameters(dataclasses.replace(known, tied_embeddings=None)) is None
