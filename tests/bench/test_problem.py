"""What a timed attention reads and computes, by hand."""

import pytest
import torch

from gqa.bench.problem import Problem, copies_for_cold_caches, random_inputs
from gqa.errors import GqaError


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("fp32", 2 * 3 * 100 * 2 * 20 * 4), ("bf16", 2 * 3 * 100 * 2 * 20 * 2), ("int8", 2 * 3 * 100 * 2 * (20 + 4))],
)
def test_kv_bytes(dtype, expected):
    problem = Problem(12, 3, 20, 100, batch=2, dtype=dtype)
    assert problem.kv_bytes == expected
    inputs = random_inputs(problem)
    tensors = (inputs.k, inputs.v, inputs.k_scale, inputs.v_scale)
    assert sum(x.nbytes for x in tensors if x is not None) == expected


def test_flops():
    assert Problem(12, 3, 20, 100, batch=2).flops == 2 * 12 * 100 * (2 * 20 + 2 * 20)
    visible = 1 + 2 + 3 + 4 + 5  # query t sees t + 1 keys
    prefill = Problem(12, 3, 20, 5, 5)
    assert prefill.flops == 12 * visible * (2 * 20 + 2 * 20)
    # the forward pass is q k and p v; backward p again, then dv, dp, dq and dk
    assert 2 * Problem(12, 3, 20, 5, 5, backward=True).flops == 7 * prefill.flops


@pytest.mark.parametrize(("bandwidth", "rate", "seconds"), [(1e9, 1e18, 0.2048), (1e18, 1e9, 0.8192)])
def test_the_roofline_is_the_tighter_of_two_limits(bandwidth, rate, seconds):
    problem = Problem(64, 8, 128, 50_000, dtype="bf16")
    assert problem.kv_bytes == 204_800_000
    assert problem.flops == 1_638_400_000
    assert problem.roofline_seconds(bandwidth, 2 * rate) == pytest.approx(seconds)


def test_int8_inputs_stand_for_normal_numbers():
    inputs = random_inputs(Problem(4, 2, 16, 50, dtype="int8"))
    assert inputs.k_scale is not None
    assert inputs.k.dtype == torch.int8
    assert inputs.q.dtype == torch.bfloat16
    assert inputs.k.abs().amax(dim=-1).float().mean() > 126  # each row uses its 255 steps
    assert (inputs.k * inputs.k_scale[..., None]).std() == pytest.approx(1, abs=0.1)


def test_clones_share_nothing():
    inputs = random_inputs(Problem(4, 2, 16, 50, 50, backward=True))
    twin = inputs.clone()
    assert twin.problem is inputs.problem
    for name in ("q", "k", "v", "grad"):
        assert torch.equal(getattr(twin, name), getattr(inputs, name))
        assert getattr(twin, name).data_ptr() != getattr(inputs, name).data_ptr()


@pytest.mark.parametrize(
    ("problem", "cache_bytes", "expected"),
    [
        (Problem(32, 8, 128, 8192, dtype="bf16"), 32 << 20, (3, True)),  # 32 MiB each, more than 64 MiB together
        (Problem(32, 1, 64, 1024, dtype="bf16"), 32 << 20, (257, True)),
        (Problem(32, 32, 128, 32768, dtype="bf16"), 32 << 20, (1, True)),
        (Problem(32, 8, 128, 8192, dtype="bf16"), 4 << 30, (32, False)),  # no more than 1 GiB of copies
        (Problem(32, 8, 128, 2048, 2048), 32 << 20, (1, False)),  # bound by arithmetic
    ],
)
def test_copies_exceed_the_caches_twice(problem, cache_bytes, expected):
    assert copies_for_cold_caches(problem, cache_bytes) == expected


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"kv_heads": 3}, "3 KV heads do not divide 8 query heads"),
        ({"batch": 0}, "batch must be positive"),
        ({"query_tokens": 5}, "decode or a whole prefill"),
        ({"dtype": "fp8"}, "an unknown dtype"),
        ({"dtype": "int8", "backward": True}, "no gradient"),
    ],
)
def test_refuses(fields, says):
    with pytest.raises(GqaError, match=says):
        Problem(**{"query_heads": 8, "kv_heads": 2, "head_dim": 16, "context_tokens": 64, **fields})
