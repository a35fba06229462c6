"""The report page in a real browser: the dial tells the record's figures, and nothing overlaps or overflows."""

from __future__ import annotations

import json

import pytest
from helpers.study_record import study_record, study_results

from gqa.report import dial
from gqa.report.reading import Study
from gqa.units import format_bytes, format_seconds

pytestmark = pytest.mark.browser

STOPS = [8, 4, 2, 1]

# Texts of every drawing that is on show, with their boxes; then the pairs that cover one another by over a pixel.
OVERLAPS = """() => {
  const found = [];
  for (const drawing of document.querySelectorAll("svg")) {
    const texts = [...drawing.querySelectorAll("text")].filter((t) => t.textContent.trim());
    const boxes = texts.map((t) => t.getBoundingClientRect());
    boxes.forEach((a, i) => boxes.slice(i + 1).forEach((b, k) => {
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (wide > 1 && high > 0.2 * Math.min(a.height, b.height)) {
        found.push([texts[i].textContent, texts[i + 1 + k].textContent]);
      }
    }));
  }
  return found;
}"""

# Texts that leave the drawing they belong to.
CLIPPED = """() => [...document.querySelectorAll("svg")].flatMap((drawing) => {
  const frame = drawing.getBoundingClientRect();
  return [...drawing.querySelectorAll("text")].filter((t) => {
    const box = t.getBoundingClientRect();
    return box.left < frame.left - 1 || box.right > frame.right + 1
      || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
  }).map((t) => t.textContent);
})"""


def shown(page, field: str) -> str:
    return page.locator(f'[data-field="{field}"]').inner_text()


def test_dial_by_keyboard_shows_the_records_figures_at_every_stop(open_page) -> None:
    page = open_page(state="#kv=8")
    results = study_results()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "kv-heads"
    for kv_heads in STOPS:
        setting = next(row for row in results["settings"] if row["kv_heads"] == kv_heads)
        decode = [row for row in results["decode"] if row["kv_heads"] == kv_heads][-1]
        room = next(row for row in results["capacity"] if (row["kv_heads"], row["device"]) == (kv_heads, "L4"))
        assert shown(page, "kv_heads") == str(kv_heads)
        assert shown(page, "cache") == format_bytes(setting["kv_bytes_per_token_measured"])
        assert shown(page, "decode") == format_seconds(decode["seconds_per_token_p50"])
        assert shown(page, "requests") == f"{room['max_concurrent_requests']:,}"
        for row in results["quality"]:
            if row["kv_heads"] == kv_heads != 8:
                assert shown(page, f"{row['method']}/{row['stage']}") == f"{row['perplexity']:.3g}"
        assert (shown(page, "svd/converted") == "as the parent") == (kv_heads == 8)
        value = page.locator("#kv-heads").get_attribute("aria-valuetext")
        assert value.startswith("1 KV head," if kv_heads == 1 else f"{kv_heads} KV heads,")
        assert page.evaluate("location.hash").startswith(f"#kv={kv_heads}")
        assert page.locator("#settings tr.here td").first.inner_text() == str(kv_heads)
        page.keyboard.press("ArrowRight")


def test_every_text_of_the_dial_comes_from_what_python_made(open_page) -> None:
    page = open_page(state="#kv=8")
    for stop in dial.data(Study.from_record(study_record()))["stops"]:
        fields = page.evaluate("""() => Object.fromEntries(
            [...document.querySelectorAll("[data-field]")].map((e) => [e.dataset.field, e.textContent]))""")
        values = {**stop, **stop["by"]["L4"]}
        assert fields == {field: str("not measured" if values[field] is None else values[field]) for field in fields}
        page.locator("#kv-heads").press("ArrowRight")


@pytest.mark.parametrize(("state", "reads"), [("#kv=2", [0, 1, 2, 3]), ("#kv=2&layer=0", [0, 2, 4, 6])])
def test_picture_joins_each_query_head_to_its_kv_head(open_page, state: str, reads: list[int]) -> None:
    page = open_page(state=state)
    picture = page.locator(".picture svg")
    assert picture.locator("circle").count() == 8
    assert picture.locator("rect").count() == 2
    assert picture.locator("path").count() == 8
    assert picture.get_attribute("aria-label").startswith(
        f"KV head 0 is read by query heads {', '.join(map(str, reads))};"
    )
    # a line ends in the middle of the KV head that the label names
    ends = picture.locator("path").evaluate_all("paths => paths.map(p => p.getPointAtLength(p.getTotalLength()).x)")
    middles = picture.locator("rect").evaluate_all(
        "rects => rects.map(r => r.x.baseVal.value + r.width.baseVal.value / 2)"
    )
    for query, end in enumerate(ends):
        assert end == pytest.approx(middles[0] if query in reads else middles[1], abs=0.5)


def test_device_and_layer_are_chosen_and_kept_in_the_address(open_page) -> None:
    page = open_page(state="#kv=4")
    page.locator("#device").select_option("H200")
    page.locator("#layer").select_option("2")
    assert page.evaluate("location.hash") == "#kv=4&layer=2&device=H200"
    again = open_page(state="#kv=4&layer=2&device=H200")
    assert again.locator("#device").input_value() == "H200"
    assert shown(again, "requests") == shown(page, "requests")
    page.evaluate("location.hash = '#kv=1'")
    page.wait_for_function("document.querySelector('[data-field=kv_heads]').textContent === '1'")


@pytest.mark.parametrize("state", ["#kv=3", "#kv=", "#", "#layer=99&device=none", "#%%%"])
def test_an_address_with_a_strange_state_shows_the_first_view(open_page, state: str) -> None:
    assert shown(open_page(state=state), "kv_heads") in {"1", "2", "4"}


def test_dial_by_touch_and_by_click(open_page) -> None:
    page = open_page(width=360, has_touch=True, state="#kv=8")
    slider = page.locator("#kv-heads")
    slider.tap(position={"x": slider.bounding_box()["width"] - 14, "y": 22})
    assert shown(page, "kv_heads") == "1"
    page.locator(".stops span").nth(1).click()
    assert shown(page, "kv_heads") == "4"


@pytest.mark.parametrize("name", ["small", "large"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_overlaps_overflows_or_is_cut(open_page, name: str, width: int) -> None:
    page = open_page(name, width=width, state="#kv=8")
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OVERLAPS) == []
    assert page.evaluate(CLIPPED) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_from_the_paper(open_page, scheme: str) -> None:
    # WCAG contrast of every colour that draws text, worked out by the browser from a pixel of each
    page = open_page("large", scheme=scheme)
    ratios = page.evaluate("""() => {
      const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
      const light = (color) => {
        paint.fillStyle = "#fff"; paint.fillRect(0, 0, 1, 1); paint.fillStyle = color; paint.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...paint.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
          .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const paper = light(getComputedStyle(document.body).backgroundColor);
      const texts = [...document.querySelectorAll("p, h1, h2, h3, td, th, summary, .panel text")];
      return Object.fromEntries(texts.map((t) => {
        const style = getComputedStyle(t), color = t.closest("svg") ? style.fill : style.color, own = light(color);
        return [color, (Math.max(own, paper) + 0.05) / (Math.min(own, paper) + 0.05)];
      }));
    }""")
    assert len(ratios) > 8
    assert {color: ratio for color, ratio in ratios.items() if ratio < 4.5} == {}


def test_page_gives_its_record_back(open_page) -> None:
    page = open_page()
    with page.expect_download() as download:
        page.locator("#save-record").click()
    assert download.value.suggested_filename == "study.json"
    saved = json.loads(download.value.path().read_text(encoding="utf-8"))
    assert saved == json.loads(study_record().to_json())


def test_print_opens_the_tables(open_page) -> None:
    page = open_page()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0


def test_print_fits_the_width_of_a_sheet(open_page) -> None:
    page = open_page(width=680)  # A4 between margins of 15 mm
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.documentElement.scrollWidth") <= 680


def test_maps_follow_the_dial_and_show_what_the_record_says(open_page) -> None:
    page = open_page(state="#kv=8")
    assert page.locator("#looks-model").input_value() == "parent|8"
    assert page.locator(".kv").count() == 8
    page.locator("#kv-heads").press("ArrowRight")
    page.locator("#kv-heads").press("ArrowRight")
    assert page.locator("#looks-model").input_value() == "child|2"
    assert page.locator(".kv").count() == 2
    assert page.locator(".kv").nth(1).locator(".map").count() == 4
    page.locator("#looks-layer").select_option("3")
    # in layer 3 the synthetic head 2 looks 5 tokens back, or at the first
    page.locator("#looks-token").evaluate("e => { e.value = 7; e.dispatchEvent(new Event('input')); }")
    label = page.locator(".map").nth(2).get_attribute("aria-label")
    assert label == "query head 2: from “x” most to “(”, 100 %"
    painted = page.evaluate("""() => {
      const canvas = document.querySelectorAll(".map canvas")[2];
      const pixels = canvas.getContext("2d").getImageData(0, 0, 9, 9).data;
      return [...Array(81).keys()].filter((k) => pixels[4 * k + 3] > 0).map((k) => [Math.floor(k / 9), k % 9]);
    }""")
    assert painted == [[t, max(0, t - 5)] for t in range(9)]
    row = next(
        row
        for row in study_results()["attention_heads"]
        if (row["weights"], row["kv_heads"], row["layer"]) == ("child", 2, 3)
    )
    cells = page.locator("#looks-heads tbody tr").nth(5).locator("td").all_inner_texts()
    assert cells == ["5", str(row["parent_heads"][5]), "1", "6.50", "0.333", "13 %", "2.4 %"]
    page.locator("#looks-model").select_option("random|8")
    assert page.locator(".map").first.get_attribute("aria-label").endswith(", 12 %")  # of 1/8, in 64 levels
    page.set_viewport_size({"width": 700, "height": 900})
    assert page.locator("#looks-model").input_value() == "random|8", "only a turn of the dial chooses another"


def test_maps_by_keyboard_and_pointer(open_page) -> None:
    page = open_page(state="#kv=4")
    told = page.locator("#looks-told")
    page.locator(".map").nth(3).focus()
    assert told.inner_text().startswith("Query head 3, reading KV head 1: from")
    page.keyboard.press("ArrowDown")
    assert page.locator("#looks-token").input_value() == "7"
    page.keyboard.press("ArrowRight")  # from what it looks at most, three tokens back, to the next
    assert told.inner_text().endswith("from “x” (token 7) 0 % to “⏎␣␣␣␣” (token 5, 2 back).")
    page.keyboard.press("ArrowLeft")
    assert "100 % to “):” (token 4, 3 back)." in told.inner_text()
    assert page.locator("#looks-text .asks").inner_text() == " x"
    assert page.locator("#looks-text .asked").inner_text() == "):"
    box = page.locator(".map canvas").nth(1).bounding_box()
    page.mouse.move(box["x"] + 0.5 * box["width"] / 9, box["y"] + 1.5 * box["height"] / 9)
    assert told.inner_text() == "Query head 1, reading KV head 0: from “f” (token 1) 100 % to “def” (token 0, 1 back)."
