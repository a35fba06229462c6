"""Figures and sentences as the page says them."""

from __future__ import annotations

import pytest
from helpers.study_record import CONTROL, PARENT, study_record, study_results

from gqa.report import words
from gqa.report.reading import Study


def study(**changes) -> Study:
    return Study.from_record(study_record(**changes))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (164.2, "164"),
        (41.04, "41.0"),
        (6.6, "6.60"),
        (0.01234, "0.0123"),
        (12345.6, "12,346"),
        (0, "0"),
        (2e-9, "2.0e-09"),
    ],
)
def test_significant(value: float, text: str) -> None:
    assert words.significant(value) == text


@pytest.mark.parametrize(
    ("count", "text"), [(256, "256"), (1024, "1k"), (16384, "16k"), (1000, "1,000"), (2 << 20, "2M")]
)
def test_tokens(count: int, text: str) -> None:
    assert words.tokens(count) == text


@pytest.mark.parametrize(("ratio", "text"), [(1, "1×"), (4.0, "4×"), (2.68, "2.7×"), (1.333, "1.3×"), (43.9, "44×")])
def test_times(ratio: float, text: str) -> None:
    assert words.times(ratio) == text


def test_finding_takes_the_furthest_level_stop_and_holds_it_against_its_equal() -> None:
    results = study_results()
    refined = next(
        r for r in results["quality"] if (r["kv_heads"], r["method"], r["stage"]) == (1, "svd+distill", "uptrained")
    )
    refined["perplexity"] = CONTROL * 1.01
    told = words.finding(Study.from_record(study_record(results)))
    assert told == (
        "With 1 of 8 KV heads the cache is 8× smaller and perplexity is 41.3 (distilled svd, after uptraining) "
        "against 40.9 for the parent given the same extra training."
    )


def test_finding_without_a_level_stop_tells_the_gentlest_cut() -> None:
    quality = [r for r in study_results()["quality"] if (r["method"], r["stage"]) == ("mean", "converted")]
    told = words.finding(study(quality=quality))
    assert told.startswith("With 4 of 8 KV heads the cache is 2× smaller and perplexity is 64.6 (mean pooling")
    assert f"{PARENT}" in told


def test_finding_without_quality() -> None:
    assert (
        words.finding(study(quality=None)) == "With 1 of 8 KV heads the cache is 8× smaller; quality was not measured."
    )


def test_decode_title_says_so_when_nothing_is_gained() -> None:
    rows = [{**row, "seconds_per_token_p50": 0.002} for row in study_results()["decode"]]
    assert "no faster" in words.decode_title(study(decode=rows))


def test_decode_title_tells_the_gain() -> None:
    assert words.decode_title(study()) == "At 16k tokens of context 1 KV head decodes 5.7× faster than 8"
    rows = [row for row in study_results()["decode"] if row["kv_heads"] > 1]
    assert words.decode_title(study(decode=rows)) == "At 16k tokens of context 2 KV heads decode 3.4× faster than 8"


def test_layers_title_names_the_worst_layer_of_the_strongest_method() -> None:
    rows = [
        {"kv_heads": 1, "method": "svd", "layer": 0, "hidden_error": 0.5},
        {"kv_heads": 1, "method": "svd+distill", "layer": 0, "hidden_error": 0.01},
        {"kv_heads": 2, "method": "svd+distill", "layer": 3, "hidden_error": 0.02},
    ]
    told = words.layers_title(study(layers=rows))
    off = words.percent(0.02)
    assert told == f"With 2 KV heads and distilled svd hidden states are at most {off} off, behind layer 3"


def test_titles_without_their_tables() -> None:
    bare = study(quality=None, layers=None, decode=None, capacity=None)
    assert words.memory_title(bare) == "From 8 to 1 KV head the cache of every context is 8× smaller"
    for title in (words.decode_title, words.quality_title, words.share_title, words.layers_title):
        assert title(bare)
