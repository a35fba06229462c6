"""What a GqaCache of each kind does between a model's forwards; test_served_models.py has whole generations."""

import copy
import gc
import weakref

import pytest
import torch
from helpers.served import WINDOW, RoundedCache, eager_tokens, greedy, prompts, served_model

import gqa
from gqa.cache.pool import BlockPool
from gqa.errors import GqaError

KINDS = ("contiguous", "paged", "int8")
TOKEN = 2 * 2 * (12 + 12)  # layers, KV heads, D + Dv: numbers that one token of llama-gqa takes


def forward(model, ids, cache):
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}], ids=["greedy", "beams", "chunks"]
)
@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window", "gpt-oss-sinks-window"])
def test_int8_is_the_model_with_rounded_keys_and_values(name, options):
    model = served_model(name, "gqa")
    want = greedy(served_model(name, "eager"), prompts(), past_key_values=RoundedCache(), **options)
    blocks = BlockPool(0, grows=True, dtype=torch.int8)
    for cache in (
        gqa.hf.GqaCache(kind="int8"),
        gqa.hf.GqaCache(config=model.config, kind="int8"),
        gqa.hf.GqaCache(kind="paged", pool=blocks),
    ):
        assert torch.equal(greedy(model, prompts(), past_key_values=cache, **options), want)


@pytest.mark.parametrize("kind", KINDS)
def test_cropped_tokens_leave_no_trace(kind):
    model, ids = served_model("llama-gqa", "gqa"), prompts(padded=False)["input_ids"]
    cache, fresh = gqa.hf.GqaCache(kind=kind), gqa.hf.GqaCache(kind=kind)
    forward(model, ids, cache)
    cache.crop(-3)
    assert cache.get_seq_length() == 8
    forward(model, ids[:, 8:] + 1, cache)
    cache.crop(-3)
    forward(model, ids[:, :8], fresh)
    assert torch.equal(forward(model, ids[:, 8:], cache), forward(model, ids[:, 8:], fresh))
    assert cache.is_croppable


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_are_repeated_chosen_and_forgotten(kind):
    model, ids = served_model("llama-gqa", "gqa"), prompts(padded=False)["input_ids"]
    cache = gqa.hf.GqaCache(kind=kind)
    cache.batch_repeat_interleave(2)  # of nothing
    forward(model, ids[:, :9], cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3, 2]))
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    for step in (9, 10):
        got = forward(model, ids[[1, 0, 0], step : step + 1], cache)
        want = forward(model, ids[[1, 0, 0], : step + 1], gqa.hf.GqaCache(kind=kind))[:, -1:]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes_used == 0
    again, first = (forward(model, ids[[1, 0, 0]], one) for one in (cache, gqa.hf.GqaCache(kind=kind)))
    assert torch.equal(again, first)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_goes_its_own_way(kind):
    model, ids = served_model("llama-gqa", "gqa"), prompts(padded=False)["input_ids"]
    prompt = gqa.hf.GqaCache(kind=kind)
    forward(model, ids[:, :9], prompt)
    other = copy.deepcopy(prompt)
    forward(model, ids[:, 9:] + 1, other)
    fresh = gqa.hf.GqaCache(kind=kind)
    forward(model, ids[:, :9], fresh)
    assert torch.equal(forward(model, ids[:, 9:], prompt), forward(model, ids[:, 9:], fresh))


@pytest.mark.parametrize(
    ("kind", "used", "allocated"),
    [
        ("contiguous", 2 * 11 * TOKEN * 4, 2 * 40 * TOKEN * 4),
        ("paged", 2 * 16 * TOKEN * 4, 2 * 48 * TOKEN * 4),  # whole blocks
        ("int8", 2 * 11 * (TOKEN + 8 * 4), 2 * 40 * (TOKEN + 8 * 4)),  # two scales per layer and head
    ],
)
def test_weighs_what_arithmetic_says(kind, used, allocated):
    cache = gqa.hf.GqaCache(capacity=40, kind=kind)
    assert (cache.nbytes_used, cache.nbytes_allocated) == (0, 0)
    forward(served_model("llama-gqa", "gqa"), prompts()["input_ids"], cache)
    assert (cache.nbytes_used, cache.nbytes_allocated) == (used, allocated)


def test_windows_bound_what_int8_keeps_and_leave_paged_alone():
    model = served_model("gpt-oss-sinks-window", "gqa")  # of its two layers the first slides
    held = {}
    for kind in ("int8", "paged"):
        cache = gqa.hf.GqaCache(config=model.config, kind=kind)
        greedy(model, prompts(), past_key_values=cache)
        held[kind] = (cache.is_sliding, cache.nbytes_used)
    per_head = 12 + 12 + 8  # int8 D + Dv, two scales
    assert held["int8"] == ([True, False], 2 * (WINDOW + 22) * 2 * per_head)
    assert held["paged"] == ([False, False], 2 * 32 * TOKEN * 4)


@pytest.mark.parametrize("kind", ["paged", "int8"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_another_attention_is_told_what_to_do(implementation, kind):
    model = served_model("llama-gqa", implementation)
    with pytest.raises(GqaError, match='attn_implementation="gqa"'):
        greedy(model, prompts(), past_key_values=gqa.hf.GqaCache(kind=kind))


def test_requests_share_a_pool():
    """Two conversations in one pool, the second refused until the first makes room, and nothing lost by it."""
    model, inputs = served_model("llama-gqa", "gqa"), prompts(padded=False)
    pool = BlockPool(5)
    first, second = (gqa.hf.GqaCache(kind="paged", pool=pool) for _ in range(2))
    want = eager_tokens("llama-gqa", False)
    assert torch.equal(greedy(model, inputs, past_key_values=first), want)
    assert pool.free_blocks == 1
    with pytest.raises(GqaError, match="the pool of blocks is full"):
        greedy(model, inputs, past_key_values=second)
    last = want[:, -1:]
    with pytest.raises(GqaError, match="the pool of blocks is full"):  # 22 tokens are held, two blocks of each have 32
        forward(model, last.repeat(1, 11), first)
    after = forward(model, last, first)
    assert torch.equal(after, forward(model, last, copied(model, want[:, :-1])))
    assert pool.free_blocks == 1
    first.reset()
    assert torch.equal(greedy(model, inputs, past_key_values=second), want)


def copied(model, ids):
    """A cache of its own that holds these tokens, fed one by one behind the prompt, as generate() does."""
    cache = gqa.hf.GqaCache(kind="paged")
    for part in (ids[:, :11], *ids[:, 11:].split(1, dim=1)):
        forward(model, part, cache)
    return cache


@pytest.mark.parametrize("kind", KINDS)
def test_can_be_made_before_the_first_token(kind):
    model = served_model("llama-gqa", "gqa")
    cache = gqa.hf.GqaCache(config=model.config, kind=kind)
    cache.early_initialization(2, 2, 12, torch.float32, torch.device("cpu"))
    assert cache.is_initialized
    assert cache.get_seq_length() == 0
    got = forward(model, prompts()["input_ids"], cache)
    assert torch.equal(got, forward(model, prompts()["input_ids"], gqa.hf.GqaCache(kind=kind)))


def test_refusals():
    with pytest.raises(GqaError, match="unknown kind") as caught:
        gqa.hf.GqaCache(kind="ragged")  # type: ignore[arg-type]
    assert "contiguous, paged, int8" in str(caught.value)
    with pytest.raises(GqaError, match="has no pool"):
        gqa.hf.GqaCache(kind="int8", pool=BlockPool(1))
    with pytest.raises(GqaError, match="capacity"):
        gqa.hf.GqaCache(-1, kind="paged")
    cache = gqa.hf.GqaCache()
    forward(served_model("llama-gqa", "gqa"), prompts()["input_ids"], cache)
    with pytest.raises(GqaError, match="change together"):
        cache.layers[0].reset()
    with pytest.raises(GqaError, match="change together"):
        cache.layers[0].reorder_cache(torch.tensor([0]))  # type: ignore[arg-type]
    with pytest.raises(GqaError, match="stays on its device"):
        cache.layers[0].offload()


def test_paged_caches_join_and_only_those():
    model, ids = served_model("llama-gqa", "gqa"), prompts(padded=False)["input_ids"]
    pool = BlockPool(0, grows=True)
    whole, parts = gqa.hf.GqaCache(kind="paged", pool=pool), []
    for row, length in enumerate((9, 5)):
        one = gqa.hf.GqaCache(kind="paged", pool=pool)
        forward(model, ids[row : row + 1, :length], one)
        parts.append(copy.copy(one.lengths))
        whole.join(one)
        assert one.get_seq_length() == 0
    assert (parts, whole.lengths, whole.get_seq_length()) == ([[9], [5]], [9, 5], 9)
    twin = whole.fork()
    new = torch.stack([ids[0, 9:10], ids[1, 5:6]])
    for cache in (whole, twin):
        with torch.no_grad():
            got = model(new, past_key_values=cache, position_ids=torch.tensor([[9], [5]])).logits[:, -1]
        for row, length in enumerate((10, 6)):
            want = forward(model, ids[row : row + 1, :length], gqa.hf.GqaCache())[0, -1]
            torch.testing.assert_close(got[row], want, rtol=0, atol=1e-5 * float(want.abs().max()))
    for one in (gqa.hf.GqaCache(), gqa.hf.GqaCache(kind="int8")):
        with pytest.raises(GqaError, match="go together"):
            one.join(whole)
        with pytest.raises(GqaError, match="go together"):
            whole.join(one)


@pytest.mark.parametrize("told", [False, True], ids=["", "config"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_that_nobody_holds_gives_its_memory_back_at_once(kind, told):
    model, ids = served_model("llama-gqa", "gqa"), prompts(padded=False)["input_ids"]
    gc.disable()
    try:
        cache = gqa.hf.GqaCache(config=model.config if told else None, kind=kind)
        forward(model, ids, cache)
        store = weakref.ref(cache.store)
        del cache
        assert store() is None
    finally:
        gc.enable()
