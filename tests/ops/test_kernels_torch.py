"""Our kernels as torch sees them: opcheck, one compiled graph, fake tensors, inference."""

from typing import Any

import pytest
import torch
from ops.triton_device import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode

import gqa
from gqa.ops import registry

WHERE = {"cpu": "cpu", "triton": DEVICE}
both = pytest.mark.parametrize("impl", WHERE)


def qkv(impl, dtype=torch.float32, requires_grad=False, B=2, T=5, S=7):
    random = torch.Generator().manual_seed(0)
    sizes = ((B, 6, T, 8), (B, 2, S, 8), (B, 2, S, 12))
    return [torch.randn(*size, generator=random).to(WHERE[impl], dtype).requires_grad_(requires_grad) for size in sizes]


def options_of(name, impl) -> dict[str, Any]:
    return {key: x.to(WHERE[impl]) if torch.is_tensor(x) else x for key, x in OPTIONS[name].items()}


OPTIONS = {
    "plain": {},
    "all": {
        "causal": True,
        "window": 4,
        "softcap": 2.0,
        "mask": torch.arange(7) % 3 > 0,
        "sinks": torch.linspace(-1, 1, 6),
        "kv_lengths": torch.tensor([7, 3]),
        "kv_starts": torch.tensor([1, 0]),
    },
}


@pytest.mark.parametrize(
    ("op", "options", "requires_grad"),
    [("attention", "plain", False), ("attention", "all", True), ("attention_with_lse", "all", True)],
)
@both
def test_opcheck(impl, op, options, requires_grad):
    named = dict.fromkeys(registry._NAMES) | {"causal": False, "q_start": 2, "scale": 0.3} | options_of(options, impl)
    arguments = (*qkv(impl, requires_grad=requires_grad), *(named | {"impl": impl}).values())
    torch.library.opcheck(getattr(torch.ops.gqa, op).default, arguments)


@pytest.mark.parametrize(("options", "backend"), [("plain", "inductor"), ("all", "aot_eager")])
@both
def test_compiles_into_one_graph(impl, options, backend):
    def attend(q, k, v):
        return gqa.attention(q * 2, k, v, return_lse=True, impl=impl, **options_of(options, impl))

    got = torch.compile(attend, fullgraph=True, backend=backend)(*qkv(impl))
    for a, b in zip(got, attend(*qkv(impl)), strict=True):
        torch.testing.assert_close(a, b)


@both
def test_gradients_through_a_compiled_graph(impl):
    def attend(q, k, v):
        return gqa.attention(q, k, v, causal=True, impl=impl)

    leaves = qkv(impl, requires_grad=True)
    want = attend(*leaves)
    got = torch.compile(attend, fullgraph=True, backend="aot_eager")(*leaves)
    weights = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, leaves, weights), torch.autograd.grad(want, leaves, weights), strict=True):
        torch.testing.assert_close(a, b)


@both
def test_a_cache_that_grows_needs_no_graph_per_token(impl):
    def attend(q, k, v):
        return gqa.attention(q, k, v, causal=True, impl=impl)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for S in (7, 8, 9, 64):
            q, k, v = qkv(impl, T=2, S=S)
            torch.testing.assert_close(compiled(q, k, v), attend(q, k, v), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@both
def test_fake_tensors_have_the_real_shapes_and_strides(impl, dtype):
    real = gqa.attention(*qkv(impl, dtype), causal=True, return_lse=True, impl=impl)
    with FakeTensorMode() as mode:
        fake = gqa.attention(*map(mode.from_tensor, qkv(impl, dtype)), causal=True, return_lse=True, impl=impl)
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@both
def test_fake_gradients_have_the_real_strides(impl):
    """Heads behind tokens in memory, as projections leave them."""
    leaves = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(impl)]
    out, lse = gqa.attention(*leaves, return_lse=True, impl=impl)
    backward = getattr(torch.ops.gqa, f"{impl}_backward").default
    offsets = [None, None] if impl == "triton" else []

    def gradients(*inputs):
        q, k, v, out, lse = inputs
        return backward(q, k, v, out, lse, out, None, False, 2, None, None, 0.3, None, None, None, None, None, *offsets)

    inputs = [*leaves, out, lse]
    real = gradients(*inputs)
    with FakeTensorMode() as mode:
        fake = gradients(*map(mode.from_tensor, inputs))
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@both
def test_inference_mode_gives_the_same(impl):
    q, k, v = qkv(impl)
    want = gqa.attention(q, k, v, impl=impl)
    with torch.inference_mode():
        assert torch.equal(gqa.attention(q, k, v, impl=impl), want)


def test_automatic_choice_and_its_name():
    assert gqa.attention_impl(*qkv("cpu"), causal=True) == "cpu"
    assert gqa.attention_impl(*qkv("cpu"), **OPTIONS["all"], return_lse=True) == "cpu"
    assert (
        gqa.attention_impl(*(x.double() for x in qkv("cpu")), softcap=2.0) == "reference"
    )  # the kernels have no float64


def test_what_the_kernels_do_not_take_is_refused():
    with pytest.raises(gqa.GqaError, match="float64"):
        gqa.attention(*(x.double() for x in qkv("cpu")), impl="cpu")
