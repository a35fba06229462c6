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
from helpers.small import RECIPE, small_corpus, small_texts
from transformers import AutoModelForCausalLM

from gqa.errors import GqaError
from gqa.study.train_parent import learning_rate_factor, train_parent
from gqa.text import load_tokenizer


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.fixture
def texts(tmp_path):
    return small_texts(small_corpus(tmp_path))


def test_the_schedule_warms_up_holds_and_ends_near_zero():
    recipe = dataclasses.replace(RECIPE, steps=100, warmup_steps=10, decay_share=0.4)
    factors = [learning_rate_factor(step, recipe) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:61] == [1.0] * 52
    assert factors[60:] == sorted(factors[60:], reverse=True)
    assert factors[-1] == pytest.approx(1 / 40)
    longer = dataclasses.replace(recipe, steps=200)
    assert [learning_rate_factor(step, longer) for step in range(60)] == factors[:60]


def test_a_parent_is_trained_once_and_is_an_ordinary_model(tmp_path, texts):
    seen = []
    folder = tmp_path / "parent"
    tell = lambda stage, done, total, note="": seen.append((stage, done, total))  # noqa: E731
    parent = train_parent(RECIPE, texts, folder, tell)
    assert parent.train_tokens == RECIPE.steps * RECIPE.batch * RECIPE.window
    assert ("training the parent", RECIPE.steps, RECIPE.steps) in seen
    assert not list(tmp_path.glob("*.partial"))

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == parent.parameters
    assert model.config.num_key_value_heads == model.config.num_attention_heads == RECIPE.heads
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["head_dim"] == RECIPE.hidden // RECIPE.heads
    assert config["torch_dtype"] == "float32"
    tokenizer = load_tokenizer(folder)
    text = "def ünknown(x):\n\treturn '日本'\n"  # byte level: what was never seen comes back too
    assert tokenizer.decode(tokenizer.encode(text)) == text

    seen.clear()
    assert train_parent(RECIPE, texts, folder, tell) == parent
    assert seen == []


def test_a_folder_of_another_parent_is_refused(tmp_path, texts):
    short = dataclasses.replace(RECIPE, steps=2)
    train_parent(short, texts, tmp_path / "parent")
    with pytest.raises(GqaError, match="another parent"):
        train_parent(dataclasses.replace(short, seed=1), texts, tmp_path / "parent")
    with pytest.raises(GqaError, match="another parent"):
        train_parent(short, [*texts[:-1], "x = 1"], tmp_path / "parent")


def test_too_little_text(tmp_path):
    with pytest.raises(GqaError, match="too short"):
        train_parent(RECIPE, ["x = 1"], tmp_path / "parent")


def test_a_killed_training_goes_on_and_ends_with_the_same_weights(tmp_path, texts):
    recipe = dataclasses.replace(RECIPE, steps=120, checkpoint_steps=20)
    program = (
        "import sys; from pathlib import Path; from helpers.small import *; import dataclasses\n"
        "folder = Path(sys.argv[1]); texts = small_texts(small_corpus(folder))\n"
        "train_parent(dataclasses.replace(RECIPE, steps=120, checkpoint_steps=20), texts, folder / 'parent')\n"
    )
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], env={**os.environ, "PYTHONPATH": paths})
    state = tmp_path / "parent.partial" / "state.pt"
    deadline = time.monotonic() + 60
    while not state.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state.exists()
    assert not (tmp_path / "parent").exists()

    steps = []
    train_parent(recipe, texts, tmp_path / "parent", lambda stage, done, total, note="": steps.append(done))
    assert 20 < steps[2] <= 120  # after two reports on the tokenizer; not from the first step again
    train_parent(recipe, texts, tmp_path / "undisturbed")
    one, other = weights(tmp_path / "parent"), weights(tmp_path / "undisturbed")
    assert all(torch.equal(one[name], other[name]) for name in other)
    resumed, straight = (
        json.loads((tmp_path / name / "gqa_training.json").read_text())["losses"] for name in ("parent", "undisturbed")
    )
    assert [row["loss_nats"] for row in resumed] == [row["loss_nats"] for row in straight]
