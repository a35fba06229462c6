"""config.json -> shape: every spelling, every kind of layer, and every way to be wrong."""

import contextlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gqa.config import LayerShape, parse_config
from gqa.config.parse import model_types as known_types
from gqa.errors import GqaError

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 100,
    "vocab_size": 99,
    "max_position_embeddings": 512,
    "torch_dtype": "float16",
}


def without(*keys):
    return {key: value for key, value in LLAMA.items() if key not in keys}


def test_a_plain_llama():
    shape = parse_config(LLAMA, "small")
    assert shape.layers == (LayerShape("full", 8, 2, 8, 8),) * 4
    assert (shape.name, shape.model_type, shape.hidden, shape.vocab) == ("small", "llama", 64, 99)
    assert (shape.intermediate, shape.context, shape.tied_embeddings) == (100, 512, False)
    assert (shape.weight_dtype, shape.quantised) == ("fp16", None)


def test_absent_kv_heads_are_multi_head():
    assert parse_config(without("num_key_value_heads"), "x").kv_heads == 8
    assert parse_config(LLAMA | {"num_key_value_heads": None}, "x").kv_heads == 8


def test_explicit_head_dim_wins_over_hidden_by_heads():
    assert parse_config(LLAMA | {"head_dim": 128}, "x").head_dim == 128
    assert parse_config(LLAMA | {"head_dim": None}, "x").head_dim == 8
    with pytest.raises(GqaError, match="gives no head_dim and 8 heads do not divide hidden_size 63"):
        parse_config(LLAMA | {"hidden_size": 63}, "x")


def test_older_spellings():
    gpt2 = parse_config({"model_type": "gpt2", "n_layer": 2, "n_embd": 48, "n_head": 6, "n_positions": 32}, "x")
    assert (gpt2.kv_heads, gpt2.head_dim, gpt2.context, gpt2.intermediate) == (6, 8, 32, 192)
    falcon = {"model_type": "falcon", "num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 6}
    # The hub's Falcon-7B says 71 KV heads and multi_query: the latter decides.
    assert parse_config(falcon | {"num_kv_heads": 6, "multi_query": True}, "x").kv_heads == 1
    assert parse_config(falcon | {"n_head_kv": 3, "new_decoder_architecture": True}, "x").kv_heads == 3
    assert parse_config(falcon | {"multi_query": False}, "x").kv_heads == 6


@pytest.mark.parametrize("nest", ["text_config", "llm_config"])
def test_nested_text_config(nest):
    nested = {"model_type": "some_vlm", nest: without("torch_dtype"), "dtype": "bfloat16", "vision_config": {"x": 1}}
    shape = parse_config(nested, "vlm")
    assert (shape.model_type, shape.kv_heads, shape.weight_dtype) == ("llama", 2, "bf16")


def kinds(config):
    return "".join(layer.kind[0] for layer in parse_config(config, "x").layers)


def of_type(model_type, **more):
    return LLAMA | {"model_type": model_type, "sliding_window": 16, "num_hidden_layers": 6, **more}


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (of_type("mistral"), "ssssss"),
        (of_type("mistral", sliding_window=None), "ffffff"),
        (of_type("qwen2"), "ffffff"),  # use_sliding_window is off unless said
        (of_type("qwen2", use_sliding_window=True, max_window_layers=4), "ffffss"),
        (of_type("qwen2", use_sliding_window=False, max_window_layers=0), "ffffff"),
        (of_type("gemma2"), "sfsfsf"),
        (of_type("gemma3_text"), "sssssf"),
        (of_type("gemma3_text", sliding_window_pattern=3), "ssfssf"),
        (of_type("gpt_oss", num_local_experts=4), "sfsfsf"),
        (of_type("anything", layer_types=["sliding_attention", "full_attention"] * 3), "sfsfsf"),
        (of_type("mistral", layer_types=["full_attention"] * 6), "ffffff"),
        (of_type("qwen2", use_sliding_window=False, layer_types=["sliding_attention"] * 6), "ffffff"),
    ],
)
def test_which_layers_slide(config, layers):
    assert kinds(config) == layers
    windows = {layer.window for layer in parse_config(config, "x").layers if layer.kind == "sliding"}
    assert windows <= {16}


def layers_of(**config):
    return parse_config(without("num_key_value_heads") | config, "x").layers


def test_chunked_attention():
    # Llama 4: every fourth layer has no rotary embedding and sees everything.
    layers = layers_of(model_type="llama4_text", attention_chunk_size=32)
    assert "".join(layer.kind[0] for layer in layers) == "cccf"
    assert [layer.window for layer in layers] == [32, 32, 32, None]
    named = layers_of(model_type="llama4_text", attention_chunk_size=32, no_rope_layers=[0, 1, 1, 0])
    assert "".join(layer.kind[0] for layer in named) == "fccf"
    assert all(layer.kind == "full" for layer in layers_of(model_type="llama4_text", attention_chunk_size=None))


def test_layers_that_share_a_cache():
    layers = layers_of(model_type="gemma3n_text", num_kv_shared_layers=2, num_hidden_layers=5)
    assert [layer.shares_cache for layer in layers] == [False, False, False, True, True]
    # Hunyuan-Large: cross-layer attention in pairs.
    pairs = layers_of(model_type="hunyuan", use_cla=True, cla_share_factor=2)
    assert [layer.shares_cache for layer in pairs] == [False, True, False, True]
    assert not any(layer.shares_cache for layer in layers_of(model_type="hunyuan", use_cla=False, cla_share_factor=2))


def test_heads_that_differ_between_layers():
    # MiMo-V2-Flash: zeros are full layers; the sliding ones have more KV heads.
    mimo = layers_of(
        model_type="mimo_v2_flash",
        hybrid_layer_pattern=[0, 1, 1, 1],
        sliding_window=128,
        num_key_value_heads=4,
        swa_num_key_value_heads=8,
        head_dim=24,
        v_head_dim=16,
    )
    assert [(layer.kind, layer.kv_heads, layer.window) for layer in mimo[:2]] == [
        ("full", 4, None),
        ("sliding", 8, 128),
    ]
    assert (mimo[1].head_dim, mimo[1].v_head_dim) == (24, 16)
    gemma = {
        "model_type": "gemma4_text",
        "num_hidden_layers": 6,
        "num_global_key_value_heads": 2,
        "global_head_dim": 32,
    }
    gated = layers_of(**gemma, attention_k_eq_v=True)[-1]
    assert (gated.kind, gated.kv_heads, gated.head_dim) == ("full", 2, 32)
    assert layers_of(**gemma, attention_k_eq_v=False)[-1].kv_heads == 4
    # Nemotron-NAS: queries per KV head of each block, or none of the attention.
    nas = layers_of(
        model_type="nemotron-nas",
        block_configs=[{"attention": {"n_heads_in_group": 4}}, {"attention": {"n_heads_in_group": 8}}]
        + [{"attention": {"no_op": True, "n_heads_in_group": None}}] * 2,
    )
    assert [(layer.kind, layer.kv_heads) for layer in nas] == [("full", 2), ("full", 1), ("none", 0), ("none", 0)]


def test_a_dial_over_unlike_layers():
    shape = parse_config(
        without("num_key_value_heads")
        | {"model_type": "gemma4_text", "num_hidden_layers": 6, "num_global_key_value_heads": 2}
        | {"attention_k_eq_v": True},
        "x",
    )
    assert shape.dial == (1, 2, 4, 8)
    assert {layer.kv_heads for layer in shape.with_kv_heads(2).layers} == {2}
    with pytest.raises(GqaError, match="no single kv_heads") as caught:
        _ = shape.kv_heads
    assert caught.value.got == "2 and 4"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "jamba", "attn_layer_period": 3, "attn_layer_offset": 1}, "lfllfl"),
        ({"model_type": "bamba", "attn_layer_indices": [2]}, "llflll"),
        ({"model_type": "lfm2", "full_attn_idxs": [0, 5]}, "fllllf"),
        ({"model_type": "qwen3_next", "full_attention_interval": 2}, "lflflf"),
        ({"model_type": "minimax"}, "flflfl"),
        ({"model_type": "minimax_text_01", "attn_type_list": [0, 0, 1, 0, 0, 1]}, "llfllf"),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*-E"}, "lnlfnn"),
        ({"model_type": "recurrent_gemma", "attention_window_size": 8}, "llslls"),
        ({"model_type": "mamba2", "num_attention_heads": None}, "llllll"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_linear_layers(config, words):
    layers = layers_of(num_hidden_layers=6, **config)
    assert "".join(layer.kind[0] for layer in layers) == words
    assert all((layer.state is not None) == (layer.kind == "linear") for layer in layers)
    assert all(layer.query_heads == 0 for layer in layers if layer.kind in ("linear", "none"))


def test_other_spellings_of_kv_heads():
    dbrx = {"model_type": "dbrx", "d_model": 64, "n_heads": 8, "n_layers": 4, "attn_config": {"kv_n_heads": 2}}
    assert parse_config(dbrx, "x").kv_heads == 2
    mpt = {"model_type": "mpt", "d_model": 64, "n_heads": 8, "n_layers": 4}
    assert parse_config(mpt | {"attn_config": {"attn_type": "multiquery_attention"}}, "x").kv_heads == 1
    assert parse_config(mpt | {"attn_config": {"attn_type": "multihead_attention"}}, "x").kv_heads == 8
    glm = without("num_hidden_layers", "num_key_value_heads") | {"model_type": "chatglm", "num_layers": 2}
    assert parse_config(glm | {"multi_query_group_num": 2, "kv_channels": 16}, "x").head_dim == 16
    assert parse_config(glm | {"multi_query_group_num": 2, "multi_query_attention": True}, "x").kv_heads == 2
    # LongCat-Flash has two attention blocks in each of its layers.
    longcat = layers_of(model_type="longcat_flash", qk_rope_head_dim=8)
    assert len(longcat) == 8
    assert {layer.kind for layer in longcat} == {"mla"}
    indexed = layers_of(model_type="deepseek_v32")[0]
    assert (indexed.index_dim, indexed.index_topk) == (128, 2048)


def test_a_window_without_a_pattern_is_not_guessed():
    with pytest.raises(GqaError, match="not which layers slide"):
        parse_config(of_type("anything"), "x")


def test_latent_attention():
    latent = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
    shape = parse_config(without("num_key_value_heads") | {"model_type": "deepseek_v3"} | latent, "x")
    assert shape.layers[0] == LayerShape("mla", 8, 1, 576, 512)
    assert shape.latent is not None
    assert shape.latent.q_rank == 1536  # the class default
    assert shape.is_latent


def test_v_heads_of_another_width():
    layer = parse_config(LLAMA | {"v_head_dim": 4}, "x").layers[0]
    assert (layer.head_dim, layer.v_head_dim) == (8, 4)


@pytest.mark.parametrize(
    ("config", "dims"),
    [
        (LLAMA, None),
        (LLAMA | {"partial_rotary_factor": 0.5}, 4),
        (LLAMA | {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 0.25}}, 2),
        (LLAMA | {"partial_rotary_factor": 1.0}, None),
        (LLAMA | {"model_type": "phi"}, 4),
        (LLAMA | {"model_type": "stablelm"}, 2),
        (LLAMA | {"model_type": "stablelm", "partial_rotary_factor": 0.75}, 6),
        (LLAMA | {"alibi": True}, 0),
        (without("num_key_value_heads") | {"model_type": "gpt_bigcode", "multi_query": False}, 0),
    ],
)
def test_how_much_of_a_head_the_rotary_embedding_turns(config, dims):
    layer = parse_config(config, "x").layers[0]
    assert layer.rotary_dim == dims
    assert layer.alibi == config.get("alibi", False)


@pytest.mark.parametrize("factor", [-0.1, 1.5, True, "half", float("nan")])
def test_strange_shares_of_rotary(factor):
    with pytest.raises(GqaError, match="partial_rotary_factor in the config of x makes no sense"):
        parse_config(LLAMA | {"partial_rotary_factor": factor}, "x")


def test_experts():
    mixtral = parse_config(LLAMA | {"model_type": "mixtral", "num_local_experts": 4}, "x")
    assert mixtral.experts is not None
    assert (mixtral.experts.total, mixtral.experts.per_token, mixtral.experts.layers) == (4, 2, 4)
    sparse = parse_config(
        LLAMA | {"model_type": "qwen3_moe", "num_local_experts": 16, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
        "x",
    )
    assert sparse.experts is not None
    assert (sparse.experts.total, sparse.experts.layers) == (16, 1)  # layers 1 and 3 are sparse, 3 is kept dense
    assert parse_config(LLAMA, "x").experts is None


def test_dtype_and_quantisation():
    assert parse_config(LLAMA | {"dtype": "torch.bfloat16"}, "x").weight_dtype == "bf16"
    assert parse_config(without("torch_dtype"), "x").weight_dtype is None
    quantised = parse_config(LLAMA | {"quantization_config": {"quant_method": "mxfp4"}}, "x")
    assert (quantised.weight_dtype, quantised.quantised) == (None, "mxfp4")


@pytest.mark.parametrize(
    "strange",
    [
        {"attention_chunk_size": 8192},
        {"layers_block_type": ["mamba", "attention"]},
        {"layer_types": ["full_attention", "linear_attention", "full_attention", "full_attention"]},
        {"layer_types": ["chunked_attention"] * 4},
        {"full_attention_interval": 4},
        {"mamba_d_state": 16},
        {"linear_num_key_heads": 4},
        {"num_kv_shared_layers": 2},
        {"num_global_key_value_heads": 1},
        {"global_head_dim": 512},
        {"num_key_value_heads_per_layer": [1, 2, 1, 2]},
        {"swa_num_key_value_heads": 4},
        {"multi_query_group_num": 2},
        {"index_topk": 2048},
        {"attn_config": {"kv_n_heads": 2}},
        {"block_configs": [{}]},
        {"use_cla": True},
        {"per_layer_config": {"0": {"num_key_value_heads": 1}}},
        {"linear_attn_config": {"num_heads": 2}},
        {"is_encoder_decoder": True},
    ],
    ids=lambda config: next(iter(config)),
)
def test_unknown_attention_is_named(strange):
    with pytest.raises(GqaError, match=next(iter(strange))):
        parse_config(LLAMA | strange, "x")


@pytest.mark.parametrize(
    "harmless",
    [
        {"num_kv_shared_layers": 0},
        {"attention_chunk_size": None},
        {"no_rope_layers": [1, 1, 1, 0]},
        {"attention_bias": True, "attention_dropout": 0.1, "rope_local_base_freq": 1e4},
    ],
)
def test_harmless_keys_pass(harmless):
    assert parse_config(LLAMA | harmless, "x").kv_heads == 2


@pytest.mark.parametrize("value", [0, -8, True, 8.0, "8", [8], 1 << 40, float("nan"), {}])
@pytest.mark.parametrize("key", ["num_attention_heads", "num_key_value_heads", "num_hidden_layers", "hidden_size"])
def test_nonsense_values_are_named(key, value):
    with pytest.raises(GqaError, match=key):
        parse_config(LLAMA | {key: value}, "x")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (without("num_attention_heads"), "has no num_attention_heads"),
        (without("num_hidden_layers"), "has no num_hidden_layers"),
        ({}, "has no hidden_size"),
        (LLAMA | {"num_key_value_heads": 3}, "3 KV heads, which do not divide 8 query heads"),
        (LLAMA | {"num_key_value_heads": 16}, "16 KV heads, which do not divide 8 query heads"),
        (LLAMA | {"num_kv_heads": 4}, "contradicts itself"),
        (LLAMA | {"layer_types": ["full_attention"]}, "layer_types"),
        (LLAMA | {"layer_types": ["sliding_attention"] * 4}, "has no sliding_window"),
        (LLAMA | {"model_type": 7}, "model_type"),
        (LLAMA | {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        (LLAMA | {"num_local_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok"),
        ([], "not a JSON object"),
    ],
)
def test_contradictions_and_gaps(config, says):
    with pytest.raises(GqaError, match=says):
        parse_config(config, "x")


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
known_keys = st.sampled_from(
    sorted(
        {*LLAMA, "head_dim", "sliding_window", "layer_types", "text_config", "kv_lora_rank", "qk_rope_head_dim"}
        | {"qk_nope_head_dim", "v_head_dim", "q_lora_rank", "num_local_experts", "num_experts_per_tok", "dtype"}
        | {"mlp_only_layers", "decoder_sparse_step", "first_k_dense_replace", "quantization_config", "multi_query"}
        | {"use_sliding_window", "sliding_window_pattern", "max_window_layers", "n_shared_experts", "attention_bias"}
        | {"attention_chunk_size", "num_kv_shared_layers", "hybrid_override_pattern", "full_attn_idxs", "block_types"}
        | {"attn_type_list", "per_layer_config", "block_configs", "attn_config", "mamba_d_ssm", "linear_key_head_dim"}
        | {"no_rope_layers", "attn_layer_period", "swa_head_dim", "global_head_dim", "index_topk", "lru_width"}
    )
)
model_types = st.sampled_from([*sorted(known_types()), "x"])
plausible = st.sampled_from([1, 2, 4, 8, 64, None, True]) | st.sampled_from(
    [
        ["full_attention"] * 4,
        ["sliding_attention"] * 4,
        ["linear_attention"] * 4,
        [0, 1, 1, 0],
        "M*-M",
        {"0": {"head_dim": 4}},
        {"kv_n_heads": 2},
        [{"attention": {"n_heads_in_group": 2}}] * 4,
    ]
)


@settings(max_examples=1000, deadline=None)
@given(
    st.dictionaries(known_keys, plausible | json_values, max_size=8),
    model_types,
    st.booleans(),
)
@example({"text_config": {"num_attention_heads": {}}}, "llama", True)
@example({"layer_types": [["full_attention"]] * 4}, "llama", True)
def test_only_gqa_errors_come_out(edits, model_type, from_llama):
    config = (LLAMA if from_llama else {}) | {"model_type": model_type} | edits
    with contextlib.suppress(GqaError):
        shape = parse_config(config, "fuzzed")
        assert all(layer.query_heads % layer.kv_heads == 0 for layer in shape.attention)
        assert all(layer.head_dim > 0 for layer in shape.attention)
        assert len({layer.window for layer in shape.layers}) <= 2
