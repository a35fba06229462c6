"""Sequences that come and go in one batch say what each says alone, and leave nothing behind."""

import copy

import pytest
import torch
from helpers.served import served_model

import gqa
from gqa.cache.pool import BlockPool
from gqa.errors import GqaError
from gqa.model.serve import Batch, Sequence, forward

VOCABULARY = 97


def prompt(length, seed):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (length,), generator=random).tolist()


def alone(name, sequence):
    """Greedy tokens by transformers' eager attention and no cache: the whole text again for every token."""
    model, ids = copy.deepcopy(served_model(name, "eager")).double(), list(sequence.prompt)
    for _ in range(sequence.most):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(sequence.prompt) :]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.inference_mode():
        yield


def poisoned(pool, model):
    """The pool with all its blocks full of NaN: nobody may read what nobody wrote."""
    cache = gqa.hf.GqaCache(kind="paged", pool=pool)
    forward(model, cache, [[1]])
    for layer in cache.blocks:
        for stored in layer.stored():
            (stored.data if stored.scale is None else stored.scale).fill_(torch.nan)
    cache.reset()
    return pool


@pytest.mark.parametrize("block", [1, 5, 16])
@pytest.mark.parametrize("name", ["llama-gqa", "llama-mqa", "qwen2-bias", "phi3-fused"])
def test_every_text_is_what_it_is_alone(name, block):
    model = served_model(name, "gqa")
    pool = poisoned(BlockPool(-(-70 // block), block=block), model)
    batch = Batch(model, pool)
    waiting = [Sequence(prompt(length, length), most) for length, most in ((1, 9), (20, 2), (17, 1), (16, 12), (33, 6))]
    finished = []
    while waiting or batch.running:
        while waiting and batch.has_room(waiting[0]):
            sequence = waiting.pop(0)
            if not batch.admit(sequence):
                finished.append(sequence)
        finished += batch.step()
    assert len(finished) == 5
    for sequence in finished:
        assert sequence.tokens == alone(name, sequence)
    assert pool.free_blocks == pool.num_blocks
    assert pool.sequences == []


def test_a_text_may_begin_with_another_that_runs():
    model = served_model("llama-gqa", "gqa")
    pool = poisoned(BlockPool(12, block=4), model)
    batch = Batch(model, pool)
    first, other = Sequence(prompt(6, 0), 8), Sequence(prompt(3, 1), 9)
    batch.admit(first)
    batch.admit(other)
    batch.step()
    begun = first.prompt + first.tokens[:-1]
    assert len(begun) == 7
    before = pool.free_blocks
    child = Sequence([*begun, 5, 6], 4)
    batch.admit(child, like=0)
    assert before - pool.free_blocks == 2  # a copy of the second block, which is not full, and a third
    with pytest.raises(GqaError, match="does not begin with"):
        batch.admit(Sequence(begun, 1), like=0)
    with pytest.raises(GqaError, match="does not begin with"):
        batch.admit(Sequence([*begun, 5], 1), like=1)
    while batch.running:
        batch.step()
    for sequence in (first, other, child):
        assert sequence.tokens == alone("llama-gqa", sequence)
    assert pool.free_blocks == 12


def test_a_token_that_ends_a_text():
    model = served_model("llama-gqa", "gqa")
    whole = Sequence(prompt(6, 0), 8)
    pool = BlockPool(12, block=4)
    batch = Batch(model, pool)
    batch.admit(whole)
    while batch.running:
        batch.step()
    end = whole.tokens[3]
    cut = Batch(model, pool, ends=[end])
    again = Sequence(whole.prompt, 8)
    cut.admit(again)
    while cut.running:
        cut.step()
    assert again.tokens == whole.tokens[: whole.tokens.index(end) + 1]
    assert pool.free_blocks == 12


def test_what_has_no_room_is_refused_and_changes_nothing():
    model = served_model("llama-gqa", "gqa")
    pool = BlockPool(4, block=4)
    batch = Batch(model, pool)
    batch.admit(Sequence(prompt(5, 0), 4))  # 8 tokens are stored: promised two blocks
    assert (batch.blocks_promised, pool.free_blocks) == (2, 2)
    large = Sequence(prompt(5, 1), 5)
    assert not batch.has_room(large)
    with pytest.raises(GqaError, match="no room"):
        batch.admit(large)
    assert (large.tokens, pool.free_blocks) == ([], 2)
    for bad in (Sequence([], 1), Sequence([1], 0)):
        with pytest.raises(GqaError, match="begins with a prompt"):
            batch.admit(bad)


def test_a_forward_that_fails_gives_its_blocks_back(monkeypatch):
    model = served_model("llama-gqa", "gqa")
    pool = BlockPool(4, block=4)
    batch = Batch(model, pool)
    with pytest.raises(IndexError):
        batch.admit(Sequence([VOCABULARY + 1], 4))
    assert pool.free_blocks == 4
    assert batch.running == []


def test_a_window_shorter_than_the_texts_is_refused_not_misread():
    model = served_model("mistral-window", "gqa")
    batch = Batch(model, BlockPool(20, block=4))
    batch.admit(Sequence(prompt(9, 0), 4))
    batch.admit(Sequence(prompt(3, 1), 4))
    with pytest.raises(GqaError, match="take no mask"):
        batch.step()
