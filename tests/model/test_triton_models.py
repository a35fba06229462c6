"""transformers' models with attn_implementation="gqa" on the Triton kernels: the tokens of their eager attention.

On a GPU where there is one, else in Triton's interpreter, which is slow: few models, few tokens.
"""

import copy
import functools

import pytest
import torch
from helpers.served import MODELS, PROMPT_TOKENS, RoundedCache, eager_tokens, greedy, prompts, served_model

import gqa
from gqa.cache.pool import BlockPool
from gqa.model import hf, mask

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
NEW_TOKENS = 12 if GPU else 3
FAMILIES = list(MODELS) if GPU else ["llama-gqa", "mistral-window", "gemma2-softcap-window", "gpt-oss-sinks-window"]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """The op runs the Triton kernels, which is what auto chooses on a GPU, and a step's masks are not read."""
    if not GPU:
        monkeypatch.setattr(hf, "attention", functools.partial(gqa.attention, impl="triton"))
        monkeypatch.setattr(mask, "_readable", lambda mask: mask.shape[2] > 1)


@functools.cache
def model_there(name, implementation="gqa"):
    model = copy.deepcopy(served_model(name, implementation)).to(DEVICE)
    if name.startswith("gpt-oss"):  # the default for experts is torch's grouped product, which is for bf16
        model.set_experts_implementation("eager")
    return model


def inputs_there(padded):
    return {name: x.to(DEVICE) for name, x in prompts(padded).items()}


def agrees(name, want, padded=True, **options):
    got = model_there(name).generate(**inputs_there(padded), max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    return torch.equal(got.cpu(), want[:, : PROMPT_TOKENS + NEW_TOKENS])


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_greedy_tokens(name, kind):
    cache = gqa.hf.GqaCache(config=MODELS[name], kind=kind)
    assert agrees(name, eager_tokens(name, True), past_key_values=cache)


def test_without_padding():
    assert agrees("mistral-window", eager_tokens("mistral-window", False), padded=False)


@pytest.mark.parametrize("cache", ["default", "static", "none"])
def test_with_the_caches_of_transformers(cache):
    options = {"default": {}, "static": {"cache_implementation": "static"}, "none": {"use_cache": False}}
    name = "gpt-oss-sinks-window"
    assert agrees(name, eager_tokens(name, True), **options[cache])


@pytest.mark.parametrize(("name", "kind"), [("llama-gqa", "paged"), ("mistral-window", "contiguous")])
def test_a_prompt_fed_in_chunks(name, kind):
    cache = gqa.hf.GqaCache(config=MODELS[name], kind=kind)
    assert agrees(name, eager_tokens(name, True), past_key_values=cache, prefill_chunk_size=4)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt-oss-sinks-window"])
def test_int8_is_the_model_with_rounded_keys_and_values(name):
    want = greedy(served_model(name, "eager"), prompts(), past_key_values=RoundedCache())
    blocks = BlockPool(0, grows=True, dtype=torch.int8)
    for cache in (gqa.hf.GqaCache(config=MODELS[name], kind="int8"), gqa.hf.GqaCache(kind="paged", pool=blocks)):
        assert agrees(name, want, past_key_values=cache)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt-oss-sinks-window"])
def test_the_same_gradients(name):
    inputs, gradients = inputs_there(padded=True), []
    for model in (model_there(name, "eager"), model_there(name)):
        model.zero_grad()
        logits = model(**inputs, use_cache=False).logits
        logits[inputs["attention_mask"].bool()].square().mean().backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    want, got = gradients
    torch.testing.assert_close(got, want, rtol=0, atol=float(want.abs().max()) * 1e-4)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("kind", ["contiguous", "int8"])
def test_a_step_in_a_cuda_graph(kind):
    model, token = model_there("llama-gqa"), torch.ones(2, 1, dtype=torch.int64, device=DEVICE)
    cache = gqa.hf.GqaCache(capacity=64, kind=kind)

    def step():
        return model(token, past_key_values=cache).logits

    with torch.no_grad():
        model(inputs_there(padded=False)["input_ids"], past_key_values=cache)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # compiles what is to be captured
            step()
        torch.cuda.current_stream().wait_stream(aside)
        cache.crop(-1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = step()
        for number in (5, 17):
            token.fill_(number)
            graph.replay()
            cache.crop(-1)
            torch.testing.assert_close(got, step(), rtol=0, atol=1e-5)
