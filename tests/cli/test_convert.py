"""`gqa convert` as a user meets it: exit codes, streams, JSON, a plan that writes nothing."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import folder_hashes, tiny_config, write_checkpoint
from helpers.talker import talker, word_tokenizer
from helpers.tokenized import WORDS, write_tokenized

from gqa.cli.main import main


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A tiny model folder with a tokenizer. Tests convert it and never write to it."""
    return write_tokenized(tmp_path_factory.mktemp("model") / "parent", shards=2)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def gqa(*arguments):
    """Run the command line in this process: (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as left:
        main(["convert", *map(str, arguments)])
    return left.value.code, out.getvalue(), err.getvalue()


def test_help_begins_with_examples_and_loads_no_torch():
    code, out, _ = gqa("--help")
    assert code == 0
    assert out.startswith("Examples:\n  gqa convert ")
    script = (
        "import sys; sys.argv = ['gqa', 'convert', '--help']\n"
        "from gqa.cli.main import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_without_text(parent):
    code, out, err = gqa(parent, "out", "--kv-heads", 2)
    assert code == 0
    assert "12 of 30 tensors changed" in out
    assert "KV heads" in out
    assert "--calibrate" in err
    assert "next: gqa eval out --text FILE" in err
    assert Path("out", "model.safetensors.index.json").exists()


def test_calibrated_and_refined_then_done_already(parent):
    Path("text.txt").write_text(WORDS * 100)
    arguments = (parent, "out", "--kv-heads", 4, "--calibrate", "text.txt", "--calibration-tokens", 128)
    arguments += ("--window", 32, "--refine", 64, "--refine-steps", 2)
    code, out, err = gqa(*arguments, "--json")
    assert code == 0, err
    record = json.loads(out)
    results = record["results"]
    assert record["command"] == "convert"
    assert results["recipe"]["calibration_tokens"] == 128
    assert results["recipe"]["refine_tokens"] == 64
    assert results["recipe"]["refit"]
    assert [layer["layer"] for layer in results["layers"]] == [0, 1, 2]
    assert all(0 <= layer["output_error"] <= layer["closed_form_error"] < 1 for layer in results["layers"])
    assert all(0 < layer["hidden_error"] < 1 for layer in results["layers"])
    assert results["measured"]["tokens"] == results["recipe"]["measure_tokens"] // 32 * 31 > 0
    assert results["kv_bytes_per_token"] * 2 == results["kv_bytes_per_token_parent"]
    before = folder_hashes(Path("out"))
    code, out, _ = gqa(*arguments)
    assert code == 0
    assert "was converted already" in out
    assert "hidden states on the calibration text are off" in out
    assert "tokens of the text that no fit has seen (measured): " in out
    assert folder_hashes(Path("out")) == before


def test_the_cards_command_gives_the_same_conversion(parent):
    Path("text.txt").write_text(WORDS * 20)  # fewer tokens than the default wants
    code, _, err = gqa(parent, "out", "--kv-heads", 2, "--calibrate", "text.txt", "--window", 16, "--no-refit")
    assert code == 0, err
    assert "fewer than the 40960 asked for" in err
    line = next(line for line in Path("out", "README.md").read_text().splitlines() if line.startswith("gqa convert"))
    words = line.split()
    assert words[2:4] == ["parent", "out"]
    Path("again").mkdir()
    code, _, err = gqa(parent, "again/out", *words[4:])
    assert code == 0, err
    assert folder_hashes(Path("out")) == folder_hashes(Path("again", "out"))


def test_the_fewest_heads_within_a_budget(parent, monkeypatch):
    Path("text.txt").write_text(WORDS * 100)
    arguments = ("--kv-heads", "auto", "--calibrate", "text.txt", "--calibration-tokens", 128, "--window", 32)
    with monkeypatch.context() as patch:  # a random parent may be worse than its children
        patch.setattr("gqa.cli.convert.parse_share", lambda text: -0.9)
        code, out, err = gqa(parent, "none", *arguments, "--budget", "2%")
        assert gqa(parent, "four", "--kv-heads", 4, *arguments[2:], "--budget", "2%")[0] == 1
    assert code == 1
    assert "no: nothing stays within" in err
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["1", "2", "4"]
    assert [path.name for path in Path().iterdir()] == ["text.txt"]
    code, out, err = gqa(parent, "out", *arguments, "--budget", "10000%", "--json")
    assert code == 0, err
    record = json.loads(out)
    assert record["inputs"]["recipe"]["kv_heads"] == record["results"]["kv_heads"] == 1
    assert record["results"]["within_budget"]
    assert record["results"]["tried"] == []
    assert {path.name for path in Path().iterdir()} == {"text.txt", "out"}


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A tiny model that can write text of its own, questions and answers."""
    folder = tmp_path_factory.mktemp("writer") / "parent"
    talker(4, dtype=torch.float32).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def test_distilled_on_text_that_the_parent_writes(writer, monkeypatch, tmp_path):
    monkeypatch.setenv("GQA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 90 + 4}" for i in range(2000)))
    arguments = [writer, "out", "--kv-heads", 2, "--calibrate", "text.txt", "--calibrate", "self", "--window", 16]
    arguments += ["--calibration-tokens", 256, "--measure", 64, "--answers", 3]
    arguments += ["--distill", 512, "--distill-window", 16]
    code, out, err = gqa(*arguments)
    assert code == 0, err
    assert "-> distilled " in out
    assert "answers to 3 prompts that the parent wrote (greedy, measured)" in out
    report = json.loads((tmp_path / "out" / "gqa-conversion.json").read_text())["report"]
    assert report["distillation"]["tokens"] == 512
    assert report["answers"]["prompts"] == 3
    assert any((tmp_path / "cache").glob("own-text-*"))
    before = folder_hashes(tmp_path / "out")
    code, out, _ = gqa(*arguments)
    assert code == 0
    assert "was converted already" in out
    assert folder_hashes(tmp_path / "out") == before
    card = (tmp_path / "out" / "README.md").read_text()
    assert "512 tokens in 16 steps" in card
    assert "greedy answers to 3 prompts" in card


def test_a_distillation_without_text_is_refused(writer):
    code, _, err = gqa(writer, "out", "--kv-heads", 2, "--distill", "1k")
    assert code == 2
    assert "a distillation reads text" in err
    assert not Path("out").exists()


def test_dry_run_prints_the_plan_and_writes_nothing(parent):
    before = folder_hashes(parent)
    code, out, _ = gqa(parent, "out", "--kv-heads", 2, "--dry-run")
    assert code == 0
    assert "a plan; nothing is written" in out
    code, text, _ = gqa(parent, "out", "--kv-heads", 2, "--method", "mean", "--dry-run", "--json")
    plan = json.loads(text)["results"]
    assert code == 0
    assert list(Path().iterdir()) == []
    assert folder_hashes(parent) == before
    assert [layer["kv_heads"] for layer in plan["layers"]] == [2, 2, 2]
    code, _, _ = gqa(parent, "out", "--kv-heads", 2, "--method", "mean")
    assert code == 0
    written = {path.name: path.stat().st_size for path in Path("out").glob("*.safetensors")}
    assert plan["shards"] == written
    assert plan["bytes"] == sum(written.values())
    assert plan["tensors_copied"] == 30 - 6


def test_as_many_heads_as_there_are(parent):
    code, out, err = gqa(parent, "out", "--kv-heads", 8)
    assert code == 0
    assert "0 of 30 tensors changed" in out
    assert "every tensor is copied" in err


def test_the_error_of_the_style_guide(tmp_path):
    write_checkpoint(tmp_path / "m", tiny_config(num_attention_heads=32, num_key_value_heads=32, head_dim=4))
    code, out, err = gqa("m", "out", "--kv-heads", 12)
    assert (code, out) == (2, "")
    assert err == (
        "error: 12 KV heads do not divide 32 query heads\n"
        "allowed: 1, 2, 4, 8, 16, 32\n"
        "hint: gqa convert <the same arguments> --kv-heads 8\n"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--kv-heads", 3), "3 KV heads do not divide 8 query heads"),
        (("--kv-heads", 16), "16 KV heads are more than the 8 query heads"),
        (("--kv-heads", 0), "kv heads out of range"),
        (("--kv-heads", "two"), "got: 'two'\nallowed: a number, or auto"),
        (("--kv-heads", "auto"), "a budget of loss is measured on text, and there is none"),
        (("--kv-heads", 2, "--budget", "0.02"), "a budget of loss is measured on text, and there is none"),
        (("--kv-heads", 2, "--budget", "some"), "a share is not understood"),
        ((), "Missing option '--kv-heads'"),
        (("--kv-heads", 2, "--method", "median"), "'median' is not one of"),
        (("--kv-heads", 2, "--refine", "1k"), "and there is none"),
        (("--kv-heads", 2, "--refit"), "and there is none"),
        (("--kv-heads", 2, "--calibrate", "gone.txt"), "gone.txt"),
        (("--kv-heads", 2, "--calibrate", "empty.txt"), "empty"),
        (("--kv-heads", 2, "--calibrate", "binary.txt"), "binary"),
        (("--kv-heads", 2, "--calibrate", "short.txt"), "shorter than one window of 256 tokens"),
        (("--kv-heads", 2, "--calibrate", "short.txt", "--calibration-tokens", "many"), "token count"),
        (("--kv-heads", 2, "--calibrate", "short.txt", "--window", 1), "window out of range"),
        (("--kv-heads", 2, "--calibrate", "short.txt", "--calibration-tokens", 100), "fewer than one window"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_bad_arguments(parent, arguments, said):
    Path("empty.txt").write_text(" \n")
    Path("binary.txt").write_bytes(b"\x00\x01\xff" * 100)
    Path("short.txt").write_text(WORDS)
    before = folder_hashes(Path()), folder_hashes(parent)
    code, out, err = gqa(parent, "out", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert said in err
    assert "Traceback" not in err
    assert (folder_hashes(Path()), folder_hashes(parent)) == before
    assert {path.name for path in Path().iterdir()} == {"empty.txt", "binary.txt", "short.txt"}


@pytest.mark.parametrize(
    ("model", "said"),
    [("./nowhere", "nowhere"), ("llama-3-70b", "without weights"), ("empty", "config.json")],
)
def test_models_that_are_not_there(model, said):
    Path("empty").mkdir()
    code, out, err = gqa(model, "out", "--kv-heads", 2)
    assert (code, out) == (2, "")
    assert said in err
    assert not Path("out").exists()


def test_a_hub_id_without_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, out, err = gqa("someone/some-model", "out", "--kv-heads", 2)
    assert (code, out) == (2, "")
    assert "the model hub cannot be reached" in err
    assert list(Path().iterdir()) == []


def test_out_exists(parent):
    Path("out").mkdir()
    code, out, err = gqa(parent, "out", "--kv-heads", 2)
    assert (code, out) == (2, "")
    assert "OUT exists and is not this conversion's" in err
    assert list(Path("out").iterdir()) == []
