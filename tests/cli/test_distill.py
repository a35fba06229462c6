"""`gqa convert --distill` with input that it cannot use: one clear error, nothing written, nothing lost."""

import contextlib
import io
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from helpers.checkpoints import folder_hashes
from helpers.tokenized import WORDS, write_tokenized

from gqa.cli.main import main
from gqa.uptrain.loop import Loop

TRAINED = ("--distill", 128, "--distill-window", 8, "--distill-batch", 2, "--window", 16)
CALIBRATED = ("--calibrate", "text.txt", "--calibration-tokens", 64, "--measure", 32, *TRAINED)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """Tests convert it and never write to it."""
    return write_tokenized(tmp_path_factory.mktemp("model") / "parent")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(WORDS * 50)
    Path("short.txt").write_text(WORDS * 6)  # more than a window, less than a batch


def gqa(*arguments):
    """Run the command line in this process: (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as left:
        main(["convert", *map(str, arguments)])
    return left.value.code, out.getvalue(), err.getvalue()


def refused(parent, *arguments, said):
    """The command fails with that error and leaves everything as it was."""
    before = folder_hashes(Path()), folder_hashes(Path(parent))
    code, out, err = gqa(parent, "out", *arguments)
    assert (code, out) == (2, ""), err
    assert said in err
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    assert (folder_hashes(Path()), folder_hashes(Path(parent))) == before
    return err


SHORT = ("--calibrate", "short.txt", "--calibration-tokens", 16, "--window", 16, "--measure", 16, "--distill", "4k")
BAD = {
    "without text": ((*TRAINED,), "a distillation reads text, and none is given"),
    "a text shorter than a batch": (
        (*SHORT, "--distill-window", 16, "--distill-batch", 64),
        "the text is shorter than one batch of the distillation",
    ),
    "a text shorter than a batch, pooled": (
        (*SHORT, "--distill-window", 16, "--distill-batch", 64, "--method", "mean"),
        "the text is shorter than one batch of the distillation",
    ),
    "a text shorter than a window": (
        (*SHORT, "--distill-window", 256),
        "shorter than one window of 256 tokens",
    ),
    "fewer tokens than a step": ((*CALIBRATED, "--distill-batch", 32), "fewer tokens than one step"),
    "a window of one token": ((*CALIBRATED, "--distill-window", 1), "distill window out of range"),
    "a batch of nothing": ((*CALIBRATED, "--distill-batch", 0), "distill batch out of range"),
    "no learning rate": ((*CALIBRATED, "--distill-rate", "nan"), "distill learning rate out of range"),
    "too little memory": ((*CALIBRATED, "--memory", "1MiB"), "does not fit the memory it may take"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_before_anything_is_written(parent, name):
    arguments, said = BAD[name]
    refused(parent, "--kv-heads", 2, *arguments, said=said)


def test_too_little_memory_for_the_training_names_its_arguments(parent):
    pooled = ("--method", "mean", "--calibrate", "text.txt", "--measure", 0)
    err = refused(parent, "--kv-heads", 2, *pooled, *TRAINED, "--memory", "1MiB", said="does not fit the memory")
    assert "hint: a smaller --distill-batch or --distill-window, or no --distill" in err


def test_a_tokenizer_with_ids_outside_the_vocabulary():
    write_tokenized(Path("other"), vocabulary=300)
    tokenizer = json.loads(Path("other", "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {word: index + 1000 for word, index in vocabulary.items() if len(word) > 1}
    Path("other", "tokenizer.json").write_text(json.dumps(tokenizer))
    for method in ("svd", "mean"):  # the latter reads the text for the distillation alone
        refused(
            "other", "--kv-heads", 2, "--method", method, *CALIBRATED[:4], *TRAINED, said="that the model does not know"
        )


@pytest.mark.parametrize("kv_heads_there", [8, 4])
def test_as_many_or_more_kv_heads_are_exact_and_nothing_is_trained(kv_heads_there, parent, monkeypatch):
    model, wanted = parent, 8
    if kv_heads_there < wanted:
        assert gqa(parent, "fewer", "--kv-heads", kv_heads_there, "--method", "mean")[0] == 0
        model = "fewer"
    monkeypatch.setattr(Loop, "run", lambda self: pytest.fail("it trains"))
    code, _, err = gqa(model, "out", "--kv-heads", wanted, *CALIBRATED)
    assert code == 0, err
    assert "the result computes what its parent computes; --distill has nothing to train" in err
    assert gqa(model, "plain", "--kv-heads", wanted)[0] == 0
    weights = [name for name in folder_hashes(Path("plain")) if name.endswith(".safetensors")]
    assert [folder_hashes(Path("out"))[name] for name in weights] == [folder_hashes(Path("plain"))[n] for n in weights]


def interrupted(monkeypatch, parent, step, *arguments):
    """Begin a conversion that stops before that step of the training."""
    real = Loop._step

    def stop(self, number, rate):
        if number == step:
            raise KeyboardInterrupt
        return real(self, number, rate)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_step", stop)
        assert gqa(parent, "out", "--kv-heads", 2, *arguments)[0] != 0
    assert Path("out.partial", "training").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--distill", 256), "distill tokens 128 there, 256 here"),
        (("--distill-rate", 0.001), "distill learning rate 0.0005 there, 0.001 here"),
        (("--distill-batch", 4), "distill batch 2 there, 4 here"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_an_unfinished_conversion_with_other_settings_is_left_alone(parent, monkeypatch, change, said):
    interrupted(monkeypatch, parent, 5, *CALIBRATED)
    err = refused(parent, "--kv-heads", 2, *CALIBRATED, *change, said=said)
    assert "another unfinished conversion" in err
    assert "rm -r out.partial" in err


def test_an_unfinished_conversion_with_a_distillation_is_no_other_without(parent, monkeypatch):
    interrupted(monkeypatch, parent, 5, *CALIBRATED)
    without = CALIBRATED[: CALIBRATED.index("--distill")]
    refused(parent, "--kv-heads", 2, *without, "--window", 16, said="distill tokens 128 there, not set here")


@pytest.mark.parametrize("damage", ["weights cut", "no weights", "trace cut"])
def test_a_damaged_checkpoint_is_named_and_the_way_on_works(parent, monkeypatch, damage):
    assert gqa(parent, "whole", "--kv-heads", 2, *CALIBRATED)[0] == 0
    interrupted(monkeypatch, parent, 5, *CALIBRATED)
    last = max(Path("out.partial", "training").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    file = last / "gqa_trace.json" if damage == "trace cut" else next(last.glob("*.safetensors"))
    if damage == "no weights":
        file.unlink()
        file = last / "gqa_trace.json"
    else:
        os.truncate(file, file.stat().st_size // 2)
    err = refused(parent, "--kv-heads", 2, *CALIBRATED, said="a checkpoint of the training is damaged")
    assert str(file) in err
    found = re.search(r"hint: rm -r (\S+)  and repeat the command", err)
    assert found, err
    shutil.rmtree(found[1])
    code, _, err = gqa(parent, "out", "--kv-heads", 2, *CALIBRATED)
    assert code == 0, err
    weights = [name for name in folder_hashes(Path("whole")) if name.endswith(".safetensors")]
    assert [folder_hashes(Path("out"))[n] for n in weights] == [folder_hashes(Path("whole"))[n] for n in weights]
    assert not Path("out.partial").exists()
