import json
import shutil

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


def test_the_schedule_goes_on_where_the_parents_ended(model, tmp_path):
    folder, text = model
    parent = tmp_path / "parent"
    shutil.copytree(folder, parent)
    history = [{"learning_rate": 1e-3}, {"learning_rate": 1e-4}]
    (parent / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    base = ("--parent", parent, "--text", text, "--tokens", "512", "--json")
    told = [
        json.loads(run(folder, tmp_path / f"out{n}", *base, *more).stdout)["results"]
        for n, more in enumerate(((), ("--learning-rate", "0.002"), ("--schedule", "linear")))
    ]
    assert [report["learning_rate"] for report in told] == [1e-4, 2e-3, 2e-4]
    assert [report["schedule"] for report in told] == ["constant", "constant", "linear"]


def test_a_folder_of_texts_with_an_early_stop(model, tmp_path):
    folder, text = model
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    shutil.copyfile(text, corpus / "a.txt")
    (corpus / "b.jsonl").write_text(json.dumps({"code": "def g(x):\n    return x\n" * 400}) + "\n")
    arguments = (folder, tmp_path / "out", "--parent", folder, "--text", corpus, "--text-field", "code")
    result = run(*arguments, "--tokens", "64k", "--early-stop", "--save-every", 2, "--learning-rate", "0.3")
    assert "stopped early" in result.stdout
    with pytest.raises(GqaError, match="'text'"):
        run(folder, tmp_path / "other", "--text", corpus, "--tokens", "64k")
    assert not (tmp_path / "other.partial").exists()
