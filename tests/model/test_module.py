"""Our attention layer against transformers' Llama attention with the same weights."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

import gqa
from gqa.cache.contiguous import ContiguousCache
from gqa.cache.int8 import Int8Cache
from gqa.cache.paged import PagedCache
from gqa.errors import GqaError


def layers(kv_heads, *, bias=False, dtype=torch.float64, theta=5000.0):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=42,
        num_attention_heads=6,
        num_key_value_heads=kv_heads,
        head_dim=10,
        attention_bias=bias,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    config._attn_implementation = "eager"
    llama = LlamaAttention(config, layer_idx=0).to(dtype)
    ours = gqa.GroupedQueryAttention(42, 6, kv_heads, 10, bias=bias, rope_theta=theta).to(dtype)
    ours.load_state_dict(llama.state_dict())
    return llama, LlamaRotaryEmbedding(config), ours


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
def test_equals_llama_attention(kv_heads, bias):
    llama, rotary, ours = layers(kv_heads, bias=bias)
    T = 11
    x = torch.randn(2, T, 42, dtype=torch.float64)
    causal = torch.full((T, T), -torch.inf, dtype=torch.float64).triu(1)
    want, _ = llama(x, position_embeddings=rotary(x, torch.arange(T)[None]), attention_mask=causal[None, None])
    torch.testing.assert_close(ours(x), want, rtol=0, atol=5e-7)  # eager takes its softmax in float32


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(
    ("kind", "tolerance"),
    # A row of keys or values is off by at most 1/254 of its largest number in int8, and outputs average over rows.
    [(ContiguousCache, 1e-12), (PagedCache, 1e-12), (Int8Cache, 0.02)],
)
def test_decoding_with_a_cache_equals_the_full_forward(kind, tolerance, window):
    torch.manual_seed(0)
    module = gqa.GroupedQueryAttention(42, 6, 2, 10, window=window).double()
    x = torch.randn(2, 19, 42, dtype=torch.float64)
    with torch.no_grad():
        want = module(x)
        cache = kind()
        steps = [x[:, :5], x[:, 5:8], *x[:, 8:].split(1, dim=1)]
        got = torch.cat([module(step, cache=cache) for step in steps], dim=1)
    assert cache.length == 19
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * float(want.abs().max()))


@pytest.mark.parametrize("kind", [ContiguousCache, PagedCache])
def test_a_mask_over_what_a_cache_holds(kind):
    torch.manual_seed(0)
    module = gqa.GroupedQueryAttention(24, 6, 2).double()
    x = torch.randn(2, 6, 24, dtype=torch.float64)
    mask = torch.arange(6) > 1
    with torch.no_grad():
        cache = kind()
        module(x[:, :4], cache=cache)
        for one in (mask, mask.expand(2, 1, 2, 6), torch.zeros(6, dtype=torch.float64).masked_fill(~mask, -torch.inf)):
            torch.testing.assert_close(module(x[:, 4:], cache=cache, mask=one), module(x, mask=mask)[:, 4:])
            cache.crop(4)
        torch.testing.assert_close(module(x[:, 4:], cache=cache, mask=torch.ones(1, 1)), module(x)[:, 4:])


def test_without_positions_and_without_causality_the_order_of_keys_does_not_matter():
    torch.manual_seed(0)
    module = gqa.GroupedQueryAttention(24, 6, 2, rope_theta=None, causal=False).double()
    x = torch.randn(1, 7, 24, dtype=torch.float64)
    order = torch.randperm(7)
    torch.testing.assert_close(module(x)[:, order], module(x[:, order]))


def test_mask_hides_keys():
    torch.manual_seed(0)
    module = gqa.GroupedQueryAttention(24, 6, 2).double()
    x, y = torch.randn(2, 1, 6, 24, dtype=torch.float64).unbind(0)
    y[:, 1:] = x[:, 1:]  # they differ in the first token, which the mask hides
    mask = torch.arange(6) > 0
    torch.testing.assert_close(module(x, mask=mask)[:, 1:], module(y, mask=mask)[:, 1:])


def test_trains():
    module = gqa.GroupedQueryAttention(24, 6, 2)
    module(torch.randn(2, 5, 24)).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in module.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((32, 6, 4, 8), "4 KV heads do not divide 6 query heads"),
        ((32, 6, 2), "do not divide a hidden size"),
        ((32, 8, 0), "kv_heads must be positive"),
        ((30, 6, 2, 5), "rotary"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(GqaError, match=message):
        gqa.GroupedQueryAttention(*arguments)
