"""Gradients of the CPU kernels, in float32, bf16 and fp16, against the reference's float64 ones.

That the reference's are right is shown by gradcheck (test_reference).
"""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim of q, k · Dv head dim of v

import functools
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from ops.every_call import FLOATS, every_call
from ops.gradients import OPTIONS, check_gradients, gradients, random_call

import gqa
from gqa.errors import GqaError

pytestmark = [
    pytest.mark.skipif(find_spec("gqa.ops.cpu_backward") is None, reason="no backward in this release"),
    pytest.mark.usefixtures("fresh_memory_is_nan"),
]


check = functools.partial(check_gradients, impl="cpu")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(every_call(kinds=("fp32", "bf16", "fp16"), small=True))
def test_whole_signature(call):
    q, k, v, options = call
    check(q, k, v, **options)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", OPTIONS)
def test_core_options(options, dtype):
    check(*random_call(dtype=FLOATS[dtype]), **OPTIONS[options])


@pytest.mark.parametrize("T", [1, 63, 111])
@pytest.mark.parametrize(("H", "G"), [(3, 1), (1, 7), (1, 71)])
def test_core_sizes(H, G, T):
    check(*random_call(1, H, G, T, 111), causal=True)


@pytest.mark.parametrize(
    ("leaf", "value"),
    [
        ("sinks", torch.linspace(-2, 2, 6)),
        ("mask", torch.linspace(-2, 2, 9 * 65).view(9, 65)),
        ("k_scale", torch.linspace(0.5, 1.5, 260).view(2, 2, 65)),
        ("v_scale", torch.linspace(0.5, 1.5, 260).view(2, 2, 65)),
    ],
)
def test_other_gradients_are_right_or_refused(leaf, value):
    """A gradient that the kernels do not compute is an error that names it, never a silent zero."""
    q, k, v = random_call()
    options: dict[str, Any] = {leaf: value}
    if leaf.endswith("scale"):
        k, v = ((x * 20).to(torch.int8) for x in (k, v))
        options = {"k_scale": torch.ones(2, 2, 65), "v_scale": torch.ones(2, 2, 65)} | options
    options[leaf] = options[leaf].requires_grad_()
    refused = None
    try:
        out = gqa.attention(q, k, v, impl="cpu", **options)
    except GqaError as error:
        refused, out = error, torch.zeros(())
    if refused is not None:
        assert leaf in refused.what
        return
    (got,) = torch.autograd.grad(out.sum(), options[leaf])
    (want,) = torch.autograd.grad(gqa.attention(q, k, v, impl="reference", **options).sum(), options[leaf])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_gradients_are_summed_per_kv_head_and_only_where_asked_for():
    q, k, v = random_call()
    k.requires_grad_()
    out = gqa.attention(q, k, v, impl="cpu", causal=True)
    out.sum().backward()
    assert k.grad is not None
    assert k.grad.shape == k.shape
    assert q.grad is None
    assert v.grad is None


def test_strided_inputs_and_incoming_gradients():
    q, k, v = random_call(D=64, Dv=64)
    plain = gradients(q, k, v, {}, "cpu")
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    out = gqa.attention(*strided, impl="cpu")
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    weights = weights.transpose(1, 3).contiguous().transpose(1, 3)
    for got, want in zip(torch.autograd.grad(out, strided, weights), plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    expanded = torch.autograd.grad(gqa.attention(*strided, impl="cpu").sum(), strided)  # its gradient has strides of 0
    ones = torch.autograd.grad(gqa.attention(*strided, impl="cpu"), strided, torch.ones_like(out))
    for got, want in zip(expanded, ones, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_compiles_into_one_graph():
    def attend(q, k, v):
        return gqa.attention(q * 2, k, v, causal=True, window=5, impl="cpu")

    leaves = [x.requires_grad_() for x in random_call()]
    want = attend(*leaves)
    got = torch.compile(attend, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(out.sum(), leaves) for out in (got, want)), strict=True):
        torch.testing.assert_close(a, b)
