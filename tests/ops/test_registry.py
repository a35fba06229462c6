"""The op as torch sees it: opcheck, fake tensors, torch.compile, autograd."""

import time

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gqa
from gqa.ops import registry, sdpa


def arguments(impl):
    random = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, h, t, 8, generator=random, dtype=torch.float64, requires_grad=True)
        for h, t in ((6, 5), (2, 7), (2, 7))
    )
    options = dict.fromkeys(registry._NAMES)
    options |= {"causal": True, "q_start": 2, "scale": 0.3, "impl": impl, "kv_lengths": torch.tensor([7, 3])}
    if impl == "reference":
        options |= {"sinks": torch.randn(6, generator=random, dtype=torch.float64), "softcap": 2.0}
    return (q, k, v, *options.values())


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_opcheck(impl):
    torch.library.opcheck(torch.ops.gqa.attention.default, arguments(impl))


def test_opcheck_with_lse():
    torch.library.opcheck(torch.ops.gqa.attention_with_lse.default, arguments("reference"))


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("T", [1, 6])
def test_compiles_into_one_graph_and_gives_the_same_gradients(impl, T):
    def attend(q, k, v):
        return gqa.attention(q, k, v, causal=True, window=4, impl=impl)

    leaves = [torch.randn(2, h, t, 8, dtype=torch.float64, requires_grad=True) for h, t in ((6, T), (2, 9), (2, 9))]
    want = attend(*leaves)
    got = torch.compile(attend, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(got, want)
    weights = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, leaves, weights), torch.autograd.grad(want, leaves, weights), strict=True):
        torch.testing.assert_close(a, b)


def test_fake_tensors_have_the_real_shapes():
    with FakeTensorMode():
        q, k, v = (
            torch.empty(2, 6, 5, 8).bfloat16(),
            torch.empty(2, 2, 7, 8).bfloat16(),
            torch.empty(2, 2, 7, 6).bfloat16(),
        )
        out, lse = gqa.attention(q, k, v, causal=True, return_lse=True)
    assert (out.shape, out.dtype) == ((2, 6, 5, 6), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 6, 5), torch.float32)


def test_overhead_of_a_small_decode_call():
    """Checks, choice and dispatch together stay small; the bound is loose, for a busy machine."""
    q, k, v = torch.randn(1, 8, 1, 64), torch.randn(1, 2, 16, 64), torch.randn(1, 2, 16, 64)
    options = dict.fromkeys(("q_starts", "window", "mask", "kv_lengths", "kv_starts"))

    def best_of(call, rounds=30, calls=50):
        best = float("inf")
        for _ in range(rounds):
            start = time.perf_counter()
            for _ in range(calls):
                call()
            best = min(best, (time.perf_counter() - start) / calls)
        return best

    with torch.inference_mode():
        whole = best_of(lambda: gqa.attention(q, k, v, causal=True))
        bare = best_of(lambda: sdpa.attention(q, k, v, causal=True, q_start=15, scale=0.125, **options))
    assert whole - bare < 30e-6
