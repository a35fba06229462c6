"""The page as text: whole, self-contained, true to its record, and safe with hostile names."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from helpers.study_record import study_record, study_results

from gqa.errors import GqaError
from gqa.record import Record
from gqa.report import dial, patterns
from gqa.report.page import render
from gqa.report.reading import Study

VOID = {"meta", "link", "input"}
HOSTILE = """</script><script>alert(1)</script><img src=x onerror="alert(1)"> & 'quoted' $name ${title}"""


class Outline(HTMLParser):
    """Checks that elements nest, and collects texts, identifiers and everything that could fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.ids: list[str] = []
        self.fetches: list[tuple[str, str]] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in {"src", "href", "xlink:href", "action", "srcset", "data"} or name.startswith("on"):
                self.fetches.append((name, value or ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in {"script", "style"}:
            self.text.append(data)


def outline(page: str) -> Outline:
    parsed = Outline()
    parsed.feed(page)
    assert parsed.open == []
    return parsed


def embedded(page: str, name: str) -> dict:
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


@pytest.fixture(scope="module")
def page() -> str:
    return render(study_record())


def test_is_one_file_without_anything_to_fetch(page: str) -> None:
    parsed = outline(page)
    assert parsed.fetches == [("href", "data:,")]
    assert set(re.findall(r"""https?://[^\s"'<]+""", page)) == {"http://www.w3.org/2000/svg"}
    assert "@import" not in page
    assert "url(" not in page
    assert len(page.encode()) < 1_000_000


def test_identifiers_are_unique(page: str) -> None:
    ids = outline(page).ids
    assert len(ids) == len(set(ids))


def test_same_record_gives_the_same_page(page: str) -> None:
    assert render(study_record()) == page


def test_holds_its_record_unchanged(page: str) -> None:
    assert embedded(page, "record") == json.loads(study_record().to_json())


def test_every_drawing_is_well_formed(page: str) -> None:
    drawings = re.findall(r"<svg viewBox.*?</svg>", page, re.DOTALL)
    assert len(drawings) == 12
    for drawing in drawings:
        ElementTree.fromstring(drawing.replace("<svg ", '<svg xmlns:xlink="http://www.w3.org/1999/xlink" ', 1))


def test_every_figure_of_the_record_is_in_a_table(page: str) -> None:
    text = " ".join(outline(page).text)
    results = study_results()
    for row in results["decode"]:
        assert f"{row['cache_bytes_measured']:,}" in text
    for row in results["quality"]:
        assert f"{row['cross_entropy_nats_per_token']:.4f}" in text
    for row in results["capacity"]:
        assert f"{row['max_context_tokens']:,}" in text
    for row in results["attention_alike"]:
        assert row["within_nats"] is None or f"{row['within_nats']:.4f}" in text


def test_hostile_texts_stay_texts() -> None:
    results = study_results()
    results["parent"]["name"] = HOSTILE
    for row in results["quality"] + results["layers"]:
        row["method"] = row["method"].replace("mean", HOSTILE)
    for row in results["capacity"]:
        row["device"] += HOSTILE
    results["attention_text"]["tokens"] = [HOSTILE] * 9
    for row in results["attention_maps"] + results["attention_heads"] + results["attention_alike"]:
        row["weights"] = row["weights"].replace("child", HOSTILE)
    record = study_record(results)
    record = Record(
        command="study",
        inputs={HOSTILE: HOSTILE},
        results=record.results,
        basis={HOSTILE: HOSTILE},
        assumptions=(HOSTILE,),
        machine={HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE},
        created=HOSTILE,
    )
    page = render(record)
    parsed = outline(page)
    assert "img" not in parsed.tags
    assert parsed.fetches == [("href", "data:,")]
    assert page.count("<script") == 3
    assert HOSTILE in "".join(parsed.text)
    assert embedded(page, "record")["results"]["parent"]["name"] == HOSTILE


@pytest.mark.parametrize("change", ["no text", "short map", "no figure", "fewer heads", "no row"])
def test_broken_maps_are_left_out(change: str) -> None:
    results = study_results()
    if change == "no text":
        results["attention_text"] = {"tokens": 3}
    elif change == "short map":
        results["attention_maps"][1]["maps"][2] = "AAA"
    elif change == "no figure":
        results["attention_heads"][0]["entropy_nats"][0] = None
    elif change == "fewer heads":
        results["attention_maps"][1]["maps"].pop()
    else:
        results["attention_maps"] = [None, {"weights": 3}]
    study = Study.from_record(study_record(results))
    assert patterns.html(study) == ""
    assert [figure.key for figure in patterns.figures(study)] == ["alike"]


@pytest.mark.parametrize(
    ("searched", "says"), [(0.2, "more than neighbours do"), (0.261, "no more alike"), (0.4, "less than neighbours")]
)
def test_the_title_says_whether_heads_that_share_were_alike(searched: float, says: str) -> None:
    results = study_results()
    for row in results["attention_alike"]:
        if (row["weights"], row["grouping"]) == ("parent", "as converted"):
            row["within_nats"] = searched * (1 + 0.1 * row["layer"])
    assert says in patterns.figures(Study.from_record(study_record(results)))[0].title


@pytest.mark.parametrize("gone", ["control", "quality", "layers", "decode", "capacity"])
def test_a_gap_in_the_record_is_no_gap_in_the_page(gone: str) -> None:
    parsed = outline(render(study_record(**{gone: None})))
    text = " ".join(parsed.text)
    assert "nan" not in text.lower().split()
    assert "None" not in text
    assert {"dial", "settings", "saves", "method", "memory"} <= set(parsed.ids)
    figures = {"layers": {"layers"}, "decode": {"decode"}, "quality": {"quality", "share"}}
    assert figures.get(gone, set()).isdisjoint(parsed.ids)


def test_only_the_settings_are_needed() -> None:
    record = study_record({"parent": {"query_heads": 8}, "settings": [{"kv_heads": 2}, {"kv_heads": 8}]})
    parsed = outline(render(record))
    assert "an unnamed model" in " ".join(parsed.text)
    assert "not measured" in " ".join(parsed.text)
    assert "memory" not in parsed.ids


def test_figures_that_are_no_figures_count_as_not_measured() -> None:
    results = study_results()
    for row in results["decode"]:
        row["seconds_per_token_p50"] = float("nan")
    for row in results["quality"]:
        row["perplexity"] = "41.0"
    results["capacity"] = [{**row, "memory_bytes": -1, "max_context_tokens": True} for row in results["capacity"]]
    stops = dial.data(Study.from_record(study_record(results)))["stops"]
    assert {stop["decode"] for stop in stops} == {None}
    assert {stop["svd/converted"] for stop in stops[1:]} == {None}
    render(study_record(results))


@pytest.mark.parametrize(
    "results",
    [
        {},
        {"parent": "llama"},
        {"parent": {"query_heads": 0}},
        {"parent": {"query_heads": 8}},
        {"parent": {"query_heads": 8}, "settings": []},
        {"parent": {"query_heads": 8}, "settings": {"kv_heads": 8}},
        {"parent": {"query_heads": 8}, "settings": [{"kv_heads": "8"}]},
        {"parent": {"query_heads": 8}, "settings": [{"kv_heads": 3}]},
        {"parent": {"query_heads": 8}, "settings": [{"kv_heads": 8}], "quality": [{"method": "svd"}]},
    ],
)
def test_a_record_that_is_no_study_is_refused(results: dict) -> None:
    with pytest.raises(GqaError):
        render(study_record(results))


def test_another_commands_record_is_refused() -> None:
    with pytest.raises(GqaError, match="gqa plan"):
        render(Record(command="plan", inputs={}, results={}, basis={}))
