"""`gqa report`: the page lies there whole, or an error says why not and nothing lies there."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.study_record import study_record

from gqa.cli.main import main


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def test_writes_the_page_beside_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study_record().write(tmp_path / "study.json")
    assert run("report", tmp_path / "study.json") == 0
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    told = capsys.readouterr()
    assert told.out == ""
    assert "report.html" in told.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "study.json"]


@pytest.mark.parametrize("content", [None, "", "not json", "[]", '{"schema": 1}', '{"command": "study"}'])
def test_a_missing_or_broken_record_is_one_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    record = tmp_path / "study.json"
    if content is not None:
        record.write_text(content)
    assert run("report", record, "--out", tmp_path / "page.html") == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "page.html").exists()


def test_an_unwritable_place_is_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study_record().write(tmp_path / "study.json")
    assert run("report", tmp_path / "study.json", "--out", tmp_path / "study.json" / "page.html") == 2
    assert "cannot be written" in capsys.readouterr().err
