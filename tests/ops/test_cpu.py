"""The CPU kernels against the float64 oracle, over the whole signature. Fresh memory and unused memory are poisoned."""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim of q, k · Dv head dim of v

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from ops.every_call import FLOATS, LAYOUTS, every_call, laid_out, paged, quantised
from ops.precision import assert_precise

import gqa
from gqa.ops.api import IMPLEMENTATIONS

pytestmark = [
    pytest.mark.skipif("cpu" not in IMPLEMENTATIONS, reason="no CPU kernels in this release"),
    pytest.mark.usefixtures("fresh_memory_is_nan"),
]


def check(q, k, v, **options):
    out, lse = gqa.attention(q, k, v, return_lse=True, impl="cpu", **options)
    assert_precise(out, lse, q, k, v, **options)
    alone = gqa.attention(q, k, v, impl="cpu", **options)
    assert torch.equal(out, alone), "the output depends on whether the lse is asked for"


def random_call(B=1, H=2, G=3, T=1, S=65, D=64, Dv=None, dtype=torch.float32):
    random = torch.Generator().manual_seed(B + 2 * H + 3 * G + 5 * T + 7 * S + 11 * D)
    sizes = ((B, H * G, T, D), (B, H, S, D), (B, H, S, Dv or D))
    return [torch.randn(*size, generator=random).to(dtype) for size in sizes]


# Core: a row per idea, also run with other vector widths (test_machines).


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("T", [1, 2, 63, 111])
@pytest.mark.parametrize(("H", "G", "D", "Dv"), [(2, 1, 64, 64), (1, 3, 60, 100), (2, 5, 1, 60), (1, 12, 128, 256)])
def test_core_sizes(H, G, D, Dv, T, dtype):
    for S in (1, 63, 111):
        check(*random_call(2, H, G, T, S, D, Dv, FLOATS[dtype]), causal=True)


@pytest.mark.parametrize("G", [1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 71])
def test_core_groups(G):
    check(*random_call(G=G, S=130, D=60))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("T", [1, 9])
def test_core_int8(T, dtype):
    q, k, v = random_call(2, 2, 3, T, 111, 100, 60)
    (k, k_scale), (v, v_scale) = quantised(k), quantised(v)
    check(q.to(FLOATS[dtype]), k, v, k_scale=k_scale, v_scale=v_scale, causal=True)


OPTIONS = {
    "window": {"window": 5},
    "causal window": {"window": 5, "causal": True},
    "top-left": {"causal": True, "q_start": 0},
    "before the keys": {"causal": True, "q_start": -2},
    "starts": {"causal": True, "q_start": torch.tensor([40, 90])},
    "softcap": {"softcap": 1.5},
    "softcap and scale": {"softcap": 30.0, "scale": 3.0},
    "sinks": {"sinks": torch.linspace(-3, 3, 6)},
    "lengths": {"kv_lengths": torch.tensor([0, 64])},
    "lengths and starts": {"kv_lengths": torch.tensor([111, 65]).int(), "kv_starts": torch.tensor([64, 64])},
    "bool mask": {"mask": torch.arange(111) % 3 > 0},
    "float mask": {"mask": torch.linspace(-4, 4, 111).masked_fill(torch.arange(111) < 70, -math.inf)},
    "mask of heads": {"mask": torch.arange(12).view(2, 6, 1, 1) % 4 > 0},
}


@pytest.mark.parametrize("T", [1, 65])
@pytest.mark.parametrize("options", OPTIONS)
def test_core_options(options, T):
    check(*random_call(2, T=T, S=111), **OPTIONS[options])


@pytest.mark.parametrize("block", [1, 5, 16, 128])
@pytest.mark.parametrize("T", [1, 9])
def test_core_pages(T, block):
    q, k, v = random_call(2, T=T, S=111)
    lengths, most = torch.tensor([111, 17]), -(-111 // block)
    table = torch.arange(2 * most).flip(0).view(2, most)
    table = table.masked_fill(torch.arange(most) * block >= lengths[:, None], -1)
    k, v = (paged(x, table, 2 * most + 1, block) for x in (k, v))
    check(q, k, v, block_table=table, kv_lengths=lengths, q_start=lengths - T, causal=True)


# The whole signature


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(every_call())
def test_whole_signature(call):
    q, k, v, options = call
    check(q, k, v, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_any_layout_gives_the_same_bits(which, layout):
    tensors = random_call(2, T=9)
    want = gqa.attention(*tensors, impl="cpu", causal=True)
    tensors[which] = laid_out(tensors[which], layout)
    assert torch.equal(gqa.attention(*tensors, impl="cpu", causal=True), want)


# Extremes


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("T", [1, 9])
def test_scores_of_ten_thousand(T, dtype):
    q, k, v = random_call(2, T=T, dtype=FLOATS[dtype])
    check(q * 100, k * 100, v)


@pytest.mark.parametrize("value", [-1e30, 1e30])
def test_masks_of_finite_extremes(value):
    """As transformers' masks are: finite, and far beyond any score. A row of nothing else is the mean of its values."""
    mask = torch.zeros(9, 65)
    mask[:, 30:] = value
    mask[4] = value
    q, k, v = random_call(T=9)
    out = gqa.attention(q, k, v, mask=mask, impl="cpu")
    seen = slice(0, 30) if value < 0 else slice(30, None)
    want = gqa.attention(q, k[:, :, seen], v[:, :, seen], impl="reference")
    rows = [t for t in range(9) if t != 4]
    if value < 0:  # a score added to 1e30 is lost
        torch.testing.assert_close(out[:, :, rows], want[:, :, rows], rtol=1e-5, atol=1e-5)
    mean = v.mean(dim=2, keepdim=True).repeat_interleave(3, dim=1)
    torch.testing.assert_close(out[:, :, 4:5], mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("T", [1, 65])
def test_equal_keys_give_the_mean(T):
    q, k, v = random_call(T=T, S=600)
    out = gqa.attention(q, k[:, :, :1].expand_as(k), v, impl="cpu")
    mean = v.double().mean(dim=2, keepdim=True).repeat_interleave(3, dim=1).float().expand_as(out)
    torch.testing.assert_close(out, mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
def test_few_heads_and_many_keys(dtype):
    check(*random_call(1, 1, 1, 1, 5000, dtype=FLOATS[dtype]))
    check(*random_call(1, 1, 7, 1, 5000, dtype=FLOATS[dtype]), window=2000, causal=True, sinks=torch.ones(7))


def test_extremely_uneven_lengths():
    q, k, v = random_call(3, T=2, S=5000)
    lengths = torch.tensor([5000, 1, 0])
    k[1, :, 1:] = v[1, :, 1:] = k[2] = v[2] = math.nan
    check(q, k, v, kv_lengths=lengths)
    check(q, k, v, kv_lengths=lengths, q_start=lengths - 2, causal=True)


def test_most_splits_see_nothing():
    q, k, v = random_call(1, 1, 2, 1, 5000)
    check(q, k, v, mask=torch.arange(5000) == 4321)
    check(q, k, v, mask=torch.zeros(5000, dtype=torch.bool))
    check(q, k, v, kv_starts=torch.tensor([4990]), sinks=torch.tensor([-50.0, 50.0]))


def test_packed():
    random = torch.Generator().manual_seed(0)
    q_lengths, k_lengths = [1, 0, 65, 3], [63, 2, 111, 0]
    q = torch.randn(sum(q_lengths), 6, 60, generator=random)
    k, v = (torch.randn(sum(k_lengths), 2, d, generator=random) for d in (60, 100))
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0) for lengths in (q_lengths, k_lengths))
    out, lse = gqa.attention_packed(q, k, v, cu_q, cu_k, causal=True, window=9, return_lse=True, impl="cpu")
    for i in (0, 2, 3):
        rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        if k_lengths[i] == 0:
            assert torch.all(out[rows] == 0)
            assert torch.all(lse[rows] == -math.inf)
            continue
        one = [x[None].transpose(1, 2) for x in (q[rows], k[keys], v[keys])]
        assert_precise(
            out[rows][None].transpose(1, 2), lse[rows].T[None], *one, causal=True, window=9
        )  # fmt: skip
