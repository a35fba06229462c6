"""The int8 cache: its rounding, what it weighs, and that attention reads it as it is."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gqa
from gqa.cache.int8 import Int8Cache, Int8Layer, quantise
from gqa.errors import GqaError


def kv(T, B=2, H=3, D=4, Dv=6, dtype=torch.float32):
    return torch.randn(B, H, T, D).to(dtype), torch.randn(B, H, T, Dv).to(dtype)


def numbers(stored):
    return stored.data.double() * stored.scale.double()[..., None]


NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=200, deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=6), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_no_number_is_off_by_more_than_half_a_step(row, dtype):
    x = torch.tensor(row).clamp(-3e38, 3e38).to(dtype)
    x = x.nan_to_num()  # what float16 cannot hold
    q, scale = quantise(x)
    assert q.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert scale.isfinite()
    assert int(q.min()) >= -127
    step = float(scale)
    bound = step / 2 + 127 * 2.0**-24 * step  # the quotient's own rounding
    assert float((x.double() - q.double() * step).abs().max()) <= bound
    assert step <= max(float(x.abs().max()) / 127 * (1 + 2.0**-23), torch.finfo(torch.float32).tiny)


def test_a_row_of_one_size_is_exact_and_zeros_are_zeros():
    x = torch.tensor([[3.0, -3.0, 3.0], [0.0, 0.0, 0.0], [1e-45, 0.0, 0.0]])
    q, scale = quantise(x)
    assert q.tolist() == [[127, -127, 127], [0, 0, 0], [0, 0, 0]]
    assert scale.isfinite().all()
    torch.testing.assert_close(q[0] * scale[0], x[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_what_is_not_finite_does_not_pass_for_a_number(bad):
    x = torch.randn(4, 5, dtype=torch.float64)
    x[2, 3] = bad
    q, scale = quantise(x)
    back = q * scale[:, None]
    assert not back[2].isfinite().any()
    assert (back[[0, 1, 3]] - x[[0, 1, 3]]).abs().max() <= scale[[0, 1, 3]].max() / 2


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=10),
    st.sampled_from([None, 1, 5, 30]),
    st.sampled_from([0, 7, 64]),
)
def test_each_row_is_rounded_once(steps, window, capacity):
    """What is held is what its tokens gave when they came, wherever growth and windows have moved it."""
    layer = Int8Layer(capacity, window)
    k_held, v_held = torch.empty(2, 3, 0, 4), torch.empty(2, 3, 0, 6)
    for number, T in enumerate(steps, start=1):
        k, v = kv(T)
        ahead = layer.span(T)[0]
        k_held, v_held = torch.cat([k_held, k], dim=2), torch.cat([v_held, v], dim=2)
        seen = layer.append(k, v)
        held = layer.stored()
        for stored, tokens in ((seen, ahead), (held, layer.held)):
            for one, everything in zip(stored, (k_held, v_held), strict=True):
                q, scale = quantise(everything[:, :, -tokens:])
                assert torch.equal(one.data, q)
                assert one.scale is not None
                assert torch.equal(one.scale, scale)
                assert one.block_table is one.lengths is None
        assert layer.length == sum(steps[:number])
    kept = layer.held
    assert kept == min(sum(steps), window or sum(steps))
    assert layer.nbytes_used == kept * 2 * 3 * (4 + 6 + 2 * 4)  # tokens, B, H, int8 D + Dv and two float32 scales
    assert layer.nbytes_allocated == layer.capacity * 2 * 3 * (4 + 6 + 2 * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("G", "D", "Dv", "S"), [(1, 60, 60, 63), (3, 16, 24, 111), (7, 64, 64, 1)])
def test_attention_over_it_equals_attention_over_the_numbers_held(dtype, G, D, Dv, S):
    torch.manual_seed(0)
    cache = Int8Cache(capacity=128)
    k, v = cache.update(0, *kv(S, D=D, Dv=Dv, dtype=dtype))
    q = torch.randn(2, 3 * G, 2, D).to(dtype)
    got = gqa.attention(q, k.data, v.data, k_scale=k.scale, v_scale=v.scale)
    want = gqa.attention(q.double(), numbers(k), numbers(v), impl="reference")
    plain = gqa.attention(q, numbers(k).to(dtype), numbers(v).to(dtype), impl="reference")
    tolerance = 2 * (plain.double() - want).abs().max() + 4 * torch.finfo(dtype).eps
    assert (got.double() - want).abs().max() <= tolerance


def test_crop_select_and_reset():
    cache = Int8Cache()
    k, v = kv(5)
    for layer in range(2):
        cache.update(layer, k, v)
    q, scale = quantise(k)
    cache.crop(3)
    cache.select(torch.tensor([1, 1, 0]))
    held, _ = cache.layer(1).stored()
    assert torch.equal(held.data, q[[1, 1, 0], :, :3])
    assert held.scale is not None
    assert torch.equal(held.scale, scale[[1, 1, 0], :, :3])
    assert (cache.batch, cache.length) == (3, 3)
    cache.update(0, k[[0, 0, 0]], v[[0, 0, 0]])
    cache.reset()
    assert cache.length == cache.nbytes_used == 0
    assert cache.nbytes_allocated > 0


def test_windows_are_per_layer():
    cache = Int8Cache(windows=(4, None))
    for layer in range(3):
        cache.update(layer, *kv(10))
    assert [layer.held for layer in cache.layers] == [4, 10, 10]


def test_refusals():
    cache = Int8Cache()
    k, v = kv(2)
    with pytest.raises(GqaError, match="differentiated"):
        cache.update(0, k.requires_grad_(), v)
    k = k.detach()
    with pytest.raises(GqaError, match="floating"):
        cache.update(0, k.to(torch.int8), v.to(torch.int8))
    cache.update(0, k, v)
    for bad_k, bad_v in ((k[:1], v[:1]), (k[:, :2], v), (k, v[..., :5]), (k.half(), v.half()), (k, v[:, :, :1])):
        with pytest.raises(GqaError, match="keys and values"):
            cache.update(0, bad_k, bad_v)
    assert cache.length == 2
