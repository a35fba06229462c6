"""The Triton kernels against the float64 oracle, over the whole signature: on a GPU, or in Triton's interpreter."""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim of q, k · Dv head dim of v

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from ops.core_calls import CORE, random_call
from ops.every_call import FLOATS, LAYOUTS, every_call, laid_out
from ops.extremes import EXTREMES, assert_finite_extremes
from ops.packed import assert_packed_precise, packed_call
from ops.precision import assert_precise
from ops.triton_device import DEVICE, moved, there

import gqa
from gqa.errors import GqaError
from gqa.ops import gpu

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")

# The interpreter takes its time: of the sizes, those with few rows and those with several tiles.
CALLS = [name for name in CORE if DEVICE == "cuda" or "size" not in name or "S111" in name]


def check(q, k, v, **options):
    q, k, v, options = there(q, k, v, options)
    out, lse = gqa.attention(q, k, v, return_lse=True, impl="triton", **options)
    assert_precise(out, lse, q, k, v, **options)
    alone = gqa.attention(q, k, v, impl="triton", **options)
    assert torch.equal(out, alone), "the output depends on whether the lse is asked for"


@pytest.mark.parametrize("name", CALLS)
def test_core(name):
    q, k, v, options = CORE[name]()
    check(q, k, v, **options)


@pytest.mark.parametrize("part", range(4))  # on a GPU nearly every call is compiled first: parts share the cores
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(call=every_call())
def test_whole_signature(part, call):
    q, k, v, options = call
    check(q, k, v, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_any_layout_gives_the_same_bits(which, layout):
    tensors = random_call(2, T=9)
    q, k, v = map(moved, tensors)
    want = gqa.attention(q, k, v, impl="triton", causal=True)
    tensors[which] = laid_out(tensors[which], layout)
    q, k, v = map(moved, tensors)
    assert torch.equal(gqa.attention(q, k, v, impl="triton", causal=True), want)


@pytest.mark.parametrize("value", EXTREMES)
def test_masks_of_finite_extremes(value):
    assert_finite_extremes(value, impl="triton", device=DEVICE)


@pytest.mark.parametrize("T", [1, 70])
def test_twice_the_same_bits(T):
    """Splits are joined in a fixed order."""
    q, k, v = map(moved, random_call(1, 1, 2, T, 3000))
    assert torch.equal(gqa.attention(q, k, v, impl="triton"), gqa.attention(q, k, v, impl="triton"))


PACKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal window": {"causal": True, "window": 9},
    "top-left": {"causal": True, "q_start": 0},
    "starts": {"causal": True, "q_start": torch.tensor([40, 0, 90, 5])},
    "softcap and sinks": {"softcap": 2.0, "sinks": torch.linspace(-3, 3, 6)},
}


@pytest.mark.parametrize("options", PACKED)
@pytest.mark.parametrize("dtype", FLOATS)
def test_packed(dtype, options):
    q, k, v, cu_q, cu_k = packed_call(FLOATS[dtype])
    q, k, v, options = there(q, k, v, PACKED[options])
    cu_q, cu_k = cu_q.to(DEVICE), cu_k.to(DEVICE)
    out, lse = gqa.attention_packed(q, k, v, cu_q, cu_k, return_lse=True, impl="triton", **options)
    assert_packed_precise(out, lse, q, k, v, cu_q, cu_k, **options)


def test_packed_offsets_as_a_list():
    q, k, v, cu_q, cu_k = packed_call()
    q, k, v = map(moved, (q, k, v))
    a = gqa.attention_packed(q, k, v, cu_q.tolist(), cu_k.tolist(), impl="triton")
    assert torch.equal(a, gqa.attention_packed(q, k, v, cu_q.to(DEVICE), cu_k.to(DEVICE), impl="triton"))


def test_packed_as_slices_of_one_projection():
    """q, k and v side by side in one matrix, as a fused projection leaves them."""
    random = torch.Generator().manual_seed(0)
    fused = torch.randn(70, (6 + 2 + 2) * 64, generator=random).to(DEVICE)
    q, k, v = (x.unflatten(1, (-1, 64)) for x in fused.split([6 * 64, 2 * 64, 2 * 64], dim=1))
    cu = [0, 3, 70]
    want = gqa.attention_packed(q.contiguous(), k.contiguous(), v.contiguous(), cu, cu, causal=True, impl="triton")
    assert torch.equal(gqa.attention_packed(q, k, v, cu, cu, causal=True, impl="triton"), want)


def test_many_packed_sequences():
    """More of them than a tile has rows."""
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 3, (300,), generator=random)
    cu = torch.tensor([0, *lengths.cumsum(0).tolist()])
    q, k, v = (torch.randn(int(cu[-1]), heads, 16, generator=random).to(DEVICE) for heads in (3, 1, 1))
    out = gqa.attention_packed(q, k, v, cu.to(DEVICE), cu.to(DEVICE), causal=True, impl="triton")
    want = gqa.attention_packed(q, k, v, cu, cu, causal=True, impl="reference")
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"dtype": torch.float64}, r"torch\.float64"),
        ({"mask": True}, "a mask that requires grad"),
        ({"scale": True}, "gradients through int8 keys and values"),
    ],
)
def test_what_is_not_served_is_named(change, what):
    q, k, v = random_call(dtype=change.get("dtype", torch.float32))
    options: dict[str, Any] = {}
    if "mask" in change:
        options["mask"] = torch.zeros(65, requires_grad=True)
    if "scale" in change:
        q.requires_grad_()
        k, v = k.to(torch.int8), v.to(torch.int8)
        options |= {"k_scale": torch.ones(1, 2, 65), "v_scale": torch.ones(1, 2, 65)}
    q, k, v, options = there(q, k, v, options)
    with pytest.raises(GqaError, match=f"does not serve {what}"):
        gqa.attention(q, k, v, impl="triton", **options)


@pytest.mark.parametrize(
    ("tiles", "keys", "fastest"),
    [
        (8, 32768, {16}),
        (8, 8192, {16}),
        (8, 1024, {8}),
        (1, 131072, {128}),
        (16, 32768, {8, 16}),
        (32, 8192, {4, 8}),
        (64, 32768, {2, 4}),
        (128, 32768, {1}),
        (256, 8192, {1}),
        (256, 32768, {1}),
        (256, 1024, {1}),
        (512, 1024, {1}),
        (512, 8192, {2, 4}),
        (512, 32768, {2, 3, 4, 5}),
    ],
)
def test_splits_are_those_that_were_fastest(tiles, keys, fastest):
    """On an H100, within 1.5 %: 132 multiprocessors, three programs on each at a time."""
    assert gpu.choose_splits(tiles, keys // gpu.SPLIT_KEYS, 132, 3) in fastest


def test_keys_for_no_split():
    assert gpu.choose_splits(8, 0, 132, 3) == 1
    assert gpu.choose_splits(5000, 128, 132, 3) == 1


def test_nothing_is_as_large_as_repeated_keys():
    """What a decode step allocates beside its output is for the splits: float32 rows, whatever S is."""
    sizes = []
    for S in (8192, 131072):
        q, k, v = (torch.empty(1, heads, n, 128, device="meta") for heads, n in ((64, 1), (8, S), (8, S)))
        launches, out, _ = gpu.plan_forward(
            q, k, v, False, S - 1, None, None, 0.1, None, None, None, None, None, None, None, None, None, None, False,
            capability=90, multiprocessors=132,
        )  # fmt: skip
        parts = launches[0].arguments["parts"]
        assert out.shape == q.shape
        sizes.append(parts.numel())
    rounds, programs = 2, 3 * 132
    assert sizes[0] <= sizes[1] <= rounds * programs * 8 * 128  # each leaves G rows of Dv
