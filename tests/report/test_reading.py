"""The record as the page reads it: stops, look-ups and groups."""

from __future__ import annotations

import pytest
from helpers.study_record import study_record, study_results

from gqa.report.reading import Study


@pytest.fixture(scope="module")
def study() -> Study:
    return Study.from_record(study_record())


def test_stops_run_from_many_heads_to_one() -> None:
    results = study_results()
    results["settings"].reverse()
    assert Study.from_record(study_record(results)).stops == [8, 4, 2, 1]


@pytest.mark.parametrize("kv_heads", [8, 4, 2, 1])
def test_contiguous_groups_read_head_n_over_g(study: Study, kv_heads: int) -> None:
    shared = 8 // kv_heads
    assert study.contiguous(kv_heads) == [n // shared for n in range(8)]


def test_groupings_follow_the_record(study: Study) -> None:
    # layer 0 of the synthetic study shares every second head, layer 1 shares neighbours
    found = study.groupings(2)
    assert list(found) == list(range(6))
    assert found[0] == [0, 1] * 4
    assert found[1] == [0] * 4 + [1] * 4


def test_groups_of_a_grouped_parent_are_spread_to_its_query_heads() -> None:
    results = study_results()
    results["parent"].update(query_heads=8, kv_heads=4)
    results["settings"] = [{"kv_heads": 4}, {"kv_heads": 2}]
    results["layers"] = [{"kv_heads": 2, "method": "svd", "layer": 0, "groups": [[0, 3], [1, 2]]}]
    found = Study.from_record(study_record({**results, "quality": None, "decode": None, "capacity": None}))
    assert found.groupings(2) == {0: [0, 0, 1, 1, 1, 1, 0, 0]}


@pytest.mark.parametrize("groups", [None, "all", [[0, 1]], [[0], [9]], [[0, 1, 2, 3], [4, 5, 6]], [[0, 1, 2, 3], None]])
def test_groups_that_are_no_partition_are_not_drawn(groups: object) -> None:
    rows = [{"kv_heads": 2, "method": "svd", "layer": 0, "groups": groups}]
    assert Study.from_record(study_record(layers=rows)).groupings(2) == {}


def test_longest_context_is_one_that_every_timed_stop_has() -> None:
    rows = [r for r in study_results()["decode"] if (r["kv_heads"], r["context_tokens"]) != (8, 16384)]
    study = Study.from_record(study_record(decode=rows))
    assert study.longest_context == 4096
    assert study.decode_seconds(8) == pytest.approx(1.1e-3 + 4096 * 8 * 1.4e-7)


def test_best_is_the_lowest_perplexity_of_the_stages_asked(study: Study) -> None:
    converted, uptrained = study.best(1, ["converted"]), study.best(1)
    assert converted is not None
    assert uptrained is not None
    assert converted[1:] == ("svd+distill", "converted")
    assert uptrained[1:] == ("svd+distill", "uptrained")
    assert study.best(3) is None
