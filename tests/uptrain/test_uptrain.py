import shutil

import numpy as np
import pytest
import torch
from helpers.small import RECIPE
from helpers.uptraining import noisy_child, parent_and_windows
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, log_softmax

from gqa.errors import GqaError
from gqa.evaluate import evaluate, load_model
from gqa.uptrain import Settings, training_windows, uptrain
from gqa.uptrain.distill import distillation_loss


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A folder with a minuscule trained model, and windows of its text."""
    return parent_and_windows(tmp_path_factory.mktemp("parent"))


@pytest.fixture(scope="module")
def child(parent, tmp_path_factory):
    return noisy_child(parent[0], tmp_path_factory.mktemp("child") / "child")


def test_the_loss_is_what_the_formula_says():
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(2, 5, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    ids = torch.randint(0, 11, (2, 5), generator=generator)
    q, p = log_softmax(logits[:, :-1], -1), log_softmax(teacher[:, :-1], -1)
    entropy = cross_entropy(logits[:, :-1].reshape(-1, 11), ids[:, 1:].reshape(-1))
    kl = (p.exp() * (p - q)).sum(-1).mean()
    loss, told_entropy, told_kl = distillation_loss(logits, ids, teacher, 0.7)
    assert told_entropy.item() == pytest.approx(entropy.item(), rel=1e-6)
    assert told_kl is not None
    assert told_kl.item() == pytest.approx(kl.item(), rel=1e-6)
    assert loss.item() == pytest.approx(0.7 * kl.item() + 0.3 * entropy.item(), rel=1e-6)
    plain, told_entropy, told_kl = distillation_loss(logits, ids, None, 0.7)
    assert plain.item() == told_entropy.item()
    assert told_kl is None


def test_a_model_taught_by_itself_has_no_gradient_from_the_teacher():
    logits = torch.randn(2, 5, 11, requires_grad=True)
    loss, _, _ = distillation_loss(logits, torch.zeros(2, 5, dtype=torch.int64), logits.detach(), 1.0)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-6


def test_training_windows_use_each_window_once_before_any_twice():
    windows = np.arange(20).reshape(10, 2)
    chosen = training_windows(windows, tokens=48, batch=4, seed=3)
    assert chosen.shape == (24, 2)
    for start in (0, 10):
        assert sorted(chosen[start : start + 10, 0]) == windows[:, 0].tolist()
    assert chosen[:10].tolist() != chosen[10:20].tolist()
    assert training_windows(windows, 1, 4).shape == (4, 2)  # one whole batch at least
    for tokens, batch in ((0, 1), (4, 0)):
        with pytest.raises(GqaError):
            training_windows(windows, tokens, batch)


def test_a_child_comes_closer_to_its_parent(parent, child, tmp_path):
    folder, windows = parent
    out = tmp_path / "out"
    stages = []
    report = uptrain(
        child,
        out,
        windows=windows[:80],
        parent_folder=folder,
        settings=Settings(learning_rate=3e-3),
        progress=lambda stage, done, total, note="": stages.append((stage, done, total)),
    )
    assert (report["steps"], report["tokens"]) == (10, 80 * RECIPE.window)
    assert stages[-1] == ("uptraining", 10, 10)
    assert report["final_kl_to_parent_nats"] > 0
    teacher = load_model(folder)
    before, after = (evaluate(load_model(path), windows[80:120], teacher) for path in (child, out))
    assert after["kl_to_parent_nats"] < before["kl_to_parent_nats"]

    # An ordinary folder: the config as it was, legacy keys included, the tokenizer, no trace of the work.
    assert (out / "config.json").read_bytes() == (child / "config.json").read_bytes()
    assert (out / "tokenizer.json").exists()
    assert "10240" not in (out / "README.md").read_text()
    assert "2560 tokens" in (out / "README.md").read_text()
    assert not (out / "gqa_training.json").exists()  # the number of training tokens is no longer true
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    # Once more is a look at what is there; another job does not touch it.
    stages.clear()
    assert (
        uptrain(child, out, windows=windows[:80], parent_folder=folder, settings=Settings(learning_rate=3e-3)) == report
    )
    assert stages == []
    with pytest.raises(GqaError, match="not the result of this uptraining"):
        uptrain(child, out, windows=windows[:80], parent_folder=folder, settings=Settings(learning_rate=1e-3))


def test_without_a_parent_it_is_plain_continuation(parent, tmp_path, capsys):
    folder, windows = parent
    report = uptrain(folder, tmp_path / "control", windows=windows[:16])
    assert report["parent"] is None
    assert report["final_kl_to_parent_nats"] is None
    assert report["distill_weight"] == 0
    assert capsys.readouterr() == ("", "")


def test_the_stored_dtype_is_kept(parent, tmp_path):
    folder, windows = parent
    half = tmp_path / "half"
    shutil.copytree(folder, half)
    load_model(folder, dtype=torch.bfloat16).save_pretrained(half)
    uptrain(half, tmp_path / "out", windows=windows[:8])
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"distill_weight": 1.5}, "weight"),
        ({"batch": 0}, "batch"),
        ({"batch": 200}, "less text"),
        ({"learning_rate": 0.0}, "learning rate"),
        ({"windows": np.full((8, 4), 5000)}, "does not know"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(parent, tmp_path, changes, word):
    folder, windows = parent
    changes = {"windows": windows[:100], **changes}
    windows = changes.pop("windows")
    with pytest.raises(GqaError, match=word):
        uptrain(folder, tmp_path / "out", windows=windows, settings=Settings(**changes))
    assert list(tmp_path.iterdir()) == []


def test_an_output_of_something_else_stays_untouched(parent, tmp_path):
    folder, windows = parent
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    with pytest.raises(GqaError, match="exists"):
        uptrain(folder, out, windows=windows[:8])
    other = tmp_path / "other.partial"
    other.mkdir()
    with pytest.raises(GqaError, match="interrupted"):
        uptrain(folder, tmp_path / "other", windows=windows[:8])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "other.partial", "out"]


def test_two_at_once_do_not_disturb_each_other(parent, tmp_path):
    folder, windows = parent
    refused = []

    def meanwhile(stage, done, total, note=""):
        with pytest.raises(GqaError, match="another process is at work"):
            uptrain(folder, tmp_path / "out", windows=windows[:16])
        refused.append(done)

    uptrain(folder, tmp_path / "out", windows=windows[:16], progress=meanwhile)
    assert refused == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
