"""`gqa claims` as a user meets it."""

import json
from pathlib import Path

import pytest

from gqa.cli.main import main

STUDY = next((Path(__file__).parents[2] / "benchmarks" / "results").glob("*-study.json"))


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main(["claims", *arguments])
    printed = capsys.readouterr()
    return caught.value.code, printed.out, printed.err


def test_the_table(capsys):
    code, out, err = run(capsys)
    assert (code, err) == (0, "")
    assert "WRONG BY A FACTOR OF 8.2: 171.8 GB (160 GiB) and 21.47 GB (20 GiB)" in out
    assert out.count("TO BE MEASURED") == 4
    assert max(map(len, out.splitlines())) <= 100


def test_json_with_a_study(capsys):
    code, out, _ = run(capsys, "--study", str(STUDY), "--json")
    assert code == 0
    rows = json.loads(out)["results"]["claims"]
    assert sum(row["verdict"] == "measured" for row in rows) == 3


def test_a_study_that_is_none(capsys, tmp_path):
    code, _, err = run(capsys, "--study", str(tmp_path / "none.json"))
    assert code == 2
    assert "no record at this path" in err
