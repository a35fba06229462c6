"""What a study is said to take, and a dial that stops at a budget."""

import dataclasses

import pytest
import torch
from helpers.small import small_parent

from gqa.config import parse_config
from gqa.source import open_checkpoint
from gqa.study import estimate as module
from gqa.study.corpus import from_corpus
from gqa.study.estimate import estimate, logits_bytes
from gqa.study.pipeline import run
from gqa.study.settings import Settings

SETTINGS = Settings(
    calibration_windows=16,
    test_windows=8,
    uptrain_tokens=8 * 32,
    contexts=(16, 64),
    distill_tokens=1024,
    decode_repeats=3,
    analyses=(),
)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    folder, corpus = small_parent(tmp_path_factory.mktemp("parent"))
    return open_checkpoint(str(folder)), from_corpus(corpus, folder, window=32)


def estimated(parent, monkeypatch, **changes):
    """With a forward that takes a second per token and a step of half a second, and 1 GB/s."""
    probe = module._Probe(token_seconds=1.0, step_seconds=0.5, weights_bytes=10**9, vocabulary=300)
    monkeypatch.setattr(module._Probe, "of", lambda *_: probe)
    monkeypatch.setattr(module, "_read_bandwidth", lambda _: 1e9)
    source, text = parent
    settings = dataclasses.replace(SETTINGS, **changes).for_model(parse_config(source.config, source.name))
    return estimate(source, text, settings)


def test_an_evaluation_is_a_pass_over_the_test_text(parent, monkeypatch):
    tokens = 8 * 32
    without = estimated(parent, monkeypatch, uptrain_tokens=0)
    assert without.seconds["evaluation"] == tokens * (1 + 6)  # the parent once, 2 stops by 3 methods
    assert without.seconds["uptraining"] == 0
    with_training = estimated(parent, monkeypatch)
    assert with_training.seconds["evaluation"] == tokens * (1 + 12 + 1)
    assert with_training.seconds["uptraining"] == 8 * 32 * (7 * 3 + 6)  # the control has no teacher
    one = estimated(parent, monkeypatch, kv_heads=(1,))
    assert one.seconds["evaluation"] == tokens * (1 + 6 + 1)


def test_a_large_vocabulary_is_evaluated_beside_the_parent(parent, monkeypatch):
    few = estimated(parent, monkeypatch)
    monkeypatch.setattr(module, "REMEMBERED_BYTES", 0)
    many = estimated(parent, monkeypatch)
    assert many.seconds["evaluation"] == 8 * 32 * (1 + 13 * 2)
    assert few.seconds["evaluation"] < many.seconds["evaluation"]


def test_decoding_reads_the_cache(parent, monkeypatch):
    per_token = 2 * 2 * 8 * 4  # K and V, layers, head dim, fp32; per KV head
    cache = sum(context * heads * per_token for context in (16, 64) for heads in (4, 2, 1))
    found = estimated(parent, monkeypatch).seconds["decoding"]
    assert found == pytest.approx((3 + 3) * (6 * 0.5 + cache / 1e9))


def test_memory_and_disk(parent, monkeypatch):
    source, _ = parent
    trained, untrained = estimated(parent, monkeypatch), estimated(parent, monkeypatch, uptrain_tokens=0)
    logits = logits_bytes(8, 32, 300)
    assert trained.memory_bytes == module._LIBRARIES_BYTES + 5 * 10**9 + 5 * logits
    assert untrained.memory_bytes == module._LIBRARIES_BYTES + 2 * 10**9 + 4 * logits
    stored = sum(path.stat().st_size for path in source.folder.glob("*.safetensors"))
    assert trained.disk_bytes == (2 * 2 + 1 + 2) * stored
    assert trained.available_bytes


def test_a_real_estimate_is_of_the_right_size(parent):
    source, text = parent
    told = estimate(source, text, SETTINGS.for_model(parse_config(source.config, source.name)))
    assert set(told.seconds) == {"conversion", "evaluation", "uptraining", "decoding"}
    assert all(seconds > 0 for seconds in told.seconds.values())
    assert told.total_seconds < 600


@pytest.mark.parametrize(("budget", "stops", "within"), [(10.0, [4, 2, 1], 1), (-0.9, [4, 2], None)])
def test_the_dial_stops_at_the_budget(parent, tmp_path, budget, stops, within):
    """-90 %: no model has a tenth of its parent's perplexity."""
    source, text = parent
    settings = dataclasses.replace(SETTINGS, budget=budget, uptrain_tokens=0)
    record = run(source, text, tmp_path / "out", settings)
    assert [row["kv_heads"] for row in record.results["settings"]] == stops
    assert record.results["within_budget"] == {"kv_heads": within}
    assert {row["kv_heads"] for row in record.results["decode"]} == set(stops)


def test_models_too_large_for_turns_are_timed_one_by_one(parent, tmp_path, monkeypatch):
    source, text = parent
    held = []
    from gqa.evaluate import load_model

    monkeypatch.setattr("gqa.convert.memory.available_bytes", lambda _: 1)
    monkeypatch.setattr("gqa.evaluate.load_model", lambda folder, **options: held.append(folder) or load_model(folder))
    record = run(source, text, tmp_path / "out", dataclasses.replace(SETTINGS, uptrain_tokens=0, kv_heads=(2,)))
    places = [(row["context_tokens"], row["kv_heads"]) for row in record.results["decode"]]
    assert places == [(16, 4), (16, 2), (64, 4), (64, 2)]
    assert torch.tensor([row["seconds_per_token_p50"] for row in record.results["decode"]]).min() > 0
