"""The page of the proof on a real model: what it draws, says, and does without."""

import dataclasses

import pytest
from helpers.real_record import real_record

from gqa.errors import GqaError
from gqa.record import Record
from gqa.report import real_page

from .test_page import outline


def without(*tables: str) -> Record:
    record = real_record()
    return dataclasses.replace(record, results={k: v for k, v in record.results.items() if k not in tables})


def test_every_figure_and_every_model_is_there():
    page = outline(real_page.render(real_record()))
    assert {"losses", "curves", "kept", "recall", "published", "diagnosis"} <= set(page.ids)
    for model in real_record().results["models"]:
        assert model["name"] in page.text
    for row in real_record().results["curve"]:
        assert f"{row['loss_above_parent_nats']:.4f}" in page.text
    assert "answers on questions.jsonl: no such file" in page.text


def test_the_finding_names_the_best_and_the_worst_child():
    text = " ".join(outline(real_page.render(real_record())).text)
    assert "1.13 times the parent's for distilled-1M and 66.7 times for mean" in text


@pytest.mark.parametrize(
    "gone",
    [
        ["quality"],
        ["answers", "recall"],
        ["curve", "trends"],
        ["trends"],
        ["published", "diagnosis", "texts", "missing"],
        ["models", "quality", "answers", "recall", "curve", "trends", "published", "diagnosis"],
    ],
    ids=["no quality", "no answers", "no training", "no trends", "no others", "nothing"],
)
def test_less_is_drawn_of_less(gone):
    assert real_page.render(without(*gone))


def test_a_loss_without_a_standard_error_is_drawn():
    record = real_record()
    for row in (*record.results["quality"], *record.results["curve"]):
        row["loss_above_parent_standard_error_nats"] = None
    assert real_page.render(record)


def test_another_record_is_refused():
    with pytest.raises(GqaError, match="not a record of the proof"):
        real_page.render(Record("plan", {}, {}, {}))
