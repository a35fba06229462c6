"""The oracle against an independent loop."""

import math

import pytest
import torch
from hypothesis import given, settings
from ops.naive import naive_attention
from ops.strategies import calls

import gqa


@settings(max_examples=60, deadline=None)
@given(calls())
def test_equals_the_naive_loop(call):
    q, k, v, options = call
    out, lse = gqa.attention(q, k, v, return_lse=True, impl="reference", **options)
    want_out, want_lse = naive_attention(q, k, v, **options)
    torch.testing.assert_close(out, want_out, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_accumulates_in_float32(dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, t, 60).to(dtype) for h, t in ((6, 9), (2, 111), (2, 111)))
    out, lse = gqa.attention(q, k, v, return_lse=True, impl="reference")
    want, want_lse = naive_attention(q, k, v)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    rounding = torch.finfo(dtype).eps * float(v.abs().max())  # of the output alone, when all else is float32
    assert (out.double() - want).abs().max() <= rounding
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-6)


def test_query_head_n_reads_kv_head_n_over_g():
    H, G = 3, 5
    q, k = torch.randn(1, H * G, 1, 8), torch.randn(1, H, 4, 8)
    v = torch.arange(H).view(1, H, 1, 1).expand(1, H, 4, 8).float()  # a KV head's value is its number
    for impl in ("reference", "sdpa"):
        out = gqa.attention(q, k, v, impl=impl)
        read = out[0, :, 0, 0].round().int().tolist()
        assert read == [n // G for n in range(H * G)]


def test_a_row_without_a_visible_key_is_zero_with_lse_minus_infinity():
    q, k, v = torch.randn(1, 3, 2, 4), torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 4)
    mask = torch.tensor([[False] * 5, [True] * 5])
    out, lse = gqa.attention(q, k, v, mask=mask, return_lse=True)
    assert torch.all(out[:, :, 0] == 0)
    assert torch.all(lse[:, :, 0] == -math.inf)
    assert torch.all(torch.isfinite(lse[:, :, 1]))
    sinks = torch.tensor([0.5, 1.0, 2.0])
    out, lse = gqa.attention(q, k, v, mask=mask, sinks=sinks, return_lse=True)
    assert torch.all(out[:, :, 0] == 0)
    torch.testing.assert_close(lse[0, :, 0], sinks)


def test_what_lies_outside_lengths_and_starts_never_counts():
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 6, 3, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    lengths, starts = torch.tensor([9, 6]), torch.tensor([2, 0])
    want = gqa.attention(q, k, v, kv_lengths=lengths, kv_starts=starts, impl="reference")
    k[0, :, :2] = v[0, :, :2] = k[1, :, 6:] = v[1, :, 6:] = math.nan
    got = gqa.attention(q, k, v, kv_lengths=lengths, kv_starts=starts, impl="reference")
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("quantised", [False, True])
def test_paged_pools(quantised):
    random = torch.Generator().manual_seed(2)
    q = torch.randn(2, 6, 3, 8, generator=random, dtype=torch.float64)
    pool_k, pool_v = (torch.randn(7, 2, 4, d, generator=random, dtype=torch.float64) for d in (8, 6))
    options = {
        "block_table": torch.tensor([[5, 0, 3], [2, 6, -1]]),
        "kv_lengths": torch.tensor([11, 5]),
        "q_start": torch.tensor([8, 2]),
        "causal": True,
    }
    if quantised:
        options["k_scale"], options["v_scale"] = (
            torch.rand(7, 2, 4, generator=random, dtype=torch.float64) + 0.5 for _ in range(2)
        )
        pool_k, pool_v = ((pool * 2).round().to(torch.int8) for pool in (pool_k, pool_v))
    out, lse = gqa.attention(q, pool_k, pool_v, return_lse=True, **options)
    want, want_lse = naive_attention(q, pool_k, pool_v, **options)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients(masked):
    random = torch.Generator().manual_seed(3)

    def leaf(*size):
        return torch.randn(*size, generator=random, dtype=torch.float64).requires_grad_()

    q, k, v, mask, sinks = leaf(2, 6, 3, 5), leaf(2, 2, 4, 5), leaf(2, 2, 4, 3), leaf(2, 1, 3, 4), leaf(6)
    blind = torch.zeros(3, 4, dtype=torch.float64)
    blind[1] = -math.inf  # one row sees nothing

    def call(q, k, v, mask, sinks):
        return gqa.attention(
            q, k, v, causal=True, softcap=2.0, mask=mask + blind, sinks=None if masked else sinks, return_lse=not masked
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, (q, k, v, mask, sinks))
