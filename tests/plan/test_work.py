"""Work, traffic and training, by hand and against brute force."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqa.config import parse_config
from gqa.hardware import Device
from gqa.plan.crossover import overtaking_batch, overtaking_context
from gqa.plan.decode import decode_bound, decode_kv_traffic, prefill_bound
from gqa.plan.flops import attention_core_flops, decode_work, prefill_core_flops, prefill_work
from gqa.plan.kv_dtype import kv_dtype
from gqa.plan.training import training_flops_per_token, training_state_bytes
from gqa.plan.weights import Stored, Weights
from gqa.source import open_source

BF16 = kv_dtype("bf16")
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 100,
    "vocab_size": 50,
}
SHAPE = parse_config(LLAMA, "hand")
# A layer: q and o 64*64 each, k and v 64*16 each: 10,240 parameters; MLP 19,200 and norms 128. Output matrix 3200.
PROJECTIONS, REST, OUTPUT = 2 * 10_240, 2 * 19_328 + 64, 3200
MOE = parse_config(LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}, "experts")


def bundled(name):
    source = open_source(name)
    return parse_config(source.config, source.name)


def device(bandwidth, flops):
    return Device("round", 1 << 30, "", bandwidth, flops, "bf16", {})


def test_decode_work_by_hand():
    work = decode_work(SHAPE, 10, 3)
    assert work is not None
    assert work.projections == 3 * 2 * PROJECTIONS
    assert work.core == 2 * 8 * 2 * 16 * 10 * 3
    assert work.rest == 3 * 2 * (REST + OUTPUT)


def test_prefill_work_by_hand():
    work = prefill_work(SHAPE, 10, 3)
    assert work is not None
    assert work.projections == 30 * 2 * PROJECTIONS
    # 10 * 11 / 2 pairs of query and key, 2 FLOPs * (8 + 8) dims * 8 heads * 2 layers * 3 requests.
    assert work.core == 55 * 2 * 16 * 8 * 2 * 3
    assert work.rest == 30 * 2 * REST + 3 * 2 * OUTPUT
    # The dial turns projections only.
    one = prefill_work(SHAPE.with_kv_heads(1), 10, 3)
    assert one is not None
    assert (one.core, one.rest) == (work.core, work.rest)
    assert work.projections - one.projections == 30 * 2 * 2 * (2 * 64 * 8)


@given(
    st.integers(1, 60),
    st.sampled_from(
        [
            LLAMA,
            LLAMA | {"model_type": "mistral", "sliding_window": 7},
            LLAMA | {"model_type": "llama4_text", "attention_chunk_size": 7, "num_hidden_layers": 4, "head_dim": 8},
            LLAMA | {"model_type": "minimax", "num_hidden_layers": 4},
        ]
    ),
)
def test_a_prompt_is_the_sum_of_its_tokens(tokens, config):
    """Causal work of a prompt: what each token does on those it sees, one after another."""
    shape = parse_config(config, "x")
    expected = 0
    for t in range(1, tokens + 1):
        for layer in shape.layers:
            window = layer.window or t
            seen = (t - 1) % window + 1 if layer.kind == "chunked" else min(t, window)
            expected += 2 * layer.query_heads * (layer.head_dim + layer.v_head_dim) * seen
            expected += 4 * layer.state.recurrent if layer.state else 0
    assert prefill_core_flops(shape, tokens) == expected


def test_latent_attention_runs_prompts_expanded():
    # DeepSeek-V3: a token on the latent works on 576 + 512 numbers per head, in a prompt on 128 + 64 and 128.
    shape = bundled("deepseek-v3")
    assert attention_core_flops(shape, 1, 1) == 61 * 128 * 2 * (576 + 512)
    assert prefill_core_flops(shape, 1) == 61 * 128 * 2 * (192 + 128)


def test_an_indexer_reads_what_it_selects():
    config = {"model_type": "deepseek_v32", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8}
    shape = parse_config(config, "indexed")
    # 2048 latent rows of 576 and 5000 keys of 128 numbers, 2 bytes each.
    assert decode_kv_traffic(shape, 5000, 1, BF16) == 2 * (2048 * 576 + 5000 * 128)
    assert decode_kv_traffic(shape, 2000, 1, BF16) == 2 * 2000 * (576 + 128)
    assert attention_core_flops(shape, 5000, 1) == attention_core_flops(shape, 2048, 1)


def test_states_are_read_and_written():
    shape = parse_config({"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 3, "vocab_size": 9}, "m")
    # Per layer 16 channels of 4 taps in 2 bytes, 16 * 16 numbers in fp32.
    assert decode_kv_traffic(shape, 1000, 2, BF16) == 2 * 2 * 3 * (16 * 4 * 2 + 256 * 4)


def test_prefill_bound_by_hand():
    work = prefill_work(SHAPE, 10, 3)
    assert work is not None
    computing = prefill_bound(SHAPE, 10, 3, BF16, 2, device(1e15, 1e6))
    assert computing is not None
    assert (computing.limit, computing.seconds) == ("compute", pytest.approx(work.total / 1e6))
    moving = prefill_bound(SHAPE, 10, 3, BF16, 2, device(1e6, 1e15))
    assert moving is not None
    assert moving.bytes_moved == 2 * (PROJECTIONS + REST + OUTPUT) + 3840
    assert (moving.limit, moving.seconds) == ("bandwidth", pytest.approx(moving.bytes_moved / 1e6))


def test_devices_share_bytes_and_work():
    one = decode_bound(SHAPE, 10, 3, BF16, 2, device(1e6, 1e15))
    two = decode_bound(SHAPE, 10, 3, BF16, 2, device(1e6, 1e15), ranks=2)
    four = decode_bound(SHAPE, 10, 3, BF16, 2, device(1e6, 1e15), ranks=4)
    assert one
    assert two
    assert four
    assert two.seconds == pytest.approx(one.seconds / 2)
    # Four devices on two KV heads: each keeps a whole head, as two do.
    assert four.kv_bytes == two.kv_bytes
    assert four.weight_bytes == pytest.approx(one.weight_bytes / 4)


@pytest.mark.parametrize("shape", [SHAPE, MOE, SHAPE.with_kv_heads(1)])
@pytest.mark.parametrize("batch", [1, 7])
def test_overtaking_is_where_the_cache_gets_larger(shape, batch):
    context = overtaking_context(shape, batch, BF16, 2)
    assert context is not None
    below, above = (decode_bound(shape, c, batch, BF16, 2, device(1, 1)) for c in (context - 1, context))
    assert below
    assert above
    assert below.kv_bytes <= below.weight_bytes
    assert above.kv_bytes > above.weight_bytes
    requests = overtaking_batch(shape, 100, BF16, 2)
    assert requests is not None
    below, above = (decode_bound(shape, 100, b, BF16, 2, device(1, 1)) for b in (requests - 1, requests))
    assert above
    assert above.kv_bytes > above.weight_bytes
    assert requests == 1 or (below and below.kv_bytes <= below.weight_bytes)


def test_windows_may_never_overtake():
    shape = parse_config(LLAMA | {"model_type": "mistral", "sliding_window": 4}, "x")
    assert overtaking_context(shape, 1, BF16, 2) is None


def test_training_by_hand():
    parameters = PROJECTIONS + REST + 2 * OUTPUT
    shape = parse_config(LLAMA | {"tie_word_embeddings": False}, "x")
    assert training_state_bytes(shape) == 16 * parameters
    # Every token through every matrix and the output, and half the square of the window in the core, three times.
    per_token = 2 * (PROJECTIONS + REST + OUTPUT) + 55 * 2 * 16 * 8 * 2 / 10
    assert training_flops_per_token(shape, 10) == pytest.approx(3 * per_token)


def test_weights_as_stored():
    # 1000 bytes of which 200 are K and V projections of 2 heads: at 8 heads 800, at 1 head 100.
    weights = Weights(SHAPE, 2, Stored(1000, 200))
    assert weights.bytes_of(SHAPE) == 1000
    assert weights.bytes_of(SHAPE.with_kv_heads(8)) == 1600
    assert weights.bytes_of(SHAPE.with_kv_heads(1)) == 900
    assert weights.of_rank(SHAPE, 2) == 500
    assert weights.of_rank(SHAPE, 4) == (1000 + 200) / 4  # each of two heads is kept twice
    assert Weights(SHAPE, 2).bytes_of(SHAPE) == 2 * (PROJECTIONS + REST + 2 * OUTPUT)
    assert Weights(SHAPE, None).bytes_of(SHAPE) is None
