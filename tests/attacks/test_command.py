"""Attacks as a user meets them at the command line: exit code 2, one error on stderr, nothing else."""

import contextlib
import io
import os

import pytest
from helpers.attacks import everything
from helpers.checkpoints import tiny_config, tiny_tensors, write_checkpoint

from gqa.cli.main import main
from gqa.weights.reader import INDEX


def cut(folder):
    os.truncate(folder / "model-00001-of-00002.safetensors", 5000)


def lead_out(folder):
    shard = folder / "model-00001-of-00002.safetensors"
    shard.rename(folder.parent / "secret")
    shard.symlink_to(folder.parent / "secret")


def name_a_file_above(folder):
    text = (folder / INDEX).read_text().replace("model-00002-of-00002", "../model-00002-of-00002")
    (folder / INDEX).write_text(text)


def quantise(folder):
    (folder / "quantize_config.json").write_text("{}")


def pipe(folder):
    os.mkfifo(folder / "tokenizer.json")


def pickles_only(folder):
    for path in folder.glob("*.safetensors*"):
        path.rename(path.with_suffix(".bin"))


ATTACKS = {
    cut: "is truncated",
    lead_out: "a link out of the model folder",
    name_a_file_above: "may not name",
    quantise: "a quantised checkpoint",
    pipe: "not an ordinary file",
    pickles_only: "a pickle checkpoint is not opened",
}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
@pytest.mark.parametrize("more", [(), ("--dry-run",), ("--json",)], ids=["run", "plan", "json"])
def test_command(tmp_path, attack, more):
    config = tiny_config()
    folder = write_checkpoint(tmp_path / "m", config, tensors=tiny_tensors(config), shards=2)
    attack(folder)
    before = everything(tmp_path)
    out, err = io.StringIO(), io.StringIO()
    arguments = ["convert", str(folder), str(tmp_path / "out"), "--kv-heads", "2", "--method", "mean", *more]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as left:
        main(arguments)
    assert (left.value.code, out.getvalue()) == (2, "")
    lines = err.getvalue().splitlines()
    assert lines[0].startswith("error: ")
    assert ATTACKS[attack] in lines[0]
    assert len(lines) <= 4
    assert everything(tmp_path) == before
