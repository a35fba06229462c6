import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.small import RECIPE, small_corpus
from transformers import AutoModelForCausalLM

from gqa.errors import GqaError
from gqa.study.embedded import embedded_parent, learning_rate_factor, stdlib_corpus
from gqa.text import load_tokenizer


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GQA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_the_library_is_split_by_file_and_nothing_is_in_two_parts():
    corpus = stdlib_corpus()
    parts = (corpus.train, corpus.calibration, corpus.test)
    files = [path for part in parts for path in part]
    assert len(set(files)) == len(files)
    contents = [path.read_bytes() for path in files]
    assert len(set(contents)) == len(contents)
    assert not any({"test", "tests", "site-packages"} & set(path.parts) for path in files)
    sizes = [sum(path.stat().st_size for path in part) for part in parts]
    assert sizes[0] > 10 * sizes[1] / 2
    assert min(sizes) > 200_000


def test_the_split_does_not_depend_on_where_the_library_lies(tmp_path):
    names = [f"package/module_{i}.py" for i in range(60)]
    split = []
    for place in ("here", "there/deeper"):
        root = tmp_path / place
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(f"# {name}")
        (root / "copy.py").write_text("# package/module_1.py")  # a copy counts once
        (root / "empty.py").write_text("")
        corpus = stdlib_corpus(root)
        split.append([[path.relative_to(root) for path in part] for part in dataclasses.astuple(corpus)])
    assert split[0] == split[1]
    assert sum(map(len, split[0])) == 60


def test_a_python_without_sources_is_told(tmp_path):
    with pytest.raises(GqaError, match="sources are not on this machine"):
        stdlib_corpus(tmp_path)


def test_the_schedule_warms_up_and_ends_near_zero():
    recipe = dataclasses.replace(RECIPE, steps=100, warmup_steps=10)
    factors = [learning_rate_factor(step, recipe) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[-1] < 0.01


def test_a_parent_is_trained_once_and_is_an_ordinary_model(tmp_path, cache):
    corpus = small_corpus(tmp_path)
    seen = []
    parent = embedded_parent(RECIPE, lambda stage, done, total, note="": seen.append((stage, done, total)), corpus)
    assert parent.train_tokens == RECIPE.steps * RECIPE.batch * RECIPE.window
    assert ("training the parent", RECIPE.steps, RECIPE.steps) in seen
    assert [path.name for path in cache.iterdir()] == [parent.folder.name]  # no working folder is left

    model = AutoModelForCausalLM.from_pretrained(parent.folder)
    assert sum(p.numel() for p in model.parameters()) == parent.parameters
    assert model.config.num_key_value_heads == model.config.num_attention_heads == RECIPE.heads
    config = json.loads((parent.folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["head_dim"] == RECIPE.hidden // RECIPE.heads
    assert config["torch_dtype"] == "float32"
    tokenizer = load_tokenizer(parent.folder)
    text = "def ünknown(x):\n\treturn '日本'\n"  # byte level: what was never seen comes back too
    assert tokenizer.decode(tokenizer.encode(text)) == text

    seen.clear()
    assert embedded_parent(RECIPE, lambda stage, done, total, note="": seen.append(stage), corpus) == parent
    assert seen == []


def test_another_recipe_is_another_model(tmp_path, cache):
    corpus = small_corpus(tmp_path)
    short = dataclasses.replace(RECIPE, steps=2)
    first = embedded_parent(short, corpus=corpus)
    second = embedded_parent(dataclasses.replace(short, seed=1), corpus=corpus)
    assert first.folder != second.folder


def test_a_killed_training_goes_on_and_ends_with_the_same_weights(tmp_path, cache, monkeypatch):
    corpus = small_corpus(tmp_path)
    recipe = dataclasses.replace(RECIPE, steps=120, checkpoint_steps=20)
    program = (
        "import sys; from pathlib import Path; from helpers.small import *; import dataclasses\n"
        "from gqa.study.embedded import embedded_parent\n"
        "corpus = small_corpus(Path(sys.argv[1]))\n"
        "embedded_parent(dataclasses.replace(RECIPE, steps=120, checkpoint_steps=20), corpus=corpus)\n"
    )
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], env={**os.environ, "PYTHONPATH": paths})
    deadline = time.monotonic() + 60
    while not list(cache.glob("*.partial/state.pt")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(cache.glob("*.partial/state.pt"))
    assert not [path for path in cache.iterdir() if path.suffix != ".partial"]

    steps = []
    resumed = embedded_parent(recipe, lambda stage, done, total, note="": steps.append(done), corpus)
    assert 20 < steps[2] <= 120  # after two reports on the tokenizer; not from the first step again
    monkeypatch.setenv("GQA_CACHE", str(tmp_path / "other"))
    undisturbed = embedded_parent(recipe, corpus=corpus)
    one, other = weights(resumed.folder), weights(undisturbed.folder)
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_cache_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GQA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(GqaError, match="cache folder"):
        embedded_parent(RECIPE, corpus=small_corpus(tmp_path))
