"""The script that made the shipped parent: which text it takes, and a minuscule run from the text to a folder."""

import dataclasses
import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
from helpers.small import RECIPE, small_corpus

from gqa.study.embedded import METADATA, embedded_parent

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "quality" / "train_parent.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_parent_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written(folder, name, lines):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def test_no_copy_and_nothing_near_held_out_text_is_taken(script, tmp_path):
    lines = [f"value_{i} = {i}" for i in range(40)]
    gathering = script.Gathering([written(tmp_path, "held_out.py", lines)])
    part = lines[10 : 10 + script.RUN_LINES]
    assert gathering.add(written(tmp_path, "copy.py", ["    " + line for line in lines])) == 0
    assert gathering.add(written(tmp_path, "part.py", ["x = 1", *part[:4], "", *part[4:], "y = 2"])) == 0
    assert gathering.add(written(tmp_path, "short.py", ["x = 1", *part[1:], "y = 2"])) > 0
    assert gathering.add(written(tmp_path, "again.py", ["x = 1", "", *part[1:], "  y = 2"])) == 0
    assert gathering.add(written(tmp_path, "large.py", [f"x_{i} = 0" for i in range(30_000)])) == 0
    assert gathering.left_out == {"copies": 1, "shared with held-out text": 2}
    assert len(gathering.texts) == 1


def test_packages_count_without_their_tests_and_up_to_a_limit(script, tmp_path, monkeypatch):
    for number in range(8):
        written(tmp_path, f"site/large/module_{number}.py", [f"x_{number} = {i}" for i in range(20)])
    written(tmp_path, "site/large/tests/test_x.py", ["x = 1"])
    written(tmp_path, "site/small.py", ["def small():", "    pass"])
    corpus = small_corpus(tmp_path)
    monkeypatch.setattr(script, "stdlib_corpus", lambda *_: corpus)
    monkeypatch.setattr(script.sysconfig, "get_path", lambda _: str(tmp_path / "site"))
    monkeypatch.setattr(script, "PACKAGE_BYTES", 500)
    texts, data = script.gather([])
    assert data["standard_library"]["files"] == 1
    assert set(data["packages"]) == {"large", "small.py"}
    assert data["packages"]["small.py"]["files"] == 1
    assert 500 <= data["packages"]["large"]["bytes"] < 1000
    assert data["files"] == len(texts) == 1 + 1 + data["packages"]["large"]["files"]


def test_a_minuscule_parent_is_shipped(script, tmp_path, monkeypatch):
    corpus = small_corpus(tmp_path)
    monkeypatch.setattr(script, "stdlib_corpus", lambda *_: dataclasses.replace(corpus, calibration=(), test=()))
    monkeypatch.setattr(script.sysconfig, "get_path", lambda _: str(tmp_path / "none"))
    monkeypatch.setattr(script, "RECIPE", RECIPE)
    out = tmp_path / "shipped"
    script.main(["--work", str(tmp_path / "work"), "--out", str(out), "--steps", "10"])
    parent = embedded_parent(out)
    assert parent.train_tokens == 10 * RECIPE.batch * RECIPE.window
    facts = json.loads((out / METADATA).read_text())
    assert facts["data"]["files"] == 1
    assert facts["sha256"]["model.safetensors"] == hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
