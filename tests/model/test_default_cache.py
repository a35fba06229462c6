"""Which cache generate() takes: ours for a model with our attention, unless the user says otherwise."""

import copy
from typing import Any

import pytest
import torch
from helpers.served import SMALL, greedy, prompts, served_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
    JambaConfig,
    LlavaConfig,
    StaticCache,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
)

import gqa
from gqa.model import default_cache


def cache_of(model: Any, **options: Any) -> Any:
    """The cache that generate() ended with."""
    options = {"max_new_tokens": 3, "do_sample": False, **options}
    return model.generate(**prompts(padded=False), return_dict_in_generate=True, **options).past_key_values


@pytest.mark.parametrize(
    "mode", [{}, {"do_sample": True}, {"num_beams": 2}, {"num_beams": 2, "do_sample": True}], ids=str
)
def test_ours_by_default(mode):
    assert type(cache_of(served_model("llama-gqa", "gqa"), **mode)) is gqa.hf.GqaCache


def test_windows_are_kept_short():
    cache = cache_of(served_model("gpt-oss-sinks-window", "gqa"))
    assert type(cache) is gqa.hf.GqaCache
    assert cache.is_sliding == [True, False]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_other_models_keep_theirs(implementation):
    gqa.hf.register()
    assert type(cache_of(served_model("llama-gqa", implementation))) is DynamicCache


def test_the_user_decides():
    model = served_model("llama-gqa", "gqa")
    mine = DynamicCache()
    assert cache_of(model, past_key_values=mine) is mine
    assert type(cache_of(model, cache_implementation="dynamic")) is DynamicCache
    assert type(cache_of(model, cache_implementation="static")) is StaticCache
    assert cache_of(model, use_cache=False) is None


def test_a_loaded_model_changes_over_and_back(tmp_path):
    gqa.hf.register()
    served_model("llama-gqa", "eager").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    want = greedy(model, prompts())
    for implementation, kind in (("gqa", gqa.hf.GqaCache), ("sdpa", DynamicCache), ("gqa", gqa.hf.GqaCache)):
        model.set_attn_implementation(implementation)
        assert type(cache_of(model)) is kind
        assert torch.equal(greedy(model, prompts()), want)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="gqa").eval()
    assert type(cache_of(loaded)) is gqa.hf.GqaCache
    assert torch.equal(greedy(loaded, prompts()), want)


def test_a_plain_forward_goes_on_with_its_own_cache():
    model, inputs = served_model("llama-gqa", "gqa"), prompts(padded=False)
    with torch.no_grad():
        whole = model(**inputs).logits[:, -1]
        first = model(inputs["input_ids"][:, :-1])
        last = model(inputs["input_ids"][:, -1:], past_key_values=first.past_key_values).logits[:, -1]
    assert type(first.past_key_values) is DynamicCache
    torch.testing.assert_close(last, whole, rtol=0, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.parametrize("everywhere", [True, False], ids=["whole-model", "text-only"])
def test_a_model_whose_text_is_a_part_of_it(everywhere):
    gqa.hf.register()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        text_config={"model_type": "llama", **SMALL},
        vision_config={"model_type": "clip_vision_model", **sizes, "image_size": 8, "patch_size": 4},
        image_token_index=96,
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    want = greedy(model, prompts())
    assert type(cache_of(model)) is DynamicCache
    model.set_attn_implementation("gqa" if everywhere else {"text_config": "gqa"})
    assert type(cache_of(model)) is gqa.hf.GqaCache
    assert torch.equal(greedy(model, prompts()), want)


def test_layers_that_are_not_all_attention():
    config = JambaConfig(
        **{**SMALL, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 4,
           "mamba_dt_rank": 4, "num_experts": 1},
    )  # fmt: skip
    gqa.hf.register()
    models = []
    for implementation in ("eager", "gqa"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=implementation)
        models.append(model.eval())
    eager, ours = models
    assert type(cache_of(ours)) is type(cache_of(eager)) is not gqa.hf.GqaCache
    assert torch.equal(greedy(ours, prompts(padded=False)), greedy(eager, prompts(padded=False)))


def test_encoder_and_decoder():
    gqa.hf.register()
    part = {key: value for key, value in SMALL.items() if key != "tie_word_embeddings"}
    config = T5GemmaConfig(
        encoder={**part, "attn_logit_softcapping": None},
        decoder={**part, "attn_logit_softcapping": None, "cross_attention_hidden_size": 48, "bos_token_id": 1},
        vocab_size=97,
    )
    torch.manual_seed(0)
    model: Any = T5GemmaForConditionalGeneration(config).eval()
    options = {"max_new_tokens": 3, "decoder_start_token_id": 1}
    want = greedy_of(model, options)
    model.set_attn_implementation("gqa")
    assert type(cache_of(model, **options)) is EncoderDecoderCache
    assert torch.equal(greedy_of(model, options), want)


def greedy_of(model, options):
    return model.generate(**prompts(), do_sample=False, **options)


def test_taking_tokens_back_behind_a_window_is_left_to_transformers():
    one = {"input_ids": prompts(padded=False)["input_ids"][:1].repeat(1, 2)}
    for name, kind in (("llama-gqa", gqa.hf.GqaCache), ("mistral-window", DynamicCache)):
        model = served_model(name, "gqa")
        result = model.generate(
            **one, max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=3, return_dict_in_generate=True
        )
        assert type(result.past_key_values) is kind


def test_room_for_what_was_asked_and_no_more():
    model = served_model("llama-gqa", "gqa")
    token = 2 * 2 * 2 * (12 + 12) * 4  # batch, layers, KV heads, D + Dv, bytes
    assert cache_of(model, max_new_tokens=5).nbytes_allocated == (11 + 5 - 1) * token
    assert cache_of(model, max_new_tokens=None, max_length=20).nbytes_allocated == 19 * token
    stop = model.generation_config.to_dict()["eos_token_id"]
    assert stop is None
    first = greedy(model, prompts(padded=False))[:, 11].tolist()
    endless = cache_of(model, max_new_tokens=10**9, eos_token_id=first)  # ends at once
    assert endless.nbytes_allocated == (11 + default_cache.MOST_NEW_TOKENS) * token


def test_gradients_through_generate():
    model, inputs = served_model("llama-gqa", "gqa"), prompts(padded=False)
    undecorated = type(model).generate.__wrapped__  # without its torch.no_grad()
    result = undecorated(
        model, **inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    assert type(result.past_key_values) is DynamicCache
    assert result.logits[1].requires_grad


def test_installed_once():
    gqa.hf.register()
    mixin: Any = GenerationMixin
    method = mixin._prepare_cache_for_generation
    gqa.hf.register()
    assert mixin._prepare_cache_for_generation is method
    assert not hasattr(method.__wrapped__, "__wrapped__")
