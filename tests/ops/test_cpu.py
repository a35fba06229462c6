"""The CPU kernels against the float64 oracle, over the whole signature. Fresh memory and unused memory are poisoned."""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim of q, k · Dv head dim of v

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from ops.core_calls import CORE, random_call
from ops.every_call import LAYOUTS, every_call, laid_out
from ops.extremes import EXTREMES, assert_finite_extremes
from ops.packed import assert_packed_precise, packed_call
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


@pytest.mark.parametrize("name", CORE)
def test_core(name):  # also run with other vector widths (test_machines)
    q, k, v, options = CORE[name]()
    check(q, k, v, **options)


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


@pytest.mark.parametrize("value", EXTREMES)
def test_masks_of_finite_extremes(value):
    assert_finite_extremes(value, impl="cpu")


@pytest.mark.parametrize("T", [1, 65])
def test_equal_keys_give_the_mean(T):
    q, k, v = random_call(T=T, S=600)
    out = gqa.attention(q, k[:, :, :1].expand_as(k), v, impl="cpu")
    mean = v.double().mean(dim=2, keepdim=True).repeat_interleave(3, dim=1).float().expand_as(out)
    torch.testing.assert_close(out, mean, rtol=0, atol=1e-6)


def test_packed():
    q, k, v, cu_q, cu_k = packed_call()
    out, lse = gqa.attention_packed(q, k, v, cu_q, cu_k, causal=True, window=9, return_lse=True, impl="cpu")
    assert_packed_precise(out, lse, q, k, v, cu_q, cu_k, causal=True, window=9)
