"""The page of a plan in a real browser: every choice tells the record's figures, by keyboard alone."""

from __future__ import annotations

import json

import pytest

from gqa.units import format_bytes, format_seconds

from .conftest import PLANS, study_with_plan
from .test_report_page import CLIPPED, OVERLAPS, shown

pytestmark = pytest.mark.browser

RECORD = PLANS["plan"]
STOPS = [32, 16, 8, 4, 2, 1]


def alternative(table: str, **key):
    (row,) = [row for row in RECORD.results["what_if"][table] if all(row[name] == value for name, value in key.items())]
    return row


@pytest.mark.parametrize(("device", "dtype", "context"), [("H100 SXM", "bf16", 32768), ("L4", "fp8", 131072)])
def test_every_stop_and_choice_shows_the_records_figures(open_page, device: str, dtype: str, context: int) -> None:
    page = open_page("plan", state=f"#kv=32&device={device}&dtype={dtype}&context={context}")
    page.locator("#kv-heads").focus()
    for index, kv_heads in enumerate(STOPS):
        cache = alternative("caches", stop=index, kv_dtype=dtype, context_tokens=context)
        row = alternative("settings", stop=index, kv_dtype=dtype, context_tokens=context, device=device)
        assert shown(page, "kv_heads") == str(kv_heads)
        assert shown(page, "cache") == format_bytes(cache["kv_bytes_per_token"])
        assert shown(page, "cache_note").startswith(f"{format_bytes(cache['kv_bytes'])} for 8 requests")
        assert shown(page, "requests") == f"{row['max_concurrent_requests']:,}"
        assert shown(page, "bound") == format_seconds(row["decode_seconds_bound"])
        assert shown(page, "bound_note") == f"held by {row['decode_limit']}, for 8 requests"
        assert shown(page, "quality") == ("its own" if kv_heads == 8 else "not measured")
        assert page.locator(".heat tr.here th").inner_text().split()[0] == str(kv_heads)
        assert page.locator("#kv-heads").get_attribute("aria-valuetext").startswith(f"{kv_heads} KV head")
        page.keyboard.press("ArrowRight")


@pytest.mark.parametrize(("device", "dtype"), [("L4", "bf16"), ("H100 SXM", "fp8")])
def test_heat_map_shows_bytes_and_what_does_not_fit(open_page, device: str, dtype: str) -> None:
    page = open_page("plan", state=f"#device={device}&dtype={dtype}")
    contexts = RECORD.results["what_if"]["contexts"]
    cells = page.locator(".heat tbody tr").evaluate_all(
        "rows => rows.map((row) => [...row.querySelectorAll('td')].map((c) => [c.textContent, c.className]))"
    )
    for index in range(len(STOPS)):
        for column, context in enumerate(contexts):
            cache = alternative("caches", stop=index, kv_dtype=dtype, context_tokens=context)
            row = alternative("settings", stop=index, kv_dtype=dtype, context_tokens=context, device=device)
            text, classes = cells[index][column]
            assert text == format_bytes(cache["kv_bytes"])
            assert ("over" in classes.split()) == (row["max_concurrent_requests"] < 8)


def test_work_shows_the_records_shares(open_page) -> None:
    page = open_page("plan", state="#context=4096")
    bars = page.locator(".flops").evaluate_all("""bars => bars.map((bar) => ({
      step: bar.dataset.step, stop: Number(bar.dataset.stop),
      widths: [...bar.querySelectorAll("i")].map((part) => parseFloat(part.style.width)) }))""")
    assert len(bars) == 2 * len(STOPS)
    for bar in bars:
        rows = [alternative("work", stop=index, context_tokens=4096) for index in range(len(STOPS))]
        parts = [rows[bar["stop"]][f"{bar['step']}_{part}_flops"] for part in ("projection", "core", "rest")]
        widest = max(sum(row[f"{bar['step']}_{part}_flops"] for part in ("projection", "core", "rest")) for row in rows)
        assert bar["widths"] == pytest.approx([100 * part / widest for part in parts], abs=0.02)


def test_roofline_points_lie_on_the_roof_of_the_device(open_page) -> None:
    page = open_page("plan", state="#kv=8&device=L4")
    drawn = page.evaluate("""() => {
      const roof = document.querySelector("#roof path.roof"), length = roof.getTotalLength();
      return [...document.querySelectorAll("#roof circle")].map((circle) => {
        const x = circle.cx.baseVal.value, y = circle.cy.baseVal.value;
        let best = Infinity;
        for (let k = 0; k <= 2000; k++) {
          const p = roof.getPointAtLength((length * k) / 2000);
          best = Math.min(best, Math.hypot(p.x - x, p.y - y));
        }
        return best;
      });
    }""")
    assert len(drawn) == len(STOPS)
    assert max(drawn) < 1.5
    label = page.locator("#roof text.here").text_content()
    assert label == f"8 KV heads: {shown(page, 'bound')}"


def test_choices_by_keyboard_are_kept_in_the_address(open_page) -> None:
    page = open_page("plan")
    for expected in ("device", "dtype", "context", "kv-heads"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == expected
    page.keyboard.press("Home")
    assert page.evaluate("location.hash").startswith("#kv=32")
    page.locator("#device").focus()
    page.keyboard.type("H200")
    assert "device=H200" in page.evaluate("location.hash")
    assert page.locator("#heat-device").inner_text() == "H200"
    again = open_page("plan", state=page.evaluate("location.hash"))
    assert again.locator("#device").input_value() == "H200"


@pytest.mark.parametrize("name", [*PLANS, "study-plan", "uptraining", "scaling"])
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overlaps_or_overflows(open_page, name: str, width: int, scheme: str) -> None:
    page = open_page(name, width=width, scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OVERLAPS) == []
    assert page.evaluate(CLIPPED) == []


@pytest.mark.parametrize("name", ["small", "large", "study-plan", "uptraining", "scaling", *PLANS])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_axe_finds_nothing(open_page, name: str, scheme: str, width: int) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = open_page(name, width=width, scheme=scheme)
    found = Axe().run(page)
    told = [(v["id"], [node["html"][:120] for node in v["nodes"][:3]]) for v in found.response["violations"]]
    assert len(found.response["passes"]) > 10
    assert told == []


def test_page_gives_its_record_back_and_is_small(open_page, pages) -> None:
    page = open_page("plan")
    with page.expect_download() as download:
        page.locator("#save-record").click()
    assert download.value.suggested_filename == "plan.json"
    assert json.loads(download.value.path().read_text(encoding="utf-8")) == json.loads(RECORD.to_json())
    assert all(pages[name].stat().st_size < 1_000_000 for name in PLANS)


def test_what_is_unknown_is_said(open_page) -> None:
    page = open_page("plan-unknown")
    assert shown(page, "requests") == "unknown"
    assert shown(page, "bound") == "unknown"
    assert page.locator("#roofline").count() == 0
    assert page.locator("#work").count() == 0


def test_a_study_shares_the_charts_and_keeps_what_it_measured(open_page) -> None:
    page = open_page("study-plan", state="#kv=2&device=L4&dtype=fp32&context=16384")
    rows = study_with_plan().results["plan"]["what_if"]["settings"]
    (row,) = [
        row
        for row in rows
        if (row["stop"], row["device"], row["kv_dtype"], row["context_tokens"]) == (2, "L4", "fp32", 16384)
    ]
    assert shown(page, "requests") == f"{row['max_concurrent_requests']:,}"
    measured = shown(page, "cache"), shown(page, "decode")
    page.locator("#device").select_option("H200")
    page.locator("#dtype").select_option("bf16")
    assert (shown(page, "cache"), shown(page, "decode")) == measured
    assert page.locator(".heat tr.here th").inner_text() == "2 KV heads"
    assert page.locator("#roof circle").count() == 4
