"""Gradients of the Triton kernels against the reference's float64 ones: on a GPU, or in Triton's interpreter."""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim of q, k · Dv head dim of v

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from ops.every_call import FLOATS, LAYOUTS, every_call, laid_out
from ops.gradients import OPTIONS, check_gradients, gradients, incoming, random_call
from ops.packed import packed_call
from ops.triton_device import DEVICE, moved, there

import gqa
from gqa.ops import gpu_grad

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")


def check(q, k, v, **options):
    """16-bit weights and slopes are rounded to q's dtype before they are multiplied; each rounding is half an eps."""
    of_weights = 0.0 if q.dtype == torch.float32 else torch.finfo(q.dtype).eps / 2
    q, k, v, options = there(q, k, v, options)
    check_gradients(q, k, v, impl="triton", of_weights=of_weights, **options)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(every_call(kinds=tuple(FLOATS), small=True))
def test_whole_signature(call):
    q, k, v, options = call
    check(q, k, v, **options)


MORE: dict[str, dict[str, Any]] = {
    "top-left window": {"causal": True, "window": 40, "q_start": 0},
    "before the keys": {"causal": True, "q_start": -4},
    "starts": {"causal": True, "q_start": torch.tensor([-3, 90]), "window": 60},
    "float mask": {"mask": torch.linspace(-4, 4, 65).masked_fill(torch.arange(65) < 20, -torch.inf)},
    "mask of heads": {"mask": torch.arange(12).view(2, 6, 1, 1) % 4 > 0},
    "negative scale": {"scale": -0.3, "causal": True},
}


# The interpreter takes its time: not every option once more in 16 bits.
CALLS = [(name, "fp32") for name in OPTIONS | MORE] + [
    (name, dtype)
    for name in (OPTIONS | MORE if DEVICE == "cuda" else ("plain", "causal window", "lse and more"))
    for dtype in ("bf16", "fp16")
]


@pytest.mark.parametrize(("options", "dtype"), CALLS)
def test_core_options(options, dtype):
    check(*random_call(dtype=FLOATS[dtype]), **(OPTIONS | MORE)[options])


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 111), (63, 1), (63, 111), (111, 63)])
@pytest.mark.parametrize(("H", "G"), [(3, 1), (1, 7)])
def test_core_sizes(H, G, T, S):
    check(*random_call(1, H, G, T, S), causal=True)


@pytest.mark.parametrize(("T", "S"), [(140, 140), (70, 140)])
def test_whole_blocks_and_edges(T, S):
    """Long enough that blocks lie before, within and behind what a window shows."""
    q, k, v = random_call(1, 1, 1, T, S, 16, 16)
    for options in ({"causal": True}, {"window": 80, "causal": True}, {"window": 9}):
        check(q, k, v, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_bits(layout):
    tensors = random_call(D=64, Dv=64)
    q, k, v = map(moved, tensors)
    want = gradients(q, k, v, {"causal": True}, "triton")
    q, k, v = (moved(laid_out(x, layout)) for x in tensors)
    for a, b in zip(gradients(q, k, v, {"causal": True}, "triton"), want, strict=True):
        assert torch.equal(a, b)


def test_incoming_gradients_of_any_layout():
    q, k, v = (moved(x).requires_grad_() for x in random_call(D=64, Dv=64))
    out = gqa.attention(q, k, v, impl="triton")
    weights = incoming(out, 0)
    want = torch.autograd.grad(out, (q, k, v), weights, retain_graph=True)
    strided = weights.transpose(1, 3).contiguous().transpose(1, 3)
    for a, b in zip(torch.autograd.grad(out, (q, k, v), strided, retain_graph=True), want, strict=True):
        assert torch.equal(a, b)
    ones = torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True)
    for a, b in zip(torch.autograd.grad(out.sum(), (q, k, v)), ones, strict=True):  # strides of 0
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["contiguous", "heads behind tokens"])
def test_gradients_lie_as_their_tensors_do(layout):
    """So that what follows finds its own; torch is told the same."""
    q, k, v = (moved(laid_out(x, layout)) for x in random_call(B=1, T=5, S=9, D=16, Dv=16))
    out, lse = gqa.attention(q, k, v, impl="triton", return_lse=True)
    call = (q, k, v, out, lse, out, None, False, 4, None, None, 0.3, *(None,) * 7)
    dq, dk, dv, _ = torch.ops.gqa.triton_backward(*call)
    assert [x.stride() for x in (dq, dk, dv)] == [x.stride() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.gqa.triton_backward.default, call, test_utils=("test_schema", "test_faketensor"))


def test_twice_the_same_bits():
    q, k, v = map(moved, random_call(B=1, T=40, S=70, D=16, Dv=16))
    options = {"causal": True, "sinks": torch.linspace(-2, 2, 6, device=DEVICE)}
    once, again = (gradients(q, k, v, options, "triton", leaves=("sinks",), with_lse=True) for _ in range(2))
    for a, b in zip(once, again, strict=True):
        assert torch.equal(a, b)


def test_what_nobody_sees_has_no_gradient():
    """Exactly zero for keys behind the queries or outside the lengths, and for queries that see nothing."""
    q, k, v = map(moved, random_call(T=70, S=130, D=16, Dv=16))
    k[0, :, 100:] = v[0, :, 100:] = torch.nan
    options = {"causal": True, "q_start": 30, "kv_lengths": torch.tensor([100, 130], device=DEVICE)}
    options["kv_starts"] = torch.tensor([40, 0], device=DEVICE)
    dq, dk, dv = gradients(q, k, v, options, "triton")
    assert torch.all(dq[0, :, :10] == 0)
    assert torch.all(dq[:, :, 11:] != 0)  # of a single key, as row 10 sees, the weight is 1 whatever q is
    for x in (dk, dv):
        assert torch.all(x[0, :, :40] == 0)
        assert torch.all(x[0, :, 100:] == 0)
        assert torch.all(x[:, :, 40:100] != 0)
        assert torch.all(x[1, :, 100:] == 0)


def test_gradient_of_lse_alone():
    leaves = [moved(x).requires_grad_() for x in random_call()]
    grads = []
    for impl, (q, k, v) in (("triton", leaves), ("reference", [x.detach().double().requires_grad_() for x in leaves])):
        lse = gqa.attention(q, k, v, return_lse=True, impl=impl)[1]
        grads.append(torch.autograd.grad((lse * incoming(lse, 0)).sum(), (q, k, v), materialize_grads=True))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b.float())


PACKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal window": {"causal": True, "window": 9},
    "top-left": {"causal": True, "q_start": 0},
    "starts": {"causal": True, "q_start": torch.tensor([40, 0, 90, 5])},
    "softcap and sinks": {"softcap": 2.0, "sinks": torch.linspace(-3, 3, 6)},
}


@pytest.mark.parametrize("options", PACKED)
def test_packed(options):
    """Against the reference in float64, to the order of float32 sums."""
    q, k, v, cu_q, cu_k = packed_call()
    q, k, v, options = there(q, k, v, PACKED[options])
    grads = []
    for impl, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        q, k, v = leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        if "sinks" in options:
            options["sinks"] = options["sinks"].detach().to(dtype).requires_grad_()
            leaves.append(options["sinks"])
        out, lse = gqa.attention_packed(
            q, k, v, cu_q.to(DEVICE), cu_k.to(DEVICE), return_lse=True, impl=impl, **options
        )
        seen = lse > -torch.inf
        total = (out * incoming(out, 0)).sum() + (lse.masked_fill(~seen, 0) * incoming(lse, 1)).sum()
        grads.append(torch.autograd.grad(total, leaves))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b.float())


def test_many_packed_sequences():
    """More of them than a tile has rows."""
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 3, (70,), generator=random)
    cu = torch.tensor([0, *lengths.cumsum(0).tolist()])
    q, k, v = (torch.randn(int(cu[-1]), heads, 16, generator=random).to(DEVICE).requires_grad_() for heads in (3, 1, 1))
    grads = []
    for impl in ("triton", "reference"):
        out = gqa.attention_packed(q, k, v, cu.to(DEVICE), cu.to(DEVICE), causal=True, impl=impl)
        grads.append(torch.autograd.grad((out * incoming(out, 0)).sum(), (q, k, v)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def planned(T, S, *, offsets=None):
    """The launches and results of a call at 64/8 heads, on no device."""
    q, out = (torch.empty(1, 64, T, 128, dtype=torch.bfloat16, device="meta") for _ in range(2))
    k, v = (torch.empty(1, 8, S, 128, dtype=torch.bfloat16, device="meta") for _ in range(2))
    lse = torch.empty(1, 64, T, device="meta")
    return gpu_grad.plan_backward(
        q, k, v, out, lse, torch.empty_like(out), None, True, None, None, None, 0.1, None, None, None, None, None,
        offsets, offsets, capability=90,
    )  # fmt: skip


def test_keys_and_values_are_never_repeated():
    """Beside the gradients themselves a backward at 64/8 heads allocates two float32 numbers per query row."""
    T, S = 16, 65536
    launches, results = planned(T, S)
    given = {"q", "k", "v", "out", "d_out", "lse", "dq", "dk", "dv"}
    tensors = [
        x for launch in launches for name, x in launch.arguments.items() if torch.is_tensor(x) and name not in given
    ]
    beside = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    assert sum(beside.values()) == 2 * 4 * 64 * T
    assert [tuple(x.shape) for x in results[:3]] == [(1, 64, T, 128), (1, 8, S, 128), (1, 8, S, 128)]


def test_a_program_per_tile_of_each_kv_head():
    launches, _ = planned(1000, 1000)
    rows, keys = (launch.arguments for launch in launches)
    assert launches[0].grid == (8 * -(-8000 // rows["BLOCK_ROWS"]), 1, 1)
    assert launches[1].grid == (8 * -(-1000 // keys["BLOCK_KEYS"]), 1, 1)
    ragged, _ = planned(1000, 1000, offsets=torch.empty(6, dtype=torch.int32, device="meta"))
    assert [a.grid[0] - b.grid[0] for a, b in zip(ragged, launches, strict=True)] == [8 * 5, 8 * 5]
