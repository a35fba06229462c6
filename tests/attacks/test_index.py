"""An index of shards that is nonsense, leads elsewhere, or disagrees with its shards."""

import json
import shutil

import pytest
import torch
from helpers.attacks import refused
from helpers.checkpoints import write_checkpoint
from safetensors.torch import load_file, save_file

from gqa.errors import GqaError
from gqa.weights.reader import INDEX, Checkpoint

SHARD = "model-00002-of-00003.safetensors"
FIRST = "model-00001-of-00003.safetensors"


def edit(folder, **changes):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))


def write(content):
    return lambda folder: (folder / INDEX).write_bytes(content)


def place(file):
    return lambda folder: edit(folder, x=file)


def a_tensor_in_two_shards(folder):
    save_file({"model.norm.weight": torch.ones(64)}, folder / "extra.safetensors")
    edit(folder, other="extra.safetensors")


def a_shard_twice(folder):
    shutil.copy(folder / SHARD, folder / "again.safetensors")
    edit(folder, **dict.fromkeys(list(load_file(folder / SHARD))[1:], "again.safetensors"))


def a_tensor_that_is_not_named(folder):
    save_file({**load_file(folder / SHARD), "model.extra": torch.ones(2)}, folder / SHARD)


def a_key_twice(folder):
    (folder / INDEX).write_text(f'{{"weight_map": {{"a": "{FIRST}", "a": "{SHARD}"}}}}')


ATTACKS = {
    "not JSON": (write(b"{"), "not an index"),
    "empty": (write(b""), "not an index"),
    "not UTF-8": (write(b'{"weight_map": {"\xff": "x"}}'), "not an index"),
    "deeply nested": (write(b"[" * 100_000), "not an index"),
    "a huge number": (write(b'{"weight_map": %b}' % (b"9" * 5000)), "not an index"),
    "a list": (write(b"[]"), "not an index"),
    "no map": (write(b"{}"), "not an index"),
    "the map is a list": (write(b'{"weight_map": [["a", "b.safetensors"]]}'), "not an index"),
    "the map is empty": (write(b'{"weight_map": {}}'), "names no tensor"),
    "a tensor twice": (a_key_twice, "'a' twice"),
    "a file above": (place("../secret.safetensors"), "may not name"),
    "a file below": (place("sub/x.safetensors"), "may not name"),
    "an absolute path": (place("/etc/passwd.safetensors"), "may not name"),
    "nothing but an ending": (place("sub/.safetensors"), "may not name"),
    "a pickle": (place("pytorch_model.bin"), "may not name"),
    "a file without a name": (place(""), "may not name"),
    "a number as file": (place(3), "may not name"),
    "a list as file": (place(["a.safetensors"]), "may not name"),
    "a NUL in a name": (place("a\0.safetensors"), "may not name"),
    "half a character in a name": (place("\ud800.safetensors"), "may not name"),
    "colours in a name": (place("\x1b[31m.safetensors"), "may not name"),
    "a name that no disk takes": (place("x" * 300 + ".safetensors"), "may not name"),
    "a tensor of two lines": (lambda folder: edit(folder, **{"a\nerror: b": SHARD}), "a tensor named"),
    "a shard that is missing": (lambda folder: (folder / SHARD).unlink(), f"missing\ngot: {SHARD}"),
    "a file that is missing": (place("model-00004-of-00003.safetensors"), "is missing"),
    "a name that no shard has": (place(SHARD), "tensor x is not where"),
    "a name that is in another shard": (lambda f: edit(f, **{"lm_head.weight": SHARD}), "lm_head.weight is not where"),
    "a tensor that the index does not name": (a_tensor_that_is_not_named, "does not name\ngot: model.extra"),
    "a tensor in two shards": (a_tensor_in_two_shards, "model.norm.weight is in two shards"),
    "a shard twice": (a_shard_twice, "is in two shards"),
    "no index": (lambda folder: (folder / INDEX).unlink(), "without weights"),
    "a folder as index": (lambda f: ((f / INDEX).unlink(), (f / INDEX).mkdir()), "not an ordinary file"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_index(tmp_path, name):
    folder = write_checkpoint(tmp_path / "m", shards=3)
    damage, said = ATTACKS[name]
    damage(folder)
    refused(folder, tmp_path / "out", said)


@pytest.mark.parametrize("name", [INDEX, "config.json"])
def test_a_text_larger_than_any_is_not_read(tmp_path, name):
    folder = write_checkpoint(tmp_path / "m", shards=3)
    with (folder / name).open("r+b") as stream:
        stream.truncate(1 << 34)  # of holes: it takes no space on the disk
    with pytest.raises(GqaError, match="more than 100000000 bytes"):
        Checkpoint(folder)


def test_what_the_index_says_beside_the_map_is_of_no_weight(tmp_path):
    folder = write_checkpoint(tmp_path / "m", shards=3)
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, "metadata": {"total_size": -1}, "more": [None]}))
    assert len(Checkpoint(folder).shards) == 3
