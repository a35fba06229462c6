"""The CPU kernels as torch sees them: opcheck, one compiled graph, fake tensors, inference."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gqa
from gqa.ops import registry
from gqa.ops.api import IMPLEMENTATIONS

pytestmark = pytest.mark.skipif("cpu" not in IMPLEMENTATIONS, reason="no CPU kernels in this release")


def qkv(dtype=torch.float32, requires_grad=False, B=2, T=5, S=7):
    random = torch.Generator().manual_seed(0)
    sizes = ((B, 6, T, 8), (B, 2, S, 8), (B, 2, S, 12))
    return [torch.randn(*size, generator=random).to(dtype).requires_grad_(requires_grad) for size in sizes]


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
def test_opcheck(op, options, requires_grad):
    named = dict.fromkeys(registry._NAMES) | {"causal": False, "q_start": 2, "scale": 0.3} | OPTIONS[options]
    arguments = (*qkv(requires_grad=requires_grad), *(named | {"impl": "cpu"}).values())
    torch.library.opcheck(getattr(torch.ops.gqa, op).default, arguments)


@pytest.mark.parametrize(("options", "backend"), [("plain", "inductor"), ("all", "aot_eager")])
def test_compiles_into_one_graph(options, backend):
    def attend(q, k, v):
        return gqa.attention(q * 2, k, v, return_lse=True, impl="cpu", **OPTIONS[options])

    got = torch.compile(attend, fullgraph=True, backend=backend)(*qkv())
    for a, b in zip(got, attend(*qkv()), strict=True):
        torch.testing.assert_close(a, b)


def test_a_cache_that_grows_needs_no_graph_per_token():
    def attend(q, k, v):
        return gqa.attention(q, k, v, causal=True, impl="cpu")

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for S in (7, 8, 9, 64):
            q, k, v = qkv(T=2, S=S)
            torch.testing.assert_close(compiled(q, k, v), attend(q, k, v), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fake_tensors_have_the_real_shapes_and_strides(dtype):
    real = gqa.attention(*qkv(dtype), causal=True, return_lse=True, impl="cpu")
    with FakeTensorMode() as mode:
        fake = gqa.attention(*map(mode.from_tensor, qkv(dtype)), causal=True, return_lse=True, impl="cpu")
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_inference_mode_gives_the_same():
    q, k, v = qkv()
    want = gqa.attention(q, k, v, impl="cpu")
    with torch.inference_mode():
        assert torch.equal(gqa.attention(q, k, v, impl="cpu"), want)


def test_automatic_choice_and_its_name():
    assert gqa.attention_impl(*qkv(), causal=True) == "cpu"
    assert gqa.attention_impl(*qkv(), **OPTIONS["all"], return_lse=True) == "cpu"
    assert gqa.attention_impl(*(x.double() for x in qkv()), softcap=2.0) == "reference"  # the kernels have no float64


def test_what_the_kernels_do_not_take_is_refused():
    with pytest.raises(gqa.GqaError, match="float64"):
        gqa.attention(*(x.double() for x in qkv()), impl="cpu")
