"""torch's SDPA: as right as the loop, as precise as the plain computation, and K and V never repeated."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from ops.naive import assert_as_precise_as_plain, naive_attention
from ops.strategies import calls
from torch.profiler import ProfilerActivity, profile

import gqa
from gqa.errors import GqaError
from gqa.ops import sdpa


@settings(max_examples=80, deadline=None)
@given(calls(everything=False))
def test_equals_the_naive_loop(call):
    q, k, v, options = call
    out = gqa.attention(q, k, v, impl="sdpa", **options)
    torch.testing.assert_close(out, naive_attention(q, k, v, **options)[0], rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(calls(dtypes=(torch.float32, torch.bfloat16, torch.float16), everything=False))
def test_is_as_precise_as_the_plain_computation(call):
    q, k, v, options = call
    assert_as_precise_as_plain(gqa.attention(q, k, v, impl="sdpa", **options), q, k, v, **options)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 2, "causal": True}], ids=str)
def test_gradients_with_blind_rows(options):
    random = torch.Generator().manual_seed(3)
    leaves = [torch.randn(2, h, t, 5, generator=random, dtype=torch.float64) for h, t in ((6, 3), (2, 4), (2, 4))]
    mask = torch.tensor([True, False, True])[:, None]
    call = lambda q, k, v: gqa.attention(q, k, v, mask=mask, impl="sdpa", **options)  # noqa: E731
    assert torch.autograd.gradcheck(call, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("masked", [False, True])
def test_the_route_for_other_devices(masked):
    """One call per query of the group, which never asks torch for grouped heads; run here on the CPU."""
    random = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, h, 5, 8, generator=random, dtype=torch.float64) for h in (6, 2, 2))
    mask = torch.rand(2, 6, 5, 5, generator=random) > 0.4 if masked else None
    out = sdpa.per_query_of_group(q, k, v, mask, 0.3, is_causal=not masked)
    want, _ = naive_attention(q, k, v, mask=mask, scale=0.3, causal=not masked)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)


def _largest_allocation(run):
    """Bytes of the largest block that torch's allocator hands out during `run`, inside its kernels too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    profiler: Any = record.profiler
    return max(event.nbytes() for event in profiler.kineto_results.events() if event.name() == "[memory]")


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("T", "options"),
    [
        (1, {"causal": True}),
        (1, {"kv_lengths": torch.tensor([1000])}),
        (8, {}),
        (8, {"causal": True}),
        (8, {"causal": True, "q_start": 0}),
        (8, {"kv_starts": torch.tensor([3])}),
    ],
    ids=["decode", "decode ragged", "folded", "bottom-right", "top-left", "left padding"],
)
@pytest.mark.parametrize("impl", ["sdpa", "reference"])
def test_no_tensor_of_repeated_keys_or_values_exists(impl, T, options, backward):
    H, G, S, D = 2, 16, 1024, 64
    q, k, v = (
        torch.randn(1, t, h, D).transpose(1, 2).requires_grad_(backward) for h, t in ((H * G, T), (H, S), (H, S))
    )

    def run():
        out = gqa.attention(q, k, v, impl=impl, **options)
        if backward:
            out.sum().backward()

    run()
    # Enough for K's own gradient or the reference's scores; K at H*G heads would take 16 times K.
    scores = 4 * H * G * T * S if impl == "reference" else 0
    assert _largest_allocation(run) <= max(k.nbytes, scores) < G * k.nbytes


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"softcap": 2.0}, "softcap"),
        ({"sinks": torch.zeros(6)}, "sinks"),
        ({"return_lse": True}, "return_lse"),
        ({"mask": torch.zeros(3, 5, requires_grad=True)}, "mask that requires grad"),
    ],
)
def test_refuses_what_it_cannot_do_and_auto_goes_elsewhere(options, named):
    q, k, v = (torch.randn(2, h, t, 8, dtype=torch.float64) for h, t in ((6, 3), (2, 5), (2, 5)))
    with pytest.raises(GqaError, match=named):
        gqa.attention(q, k, v, impl="sdpa", **options)
    assert gqa.attention_impl(q, k, v, **options) == "reference"
    gqa.attention(q, k, v, **options)


def test_refuses_layouts_that_torch_would_repeat():
    q, k, v = torch.randn(2, 6, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    with pytest.raises(GqaError, match="head dim of v"):
        gqa.attention(q, k, v[..., :6], impl="sdpa")
    strided = k.transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(GqaError, match="last dimension"):
        gqa.attention(q, strided, v, impl="sdpa")
    out = gqa.attention(q, strided, v)
    torch.testing.assert_close(out, gqa.attention(q, k, v), rtol=1e-5, atol=1e-5)


def test_a_batch_with_one_blind_sequence_has_no_nan():
    q, k, v = (torch.randn(2, h, t, 8).bfloat16() for h, t in ((6, 4), (2, 9), (2, 9)))
    out = gqa.attention(q, k, v, kv_lengths=torch.tensor([0, 9]), causal=True, impl="sdpa")
    assert torch.all(out[0] == 0)
    assert torch.all(torch.isfinite(out[1]))
    mask = torch.full((4, 9), -math.inf)
    assert torch.all(gqa.attention(q, k, v, mask=mask, impl="sdpa") == 0)
