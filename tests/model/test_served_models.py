"""transformers' models with attn_implementation="gqa": the same greedy tokens as their own eager attention."""

import functools

import pytest
import torch
from helpers.served import MODELS, PROMPT_TOKENS, eager_tokens, greedy, prompts, served_model
from transformers import CompileConfig, DynamicCache

import gqa
from gqa.model import hf

# "sdpa" does not serve softcap, sinks and stored keys: test_sdpa.py. "triton" is in test_triton_models.py.
SERVING = ("reference", "cpu")

CACHES = {
    "default": lambda config: {},
    "dynamic": lambda config: {"past_key_values": DynamicCache()},
    "dynamic-windows": lambda config: {"past_key_values": DynamicCache(config=config)},
    "static": lambda config: {"cache_implementation": "static"},
    "none": lambda config: {"use_cache": False},
    "contiguous": lambda config: {"past_key_values": gqa.hf.GqaCache()},
    "paged": lambda config: {"past_key_values": gqa.hf.GqaCache(kind="paged")},
    "paged-config": lambda config: {"past_key_values": gqa.hf.GqaCache(capacity=64, config=config, kind="paged")},
}


@pytest.fixture(params=SERVING)
def impl(request, monkeypatch):
    """The op runs this implementation, by name: one that is named never falls back to another."""
    monkeypatch.setattr(hf, "attention", functools.partial(gqa.attention, impl=request.param))
    return request.param


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models are so small that a second thread only costs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("padded", [False, True], ids=["even", "left-padded"])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_greedy_tokens_with_every_cache(name, padded, impl):
    model = served_model(name, "gqa")
    for cache, options in CACHES.items():
        assert torch.equal(greedy(model, prompts(padded), **options(model.config)), eager_tokens(name, padded)), cache


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window", "gpt-oss-sinks-window"])
def test_auto_runs_the_kernels(name, monkeypatch):
    """What the fixture above names is what a user gets who names nothing."""
    ran = set()

    def spy(*args, **options):
        ran.add(gqa.attention_impl(*args, **options))
        return gqa.attention(*args, **options)

    monkeypatch.setattr(hf, "attention", spy)
    assert torch.equal(greedy(served_model(name, "gqa"), prompts()), eager_tokens(name, True))
    assert ran == {"cpu"}


@pytest.mark.parametrize("name", MODELS)
def test_the_same_logits(name, impl):
    inputs = prompts()
    with torch.no_grad():
        want, got = (served_model(name, kind)(**inputs, use_cache=False).logits for kind in ("eager", "gqa"))
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[seen], want[seen], rtol=0, atol=float(want.abs().max()) * 1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_same_gradients(name):
    inputs = prompts()
    gradients = []
    for implementation in ("eager", "gqa"):
        model = served_model(name, implementation)
        model.zero_grad()
        logits = model(**inputs, use_cache=False).logits
        logits[inputs["attention_mask"].bool()].square().mean().backward()
        attention = model.model.layers[0].self_attn
        gradients.append((attention.qkv_proj if name == "phi3-fused" else attention.k_proj).weight.grad)
    want, got = gradients
    torch.testing.assert_close(got, want, rtol=0, atol=float(want.abs().max()) * 1e-4)


@pytest.mark.parametrize("cache", ["default", "contiguous", "paged"])
@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window", "gpt-oss-sinks-window"])
def test_a_prompt_fed_in_chunks(name, cache, impl):
    """Chunks after the first see the cache and one another: causal from a later position."""
    model = served_model(name, "gqa")
    got = greedy(model, prompts(), prefill_chunk_size=4, **CACHES[cache](model.config))
    assert torch.equal(got, eager_tokens(name, True))


@pytest.mark.parametrize("cache", ["default", "contiguous", "paged"])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt-oss-sinks-window"])
def test_beam_search(name, cache, impl):
    options = {"num_beams": 3, "num_return_sequences": 2}
    want = greedy(served_model(name, "eager"), prompts(), **options)
    model = served_model(name, "gqa")
    assert torch.equal(greedy(model, prompts(), **options, **CACHES[cache](model.config)), want)


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window"])
def test_packed_position_ids_keep_sequences_apart(name, impl):
    ids = prompts(padded=False)["input_ids"][:1]
    positions = torch.cat([torch.arange(4), torch.arange(7)])[None]
    with torch.no_grad():
        model = served_model(name, "gqa")
        packed = model(ids, position_ids=positions, use_cache=False).logits
        apart = torch.cat([model(part, use_cache=False).logits for part in (ids[:, :4], ids[:, 4:])], dim=1)
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt-oss-sinks-window"])
def test_a_static_cache_compiled(name):
    """As generate() does by itself on a GPU; as one graph, so that nothing in it waits for a value."""
    compiled = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)  # type: ignore[arg-type]
    compiled._compile_all_devices = True  # type: ignore[assignment]
    got = greedy(served_model(name, "gqa"), prompts(), cache_implementation="static", compile_config=compiled)
    assert torch.equal(got, eager_tokens(name, True))


@pytest.mark.parametrize("cache", ["contiguous", "paged"])
def test_a_conversation_goes_on_with_the_same_cache(cache, impl):
    model = served_model("llama-gqa", "gqa")
    ids = prompts(padded=False)["input_ids"]
    held = CACHES[cache](model.config)
    first = greedy(model, {"input_ids": ids}, **held)
    assert held["past_key_values"].get_seq_length() == first.shape[1] - 1
    longer = torch.cat([first, ids], dim=1)
    want = greedy(served_model("llama-gqa", "eager"), {"input_ids": longer})
    assert torch.equal(greedy(model, {"input_ids": longer}, **held), want)


@pytest.mark.parametrize("name", MODELS)
def test_an_int8_cache_agrees(name, impl):
    """Fed the tokens that eager chose: logits were off by at most 2.7 % of the largest, and one choice in 216 was
    another; with weights this large, rounding shows far more than in a trained model."""
    tokens = eager_tokens(name, False)
    cache = gqa.hf.GqaCache(config=MODELS[name], kind="int8")
    with torch.no_grad():
        want = served_model(name, "eager")(tokens, use_cache=False).logits[:, PROMPT_TOKENS - 1 : -1]
        parts = [tokens[:, :PROMPT_TOKENS], *tokens[:, PROMPT_TOKENS:-1].split(1, dim=1)]
        model = served_model(name, "gqa")
        got = torch.cat([model(part, past_key_values=cache).logits[:, -1:] for part in parts], dim=1)
    assert (got - want).abs().max() < 0.04 * want.abs().max()
    assert (got.argmax(-1) == want.argmax(-1)).float().mean() >= 0.95


@pytest.mark.parametrize("name", ["llama-gqa", "llama-mha", "mistral-window"])
def test_assisted_generation_takes_tokens_back(name, impl):
    """Prompt lookup proposes tokens that the model then accepts or not; behind a window the default is not ours."""
    ids = prompts(padded=False)["input_ids"][:1].repeat(1, 2)  # a prompt that has something to look up
    want = greedy(served_model(name, "eager"), {"input_ids": ids})
    assert torch.equal(greedy(served_model(name, "gqa"), {"input_ids": ids}, prompt_lookup_num_tokens=3), want)
