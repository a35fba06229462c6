"""The page of uptraining curves as text: every figure, true to its record, gaps allowed."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
from helpers.study_record import study_record
from helpers.uptraining_record import METHODS, uptraining_record

from gqa.cli.main import main
from gqa.errors import GqaError
from gqa.report import forms, uptraining_page

from .test_page import HOSTILE, outline

FIGURES = {"curves", "close", "beginnings", "cost", "recall-passkey", "positions"}
TABLES = ("spread", "verdict", "cost", "recall", "positions")


def without(*names: str):
    record = uptraining_record()
    results = copy.deepcopy(dict(record.results))
    for name in names:
        del results[name]
    return dataclasses.replace(record, results=results)


def test_every_figure_is_there_with_its_table() -> None:
    page = outline(uptraining_page.render(uptraining_record()))
    assert set(page.ids) >= FIGURES
    text = " ".join(page.text)
    two, one = (forms.percent(row["times_control_mean"] - 1) for row in uptraining_record().results["verdict"])
    assert f"{two} higher with 2 KV heads and {one} higher with 1 KV head" in text
    assert "within both bounds" in text
    for row in uptraining_record().results["spread"]:
        assert f"{row['perplexity_mean']:.2f}" in page.text
        assert f"{row['times_control_high']:.4f}" in page.text
    for row in uptraining_record().results["recall"]:
        assert f"{row['accuracy']:.0%}" in page.text


def test_all_beginnings_have_a_style_and_a_name_in_the_drawings() -> None:
    page = uptraining_page.render(uptraining_record())
    for method in METHODS:
        name = "refined svd" if method == "svd+refine" else method
        assert f">{name} " in page


def test_it_is_offline_and_always_the_same() -> None:
    page = uptraining_page.render(uptraining_record())
    fetches = [value for _, value in outline(page).fetches if not value.startswith(("data:", "#"))]
    assert fetches == []
    record = uptraining_record()
    assert uptraining_page.render(record) == uptraining_page.render(record)
    embedded = page.partition('id="record">')[2].partition("</script>")[0]
    assert json.loads(embedded)["results"] == json.loads(uptraining_record().to_json())["results"]


@pytest.mark.parametrize("gone", [*((name,) for name in TABLES), TABLES])
def test_what_was_not_measured_is_left_out(gone: tuple[str, ...]) -> None:
    page = outline(uptraining_page.render(without(*gone)))
    left = {"spread": {"curves", "close", "beginnings"}, "cost": {"cost"}, "recall": {"recall-passkey"}}
    left |= {"positions": {"positions"}, "verdict": set()}
    assert FIGURES - set(page.ids) == set().union(*(left[name] for name in gone))
    assert ("was not measured" in " ".join(page.text)) == ("verdict" in gone)


def test_one_alpha_and_one_seed_are_no_curve() -> None:
    record = uptraining_record()
    rows = [{**row, "seeds": 1} for row in record.results["spread"] if row["alpha"] == 0.05]
    for row in rows:
        row |= {"perplexity_deviation": None, "times_control_deviation": None}
    page = outline(uptraining_page.render(dataclasses.replace(record, results={**record.results, "spread": rows})))
    assert FIGURES - set(page.ids) == {"curves", "close"}


def test_a_missed_bound_is_said() -> None:
    record = uptraining_record()
    rows = [dict(row) for row in record.results["verdict"]]
    rows[1] |= {"times_control_mean": 1.03, "within": False}
    page = uptraining_page.render(dataclasses.replace(record, results={**record.results, "verdict": rows}))
    assert "1 of 2 within its bound" in page


def test_hostile_names_stay_text() -> None:
    record = dataclasses.replace(uptraining_record(), inputs={"parent": HOSTILE}, assumptions=(HOSTILE,))
    page = uptraining_page.render(record)
    assert HOSTILE in " ".join(outline(page).text)
    assert "<img" not in page


def test_another_record_is_refused_and_ours_is_found_by_the_command(tmp_path: Path) -> None:
    with pytest.raises(GqaError, match="not a record of uptraining"):
        uptraining_page.render(study_record())
    uptraining_record().write(tmp_path / "curves.json")
    with pytest.raises(SystemExit) as end:
        main(["report", str(tmp_path / "curves.json")])
    assert not end.value.code
    assert 'id="curves"' in (tmp_path / "report.html").read_text()
