"""The contiguous cache: what it returns, what it weighs, how it grows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa.cache.contiguous import ContiguousCache, ContiguousLayer
from gqa.errors import GqaError


def kv(T, B=2, H=3, D=4, Dv=6, dtype=torch.float32):
    return torch.randn(B, H, T, D).to(dtype), torch.randn(B, H, T, Dv).to(dtype)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.sampled_from([0, 1, 7, 64]))
def test_update_equals_concatenation(steps, capacity):
    cache = ContiguousCache(capacity)
    keys, values = [], []
    for T in steps:
        for layer in range(2):
            k, v = kv(T)
            if layer == 1:
                keys.append(k)
                values.append(v)
            got_k, got_v = cache.update(layer, k, v)
        assert cache.length == cache.layer_length(1) == got_k.shape[2]
        torch.testing.assert_close(got_k, torch.cat(keys, dim=2), rtol=0, atol=0)
        torch.testing.assert_close(got_v, torch.cat(values, dim=2), rtol=0, atol=0)
    tokens = sum(steps)
    assert cache.nbytes_used == 2 * tokens * 2 * 3 * (4 + 6) * 4  # layers, tokens, B, H, D + Dv, bytes
    held = cache.layers[0].capacity
    assert tokens <= held <= max(2 * tokens, capacity)
    assert cache.nbytes_allocated == 2 * held * 2 * 3 * (4 + 6) * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_bytes_in_every_dtype(dtype):
    cache = ContiguousCache()
    cache.update(0, *kv(63, dtype=dtype))
    assert cache.nbytes_used == 63 * 2 * 3 * 10 * dtype.itemsize


def test_a_step_within_capacity_moves_nothing():
    cache = ContiguousCache(capacity=8)
    first, _ = cache.update(0, *kv(3))
    second, _ = cache.update(0, *kv(5))
    assert first.data_ptr() == second.data_ptr()
    third, _ = cache.update(0, *kv(1))
    assert third.data_ptr() != second.data_ptr()
    assert cache.layers[0].capacity == 16
    torch.testing.assert_close(third[:, :, :8], second)


def test_crop_reset_and_select():
    cache = ContiguousCache()
    k, v = kv(5)
    cache.update(0, k, v)
    cache.crop(3)
    got, _ = cache.update(0, k[:, :, :1], v[:, :, :1])
    torch.testing.assert_close(got, torch.cat([k[:, :, :3], k[:, :, :1]], dim=2))
    cache.select(torch.tensor([1, 1, 0]))
    torch.testing.assert_close(cache.layers[0].views()[0], got[[1, 1, 0]])
    cache.reset()
    assert cache.length == cache.nbytes_used == 0
    assert cache.nbytes_allocated > 0
    with pytest.raises(GqaError, match="cropped"):
        cache.crop(1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=12), st.sampled_from([1, 2, 5, 30]), st.sampled_from([0, 7, 99])
)
def test_a_window_keeps_the_latest_tokens(steps, window, capacity):
    layer = ContiguousLayer(capacity, window)
    everything = torch.empty(2, 3, 0, 4)
    for T in steps:
        before = min(everything.shape[2], window)
        k, v = kv(T)
        everything = torch.cat([everything, k], dim=2)
        seen, _ = layer.append(k, v)
        assert torch.equal(seen, everything[:, :, -(before + T) :])
        assert torch.equal(layer.views()[0], everything[:, :, -window:])
        assert layer.length == everything.shape[2]
        assert layer.held == min(layer.length, window)
        assert layer.nbytes_used == layer.held * 2 * 3 * (4 + 6) * 4
        assert layer.capacity <= max(2 * window, window + 9, sum(steps[:1]))


def test_a_window_can_be_cropped_while_it_still_reaches_back():
    layer = ContiguousLayer(window=4)
    k, v = kv(10)
    layer.append(k, v)
    with pytest.raises(GqaError, match="cropped"):
        layer.crop(8)
    layer.crop(9)
    assert torch.equal(layer.views()[0], k[:, :, 6:9])
    layer.reset()
    layer.append(k[:, :, :3], v[:, :, :3])
    layer.crop(1)
    assert torch.equal(layer.views()[0], k[:, :, :1])


def test_an_empty_cache():
    cache = ContiguousCache()
    assert cache.length == cache.nbytes_used == cache.nbytes_allocated == cache.layer_length(3) == 0


def test_blocks_outlive_inference_mode():
    cache = ContiguousCache(capacity=4)
    with torch.inference_mode():
        cache.update(0, *kv(2))
    with torch.no_grad():
        cache.update(0, *kv(9))


def test_refusals():
    cache = ContiguousCache()
    k, v = kv(2)
    with pytest.raises(GqaError, match="differentiated"):
        cache.update(0, k.requires_grad_(), v)
    k = k.detach()
    cache.update(0, k, v)
    for bad_k, bad_v in ((k[:1], v[:1]), (k[:, :2], v), (k, v[..., :5]), (k.half(), v), (k, v[:, :, :1])):
        with pytest.raises(GqaError, match=r"keys|values"):
            cache.update(0, bad_k, bad_v)
    assert cache.length == 2
    with pytest.raises(GqaError, match="capacity"):
        ContiguousCache(-1)
