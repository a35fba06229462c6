"""Streaming text from a model: the pieces, the figures, and the ways it ends."""

import copy
import itertools
import os

import pytest
import torch
from helpers.served import MODELS, served_model
from helpers.small import small_parent
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import gqa
from gqa.errors import GqaError
from gqa.model.generate import Sampling, _Stream, encode_prompt, generate, use_attention
from gqa.text import load_tokenizer

DRAWN = Sampling(temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    folder, _ = small_parent(tmp_path_factory.mktemp("parent"))
    gqa.hf.register()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="gqa").eval()
    return model, load_tokenizer(folder)


def test_pieces_come_one_by_one_and_make_the_text(parent):
    model, tokenizer = parent
    pieces = []
    result = generate(
        model, tokenizer, encode_prompt(tokenizer, "def f3(x):"), max_tokens=40, sampling=DRAWN, on_text=pieces.append
    )
    assert len(pieces) > 2
    assert "".join(pieces) == result.text
    assert (result.new_tokens, result.interrupted) == (40, False)
    assert result.seconds_to_first_token is not None
    assert result.tokens_per_second is not None
    assert min(result.seconds_to_first_token, result.tokens_per_second) > 0


def streamed(tokenizer, tokens):
    """The pieces of a text whose tokens come one by one behind a prompt."""
    pieces = []
    stream = _Stream(tokenizer, pieces.append)
    stream.put(torch.tensor([[5, 6]]))
    for token in tokens:
        stream.put(torch.tensor([token]))
    stream.end()
    return pieces


def test_characters_of_several_tokens_come_whole(parent):
    _, tokenizer = parent
    text = "né 日本 x"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(tokens) > len(text)  # bytes
    pieces = streamed(tokenizer, tokens)
    assert "".join(pieces) == text
    assert {"é", "日", "本"} < set(pieces)
    assert streamed(tokenizer, tokens[:-3])[-1] == "\N{REPLACEMENT CHARACTER}"  # cut amid a character


def test_a_tokenizer_that_writes_the_first_word_differently():
    class Words:
        """Like SentencePiece's: the space before a word is not written at the beginning."""

        def decode(self, tokens, skip_special_tokens):
            return " ".join(f"word{token}" for token in tokens)

    assert streamed(Words(), [1, 2, 3]) == ["word1", " word2", " word3"]


def test_greedy_is_what_transformers_says(parent):
    model, tokenizer = parent
    ids = encode_prompt(tokenizer, "def f3(x):")
    result = generate(model, tokenizer, ids, max_tokens=12)
    use_attention(model, "eager")
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    use_attention(model, "gqa")
    assert result.text == tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
    assert result.prompt_tokens == ids.shape[1]


def test_a_draw_is_repeated_by_its_seed_and_leaves_the_generator_alone(parent):
    model, tokenizer = parent
    ids = encode_prompt(tokenizer, "def f3(x):")
    torch.manual_seed(7)
    want = torch.rand(3)
    torch.manual_seed(7)
    texts = [
        generate(model, tokenizer, ids, max_tokens=12, sampling=sampling).text
        for sampling in (DRAWN, DRAWN, Sampling(temperature=1.0, seed=4))
    ]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.rand(3), want)


def test_a_narrow_draw_is_greedy(parent):
    """Only the likeliest token is within the first 1e-6 of probability."""
    model, tokenizer = parent
    ids = encode_prompt(tokenizer, "def f3(x):")
    narrow = generate(model, tokenizer, ids, max_tokens=12, sampling=Sampling(2.0, top_p=1e-6, seed=1))
    assert narrow.text == generate(model, tokenizer, ids, max_tokens=12).text


def test_caches(parent):
    model, tokenizer = parent
    ids = encode_prompt(tokenizer, "def f3(x):")
    tokens = ids.shape[1] + 12 - 1
    default, contiguous, paged, int8 = (
        generate(model, tokenizer, ids, max_tokens=12, cache=kind) for kind in (None, "contiguous", "paged", "int8")
    )
    assert default.text == contiguous.text == paged.text
    token = 2 * 2 * 4 * 8  # layers, K and V, KV heads, head dim
    assert default.kv_cache_bytes == contiguous.kv_cache_bytes == tokens * token * 4
    assert paged.kv_cache_bytes == -(-tokens // 16) * 16 * token * 4
    assert int8.kv_cache_bytes == tokens * 2 * 2 * 4 * (8 + 4)  # a byte each, and an fp32 scale per token and head
    use_attention(model, "sdpa")
    theirs = generate(model, tokenizer, ids, max_tokens=12)
    with pytest.raises(GqaError, match="int8 cache goes with attention gqa"):
        generate(model, tokenizer, ids, max_tokens=12, cache="int8")
    use_attention(model, "gqa")
    assert (theirs.text, theirs.kv_cache_bytes) == (default.text, default.kv_cache_bytes)


def test_memory_is_told_of_a_gpu_only(parent):
    model, tokenizer = parent
    assert generate(model, tokenizer, encode_prompt(tokenizer, "def f3(x):"), max_tokens=2).peak_memory_bytes is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(parent):
    model, tokenizer = parent
    ids = encode_prompt(tokenizer, "def f3(x):")
    want = generate(model, tokenizer, ids, max_tokens=12)
    there = copy.deepcopy(model).to("cuda")
    before = torch.cuda.get_rng_state()
    got = generate(there, tokenizer, ids, max_tokens=12)
    assert (got.text, got.kv_cache_bytes) == (want.text, want.kv_cache_bytes)
    assert got.peak_memory_bytes is not None
    assert got.peak_memory_bytes > sum(parameter.nbytes for parameter in there.parameters())
    first, second = (generate(there, tokenizer, ids, max_tokens=12, sampling=DRAWN).text for _ in range(2))
    assert first == second
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_ctrl_c_keeps_what_there_is(parent):
    model, tokenizer = parent
    ids = encode_prompt(tokenizer, "def f3(x):")
    whole = generate(model, tokenizer, ids, max_tokens=40, sampling=DRAWN)
    pieces, count = [], itertools.count(1)

    def interrupted_at_the_second(piece):
        pieces.append(piece)
        if next(count) == 2:
            raise KeyboardInterrupt

    result = generate(
        model, tokenizer, ids, max_tokens=40, sampling=DRAWN, cache="contiguous", on_text=interrupted_at_the_second
    )
    assert result.interrupted
    assert 1 < result.new_tokens < 40
    assert result.text == "".join(pieces)
    assert whole.text.startswith(result.text)
    token = 2 * 2 * 4 * 8 * 4  # layers, K and V, KV heads, head dim, bytes
    assert result.kv_cache_bytes == (ids.shape[1] + result.new_tokens - 1) * token


def test_an_end_token_ends_the_text(parent):
    model, tokenizer = parent
    ids = encode_prompt(tokenizer, "def f3(x):")
    before = model.generation_config.eos_token_id
    first = generate(model, tokenizer, ids, max_tokens=1)
    assert first.tokens_per_second is None
    model.generation_config.eos_token_id = tokenizer(first.text, add_special_tokens=False)["input_ids"][0]
    result = generate(model, tokenizer, ids, max_tokens=12)
    model.generation_config.eos_token_id = before
    assert result.new_tokens == 1


def test_chat(parent):
    _, tokenizer = parent
    with pytest.raises(GqaError, match="no chat template"):
        encode_prompt(tokenizer, "hello", chat=True)
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<me>{% endif %}"
    )
    tokenizer.chat_template = template
    try:
        ids = encode_prompt(tokenizer, "hello", chat=True)
        tokenizer.chat_template = "{{ raise_exception('no such turn') }}"
        with pytest.raises(GqaError, match="no such turn"):
            encode_prompt(tokenizer, "hello", chat=True)
    finally:
        tokenizer.chat_template = None
    assert ids.shape[0] == 1
    assert tokenizer.decode(ids[0]) == "<user>hello<me>"


def test_mistakes(parent):
    model, tokenizer = parent
    with pytest.raises(GqaError, match="no tokens"):
        encode_prompt(tokenizer, "")
    with pytest.raises(GqaError, match="not text"):
        encode_prompt(tokenizer, os.fsdecode(b"a\xffb"))
    with pytest.raises(GqaError, match="not positive"):
        generate(model, tokenizer, torch.ones(1, 2, dtype=torch.int64), max_tokens=0)
    with pytest.raises(GqaError, match="does not generate"):
        generate(model.model, tokenizer, torch.ones(1, 2, dtype=torch.int64), max_tokens=1)
    for values in ((-1.0,), (float("nan"),), (float("inf"),)):
        with pytest.raises(GqaError, match="temperature"):
            Sampling(*values)
    for top_p in (0.0, 1.1, float("nan")):
        with pytest.raises(GqaError, match="top-p is not"):
            Sampling(1.0, top_p)
    with pytest.raises(GqaError, match="does not sample"):
        Sampling(0.0, 0.5)


def test_attention_that_a_model_cannot_run():
    model = served_model("llama-gqa", "gqa")
    with pytest.raises(GqaError, match="cannot run the attention"):
        use_attention(model, "no-such-attention")
    assert model.config._attn_implementation == "gqa"
    assert set(MODELS) > {"llama-gqa"}
    use_attention(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=9)), "gqa")
