"""Gradients of the CPU kernels, in float32, bf16 and fp16, against the reference's float64 ones.

That the reference's are right is shown by gradcheck (test_reference).
"""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim of q, k · Dv head dim of v

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from ops.every_call import FLOATS, every_call
from ops.precision import in_float64, largest_score, oracle

import gqa
from gqa.errors import GqaError

pytestmark = [
    pytest.mark.skipif(find_spec("gqa.ops.cpu_backward") is None, reason="no backward in this release"),
    pytest.mark.usefixtures("fresh_memory_is_nan"),
]


def random_call(B=2, H=2, G=3, T=9, S=65, D=60, Dv=100, dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    sizes = ((B, H * G, T, D), (B, H, S, D), (B, H, S, Dv))
    return [torch.randn(*size, generator=random).to(dtype) for size in sizes]


def incoming(output, seed):
    """Weights of an output's elements, the same numbers in every dtype."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(output.shape, generator=random).bfloat16().to(output.dtype)


def gradients(q, k, v, options, impl, *, leaves=(), with_lse=False):
    """Of a weighted sum of out, and of lse where asked for, in q, k, v and the options named by `leaves`."""
    options = dict(options)
    tensors = [x.detach().requires_grad_() for x in (q, k, v)]
    for name in leaves:
        options[name] = options[name].detach().requires_grad_()
        tensors.append(options[name])
    outputs = gqa.attention(*tensors[:3], impl=impl, return_lse=with_lse, **options)
    total = torch.zeros((), dtype=torch.float64)
    for seed, output in enumerate(outputs if with_lse else (outputs,)):
        seen = output.detach() > -torch.inf  # an lse of -inf is no function of anything
        total = total + (output.masked_fill(~seen, 0) * incoming(output, seed)).sum().double()
    return torch.autograd.grad(total, tensors)


def roundings(q, k, v, options):
    """By name: what float32 sums and an `out` stored in q's dtype may cost each gradient, however its terms cancel.

    dS = p (dP - delta) with dP = dO V and delta = out dO; then dQ = scale dS K, dK = scale dS^T Q, dV = p^T dO. A
    score's rounding moves p by as much relatively; roundings of many rows are independent and grow as their root.
    """
    out, _ = oracle(q, k, v, **options)
    weights = incoming(out, 0)
    largest_q, largest_k, largest_v = (float(x.double().nan_to_num(0).abs().max()) for x in (q, k, v))
    scale = options.get("scale") or q.shape[3] ** -0.5
    of_scores = 4 * torch.finfo(torch.float32).eps * (1 + largest_score(q, k, options))
    norm = float(weights.norm(dim=-1).max())
    ds = of_scores * (norm * largest_v + 1)  # 1: as much again where lse has a gradient
    ds += torch.finfo(q.dtype).eps * float(out.abs().max()) * norm
    many = (q.shape[1] // k.shape[1] * q.shape[2]) ** 0.5
    return {
        "q": scale * largest_k * ds,
        "k": scale * largest_q * ds * many,
        "v": of_scores * float(weights.abs().max()) * many,
        "sinks": ds * (q.shape[0] * q.shape[2]) ** 0.5,
    }


def check(q, k, v, *, with_lse=False, **options):
    """As precise as the reference's gradients in the same dtype, twice, beside roundings."""
    leaves = ("sinks",) if "sinks" in options else ()
    names = {"leaves": leaves, "with_lse": with_lse}
    want = gradients(*in_float64(q, k, v, options), "reference", **names)
    plain = gradients(q, k, v, options, "reference", **names)
    got = gradients(q, k, v, options, "cpu", **names)
    rounding = roundings(q, k, v, options)
    for which, a, b, c in zip(("q", "k", "v", *leaves), got, plain, want, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        error, of_plain = (float((x.double() - c).abs().max()) for x in (a, b))
        bound = 2 * of_plain + 2 * torch.finfo(a.dtype).eps * float(c.abs().max()) + rounding[which]
        assert error <= bound, f"d{which}: error {error:.3g}, plain {of_plain:.3g}, bound {bound:.3g}"


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(every_call(kinds=("fp32", "bf16", "fp16"), small=True))
def test_whole_signature(call):
    q, k, v, options = call
    check(q, k, v, **options)


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "causal window": {"causal": True, "window": 5},
    "window": {"window": 5, "q_start": 30},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.linspace(-2, 2, 6)},
    "ragged": {"kv_lengths": torch.tensor([0, 63]), "kv_starts": torch.tensor([0, 5])},
    "mask": {"mask": torch.arange(65) % 3 > 0},
    "lse": {"with_lse": True},
    "lse and more": {"with_lse": True, "causal": True, "sinks": torch.linspace(-2, 2, 6), "softcap": 2.0},
}


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
