import json

import pytest
from click.testing import CliRunner
from helpers.small import RECIPE, small_parent

from gqa.cli.uptrain import command
from gqa.errors import GqaError

PARENT_TOKENS = RECIPE.steps * RECIPE.batch * RECIPE.window


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder, corpus = small_parent(tmp_path_factory.mktemp("parent"))
    return str(folder), str(corpus.train[0])


def run(*arguments):
    return CliRunner().invoke(command, list(map(str, arguments)), catch_exceptions=False, standalone_mode=False)


def test_a_fraction_of_the_tokens_that_the_parent_tells(model, tmp_path):
    folder, text = model
    out = tmp_path / "out"
    result = run(folder, out, "--parent", folder, "--text", text, "--fraction", "0.5", "--batch", 4, "--json")
    document = json.loads(result.stdout)
    assert document["command"] == "uptrain"
    assert document["inputs"]["tokens"] == document["results"]["tokens"] == PARENT_TOKENS // 2
    assert document["inputs"]["distill"] is True
    assert document["basis"]["final_cross_entropy_nats"] == "measured"
    assert (out / "model.safetensors").exists()
    assert "gqa eval" in result.stderr


def test_without_distillation_the_parent_only_gives_its_count(model, tmp_path):
    folder, text = model
    arguments = (folder, tmp_path / "out", "--parent", folder, "--text", text, "--fraction", "0.1", "--batch", 2)
    printed = run(*arguments, "--no-distill").stdout
    assert "without a teacher" in printed
    assert "KL" not in printed
    assert "cross-entropy" in printed


def test_text_that_is_too_short_is_read_again_and_that_is_told(model, tmp_path):
    folder, text = model
    result = run(folder, tmp_path / "out", "--text", text, "--tokens", "8k")
    assert "is read 2.0 times" in result.stderr


def test_mistakes_write_nothing(model, tmp_path):
    folder, text = model
    base = (folder, tmp_path / "out", "--text", text)
    for arguments, word in (
        (base, "how long"),
        ((*base, "--tokens", "1k", "--fraction", "0.1"), "how long"),
        ((*base, "--fraction", "5"), "fraction is out of range"),
        ((*base, "--fraction", "0.05"), "not known on how many tokens"),
        ((*base, "--tokens", "1k", "--learning-rate", "0"), "learning rate"),
        ((*base, "--tokens", "1k", "--batch", "0"), "batch"),
        ((folder, tmp_path / "out", "--text", tmp_path / "none", "--tokens", "1k"), "no text file"),
    ):
        with pytest.raises(GqaError, match=word):
            run(*arguments)
    assert list(tmp_path.iterdir()) == []
