"""`gqa convert --verify` as a user meets it: exit codes, streams, JSON."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
from helpers.checkpoints import write_checkpoint

from gqa.cli.main import main
from gqa.convert.recipe import make_recipe
from gqa.convert.run import convert
from gqa.source import open_checkpoint


def gqa(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as left:
        main(["convert", *map(str, arguments)])
    return left.value.code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("made")
    convert(open_checkpoint(str(write_checkpoint(place / "parent"))), place / "out", make_recipe(2, "mean"))
    return place


@pytest.fixture
def spoilt(made, tmp_path):
    out = shutil.copytree(made / "out", tmp_path / "out")
    path = out / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return out


def test_sound(made):
    code, out, err = gqa("--verify", made / "out")
    assert code == 0, err
    assert "as it was written; 30 tensors in 5 files read" in out
    assert "verify tensors: 30/30" in err
    code, out, _ = gqa(made / "parent", made / "out", "--verify")
    assert code == 0
    assert "24 of them compared with the parent's" in out


def test_spoilt(spoilt):
    code, out, _ = gqa("--verify", spoilt)
    assert code == 1
    assert "not as it was written, 1 differences" in out
    assert "other bytes than were written, in model.safetensors" in out


def test_json(made, spoilt):
    code, out, _ = gqa("--verify", "--json", made / "parent", spoilt)
    record = json.loads(out)
    assert (code, record["command"], record["results"]["sound"]) == (1, "convert", False)
    assert len(record["results"]["differences"]) == 2  # from what was written, and from the parent


def test_many_differences_are_counted(spoilt):
    path = spoilt / "model.safetensors"
    content = bytearray(path.read_bytes())
    for place in range(8192, len(content), 4096):
        content[place] ^= 1
    path.write_bytes(content)
    code, out, _ = gqa("--verify", spoilt)
    assert code == 1
    assert "more; --json lists them all" in out
    assert len(out.splitlines()) < 20


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--verify",), "Missing argument"),
        (("--verify", "nowhere"), "no converted folder"),
        (("--verify", "a", "b", "c"), "too many folders"),
        (("--verify", "nowhere", "out"), "nowhere"),
        (("--verify", "out", "--kv-heads", "2"), "--kv-heads"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_arguments(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = gqa(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert said in err
    assert list(Path().iterdir()) == []


def test_help():
    code, out, _ = gqa("--help")
    assert code == 0
    assert "--verify" in out
    code, out, _ = gqa("--verify", "--help")
    assert code == 0
    assert out.startswith("Examples:\n  gqa convert --verify ")
