"""What the backward kernel promises beside precision (test_cpu_gradients): order, ranges, memory, refusals."""

# B batch · T query tokens · S key tokens · H KV heads · G queries per KV head · D head dim of q, k · Dv head dim of v

import math
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import gqa
from gqa.errors import GqaError
from gqa.ops import cpu_backward


def random_call(B=2, H=2, G=3, T=9, S=65, D=60, Dv=100, dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    sizes = ((B, H * G, T, D), (B, H, S, D), (B, H, S, Dv))
    return [torch.randn(*size, generator=random).to(dtype) for size in sizes]


def incoming(out):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)


def gradients(q, k, v, *, impl="cpu", **options):
    """(dQ, dK, dV) of a weighted sum of the output."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = gqa.attention(*leaves, impl=impl, **options)
    return torch.autograd.grad(out, leaves, incoming(out))


def assert_like_reference(q, k, v, **options):
    """Errors at most twice those of the reference in float32, beside a few roundings.

    Those are: eight of the largest gradient, and for dQ and dK four of dP, whose terms may cancel.
    """
    eps = torch.finfo(torch.float32).eps
    exact = {name: x.double() if torch.is_tensor(x) and x.dtype == torch.float32 else x for name, x in options.items()}
    want = gradients(*(x.double() for x in (q, k, v)), impl="reference", **exact)
    plain = gradients(q, k, v, impl="reference", **options)
    weights = incoming(q.new_empty(*q.shape[:3], v.shape[3]))
    of_dp = 4 * eps * weights.norm(dim=-1).max() * v.norm(dim=-1).max() * q.shape[3] ** -0.5
    cancelled = (of_dp * k.abs().max(), of_dp * q.abs().max(), 0)
    for name, a, b, c, rounding in zip("qkv", gradients(q, k, v, **options), plain, want, cancelled, strict=True):
        error, of_plain = ((x.double() - c).abs().max() for x in (a, b))
        allowed = 2 * of_plain + 8 * eps * c.abs().max() + rounding
        assert error <= allowed, f"d{name}: error {error:.3g}, plain {of_plain:.3g}, allowed {allowed:.3g}"


@pytest.fixture
def threads():
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


SEVERAL_BLOCKS = cpu_backward.BLOCK * 3 + 5  # keys
SEVERAL_TILES = cpu_backward.MAX_ROWS + 7  # tokens, with three queries each


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"causal": True, "q_start": -100},  # the first rows see nothing
        {"causal": True, "q_start": 120},  # the last ones see every key
        {"causal": True, "window": 20},
        {"causal": True, "window": 20, "q_start": 150},  # the last ones see nothing again
        {"window": 70, "q_start": 3},
        {"kv_lengths": torch.tensor([130, 64]), "kv_starts": torch.tensor([65, 63])},
        {"q_start": torch.tensor([5, 60]), "causal": True, "softcap": 3.0},
        {"mask": torch.arange(SEVERAL_BLOCKS) % 100 > 70},  # whole blocks are hidden
        {"mask": torch.linspace(-3, 3, SEVERAL_TILES)[:, None], "sinks": torch.linspace(-1, 2, 6)},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_ranges_across_blocks_and_tiles(options):
    assert_like_reference(*random_call(T=SEVERAL_TILES, S=SEVERAL_BLOCKS), **options)


@pytest.mark.parametrize("D", [1, 16, 60, 72, 256])
@pytest.mark.parametrize("Dv", [1, 100, 256])
def test_head_dims(D, Dv):
    assert_like_reference(*random_call(1, 1, 7, 30, 70, D, Dv), causal=True)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 64, 65, 111])
def test_edges_of_tiles_and_blocks(tokens):
    assert_like_reference(*random_call(1, 1, 1, tokens, 65))
    assert_like_reference(*random_call(1, 1, 2, 65, tokens))


@pytest.mark.parametrize(("B", "H", "G"), [(1, 1, 12), (1, 3, 4), (2, 2, 3)])
def test_the_bits_do_not_depend_on_threads(threads, B, H, G):
    """One head's tiles add to the same dK and dV: always in one order. More threads than heads must wait in turn."""
    call = random_call(B, H, G, 200, 200)
    threads(1)
    want = gradients(*call, causal=True, window=150)
    for count in (2, 2, 5):
        threads(count)
        for a, b in zip(gradients(*call, causal=True, window=150), want, strict=True):
            assert torch.equal(a, b)


def test_keys_that_do_not_exist_are_never_read():
    q, k, v = random_call(T=40, S=150)
    options: dict[str, Any] = {"kv_lengths": torch.tensor([0, 77]), "kv_starts": torch.tensor([0, 30])}
    want = gradients(q, k, v, causal=True, **options)
    hidden = torch.ones(2, 1, 150, 1, dtype=torch.bool)
    hidden[1, :, 30:77] = False
    poisoned = [x.masked_fill(hidden, math.nan) for x in (k, v)]
    for a, b in zip(gradients(q, *poisoned, causal=True, **options), want, strict=True):
        assert torch.equal(a, b)
    for x in want[1:]:
        assert torch.all(x.masked_select(hidden) == 0)
        assert torch.all(x[1, :, 30:60] != 0)


def test_rows_without_a_key_have_no_gradient():
    q, k, v = random_call(T=9, S=65)
    mask = torch.ones(9, 1, dtype=torch.bool)
    mask[4] = False
    dq, dk, _ = gradients(q, k, v, mask=mask)
    assert torch.all(dq[:, :, 4] == 0)
    rest = [t for t in range(9) if t != 4]
    assert torch.all(dq[:, :, rest] != 0)
    assert dk.isfinite().all()


@pytest.mark.parametrize("lowest", [-1e30, float(torch.finfo(torch.float32).min)])
def test_finite_masks_beyond_any_score(lowest):
    """Rows of which nothing depends, such as padding in transformers' masks, add nothing, not even NaN."""
    q, k, v = random_call(T=9, S=65)
    mask = torch.zeros(9, 65)
    mask[:, 30:] = lowest
    mask[4] = lowest
    leaves = [x.requires_grad_() for x in (q, k, v)]
    used = [t for t in range(9) if t != 4]
    out = gqa.attention(*leaves, mask=mask, impl="cpu")[:, :, used]
    got = torch.autograd.grad(out.square().sum(), leaves)
    out = gqa.attention(q[:, :, used], k[:, :, :30], v[:, :, :30], impl="reference")
    want = torch.autograd.grad(out.square().sum(), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", [0, 1])
def test_one_of_two_outputs_is_enough(which):
    got, want = [], []
    for impl, grads in (("cpu", got), ("reference", want)):
        leaves = [x.requires_grad_() for x in random_call()]
        output = gqa.attention(*leaves, return_lse=True, impl=impl)[which]
        grads += torch.autograd.grad(output.sum(), leaves[: 3 - which])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_gradients_through_pages():
    q, k, v = random_call(T=9, S=64)
    lengths = torch.tensor([60, 17])
    want = gradients(q, k, v, kv_lengths=lengths, causal=True)
    table = torch.tensor([[3, 1, 7, 0], [5, 2, -1, -1]])  # blocks of 16; block 4 and 6 belong to nobody
    pools = []
    for x in (k, v):
        pool = torch.full((8, 2, 16, x.shape[3]), math.nan)
        for b, i in ((b, i) for b in range(2) for i in range(4) if table[b, i] >= 0):
            pool[table[b, i]] = x[b, :, 16 * i : 16 * i + 16]
        pools.append(pool)
    dq, *d_pools = gradients(q, *pools, kv_lengths=lengths, causal=True, block_table=table)
    assert torch.equal(dq, want[0])
    for d_pool, d_x in zip(d_pools, want[1:], strict=True):
        assert torch.all(d_pool[[4, 6]] == 0)
        for b, i in ((b, i) for b in range(2) for i in range(4) if table[b, i] >= 0):
            assert torch.equal(d_pool[table[b, i]], d_x[b, :, 16 * i : 16 * i + 16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_has_no_key_or_value_per_query_head(dtype):
    """What autograd keeps, dK and dV in float32, and the kernels' scratch: far less than the keys of 64 heads."""
    H, G, T, S, D = 8, 8, 16, 2048, 64
    leaves = [x.requires_grad_() for x in random_call(1, H, G, T, S, D, D, dtype)]

    def run():
        gqa.attention(*leaves, causal=True, impl="cpu").sum().backward()

    run()  # compiles, and makes the scratch
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    profiler: Any = record.profiler
    blocks = [event.nbytes() for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for nbytes in blocks:
        held += nbytes
        peak = max(peak, held)
    float32 = 4 * H * S * D
    assert max(blocks) <= float32
    sums_and_gradients = 2 * float32 + 2 * leaves[1].nbytes
    of_queries = 8 * 4 * H * G * T * D
    assert peak <= sums_and_gradients + of_queries < G * leaves[1].nbytes
    assert cpu_backward.SCRATCH_BYTES < 2 << 20


@pytest.mark.parametrize("what", ["mask", "k_scale", "q with int8"])
def test_other_gradients_are_refused(what):
    q, k, v = random_call()
    scales = {name: torch.ones(2, 2, 65) for name in ("k_scale", "v_scale")}
    options: dict[str, Any] = {"mask": torch.zeros(9, 65).requires_grad_()}
    if what != "mask":
        k, v, options = k.to(torch.int8), v.to(torch.int8), scales
    if what == "k_scale":
        scales["k_scale"].requires_grad_()
    if what == "q with int8":
        q.requires_grad_()
    with pytest.raises(GqaError, match="int8" if what.startswith("q") else f"{what} that requires grad"):
        gqa.attention(q, k, v, impl="cpu", **options)
    assert gqa.attention_impl(q, k, v, **options) == "reference"
    with torch.no_grad():
        assert gqa.attention_impl(q, k, v, **options) == "cpu"


def test_gradients_of_gradients_are_refused():
    leaves = [x.requires_grad_() for x in random_call()]
    out = gqa.attention(*leaves, impl="cpu")
    (dq,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@pytest.mark.parametrize("sinks", [None, torch.linspace(-1, 1, 6)], ids=["plain", "sinks"])
def test_opcheck(sinks):
    q, k, v = random_call(T=5, S=7, D=8, Dv=12)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)  # dQ lies as q does
    out, lse = gqa.attention(q, k, v, sinks=sinks, q_start=2, causal=True, return_lse=True, impl="cpu")
    options = (True, 2, None, 4, 8**-0.5, 2.0, torch.arange(7) % 3 > 0, sinks, torch.tensor([7, 3]), None)
    torch.library.opcheck(torch.ops.gqa.cpu_backward.default, (q, k, v, out, lse, incoming(out), lse, *options))
