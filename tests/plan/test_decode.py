"""The decode bound, worked by hand on a device of round numbers."""

import pytest

from gqa.config import parse_config
from gqa.hardware import Device
from gqa.plan.decode import decode_bound
from gqa.plan.flops import attention_core_flops, decode_work
from gqa.plan.kv_dtype import kv_dtype
from gqa.plan.parameters import active_parameters

BF16 = kv_dtype("bf16")
# hidden 64, 8 query heads of 8, 2 KV heads, 2 layers, MLP of 100, vocabulary of 50, untied.
SHAPE = parse_config(
    {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 100,
        "vocab_size": 50,
    },
    "hand",
)
# A layer: q and o 64*64 each, k and v 64*16 each, MLP 3*64*100, 2 norms of 64: 8192 + 2048 + 19200 + 128 = 29,568.
# A step reads 2 layers, the last norm and the output matrix 50*64: 59,136 + 64 + 3200 = 62,400 parameters.
READ = 62_400


def device(bandwidth, flops):
    return Device("round", 1 << 30, "", bandwidth, flops, "bf16", {})


def test_flops_by_hand():
    assert active_parameters(SHAPE) == READ
    # Scores and sums: 2 layers * 8 query heads * 2 FLOPs * (8 + 8) dims * 10 tokens * 3 requests.
    assert attention_core_flops(SHAPE, 10, 3) == 2 * 8 * 2 * 16 * 10 * 3
    work = decode_work(SHAPE, 10, 3)
    assert work is not None
    assert work.total == 3 * 2 * READ + 15_360
    # The KV heads do not change the work of the core, only what is read for it.
    assert attention_core_flops(SHAPE.with_kv_heads(1), 10, 3) == 15_360


def test_bound_by_bandwidth():
    # KV: 2 layers * 2 KV heads * 16 * 2 bytes * 10 tokens * 3 requests = 3840 bytes; weights 124,800 bytes.
    bound = decode_bound(SHAPE, 10, 3, BF16, 2, device(bandwidth=1e6, flops=1e15))
    assert bound is not None
    assert bound.bytes_moved == 124_800 + 3840
    assert bound.seconds == pytest.approx(0.12864)
    assert bound.limit == "bandwidth"


def test_bound_by_compute():
    bound = decode_bound(SHAPE, 10, 3, BF16, 2, device(bandwidth=1e15, flops=1e6))
    assert bound is not None
    assert bound.seconds == pytest.approx(0.38976)  # 6 * 62,400 + 15,360 FLOPs
    assert bound.limit == "compute"


def test_tied_output_matrix_is_read_all_the_same():
    tied = parse_config(
        {
            "model_type": "llama",
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "intermediate_size": 100,
            "vocab_size": 50,
            "tie_word_embeddings": True,
        },
        "tied",
    )
    assert active_parameters(tied) == READ


def test_unknown_parameters_give_no_bound():
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}
    assert decode_bound(parse_config(config, "x"), 10, 1, BF16, 2, device(1e9, 1e9)) is None
