"""A real Chromium with the network taken away, and the synthetic study's page opened from its file."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.scaling_record import scaling_record
from helpers.study_record import study_record, study_results
from helpers.uptraining_record import uptraining_record

from gqa.config import parse_config
from gqa.hardware import find_device
from gqa.plan import sweep
from gqa.record import Record
from gqa.report import plan_page, scaling_page, uptraining_page
from gqa.report.page import render
from gqa.source import open_source
from gqa.study.rows import planned as planned_rows


def planned(model: str, **question) -> Record:
    source = open_source(model)
    return sweep.plan(parse_config(source.config, source.name), alternatives=True, **question)


# A plan with everything; one with sliding layers, many stops and no device; one of a model type without parameters.
PLANS = {
    "plan": planned("llama-3.1-8b", context=32768, batch=8, device=find_device("H100 SXM")),
    "plan-long": planned("gpt-oss-20b"),
    "plan-unknown": sweep.plan(
        parse_config(
            {"model_type": "new", "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 96}, "unknown"
        ),
        alternatives=True,
    ),
}


def study_with_plan() -> Record:
    """The synthetic study, and what the planner says of its model under other devices, dtypes and contexts."""
    results = study_results()
    config = {"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8}
    config |= {"vocab_size": 4096, "intermediate_size": 688, "max_position_embeddings": 16384}
    results["plan"] = planned_rows(parse_config(config, "SYNTHETIC model"), [8, 4, 2, 1], "fp32", 16384)
    return study_record(results)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if CHROMIUM is None:
        reason = "no Chromium on this machine: apt-get install chromium, or any Chrome on the PATH"
        for item in items:
            if item.get_closest_marker("browser"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def chromium() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium refuses its sandbox to root, as which containers run; the only page it opens here is ours.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small study with every table, and a large one that crowds the drawings."""
    large = study_results(heads=64, layers=32)
    large["parent"]["name"] = (
        "SYNTHETIC/a-model-with-a-very-long-name-and-no-place-to-break-0123456789abcdef0123456789abcdef"
    )
    folder = tmp_path_factory.mktemp("pages")
    found = {}
    for name, record in (("small", study_record()), ("large", study_record(large))):
        found[name] = folder / f"{name}.html"
        found[name].write_text(render(record), encoding="utf-8")
    found["study-plan"] = folder / "study-plan.html"
    found["study-plan"].write_text(render(study_with_plan()), encoding="utf-8")
    found["uptraining"] = folder / "uptraining.html"
    found["uptraining"].write_text(uptraining_page.render(uptraining_record()), encoding="utf-8")
    found["scaling"] = folder / "scaling.html"
    found["scaling"].write_text(scaling_page.render(scaling_record()), encoding="utf-8")
    for name, record in PLANS.items():
        found[name] = folder / f"{name}.html"
        found[name].write_text(plan_page.render(record), encoding="utf-8")
    return found


@pytest.fixture
def open_page(chromium, pages: dict[str, Path]) -> Iterator[Callable]:
    """open_page(name, width=, scheme=, state=) -> a page; after the test it must have been silent and alone."""
    contexts, noise = [], []

    def opened(name: str = "small", width: int = 1280, scheme: str = "light", state: str = "", **options):
        context = chromium.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce", **options
        )
        contexts.append(context)
        page = context.new_page()
        address = pages[name].as_uri()
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on("request", lambda request: request.url.split("#")[0] == address or noise.append(request.url))
        context.set_offline(True)
        page.goto(address + state)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert noise == []
