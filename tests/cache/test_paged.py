"""The paged cache: a batch of sequences over a pool of blocks, its own or a shared one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gqa
from gqa.cache.contiguous import ContiguousCache
from gqa.cache.int8 import Int8Cache
from gqa.cache.paged import PagedCache
from gqa.cache.pool import BlockPool
from gqa.cache.stored import Stored
from gqa.errors import GqaError


def kv(T, B=2, H=3, D=4, Dv=6, dtype=torch.float32):
    return torch.randn(B, H, T, D).to(dtype), torch.randn(B, H, T, Dv).to(dtype)


def numbers(data, scale):
    return data if scale is None else data * scale[..., None]


def dense(stored):
    """(B, H, S, D) of sequences that are equally long."""
    (length,) = set(stored.lengths.tolist())
    values = numbers(stored.data, stored.scale)
    return values[stored.block_table].transpose(1, 2).flatten(2, 3)[:, :, :length]


def plain(held):
    """(B, H, S, D) of what a cache without blocks returned."""
    return numbers(held.data, held.scale) if isinstance(held, Stored) else held


def same(paged, contiguous):
    """Both hold the same, bit for bit."""
    assert paged.length == contiguous.length
    for layer in range(len(contiguous.layers)):
        for stored, want in zip(paged.layer(layer).stored(), contiguous.layer(layer).stored(), strict=True):
            assert torch.equal(dense(stored), plain(want))


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.sampled_from([1, 1, 1, 2, 5, 16, 17, 40])),
        st.tuples(st.just("select"), st.lists(st.integers(0, 1), min_size=1, max_size=4)),
        st.tuples(st.just("crop"), st.floats(0, 1)),
        st.tuples(st.just("reset"), st.none()),
    ),
    min_size=1,
    max_size=15,
)


@settings(max_examples=60, deadline=None)
@given(STEPS, st.sampled_from([0, 1, 64]), st.sampled_from([1, 3, 16]), st.sampled_from([None, torch.int8]))
def test_equals_the_cache_without_blocks(steps, capacity, block, dtype):
    pool = BlockPool(0, block=block, grows=True, dtype=dtype)
    paged, contiguous, batch = PagedCache(capacity, pool=pool), Int8Cache() if dtype else ContiguousCache(), 2
    for step, value in [("append", 3), *steps]:
        if step == "append":
            for layer in range(2):
                k, v = kv(value, B=batch)
                got, want = paged.update(layer, k, v), contiguous.update(layer, k, v)
                for stored, expected in zip(got, want, strict=True):
                    assert torch.equal(dense(stored), plain(expected))
        elif step == "select":
            chosen = torch.tensor([index % batch for index in value])
            batch = len(value)
            paged.select(chosen)
            contiguous.select(chosen)
        elif step == "crop":
            length = int(value * paged.length)
            paged.crop(length)
            contiguous.crop(length)
        else:
            paged.reset()
            contiguous.reset()
            assert paged.nbytes_used == 0
            paged.update(0, *kv(0, B=batch))
            paged.update(1, *kv(0, B=batch))
        same(paged, contiguous)
        assert paged.batch == contiguous.batch == batch
        one_sequence = -(-paged.length // block) * pool.block_bytes
        assert one_sequence <= paged.nbytes_used <= batch * one_sequence
        assert paged.nbytes_used == pool.nbytes_used <= paged.nbytes_allocated
    paged.reset()
    assert pool.free_blocks == pool.num_blocks


def test_weighs_whole_blocks_and_shared_ones_once():
    cache = PagedCache(capacity=40)
    for layer in range(2):
        cache.update(layer, *kv(17))
    block = 2 * 16 * 3 * (4 + 6) * 4  # layers, tokens, H, D + Dv, bytes
    assert cache.pool.block_bytes == block
    assert cache.nbytes_used == 2 * 2 * block  # 17 tokens of two sequences
    assert cache.nbytes_allocated == 2 * 3 * block  # 40 tokens
    cache.select(torch.tensor([0, 0, 0]))
    assert cache.nbytes_used == 2 * block
    cache.update(0, *kv(1, B=3))  # the first blocks stay shared, two of the three need the second for themselves
    assert cache.nbytes_used == 4 * block


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_int8_blocks_weigh_and_are_read_with_their_scales(impl):
    cache = PagedCache(pool=BlockPool(0, grows=True, dtype=torch.int8))
    k, v = cache.update(0, *kv(35, D=16))
    assert (k.data.dtype, v.data.dtype) == (torch.int8, torch.int8)
    assert cache.pool.block_bytes == 16 * 3 * (16 + 6 + 2 * 4)  # tokens, H, int8 D + Dv and two float32 scales
    assert cache.nbytes_used == 2 * 3 * cache.pool.block_bytes
    q = torch.randn(2, 6, 2, 16)
    got = gqa.attention(
        q, k.data, v.data, k_scale=k.scale, v_scale=v.scale, block_table=k.block_table, kv_lengths=k.lengths, impl=impl
    )
    want = gqa.attention(q.double(), dense(k).double(), dense(v).double(), impl="reference")
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


def test_a_reordering_copies_nothing():
    cache = PagedCache(capacity=64)
    cache.update(0, *kv(20))
    before = cache.layer(0).stored()[0]
    cache.select(torch.tensor([1, 0]))
    after = cache.layer(0).stored()[0]
    assert after.data.data_ptr() == before.data.data_ptr()
    assert before.block_table is not None
    assert after.block_table is not None
    assert torch.equal(after.block_table, before.block_table[[1, 0]])


def test_caches_share_a_pool_and_a_prefix():
    pool = BlockPool(6)
    prompt = PagedCache(pool=pool)
    k, v = kv(20, B=1)
    prompt.update(0, k, v)
    branches = [prompt.fork(), prompt.fork()]
    new = [kv(2, B=1), kv(9, B=1)]
    for branch, (new_k, new_v) in zip(branches, new, strict=True):
        seen = branch.update(0, new_k, new_v)
        assert torch.equal(dense(seen[0]), torch.cat([k, new_k], dim=2))
        assert torch.equal(dense(seen[1]), torch.cat([v, new_v], dim=2))
    assert [cache.length for cache in (prompt, *branches)] == [20, 22, 29]
    assert pool.free_blocks == 6 - 2 - 1 - 1
    prompt.reset()
    assert torch.equal(dense(branches[0].layer(0).stored()[0])[:, :, :20], k)
    for branch in branches:
        branch.reset()
    assert pool.free_blocks == 6


def test_a_full_pool_refuses_the_step_and_loses_nothing():
    pool = BlockPool(3, block=4)
    cache, other = PagedCache(pool=pool), PagedCache(pool=pool)
    held = [kv(6, B=1) for _ in range(2)]
    for layer, (k, v) in enumerate(held):
        cache.update(layer, k, v)
    with pytest.raises(GqaError, match="full") as caught:
        cache.update(0, *kv(7, B=1))
    assert "2 more blocks of 4 tokens" in str(caught.value)
    assert "1 free of 3" in str(caught.value)
    with pytest.raises(GqaError, match="full"):
        other.update(0, *kv(1, B=2))
    assert pool.free_blocks == 1
    for layer, (k, v) in enumerate(held):
        assert torch.equal(dense(cache.layer(layer).stored()[0]), k)
        assert torch.equal(dense(cache.layer(layer).stored()[1]), v)
    k, v = kv(3, B=1)
    assert torch.equal(
        dense(other.update(0, k, v)[0]), k
    )  # one sequence instead of two: the refused ones left no trace
    assert pool.free_blocks == 0


def test_layers_go_forward_together():
    cache = PagedCache()
    for layer in range(2):
        cache.update(layer, *kv(3))
    cache.update(0, *kv(1))  # a forward that was cut short before its second layer
    assert (cache.length, cache.layer_length(0), cache.layer_length(5)) == (3, 4, 0)
    cache.update(0, *kv(1))
    with pytest.raises(GqaError, match="go forward together"):
        cache.update(1, *kv(1))
    cache.crop(3)
    for layer in range(2):
        cache.update(layer, *kv(2))
    assert cache.length == 5


def test_refusals():
    cache = PagedCache()
    k, v = kv(2)
    with pytest.raises(GqaError, match="differentiated"):
        cache.update(0, k.requires_grad_(), v)
    k = k.detach()
    cache.update(0, k, v)
    for bad_k, bad_v in ((k[:, :2], v[:, :2]), (k, v[..., :5]), (k.half(), v.half()), (k, v[:, :, :1])):
        with pytest.raises(GqaError, match="keys and values"):
            cache.update(0, bad_k, bad_v)
    with pytest.raises(GqaError, match="number of sequences"):
        cache.update(0, k[:1], v[:1])
    with pytest.raises(GqaError, match="cropped"):
        cache.crop(3)
    with pytest.raises(GqaError, match="capacity"):
        PagedCache(-1)
    with pytest.raises(GqaError, match="in int8"):
        BlockPool(1, dtype=torch.float16)
    rounding = PagedCache(pool=BlockPool(1, dtype=torch.int8))
    with pytest.raises(GqaError, match="floating"):
        rounding.update(0, k.to(torch.int8), v.to(torch.int8))
    assert cache.length == 2
    assert cache.pool.free_blocks == cache.pool.num_blocks - 2


def ragged(pool, *lengths):
    """A cache of sequences of these lengths, and per layer and sequence their (k, v)."""
    joined, held = PagedCache(pool=pool), []
    for length in lengths:
        one, tensors = PagedCache(pool=pool), [kv(length, B=1) for _ in range(2)]
        for layer, (k, v) in enumerate(tensors):
            one.update(layer, k, v)
        joined.join(one)
        assert (one.batch, one.length, one.layer_length(0)) == (0, 0, 0)
        held.append(tensors)
    return joined, held


def rows(stored):
    """Per sequence (1, H, length, D)."""
    return [
        dense(Stored(stored.data, stored.scale, stored.block_table[row : row + 1], stored.lengths[row : row + 1]))
        for row in range(len(stored.lengths))
    ]


def holds(cache, held):
    for layer in range(2):
        for side in (0, 1):
            got = rows(cache.layer(layer).stored()[side])
            for one, tensors in zip(got, held, strict=True):
                assert torch.equal(one, tensors[layer][side])


def test_sequences_of_different_lengths_go_forward_together():
    pool = BlockPool(20, block=4)
    cache, held = ragged(pool, 9, 3, 4)
    assert (cache.lengths, cache.length, cache.layer(0).span(1)) == ([9, 3, 4], 9, (10, 0))
    for _ in range(6):
        for layer in range(2):
            k, v = kv(1, B=3)
            seen = cache.update(layer, k, v)
            assert seen[0].ragged
            for row, tensors in enumerate(held):
                tensors[layer] = tuple(
                    torch.cat([x, new[row : row + 1]], dim=2) for x, new in zip(tensors[layer], (k, v), strict=True)
                )
        holds(cache, held)
    assert cache.lengths == [15, 9, 10]
    with pytest.raises(GqaError, match="one token per step"):
        cache.update(0, *kv(2, B=3))
    fork = cache.fork()
    fork.crop(7)  # the longest loses 8
    assert fork.lengths == [7, 1, 2]
    with pytest.raises(GqaError, match="cropped"):
        fork.crop(5)  # the shortest has not so many to lose
    fork.reset()
    holds(cache, held)
    cache.select(torch.tensor([1, 2]))  # the longest goes
    assert (cache.length, cache.layer_length(1), cache.lengths) == (10, 10, [9, 10])
    holds(cache, held[1:])
    cache.select(torch.tensor([0, 0]))
    assert not cache.layer(0).stored()[0].ragged
    assert cache.length == 9
    cache.select(torch.tensor([]).long())
    assert (cache.batch, cache.length, pool.free_blocks) == (0, 0, 20)


def test_a_longest_sequence_that_goes_amid_a_step_leaves_the_step_to_be_finished():
    cache, _ = ragged(BlockPool(20, block=4), 9, 3)
    k, v = kv(1)
    cache.update(0, k, v)
    other = PagedCache(pool=cache.pool)
    with pytest.raises(GqaError, match="amid a step"):
        other.join(cache)
    cache.select(torch.tensor([1]))
    assert (cache.layer_length(0), cache.layer_length(1)) == (4, 3)


def test_caches_of_other_pools_do_not_join():
    cache, _ = ragged(BlockPool(4, block=4), 3)
    for other in (cache, PagedCache()):
        with pytest.raises(GqaError, match="share a pool"):
            cache.join(other)
    assert cache.lengths == [3]
