"""The page of scaling with size: what it draws, says, and does without."""

import dataclasses

import pytest
from helpers.scaling_record import scaling_record

from gqa.errors import GqaError
from gqa.record import Record
from gqa.report import scaling_page

from .test_page import outline


def with_rows(chosen):
    record = scaling_record()
    results = {**record.results, "scaling": [row for row in record.results["scaling"] if chosen(row)]}
    return dataclasses.replace(record, results=results)


def test_a_panel_per_stop_and_every_row_in_the_table():
    page = outline(scaling_page.render(scaling_record()))
    text = " ".join(page.text)
    assert {"losses", "trends"} <= set(page.ids)
    for heading in ("4 KV heads", "2 KV heads", "1 KV head"):
        assert heading in text.replace("\u00a0", " ")
    for row in scaling_record().results["scaling"]:
        assert f"{row['loss_above_parent_nats']:.4f}" in page.text
    assert "-0.30 (-0.45 to -0.15)" in page.text
    assert "loses 1/33 to 1/33 of what mean pooling loses" in text


def test_the_title_tells_what_becomes_of_the_loss():
    ratio = (15.7 / 1.2) ** 0.3
    assert f"loses {ratio:.1f} times less than one of 1.2M" in " ".join(
        outline(scaling_page.render(scaling_record())).text
    )


@pytest.mark.parametrize(
    "chosen",
    [
        lambda row: False,
        lambda row: row["size"] == "5M",
        lambda row: row["method"] == "mean",
        lambda row: row["kv_heads"] == 1,
    ],
    ids=["none", "one size", "mean only", "one stop"],
)
def test_less_is_drawn_of_less(chosen):
    assert scaling_page.render(with_rows(chosen))


def test_another_record_is_refused():
    with pytest.raises(GqaError, match="not a record of scaling"):
        scaling_page.render(Record("plan", {}, {}, {}))
