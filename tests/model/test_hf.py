"""What stands between transformers' models and the op."""

import pytest
import torch
from helpers.served import WINDOW, greedy, prompts, served_model
from transformers import JambaConfig
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, DynamicLayer

import gqa
from gqa.cache.stored import Stored
from gqa.errors import GqaError
from gqa.model import hf


def test_paged_keys_are_read_in_place_behind_a_mask():
    """The pool has room behind the last key, and a mask that ends with it is widened by False."""
    torch.manual_seed(0)
    query, pool = torch.randn(2, 4, 1, 8), torch.full((8, 2, 4, 8), torch.nan)
    table = torch.tensor([[5, 2, 7], [0, 3, -1]])
    lengths = torch.tensor([7, 6])
    keys = torch.randn(2, 2, 7, 8)
    for b in range(2):
        for s in range(int(lengths[b])):
            pool[table[b, s // 4], :, s % 4] = keys[b, :, s]
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    mask[0, ..., :2] = mask[1, ..., 6:] = False
    stored = Stored(pool, block_table=table, lengths=lengths)
    got, _ = hf.attention_forward(torch.nn.Module(), query, stored, stored, mask)
    want = gqa.attention(query, keys, keys, mask=mask, impl="reference").transpose(1, 2)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_the_cache_weighs_what_arithmetic_says():
    model, cache = served_model("llama-gqa", "gqa"), gqa.hf.GqaCache(capacity=16)
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


def test_sliding_layers_weigh_no_more_than_their_window():
    model = served_model("gpt-oss-sinks-window", "gqa")  # of its two layers the first slides
    cache = gqa.hf.GqaCache(config=model.config)
    assert cache.is_sliding == [True, False]
    greedy(model, prompts(), past_key_values=cache)
    tokens = 11 + 12 - 1
    assert cache.get_seq_length() == tokens
    assert cache.nbytes_used == 2 * (WINDOW + tokens) * 2 * (12 + 12) * 4  # batch, tokens, KV heads, D + Dv, bytes


def test_refuses_models_with_other_layers():
    with pytest.raises(GqaError, match="does not serve all layers"):
        gqa.hf.GqaCache(config=JambaConfig(num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1))


@pytest.mark.parametrize("cache", [None, "contiguous", "paged", "int8"])
def test_low_precision_under_autocast(cache):
    model, eager = served_model("llama-gqa", "gqa"), served_model("llama-gqa", "eager")
    options = {"past_key_values": gqa.hf.GqaCache(kind=cache)} if cache else {"use_cache": False}
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(**prompts(), **options).logits
        want = eager(**prompts(), use_cache=False).logits
    seen = prompts()["attention_mask"].bool()
    assert (logits - want)[seen].abs().max() < 0.05 * want.abs().max()


def test_nothing_of_transformers_own_changes():
    gqa.hf.register()
    gqa.hf.register()
    gqa.hf.GqaCache()
    assert DYNAMIC_LAYER_TYPE_MAPPING["full_attention"] is DynamicLayer


def test_refuses_what_the_op_has_not():
    module, x = torch.nn.Module(), torch.randn(1, 2, 3, 8)
    with pytest.raises(GqaError, match="dropout"):
        gqa.hf.attention_forward(module, x, x, x, None, dropout=0.1)
    with pytest.raises(GqaError, match="position_bias"):
        gqa.hf.attention_forward(module, x, x, x, None, position_bias=x)
    with pytest.raises(GqaError, match="cache"):
        gqa.hf.attention_forward(module, x, x, x, None, cache=object())
    with pytest.raises(GqaError, match="differentiated"):
        served_model("llama-gqa", "gqa")(**prompts(), past_key_values=gqa.hf.GqaCache())
