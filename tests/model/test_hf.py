"""transformers' models with attn_implementation="gqa": the same greedy tokens as their own eager attention."""

import functools
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    GptOssConfig,
    JambaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, DynamicLayer

import gqa
from gqa.errors import GqaError

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
    "gemma2-softcap-window": Gemma2Config(**SMALL, sliding_window=WINDOW, attn_logit_softcapping=2.0),
    "gpt-oss-sinks-window": GptOssConfig(
        **SMALL,
        sliding_window=WINDOW,
        num_local_experts=2,
        num_experts_per_tok=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def load(folder):
    """load(name, implementation): a model read from disk, as a user would."""
    gqa.hf.register()

    @functools.cache
    def read(name, implementation):
        path = folder / name
        if not path.exists():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(MODELS[name])
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith(("bias", "sinks")):
                    torch.nn.init.normal_(parameter, std=0.5)
            model.save_pretrained(path)
        return AutoModelForCausalLM.from_pretrained(path, attn_implementation=implementation).eval()

    return read


def prompts(padded=True):
    """Two prompts, the first left-padded by five tokens."""
    ids = torch.randint(1, 97, (2, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        ids[0, :5] = mask[0, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


def greedy(model, inputs, **options):
    return model.generate(**inputs, max_new_tokens=12, do_sample=False, **options)


@pytest.mark.parametrize("padded", [False, True], ids=["even", "left-padded"])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_greedy_tokens_with_every_cache(load, name, padded):
    eager, ours = load(name, "eager"), load(name, "gqa")
    inputs = prompts(padded)
    want = greedy(eager, inputs)
    assert len(set(want[:, 11:].flatten().tolist())) > 4  # a degenerate model would prove nothing
    for options in (
        {},
        {"past_key_values": DynamicCache()},
        {"past_key_values": DynamicCache(config=ours.config)},
        {"cache_implementation": "static"},
        {"past_key_values": gqa.hf.GqaCache()},
        {"past_key_values": gqa.hf.GqaCache(capacity=64, config=ours.config)},
        {"use_cache": False},
    ):
        assert torch.equal(greedy(ours, inputs, **options), want), options


@pytest.mark.parametrize("name", MODELS)
def test_the_same_logits_and_gradients(load, name):
    inputs = prompts()
    seen = inputs["attention_mask"].bool()
    results = []
    for implementation in ("eager", "gqa"):
        model = load(name, implementation)
        logits = model(**inputs, use_cache=False).logits
        model.zero_grad()
        logits[seen].square().mean().backward()
        gradient = model.model.layers[0].self_attn.k_proj.weight.grad
        results.append((logits[seen].detach(), gradient))
    (want, want_gradient), (got, got_gradient) = results
    torch.testing.assert_close(got, want, rtol=0, atol=float(want.abs().max()) * 1e-5)
    torch.testing.assert_close(got_gradient, want_gradient, rtol=0, atol=float(want_gradient.abs().max()) * 1e-4)


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window", "gpt-oss-sinks-window"])
def test_a_prompt_fed_in_chunks(load, name):
    """Chunks after the first see the cache and one another: causal from a later position."""
    inputs = prompts()
    want = greedy(load(name, "eager"), inputs)
    model = load(name, "gqa")
    for cache in ({}, *({"past_key_values": gqa.hf.GqaCache(config=config)} for config in (None, model.config))):
        assert torch.equal(greedy(model, inputs, prefill_chunk_size=4, **cache), want)


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window"])
def test_packed_position_ids_keep_sequences_apart(load, name):
    ids = prompts(padded=False)["input_ids"][:1]
    positions = torch.cat([torch.arange(4), torch.arange(7)])[None]
    with torch.no_grad():
        model = load(name, "gqa")
        packed = model(ids, position_ids=positions, use_cache=False).logits
        apart = torch.cat([model(part, use_cache=False).logits for part in (ids[:, :4], ids[:, 4:])], dim=1)
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt-oss-sinks-window"])
def test_beam_search(load, name):
    inputs = prompts()
    options = {"num_beams": 3, "num_return_sequences": 2}
    want = greedy(load(name, "eager"), inputs, **options)
    model = load(name, "gqa")
    for cache in ({}, *({"past_key_values": gqa.hf.GqaCache(config=config)} for config in (None, model.config))):
        assert torch.equal(greedy(model, inputs, **options, **cache), want)


def test_a_conversation_goes_on_with_the_same_cache(load):
    model = load("llama-gqa", "gqa")
    ids = prompts(padded=False)["input_ids"]
    cache = gqa.hf.GqaCache()
    first = greedy(model, {"input_ids": ids}, past_key_values=cache)
    held = cache.get_seq_length()
    assert held == first.shape[1] - 1
    longer = torch.cat([first, ids], dim=1)
    assert torch.equal(
        greedy(model, {"input_ids": longer}, past_key_values=cache), greedy(model, {"input_ids": longer})
    )


def test_the_cache_weighs_what_arithmetic_says(load):
    model, cache = load("llama-gqa", "gqa"), gqa.hf.GqaCache(capacity=16)
    with torch.no_grad():
        model(**prompts(), past_key_values=cache)
    token = 2 * 2 * (12 + 12) * 4  # layers, KV heads, D + Dv, bytes
    assert cache.nbytes_used == 2 * 11 * token
    assert cache.nbytes_allocated == 2 * 16 * token
    cache.crop(-3)
    assert cache.get_seq_length() == 8
    assert cache.nbytes_used == 2 * 8 * token
    for change, batch in (
        (lambda: None, 2),
        (lambda: cache.batch_repeat_interleave(2), 4),
        (lambda: cache.batch_select_indices(torch.tensor([0, 3, 1])), 3),
    ):
        change()
        for layer in cache.layers:
            assert isinstance(layer, gqa.hf.GqaCacheLayer)
            keys, values = layer.block.views()
            assert keys.shape == values.shape == (batch, 2, 8, 12)
            assert layer.keys is not None
            assert torch.equal(layer.keys, keys)
    cache.reset()
    assert cache.get_seq_length() == 0


def test_sliding_layers_weigh_no_more_than_their_window(load):
    model = load("gpt-oss-sinks-window", "gqa")  # of its two layers the first slides
    cache = gqa.hf.GqaCache(config=model.config)
    assert cache.is_sliding == [True, False]
    greedy(model, prompts(), past_key_values=cache)
    tokens = 11 + 12 - 1
    assert cache.get_seq_length() == tokens
    assert cache.nbytes_used == 2 * (WINDOW + tokens) * 2 * (12 + 12) * 4  # batch, tokens, KV heads, D + Dv, bytes


def test_refuses_models_with_other_layers():
    with pytest.raises(GqaError, match="does not serve all layers"):
        gqa.hf.GqaCache(config=JambaConfig(num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1))


def test_low_precision_under_autocast(load):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = load("llama-gqa", "gqa")(**prompts(), use_cache=False).logits
        want = load("llama-gqa", "eager")(**prompts(), use_cache=False).logits
    seen = prompts()["attention_mask"].bool()
    assert (logits - want)[seen].abs().max() < 0.05 * want.abs().max()


def test_nothing_of_transformers_own_changes():
    gqa.hf.register()
    gqa.hf.register()
    gqa.hf.GqaCache()
    assert DYNAMIC_LAYER_TYPE_MAPPING["full_attention"] is DynamicLayer


def test_refuses_what_the_op_has_not(load):
    module, x = torch.nn.Module(), torch.randn(1, 2, 3, 8)
    with pytest.raises(GqaError, match="dropout"):
        gqa.hf.attention_forward(module, x, x, x, None, dropout=0.1)
    with pytest.raises(GqaError, match="position_bias"):
        gqa.hf.attention_forward(module, x, x, x, None, position_bias=x)
    with pytest.raises(GqaError, match="differentiated"):
        load("llama-gqa", "gqa")(**prompts(), past_key_values=gqa.hf.GqaCache())
