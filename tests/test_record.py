"""Records: to JSON and back, and files that are whole or not there."""

import json
import os
import stat

import pytest

from gqa import record
from gqa.errors import GqaError
from gqa.record import Record, describe_machine, describe_versions, read_record, write_text_atomic


def made(**changes):
    fields = {
        "command": "plan",
        "inputs": {"context": 8},
        "results": {"settings": [{"kv_heads": 8, "seconds": 0.5}]},
        "basis": {"seconds": "predicted"},
        "assumptions": ("One.", "Two."),
    }
    return Record(**(fields | changes))


def test_there_and_back(tmp_path):
    original = made()
    original.write(tmp_path / "plan.json")
    assert read_record(tmp_path / "plan.json") == original
    assert read_record(tmp_path / "plan.json", command="plan") == original


def test_json_has_no_nan(tmp_path):
    document = json.loads(made(results={"rows": [float("nan"), float("inf"), (1, tmp_path)]}).to_json())
    assert document["results"] == {"rows": [None, None, [1, str(tmp_path)]]}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a record"),
        ("{", "not a record"),
        ("[]", "not a record"),
        ("{}", "not a record"),
        ('{"command": "plan"}', "not a record"),
        ("[" * 100_000, "not a record"),
        (made(assumptions=3).to_json(), "not a record"),
        (made(results=[1]).to_json(), "not a record"),
    ],
    ids=["empty", "half", "list", "no fields", "one field", "deep", "no assumptions", "no results"],
)
def test_files_that_are_none(tmp_path, text, says):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(GqaError, match=says):
        read_record(path)


def test_missing_foreign_and_other(tmp_path):
    with pytest.raises(GqaError, match="no record"):
        read_record(tmp_path / "nothing.json")
    with pytest.raises(GqaError, match="not a record"):
        read_record(tmp_path)
    made(schema=record.SCHEMA + 1).write(tmp_path / "new.json")
    with pytest.raises(GqaError, match="another schema"):
        read_record(tmp_path / "new.json")
    made().write(tmp_path / "plan.json")
    with pytest.raises(GqaError, match="not a record of `gqa study`"):
        read_record(tmp_path / "plan.json", command="study")


def test_nothing_about_who_and_where():
    text = json.dumps(describe_machine() | describe_versions())
    for secret in (os.uname().nodename, os.path.expanduser("~"), os.getcwd()):
        if len(secret) > 1:
            assert secret not in text
    assert describe_versions()["gqa"]


def test_atomic_writing_makes_folders_and_ordinary_files(tmp_path):
    path = tmp_path / "a" / "b" / "text.txt"
    write_text_atomic(path, "one")
    write_text_atomic(path, "twø")
    assert path.read_text(encoding="utf-8") == "twø"
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert os.listdir(path.parent) == ["text.txt"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    write_text_atomic(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_text_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["text.txt"]
