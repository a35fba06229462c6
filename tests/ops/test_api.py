"""The edge: what is refused and how, what is chosen, packed sequences."""

import pytest
import torch
from ops.naive import naive_attention

import gqa
from gqa.errors import GqaError


def qkv(B=2, H=2, G=3, T=3, S=5, D=8, dtype=torch.float32):
    torch.manual_seed(0)
    return (torch.randn(B, h, t, D, dtype=dtype) for h, t in ((H * G, T), (H, S), (H, S)))


def test_triton_names_what_it_does_not_serve():
    with pytest.raises(GqaError, match=r"does not serve torch\.float64") as refused:
        gqa.attention(*qkv(dtype=torch.float64), impl="triton")
    assert refused.value.allowed == "reference, sdpa"


def test_unknown_implementation():
    with pytest.raises(GqaError, match="unknown implementation"):
        gqa.attention(*qkv(), impl="flash")


def test_heads_that_do_not_divide():
    q, k, v = torch.randn(1, 6, 2, 8), torch.randn(1, 4, 2, 8), torch.randn(1, 4, 2, 8)
    with pytest.raises(GqaError) as refused:
        gqa.attention(q, k, v)
    assert refused.value.what == "4 KV heads do not divide 6 query heads"
    assert refused.value.allowed == "1, 2, 3, 6"


SCALES = torch.ones(2, 2, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: ((q[0], k, v), {}), "four dimensions"),
        (lambda q, k, v: ((q, k, v[:, :, :4]), {}), "k and v differ"),
        (lambda q, k, v: ((q[:1], k, v), {}), "differ in batch"),
        (lambda q, k, v: ((q[..., :4], k, v), {}), "differ in head dim"),
        (lambda q, k, v: ((q, k[:, :, :0], v[:, :, :0]), {}), "empty"),
        (lambda q, k, v: ((q.half(), k, v), {}), "does not go with q"),
        (lambda q, k, v: ((q.int(), k.int(), v.int()), {}), "dtype"),
        (lambda q, k, v: ((q, k.to("meta"), v), {}), "not where q is"),
        (lambda q, k, v: ([x.repeat(1, 1, 1, 40) for x in (q, k, v)], {}), "too large"),
        (lambda q, k, v: ((q, k, v), {"mask": torch.ones(4, 5, dtype=torch.bool)}), "mask"),
        (lambda q, k, v: ((q, k, v), {"mask": torch.ones(3, 5, dtype=torch.int64)}), "mask"),
        (lambda q, k, v: ((q, k, v), {"mask": torch.ones(1, 2, 6, 3, 5)}), "mask"),
        (lambda q, k, v: ((q, k, v), {"sinks": torch.zeros(2)}), "sinks"),
        (lambda q, k, v: ((q, k, v), {"kv_lengths": torch.tensor([1])}), "kv_lengths"),
        (lambda q, k, v: ((q, k, v), {"kv_starts": torch.tensor([1.0, 2.0])}), "kv_starts"),
        (lambda q, k, v: ((q, k, v), {"q_start": 1.5}), "q_start"),
        (lambda q, k, v: ((q, k, v), {"q_start": torch.tensor([1, 2, 3])}), "q_start"),
        (lambda q, k, v: ((q, k, v), {"window": 0}), "window"),
        (lambda q, k, v: ((q, k, v), {"window": True}), "window"),
        (lambda q, k, v: ((q, k, v), {"softcap": 0.0}), "softcap"),
        (lambda q, k, v: ((q, k, v), {"scale": "1"}), "scale"),
        (lambda q, k, v: ((q, k.to(torch.int8), v.to(torch.int8)), {}), "does not go with q"),
        (lambda q, k, v: ((q, k, v), {"k_scale": SCALES, "v_scale": SCALES}), "does not go with q"),
        (lambda q, k, v: ((q, k.to(torch.int8), v.to(torch.int8)), {"k_scale": SCALES}), "v_scale"),
        (lambda q, k, v: ((q, k, v), {"block_table": torch.zeros(1, 2, dtype=torch.int64)}), "block_table"),
        (lambda q, k, v: ((q, k, v), {"block_table": torch.full((2, 1), 2)}), "block that the pool does not have"),
    ],
)
def test_refusals(change, message):
    arguments, options = change(*qkv())
    with pytest.raises(GqaError, match=message) as refused:
        gqa.attention(*arguments, **options)
    assert refused.value.allowed
    with pytest.raises(GqaError, match=message):
        gqa.attention_impl(*arguments, **options)


def test_auto_says_what_it_chose():
    q, k, v = qkv()
    assert gqa.attention_impl(q, k, v, causal=True) == "cpu"
    q, k, v = qkv(dtype=torch.float64)
    assert gqa.attention_impl(q, k, v, causal=True) == "sdpa"
    assert gqa.attention_impl(q, k, v, softcap=1.0) == "reference"
    assert gqa.attention_impl(q, k, v, impl="reference") == "reference"


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_packed_equals_sequence_by_sequence(impl):
    q_lengths, k_lengths = [1, 0, 4, 3], [6, 2, 4, 0]
    torch.manual_seed(0)
    q = torch.randn(sum(q_lengths), 6, 8, dtype=torch.float64)
    k, v = (torch.randn(sum(k_lengths), 2, 8, dtype=torch.float64) for _ in range(2))
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0) for lengths in (q_lengths, k_lengths))
    out = gqa.attention_packed(q, k, v, cu_q, cu_k, causal=True, window=3, impl=impl)
    assert out.shape == q.shape
    for i in (0, 2):
        rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        one = (x[None].transpose(1, 2) for x in (q[rows], k[keys], v[keys]))
        want = naive_attention(*one, causal=True, window=3)[0][0].transpose(0, 1)
        torch.testing.assert_close(out[rows], want, rtol=0, atol=1e-12)
    assert torch.all(out[5:] == 0)  # the last sequence has queries and no keys


def test_packed_returns_lse_and_takes_lists_and_starts():
    q, k, v = torch.randn(5, 2, 8), torch.randn(6, 1, 8), torch.randn(6, 1, 8)
    out, lse = gqa.attention_packed(
        q, k, v, [0, 2, 5], [0, 3, 6], causal=True, q_start=torch.tensor([0, 0]), return_lse=True
    )
    assert out.shape == (5, 2, 8)
    assert lse.shape == (5, 2)
    torch.testing.assert_close(out[0], v[0].expand(2, 8))  # position 0 sees key 0 alone
    torch.testing.assert_close(out[2], v[3].expand(2, 8))


@pytest.mark.parametrize("offsets", [[0, 4, 3, 5], [1, 5], [0, 4], [0], []])
def test_packed_refuses_offsets(offsets):
    q, k, v = torch.randn(5, 2, 8), torch.randn(5, 1, 8), torch.randn(5, 1, 8)
    with pytest.raises(GqaError, match="cu_seqlens_q"):
        gqa.attention_packed(q, k, v, offsets, [0, 5])
