"""What fits: exact at the edges, to the byte."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqa.config import parse_config
from gqa.plan.cache import kv_bytes
from gqa.plan.capacity import cache_budget_bytes, max_concurrent_requests, max_context
from gqa.plan.engines import Contiguous
from gqa.plan.kv_dtype import kv_dtype

PLAIN, BF16 = Contiguous(), kv_dtype("bf16")
BASE = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
FULL = parse_config(BASE, "full")  # 4 layers * 2 KV heads * 16 numbers * 2 bytes = 256 bytes a token
MIXED = parse_config(
    BASE | {"sliding_window": 10, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}, "mixed"
)  # 64 bytes a token and layer
SLIDING = parse_config(BASE | {"sliding_window": 10, "layer_types": ["sliding_attention"] * 4}, "sliding")


def test_budget_is_exact():
    assert cache_budget_bytes(1000, 0.9, 100) == 800
    assert cache_budget_bytes(10**18 + 10, 0.9, 0) == 9 * 10**17 + 9  # a float product would be off
    assert cache_budget_bytes(1000, 0.9, 901) == -1


def test_requests_at_the_edge():
    assert max_concurrent_requests(PLAIN, FULL, 10, BF16, 2560) == 1
    assert max_concurrent_requests(PLAIN, FULL, 10, BF16, 2559) == 0
    assert max_concurrent_requests(PLAIN, FULL, 10, BF16, 5120) == 2
    assert max_concurrent_requests(PLAIN, FULL, 10, BF16, -1) == 0


def test_longest_context_at_the_edge():
    assert max_context(PLAIN, FULL, 1, BF16, 2560) == 10
    assert max_context(PLAIN, FULL, 1, BF16, 2559) == 9
    assert max_context(PLAIN, FULL, 2, BF16, 2560) == 5
    assert max_context(PLAIN, FULL, 1, BF16, 255) == 0
    assert max_context(PLAIN, FULL, 1, BF16, -5) == 0


def test_longest_context_beyond_a_window():
    # 10 tokens fill the windows at 10 * 256 = 2560 bytes; each further one costs the full layer's 64.
    assert max_context(PLAIN, MIXED, 1, BF16, 2560 + 64 * 7) == 17
    assert max_context(PLAIN, MIXED, 1, BF16, 2560 + 64 * 7 - 1) == 16
    assert max_context(PLAIN, MIXED, 1, BF16, 2559) == 9


def test_all_sliding_has_no_limit_once_the_windows_fit():
    assert max_context(PLAIN, SLIDING, 1, BF16, 2560) is None
    assert max_context(PLAIN, SLIDING, 1, BF16, 2559) == 9


@given(st.sampled_from([FULL, MIXED, SLIDING]), st.integers(1, 5), st.integers(-10, 10**6))
def test_the_longest_context_fits_and_one_more_does_not(shape, batch, budget):
    longest = max_context(PLAIN, shape, batch, BF16, budget)
    if longest is None:
        assert kv_bytes(shape, 10**9, batch, BF16) <= budget
    else:
        assert longest == 0 or kv_bytes(shape, longest, batch, BF16) <= budget
        assert kv_bytes(shape, longest + 1, batch, BF16) > budget


@pytest.mark.parametrize("context", [1, 9, 10, 11, 100])
def test_as_many_requests_as_fit(context):
    count = max_concurrent_requests(PLAIN, MIXED, context, BF16, 10**5)
    assert kv_bytes(MIXED, context, count, BF16) <= 10**5 < kv_bytes(MIXED, context, count + 1, BF16)
