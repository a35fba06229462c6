"""A whole plan as a record."""

import json

import pytest

from gqa.config import parse_config
from gqa.errors import GqaError
from gqa.hardware import find_device
from gqa.plan import sweep
from gqa.plan.engines import find_engine
from gqa.source import open_source


def bundled(name):
    source = open_source(name)
    return parse_config(source.config, source.name)


def by_heads(record):
    return {setting["kv_heads"]: setting for setting in record.results["settings"]}


def test_llama_3_70b():
    record = sweep.plan(bundled("llama-3-70b"), kv_heads=[64, 8, 1], context=131072, kv_dtype="fp16")
    settings = by_heads(record)
    assert list(settings) == [64, 8, 1]
    assert settings[8]["kv_bytes"] == 42_949_672_960
    assert {setting["kv_bytes_as_mha"] for setting in settings.values()} == {343_597_383_680}
    assert settings[64]["kv_bytes"] == 343_597_383_680
    assert [setting["is_current"] for setting in settings.values()] == [False, True, False]
    assert [setting["queries_per_kv_head"] for setting in settings.values()] == [1, 8, 64]
    # k and v: 80 layers * 2 * 8192 * 8 heads * 128.
    assert settings[8]["kv_projection_parameters"] == 1_342_177_280
    # q and o: 80 * 2 * 8192 * 8192 more.
    assert settings[8]["attention_parameters"] == 1_342_177_280 + 10_737_418_240
    assert settings[8]["weight_bytes"] == 2 * 70_553_706_496
    assert settings[8]["decode_seconds_bound"] is None
    assert settings[8]["max_concurrent_requests"] is None
    assert sweep.fits(record)


def test_on_a_device():
    device = find_device("H200")  # 143,771 MiB
    record = sweep.plan(bundled("llama-3-8b"), kv_heads=[8], context=8192, device=device)
    (setting,) = record.results["settings"]
    # floor(143771 * 2**20 * 0.9) - 2 * 8,030,261,248 bytes, over 131,072 bytes a token.
    budget = 143771 * 2**20 * 9 // 10 - 16_060_522_496
    assert setting["max_context"] == budget // 131_072
    assert setting["max_concurrent_requests"] == budget // (131_072 * 8192)
    # Weights but for the input embedding (128256 * 4096), and the cache, at 4.8 TB/s.
    moved = 16_060_522_496 - 2 * 128_256 * 4096 + 131_072 * 8192
    assert setting["decode_seconds_bound"] == pytest.approx(moved / 4.8e12)
    assert setting["decode_limit"] == "bandwidth"


def test_defaults_are_the_models_own():
    record = sweep.plan(bundled("llama-3.1-8b"))
    assert [setting["kv_heads"] for setting in record.results["settings"]] == [32, 16, 8, 4, 2, 1]
    assert record.inputs["context"] == 131072
    assert (record.inputs["kv_dtype"], record.inputs["weight_dtype"]) == ("bf16", "bf16")
    assert set(record.basis.values()) == {"predicted"}


def test_what_is_assumed_is_said():
    def said(config, **question):
        base = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}
        base |= {"vocab_size": 50, "intermediate_size": 100, "max_position_embeddings": 100}
        return " ".join(sweep.plan(parse_config(base | config, "x"), **question).assumptions)

    assert "in bf16 (no dtype is told)" in said({})
    assert "in fp16." in said({"dtype": "float16"})
    assert "in int8 (stored in fp16)" in said({"dtype": "float16"}, weight_dtype="int8")
    assert "up to 100 tokens; this one is longer" in said({}, context=101)
    assert "longer" not in said({}, context=100)
    assert "a scale of 4 bytes" in said({}, kv_dtype="int8")


def test_nothing_fits():
    record = sweep.plan(bundled("llama-3-70b"), device=find_device("L4"))
    assert not sweep.fits(record)
    assert {setting["max_context"] for setting in record.results["settings"]} == {0}
    assert any("do not fit on one L4" in sentence for sentence in record.assumptions)


def test_windows_and_ignoring_them():
    shape = bundled("mistral-7b-v0.1")
    device = find_device("L4")
    with_windows = sweep.plan(shape, kv_heads=[8], context=32768, device=device).results["settings"][0]
    assert with_windows["kv_bytes"] == 4096 * 131_072
    assert with_windows["max_context"] is None
    assert with_windows["context_unlimited"]
    without = sweep.plan(shape, kv_heads=[8], context=32768, device=device, ignore_windows=True).results["settings"][0]
    assert without["kv_bytes"] == 32768 * 131_072
    assert without["context_unlimited"] is False


def test_latent_attention_is_one_row():
    record = sweep.plan(bundled("deepseek-v3"))
    (setting,) = record.results["settings"]
    assert setting["kv_heads"] is None
    assert setting["kv_bytes_per_token"] == 70_272
    assert setting["is_current"]
    with pytest.raises(GqaError, match="no KV heads to turn"):
        sweep.plan(bundled("deepseek-v3"), kv_heads=[8])


def test_unknown_parameters_are_null_and_said():
    config = {"model_type": "brand_new", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}
    record = sweep.plan(parse_config(config, "new"), device=find_device("L4"))
    setting = record.results["settings"][0]
    assert setting["weight_bytes"] is None
    assert setting["max_context"] is None
    assert setting["kv_bytes"] > 0
    assert any("brand_new" in sentence for sentence in record.assumptions)
    assert sweep.fits(record)


def test_quantised_weights_are_unknown_until_told():
    source = open_source("llama-3-8b")
    config = source.config | {"quantization_config": {"quant_method": "awq"}}
    record = sweep.plan(parse_config(config, "quantised"), kv_heads=[8])
    assert record.results["settings"][0]["weight_bytes"] is None
    assert any("awq" in sentence for sentence in record.assumptions)
    assert sweep.plan(bundled("gpt-oss-20b")).results["settings"][0]["weight_bytes"] is None
    told = sweep.plan(parse_config(config, "quantised"), kv_heads=[8], weight_dtype="int8")
    assert told.results["settings"][0]["weight_bytes"] == 8_030_261_248


@pytest.mark.parametrize(
    "wrong",
    [
        {"kv_heads": [12]},
        {"kv_heads": [0]},
        {"context": 0},
        {"context": 10**30},
        {"batch": 0},
        {"batch": 10**400},
        {"utilisation": 0.0},
        {"utilisation": 1.1},
        {"utilisation": float("nan")},
        {"kv_dtype": "fp7"},
        {"weight_dtype": "fp7"},
    ],
    ids=str,
)
def test_wrong_questions(wrong):
    with pytest.raises(GqaError):
        sweep.plan(bundled("llama-3-8b"), **wrong)


def test_the_record_is_json():
    record = sweep.plan(bundled("gemma-3-4b"), device=find_device("H100 SXM"))
    document = json.loads(record.to_json())
    assert document["command"] == "plan"
    assert document["results"]["model"]["sliding_layers"] == 29
    assert document["results"]["device"]["sources"]["memory"]
    assert all(isinstance(sentence, str) for sentence in document["assumptions"])


def test_the_largest_setting_that_holds_the_requests():
    # L4: 23034 MiB * 0.9 less the weights of Llama 2 7B; 16 requests of 4096 tokens at 16,384 bytes per KV head.
    record = sweep.plan(bundled("llama-2-7b"), context=4096, requests=16, device=find_device("L4"))
    advice = record.results["recommendation"]
    need = {n: 16 * 4096 * 16_384 * n for n in (1, 2, 4, 8, 16, 32)}
    room = {row["kv_heads"]: row["cache_budget_bytes"] for row in record.results["settings"]}
    assert advice["kv_heads"] == max(n for n in need if need[n] <= room[n]) == 8
    assert advice["reason"].startswith("8 KV heads: 16 requests of 4,096 tokens take 8 GiB of the 9.19 GiB")
    assert "16 KV heads would need 16 GiB" in advice["reason"]
    assert record.inputs["batch"] == 16
    assert sweep.fits(record)


def test_nothing_to_recommend():
    none = sweep.plan(bundled("llama-2-7b"), context=4096, requests=500, device=find_device("L4"))
    assert none.results["recommendation"]["kv_heads"] is None
    assert "even 1 KV head would need 31.25 GiB" in none.results["recommendation"]["reason"]
    assert not sweep.fits(none)
    heavy = sweep.plan(bundled("llama-3-70b"), requests=1, device=find_device("L4"))
    assert "the weights alone leave nothing" in heavy.results["recommendation"]["reason"]
    unknown = sweep.plan(bundled("llama-2-7b"), requests=1)
    assert not unknown.results["recommendation"]["known"]
    assert sweep.fits(unknown)
    latent = sweep.plan(bundled("deepseek-v3"), requests=1, device=find_device("H200"))
    assert "no KV heads to turn" in latent.results["recommendation"]["reason"]


def test_layers_with_different_heads_are_one_row_more():
    config = {"model_type": "gemma4_text", "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 8}
    config |= {"num_key_value_heads": 4, "num_global_key_value_heads": 2, "attention_k_eq_v": True}
    record = sweep.plan(parse_config(config, "unlike"))
    labels = [setting["label"] for setting in record.results["settings"]]
    assert labels == ["4 or 2", "8", "4", "2", "1"]
    assert [setting["is_current"] for setting in record.results["settings"]] == [True, *[False] * 4]
    assert record.results["settings"][0]["kv_heads"] is None


def test_a_model_without_attention():
    record = sweep.plan(parse_config({"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 3}, "mamba"))
    (setting,) = record.results["settings"]
    assert (setting["label"], setting["kv_bytes_per_token"]) == ("none", 0)
    assert setting["kv_bytes"] == 3 * (16 * 4 * 2 + 256 * 4)
    assert any("constant state" in sentence for sentence in record.assumptions)


def test_engines_say_their_rules():
    def said(**question):
        return " ".join(sweep.plan(bundled("gemma-2-2b"), **question).assumptions)

    assert "blocks of 16 tokens" in said(engine=find_engine("vllm"))
    assert "padded to 256 cells" in said(engine=find_engine("llama.cpp"))
    assert "charged in full" in said(engine=find_engine("sglang"))
    assert "no block rounding" in said()
    assert "4 devices share" in said(ranks=4)
    default = sweep.plan(bundled("gemma-2-2b"), engine=find_engine("vllm")).inputs["utilisation"]
    assert default == 0.92


def test_memory_of_one_of_several_devices():
    device = find_device("H200")
    one, four = (
        sweep.plan(bundled("llama-3-70b"), kv_heads=[8], context=8192, device=device, ranks=n).results["settings"][0]
        for n in (1, 4)
    )
    assert four["kv_bytes_per_token"] * 4 == one["kv_bytes_per_token"]
    assert four["weight_bytes"] * 4 == one["weight_bytes"]
    # floor(143771 MiB * 0.9 - a quarter of the weights), over two heads' bytes.
    budget = 143771 * 2**20 * 9 // 10 - 2 * 70_553_706_496 // 4
    assert four["max_concurrent_requests"] == budget // (81_920 * 8192)
    told = sweep.plan(bundled("llama-3-70b"), kv_heads=[8], context=8192, cache_memory=10**10).results["settings"][0]
    assert told["max_concurrent_requests"] == 10**10 // (327_680 * 8192)
